"""What the learned policy has to beat: other ways to choose regions, and classifiers without a choice.

All choosers use the same features, the same classifier and the same updates as the policy.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rlogist.batched import Chooser, State
from rlogist.modules import GatedScores, Modules, Policy, normalized

Strategy = Literal["policy", "random", "greedy-static", "greedy-adaptive"]
STRATEGIES: tuple[Strategy, ...] = ("policy", "random", "greedy-static", "greedy-adaptive")


def chooser_of(strategy: Strategy, modules: Modules, policy: Policy | None = None, seed: int = 0) -> Chooser:
    """How a strategy scores regions.

    | strategy | looks at |
    | --- | --- |
    | `policy` | the region that the trained policy prefers |
    | `random` | any region, all alike |
    | `greedy-static` | the regions with the most attention of the classifier on the scan |
    | `greedy-adaptive` | the region with the most attention of the classifier on the state so far |

    Args:
        strategy: As above.
        modules: For the classifier.
        policy: For `policy`.
        seed: For `random`.
    """
    if strategy == "policy":
        if policy is None:
            raise ValueError("the strategy policy needs a policy")
        trained = policy.eval()
        return lambda state: trained(state.states, state.observed)
    if strategy == "random":
        return random_chooser(seed)

    def attention(state: State) -> Float[Tensor, "batch regions"]:
        rows = state.states if strategy == "greedy-adaptive" else state.start
        if rows is None:
            raise ValueError("greedy-static needs the start of a reading")
        return modules.classifier.explain(rows, state.valid)[1]

    return attention


def random_chooser(seed: int) -> Chooser:
    """Scores that are random numbers: looks anywhere with the same probability."""
    generator = torch.Generator().manual_seed(seed)
    return lambda state: torch.rand(state.allowed.shape, generator=generator)


class PooledClassifier(nn.Module):
    """A plain multiple-instance classifier of all regions: ReLU(W v), pooled, then a linear layer.

    Args:
        dim: Dimension of features.
        classes: How many.
        pooling: `mean`, `max` (the most of each dimension), or `abmil` (softmax gated attention).
        width: Of the layer before pooling.
    """

    def __init__(
        self, dim: int, classes: int, pooling: Literal["mean", "max", "abmil"], width: int = 64
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.embed, self.head = nn.Linear(dim, width), nn.Linear(width, classes)
        self.scores = GatedScores(width, width) if pooling == "abmil" else None

    def forward(
        self, rows: Float[Tensor, "batch regions dim"], valid: Bool[Tensor, "batch regions"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits of each slide."""
        h = torch.relu(self.embed(rows))
        if self.pooling == "max":  # ReLU is at least 0, so padding of -1 never wins
            return self.head(h.masked_fill(~valid.unsqueeze(-1), -1).amax(dim=1))
        if self.scores is None:
            weights = valid / valid.sum(dim=-1, keepdim=True)
        else:
            weights = normalized(self.scores(h), valid, "softmax")
        return self.head((weights.unsqueeze(-1) * h).sum(dim=1))
