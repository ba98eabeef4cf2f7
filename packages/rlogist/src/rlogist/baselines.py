"""What the learned policy has to beat: other ways to choose regions.

All choosers use the same features, the same classifier and the same updates as the policy.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlogist.batched import Chooser, State
from rlogist.modules import Modules, Policy

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
    return lambda state: torch.rand(state.allowed.shape, generator=generator).to(state.allowed.device)
