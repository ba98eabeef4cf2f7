"""The networks of the method: f_local, f_global, classifier, policy and critic (the paper's section 3).

All of them take any number of regions. Batches of slides with different numbers are padded, and a mask says
which rows are regions; padded rows never change a result. `Modules` holds what the environment is made of
(f_local, f_global, classifier), `Policy` and `Critic` what reinforcement learning trains.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from shared_core import InputError

Attention = Literal["softmax", "sigmoid_norm"]
Pooling = Literal["gated", "mean"]
Update = Literal["global", "targeted", "none"]

NEVER = -1e9
"""Logit of an action that must not be taken: its probability is exactly 0 in float32 after softmax."""


class GatedScores(nn.Module):
    """Gated attention before normalization, w^T(tanh(V x) * sigmoid(U x)) (Ilse et al. 2018, eq. 9)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.value, self.gate, self.score = (
            nn.Linear(dim, hidden),
            nn.Linear(dim, hidden),
            nn.Linear(hidden, 1),
        )

    def forward(self, rows: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """One number for each row."""
        return self.score(torch.tanh(self.value(rows)) * torch.sigmoid(self.gate(rows))).squeeze(-1)


class LocalPooling(nn.Module):
    """f_local: K deep patches of a region become one vector of the same dimension.

    Args:
        dim: Dimension of features.
        hidden: Of the gated attention.
        pooling: `gated`, v = sum_k a_k u_k with a = softmax of `GatedScores`; or `mean`.
    """

    def __init__(self, dim: int, hidden: int = 256, pooling: Pooling = "gated") -> None:
        super().__init__()
        self.scores = GatedScores(dim, hidden) if pooling == "gated" else None

    def forward(self, deep: Float[Tensor, "*batch patches dim"]) -> Float[Tensor, "*batch dim"]:
        """V of each region from its U."""
        if self.scores is None:
            return deep.mean(dim=-2)
        return (torch.softmax(self.scores(deep), dim=-1).unsqueeze(-1) * deep).sum(dim=-2)


class GlobalUpdate(nn.Module):
    """f_global: what a deep look at region a says about another region i; shared over regions.

    s_i + MLP(s_i, s_a, v_a), an MLP 3d -> 2d -> d whose last layer starts at zero: untrained it changes
    nothing, and many updates in a row stay stable. The paper's code does not have it; the order of the
    arguments and the residual form are this package's (the released follow-up has both orders, no residual).

    Args:
        dim: Dimension of features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden, self.change = nn.Linear(3 * dim, 2 * dim), nn.Linear(2 * dim, dim)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(
        self,
        states: Float[Tensor, "batch regions dim"],
        before: Float[Tensor, "batch dim"],
        after: Float[Tensor, "batch dim"],
    ) -> Float[Tensor, "batch regions dim"]:
        """The rows after a look at a region whose row was `before` (s_a) and is `after` (v_a)."""
        dim = states.shape[-1]
        own, looked = self.hidden.weight[:, :dim], self.hidden.weight[:, dim:]
        # The layer on [s_i, s_a, v_a], without repeating s_a and v_a in every row.
        shared = torch.cat([before, after], dim=-1) @ looked.T + self.hidden.bias
        return states + self.change(nn.functional.gelu(states @ own.T + shared.unsqueeze(-2)))


class Classifier(nn.Module):
    """Attention-based multiple-instance classifier of a slide from its rows (a changed CLAM_SB).

    h = ReLU(W s), attention A, logits = sum_i A_i (W_c h_i + b_c).

    Args:
        dim: Dimension of features.
        classes: How many.
        width: Of h.
        hidden: Of the gated attention.
        attention: `softmax`; or `sigmoid_norm`, A_i = sigmoid(a_i) / sum_j sigmoid(a_j), the released form.
        dropout: Share of h that training sets to zero.
    """

    def __init__(
        self,
        dim: int,
        classes: int = 2,
        width: int = 512,
        hidden: int = 256,
        attention: Attention = "sigmoid_norm",
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        self.attention: Attention = attention
        self.embed = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Dropout(dropout))
        self.scores, self.head = GatedScores(width, hidden), nn.Linear(width, classes)

    def forward(
        self, rows: Float[Tensor, "batch regions dim"], valid: Bool[Tensor, "batch regions"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits of each slide; rows where `valid` is false do not count."""
        return self.explain(rows, valid)[0]

    def explain(
        self, rows: Float[Tensor, "batch regions dim"], valid: Bool[Tensor, "batch regions"]
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch regions"]]:
        """Logits, and the attention A (adding up to 1 over a slide's regions, 0 in padding)."""
        h = self.embed(rows)
        attention = normalized(self.scores(h), valid, self.attention)
        # The head is affine and A adds up to 1: the head of the mean is the mean of heads.
        return self.head((attention.unsqueeze(-1) * h).sum(dim=-2)), attention

    def instances(self, rows: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch classes"]:
        """Logits of single regions, W_c h_i + b_c."""
        return self.head(self.embed(rows))


def normalized(
    scores: Float[Tensor, "batch regions"], valid: Bool[Tensor, "batch regions"], attention: Attention
) -> Float[Tensor, "batch regions"]:
    """Scores as shares that add up to 1 over valid rows."""
    if attention == "softmax":
        return torch.softmax(scores.masked_fill(~valid, NEVER), dim=-1)
    weights = torch.sigmoid(scores) * valid
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-12)


class Policy(nn.Module):
    """One scorer for every region, [s_i, m_i] -> 64 -> 64 -> 1: permuting regions permutes the scores.

    The released code flattens all regions into one vector, which fixes their number and, in its batch of
    environments, would choose an environment. A scorer a region is the reading that works.

    Args:
        dim: Dimension of features.
        hidden: Width of both layers.
    """

    def __init__(self, dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _orthogonal(nn.Linear(dim + 1, hidden), math.sqrt(2)),
            nn.Tanh(),
            _orthogonal(nn.Linear(hidden, hidden), math.sqrt(2)),
            nn.Tanh(),
            _orthogonal(nn.Linear(hidden, 1), 0.01),
        )

    def forward(
        self, states: Float[Tensor, "batch regions dim"], observed: Bool[Tensor, "batch regions"]
    ) -> Float[Tensor, "batch regions"]:
        """Scores of all rows; `masked` rules out those that may not be chosen."""
        return self.layers(_with_flag(states, observed)).squeeze(-1)


class Critic(nn.Module):
    """Value of a state: gated-attention pool and mean of [s_i, m_i], then 64 -> 1. Invariant to the order.

    Args:
        dim: Dimension of features.
        hidden: Width.
    """

    def __init__(self, dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.embed = _orthogonal(nn.Linear(dim + 1, hidden), math.sqrt(2))
        self.scores = GatedScores(hidden, hidden)
        self.layers = nn.Sequential(
            _orthogonal(nn.Linear(2 * hidden, hidden), math.sqrt(2)),
            nn.Tanh(),
            _orthogonal(nn.Linear(hidden, 1), 1.0),
        )

    def forward(
        self,
        states: Float[Tensor, "batch regions dim"],
        observed: Bool[Tensor, "batch regions"],
        valid: Bool[Tensor, "batch regions"],
    ) -> Float[Tensor, " batch"]:
        """Value of each state; rows where `valid` is false do not count."""
        h = torch.tanh(self.embed(_with_flag(states, observed)))
        attention = normalized(self.scores(h), valid, "softmax").unsqueeze(-1)
        share = (valid / valid.sum(dim=-1, keepdim=True)).unsqueeze(-1)
        return self.layers(torch.cat([(attention * h).sum(-2), (share * h).sum(-2)], dim=-1)).squeeze(-1)


def masked(
    scores: Float[Tensor, "batch regions"], allowed: Bool[Tensor, "batch regions"]
) -> Float[Tensor, "batch regions"]:
    """Scores as logits over regions, those not allowed at a probability of exactly 0."""
    return scores.masked_fill(~allowed, NEVER)


@dataclass(frozen=True)
class Architecture:
    """Sizes and forms of the networks.

    Args:
        dim: Dimension of features.
        classes: Of slides.
        width: Of the classifier.
        hidden: Of its gated attention, and of f_local's.
        attention: Of the classifier.
        pooling: Of f_local.
        dropout: Of the classifier.
        policy_hidden: Of policy and critic.
        center: Whether the mean of a slide's scan features is taken from all its features, scan and
            deep, which removes much of its stain. It needs no deep pixel. Not in the paper.
        whiten: 0 standardizes each feature by itself; above 0 also turns correlated features into
            uncorrelated ones of unit variance, this much added to each variance first. Not in the paper;
            for features as correlated as statistics of colour are.
    """

    dim: int
    classes: int = 2
    width: int = 512
    hidden: int = 256
    attention: Attention = "sigmoid_norm"
    pooling: Pooling = "gated"
    dropout: float = 0.25
    policy_hidden: int = 64
    center: bool = True
    whiten: float = 0.0

    def __post_init__(self) -> None:
        if not self.whiten >= 0:
            raise InputError("expected 0 or more", field="whiten", value=self.whiten)
        if self.dim < 1 or self.classes < 2:
            raise InputError(f"expected dim >= 1 and classes >= 2, got {self.dim} and {self.classes}")
        for name, kind in (("attention", Attention), ("pooling", Pooling)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(
                    f"expected one of {', '.join(get_args(kind))}", field=name, value=getattr(self, name)
                )

    def to_dict(self) -> dict[str, int | float | str]:
        """As JSON has it."""
        return asdict(self)


class Modules(nn.Module):
    """Everything that turns pixels' features into states and states into a slide's class.

    Features are standardized first: less the slide's scan mean (`Architecture.center`), then by the training
    slides' mean and spread (or covariance) of deep features. It is the same affine map for a slide's scan and
    deep features.

    Args:
        architecture: Sizes and forms.
        generator: Where initial weights come from; torch's global one where None.
    """

    mean: Tensor
    transform: Tensor

    def __init__(self, architecture: Architecture, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.architecture = a = architecture
        with seeded(generator):
            self.f_local = LocalPooling(a.dim, a.hidden, a.pooling)
            self.f_global = GlobalUpdate(a.dim)
            self.classifier = Classifier(a.dim, a.classes, a.width, a.hidden, a.attention, a.dropout)
        self.register_buffer("mean", torch.zeros(a.dim))
        self.register_buffer("transform", torch.eye(a.dim))

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.mean.device

    def centre(self, scan: Float[Tensor, "regions dim"]) -> Float[Tensor, " dim"]:
        """What is taken from all features of a slide: the mean of its scan, or nothing."""
        return scan.mean(dim=0) if self.architecture.center else torch.zeros_like(scan[0])

    def standardize(
        self, features: Float[Tensor, "*batch dim"], centre: Float[Tensor, " dim"]
    ) -> Float[Tensor, "*batch dim"]:
        """Features of a slide in the training slides' units.

        Args:
            features: Scan or deep features.
            centre: The slide's `centre`.
        """
        return (features - centre - self.mean) @ self.transform


@contextmanager
def seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Inside, torch's global generators start from `generator`; afterwards they are as they were before."""
    gpus = (
        range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    )  # dropout there has its own
    with torch.random.fork_rng(devices=gpus, enabled=generator is not None):
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def _with_flag(
    states: Float[Tensor, "batch regions dim"], observed: Bool[Tensor, "batch regions"]
) -> Float[Tensor, "batch regions dim_and_1"]:
    return torch.cat([states, observed.unsqueeze(-1).to(states.dtype)], dim=-1)


def _orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
