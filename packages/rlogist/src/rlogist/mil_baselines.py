"""Multiple-instance classifiers that see all regions at depth: what a reading is measured against.

CLAM's single branch is `modules.Classifier`; TransMIL is not here (torchmil has it, for the same features).
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rlogist.batched import FeatureStore
from rlogist.modules import NEVER, GatedScores, normalized, seeded
from rlogist.stage import derived_generator

MilPooling = Literal["mean", "max", "abmil", "dsmil"]
MIL_POOLINGS: tuple[MilPooling, ...] = get_args(MilPooling)


class PooledClassifier(nn.Module):
    """A classifier of a slide from h_i = ReLU(W v_i) of all its regions.

    | pooling | logits |
    | --- | --- |
    | `mean`, `max` | a linear layer on the mean, or on the largest value of each dimension |
    | `abmil` | a linear layer on the mean weighted by gated attention (Ilse et al. 2018) |
    | `dsmil` | Li et al. 2021: for each class the region m with the highest score; half that score, half a |
    |         | linear layer on the mean weighted by softmax_i of <q_i, q_m> / sqrt(width) |

    Args:
        dim: Dimension of features.
        classes: How many.
        pooling: As above.
        width: Of h.
    """

    def __init__(self, dim: int, classes: int, pooling: MilPooling, width: int = 64) -> None:
        super().__init__()
        self.pooling: MilPooling = pooling
        self.embed, self.head = nn.Linear(dim, width), nn.Linear(width, classes)
        self.scores = GatedScores(width, width) if pooling == "abmil" else None
        dual = pooling == "dsmil"
        self.query = nn.Linear(width, width) if dual else None
        self.instance = nn.Linear(width, classes) if dual else None

    def forward(
        self, rows: Float[Tensor, "batch regions dim"], valid: Bool[Tensor, "batch regions"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits of each slide; rows where `valid` is false do not count."""
        h = torch.relu(self.embed(rows))
        if self.instance is not None and self.query is not None:
            return self._two_streams(h, valid, self.instance(h), self.query(h))
        if self.pooling == "max":  # ReLU is at least 0, so padding of -1 never wins
            return self.head(h.masked_fill(~valid.unsqueeze(-1), -1).amax(dim=1))
        if self.scores is None:
            weights = valid / valid.sum(dim=-1, keepdim=True)
        else:
            weights = normalized(self.scores(h), valid, "softmax")
        return self.head((weights.unsqueeze(-1) * h).sum(dim=1))

    def _two_streams(
        self,
        h: Float[Tensor, "batch regions width"],
        valid: Bool[Tensor, "batch regions"],
        single: Float[Tensor, "batch regions classes"],
        query: Float[Tensor, "batch regions width"],
    ) -> Float[Tensor, "batch classes"]:
        highest, where = single.masked_fill(~valid.unsqueeze(-1), NEVER).max(dim=1)
        critical = query.gather(1, where.unsqueeze(-1).expand(-1, -1, query.shape[-1]))
        alike = torch.einsum("brw,bcw->brc", query, critical) / math.sqrt(query.shape[-1])
        weights = alike.masked_fill(~valid.unsqueeze(-1), NEVER).softmax(dim=1)
        embedded = torch.einsum("brc,brw->bcw", weights, h)
        return (highest + (embedded * self.head.weight).sum(-1) + self.head.bias) / 2


def fit_pooled(
    pooling: MilPooling,
    store: FeatureStore,
    validation: FeatureStore | None,
    *,
    classes: int,
    seed: int,
    epochs: int = 100,
    lr: float = 1e-3,
    weight_decay: float = 3e-3,
    keep: float = 0.5,
    width: int = 64,
) -> PooledClassifier:
    """Train a `PooledClassifier` on V of training slides.

    Args:
        pooling: Its form.
        store: Training slides.
        validation: The epoch with the least cross-entropy here is kept; the last where None.
        classes: How many.
        seed: Of weights, batches and regions.
        epochs: Passes over the slides, 8 a step.
        lr: Adam's.
        weight_decay: Adam's.
        keep: Share of regions that a step sees, drawn anew each time.
        width: Of the hidden layer.
    """
    generator = derived_generator(seed, 5, MIL_POOLINGS.index(pooling))
    with seeded(generator):
        model = PooledClassifier(store.seen.shape[-1], classes, pooling, width).to(store.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    best, kept = float("inf"), model.state_dict()
    for _ in range(epochs):
        for slides in torch.randperm(len(store), generator=generator).split(8):
            part = store.part(slides)
            drawn = part.valid & (torch.rand(part.valid.shape, generator=generator) < keep).to(store.device)
            drawn[:, 0] |= ~drawn.any(dim=1)  # a slide is never empty
            loss = cross_entropy(model(part.seen, drawn), part.label)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if validation is not None:
            with torch.no_grad():
                found = float(cross_entropy(model(validation.seen, validation.valid), validation.label))
            if found < best:
                best, kept = found, {key: value.clone() for key, value in model.state_dict().items()}
    if validation is not None:
        model.load_state_dict(kept)
    return model.eval()
