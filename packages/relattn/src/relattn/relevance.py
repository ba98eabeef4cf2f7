"""The relevance distribution over the source: how much each token has to do with what the reader asked for.

First as pure functions on tensors, then the objects that hold its settings:

    S = E K^T,  s_j = mean over control tokens of S_ij,  s <- s * g,  a_rel = softmax(s / temperature)

where E holds rows of the encoder's embedding table for the control's tokens, and K the encoder's *input*
representation of the source, `hidden_states[0]`. Relevance is lexical therefore, not contextual. Every step
looks at real tokens only: the result for a document does not depend on what else is in its batch. (The
released code divides by the longest control of the batch and smooths pad scores into the last real tokens;
at batch size 1 it agrees with this one.)

Xiao, Miculicich, Liu, He, Carenini: "Attend to the Right Context", arXiv 2212.10819.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from shared_core import InputError

Temperature = float | int | Literal["auto"]


def similarity_scores(
    control: Float[Tensor, "batch controls width"], source: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "batch controls tokens"]:
    """S = E K^T in float32: dot products of raw vectors, without 1/sqrt(width) and without a norm."""
    return torch.einsum("bkd,bnd->bkn", control.float(), source.float())


def mean_over_control(
    scores: Float[Tensor, "batch controls tokens"],
    control_mask: Bool[Tensor, "batch controls"],
    factors: Float[Tensor, "batch controls"] | None = None,
) -> Float[Tensor, "batch tokens"]:
    """s_j = mean_i S_ij over the real control tokens, each score first multiplied by its token's factor.

    Args:
        scores: S.
        control_mask: True at real control tokens; at least one a row.
        factors: One factor a control token, or None for the formula. See `Relevance.id_weighted`.
    """
    weights = control_mask.float()
    count = weights.sum(1, keepdim=True)
    if factors is not None:
        weights = weights * factors
    return torch.einsum("bk,bkn->bn", weights, scores) / count


def gaussian_kernel(sigma: float, half_window: int) -> Float[Tensor, " taps"]:
    """Taps exp(-r^2 / 2 sigma^2) / (sigma sqrt(2 pi)), r = -half_window ... half_window, not renormalised.

    Raises:
        InputError: sigma is below 0.5, where the taps no longer sum to 1 (1.6 at sigma 0.25), or the window
            is negative.
    """
    if not (math.isfinite(sigma) and sigma >= 0.5):
        raise InputError(
            "expected 0.5 or more (below it the Gaussian's taps do not sum to 1), or None for no smoothing",
            field="smooth_sigma",
            value=sigma,
        )
    if half_window < 0:
        raise InputError("expected 0 or more tokens", field="half_window", value=half_window)
    offsets = torch.arange(-half_window, half_window + 1, dtype=torch.float32)
    return torch.exp(-offsets.square() / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))


def smooth(
    scores: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    sigma: float,
    half_window: int = 10,
) -> Float[Tensor, "batch tokens"]:
    """Convolve raw scores with the Gaussian, zeros beyond both ends; pads count as zeros: none leaks."""
    kernel = gaussian_kernel(sigma, half_window).to(scores)
    real = scores.masked_fill(~mask, 0.0)
    return nn.functional.conv1d(real[:, None], kernel[None, None], padding=half_window)[:, 0]


def masked_softmax(
    scores: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Softmax over the real tokens: rows sum to 1, pads get exactly 0."""
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=1)


def effective_support(relevance: Float[Tensor, "batch tokens"]) -> Float[Tensor, " batch"]:
    """exp(entropy): the number of tokens over which a uniform distribution would be as spread out.

    >>> effective_support(torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]]))
    tensor([4., 1.])
    """
    return torch.special.entr(relevance).sum(1).exp()


def temperature_for_support(
    scores: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"], support: float = 8.0
) -> Float[Tensor, " batch"]:
    """Temperature, one a row, at which the softmax's effective support is `support` tokens; by bisection.

    The support grows with the temperature, from the number of tied maxima to the number of real tokens, so
    the target is met wherever it lies between them. Documents shorter than 2 x `support` aim at half of their
    tokens: more would ask for a flat distribution, which says nothing. A row of equal scores gets 1.

    Not differentiable: the temperature is a constant of the document, as a learning rate is of a run.
    Computed on the CPU in float64, which some devices (MPS) do not have.
    """
    device, dtype = scores.device, scores.dtype
    with torch.no_grad():
        scores, mask = scores.cpu().double(), mask.cpu()
        exact = scores.masked_fill(~mask, -torch.inf)
        top = exact.amax(1, keepdim=True)
        spread = (top - scores.masked_fill(~mask, torch.inf).amin(1, keepdim=True)).squeeze(1)
        scale = spread.where(spread > 0, 1.0)
        target = (mask.sum(1) / 2).clamp(min=1.0, max=support)
        low, high = torch.full_like(scale, math.log(1e-6)), torch.full_like(scale, math.log(1e3))
        for _ in range(50):  # halves 20.7 in log temperature to 2e-14
            middle = (low + high) / 2
            probabilities = ((exact - top) / (middle.exp() * scale)[:, None]).softmax(dim=1)
            too_wide = effective_support(probabilities) > target
            high, low = middle.where(too_wide, high), low.where(too_wide, middle)
        found = ((low + high) / 2).exp() * scale
        return found.where(spread > 0, 1.0).to(dtype).to(device)


@dataclass(frozen=True)
class RelevanceInputs:
    """What a relevance may look at, for one batch.

    Attributes:
        control_ids: Ids of the control's tokens, right-padded.
        control_mask: True at real control tokens.
        control_vectors: E, rows of the encoder's embedding table, raw.
        source_vectors: K, the encoder's input representation (`hidden_states[0]`).
        source_mask: True at real source tokens.
        controls: The phrases of each control.
        source_tokens: The source's tokens as text, real ones only, per document.
    """

    control_ids: Int[Tensor, "batch controls"]
    control_mask: Bool[Tensor, "batch controls"]
    control_vectors: Float[Tensor, "batch controls width"]
    source_vectors: Float[Tensor, "batch tokens width2"]
    source_mask: Bool[Tensor, "batch tokens"]
    controls: Sequence[Sequence[str]] = ()
    source_tokens: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Relevance(ABC):
    """Settings that turn raw scores into a distribution. `EmbeddingRelevance` is the paper's.

    Attributes:
        smooth_sigma: Standard deviation of the Gaussian, in tokens, 0.5 or more; None for no smoothing.
        half_window: The Gaussian reaches so many tokens to each side.
        temperature: Scores are divided by it before the softmax. 1, the default, is the paper's formula. It
            is the default because this class promises that formula, and no other number would be right for
            all models: scores are raw dot products, whose scale differs by model (and falls with the number
            of control tokens). Look at `effective_support`: where it is a large share of the document, "auto"
            steers far better. "auto" finds for each document the temperature that gives `support` tokens.
        support: Target of temperature "auto", in tokens.
    """

    smooth_sigma: float | int | None = 1.0
    half_window: int = 10
    temperature: Temperature = 1.0
    support: float | int = 8.0

    def __post_init__(self) -> None:
        if self.smooth_sigma is not None:
            gaussian_kernel(self.smooth_sigma, self.half_window)
        if self.temperature != "auto" and not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(
                'expected a number above 0, or "auto"', field="temperature", value=self.temperature
            )
        if not (math.isfinite(self.support) and self.support >= 1):
            raise InputError("expected 1 token or more", field="support", value=self.support)

    @abstractmethod
    def scores(self, inputs: RelevanceInputs) -> Float[Tensor, "batch tokens"]:
        """Raw scores s before smoothing, float32; what stands at pads does not matter."""

    def distribution(
        self, scores: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens"]:
        """a_rel: smoothed, sharpened, softmax over real tokens. Rows sum to 1, pads are 0.

        Raises:
            InputError: A document has no real token, or a score of a real token is not finite.
        """
        if not mask.any(1).all():
            row = int((~mask.any(1)).nonzero()[0])
            raise InputError(
                f"document {row} has no token: its attention mask is all zeros", field="documents"
            )
        if not scores.masked_fill(~mask, 0.0).isfinite().all():
            raise InputError("relevance scores are not finite: expected real numbers", field="relevance")
        s = scores.float()
        if self.smooth_sigma is not None:
            s = smooth(s, mask, self.smooth_sigma, self.half_window)
        if self.temperature == "auto":
            s = s / temperature_for_support(s, mask, self.support)[:, None]
        else:
            s = s / self.temperature
        return masked_softmax(s, mask)

    def __call__(self, inputs: RelevanceInputs) -> Float[Tensor, "batch tokens"]:
        """a_rel of a batch."""
        return self.distribution(self.scores(inputs), inputs.source_mask)


@dataclass(frozen=True)
class EmbeddingRelevance(Relevance):
    """The paper's relevance: raw embedding of the control times the encoder's input representation.

    Attributes:
        id_weighted: Reproduces a slip of the released `generate`, which passes token ids where the 0/1 mask
            of the control belongs: each control token's scores are multiplied by its vocabulary id, and the
            softmax collapses to almost one token. Only for comparison with that code; off in the method.
        query: W_q with its bias, or None for the identity ("trained" relevance, see `RelAttnModule`).
        key: W_k likewise.
    """

    id_weighted: bool = False
    query: nn.Linear | None = field(default=None, compare=False)
    key: nn.Linear | None = field(default=None, compare=False)

    def scores(self, inputs: RelevanceInputs) -> Float[Tensor, "batch tokens"]:
        """s_j = mean over control tokens of (W_q E + b_q)(W_k K + b_k)^T, or of E K^T without projections.

        Raises:
            InputError: The encoder's embeddings are not as wide as its states (factorized embeddings), which
                leaves no dot product; `SimilarityRelevance` does not need one.
        """
        control, source = inputs.control_vectors.float(), inputs.source_vectors.float()
        if control.shape[2] != source.shape[2]:
            raise InputError(
                f"embeddings have width {control.shape[2]}, encoder states {source.shape[2]}: use"
                " SimilarityRelevance",
                field="relevance",
            )
        if self.query is not None:
            control = _in_float32(self.query, control)
        if self.key is not None:
            source = _in_float32(self.key, source)
        factors = inputs.control_ids.float() if self.id_weighted else None
        return mean_over_control(similarity_scores(control, source), inputs.control_mask, factors)


def _in_float32(
    layer: nn.Linear, vectors: Float[Tensor, "batch length width"]
) -> Float[Tensor, "batch length width"]:
    """A projection whose own parameters may be in half precision with the rest of the model."""
    bias = None if layer.bias is None else layer.bias.float()
    return nn.functional.linear(vectors, layer.weight.float(), bias)


Similarity = Callable[[Sequence[str], Sequence[str]], Sequence[float] | Tensor]


@dataclass(frozen=True)
class SimilarityRelevance(Relevance):
    """A relevance of your own: `similarity(phrases, source_tokens)` gives one score a source token.

    Not the paper's method; smoothing, temperature and softmax are the same. The tokens are the tokenizer's,
    as text; a model that scores sentences returns its sentence's score for each of the sentence's tokens.
    """

    similarity: Similarity | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.similarity is None:
            raise InputError("expected a function (phrases, source tokens) -> scores", field="similarity")

    def scores(self, inputs: RelevanceInputs) -> Float[Tensor, "batch tokens"]:
        """The function's scores, put where each document's real tokens are.

        Raises:
            InputError: The function returns another number of scores than there are source tokens.
        """
        assert self.similarity is not None
        scores = inputs.source_vectors.new_zeros(inputs.source_mask.shape, dtype=torch.float32)
        for row, (phrases, tokens) in enumerate(zip(inputs.controls, inputs.source_tokens, strict=True)):
            found = torch.as_tensor(
                self.similarity(phrases, tokens), dtype=torch.float32, device=scores.device
            )
            if found.shape != (len(tokens),):
                raise InputError(
                    f"expected {len(tokens)} scores, one a source token, got shape {tuple(found.shape)}",
                    field="similarity",
                )
            scores[row, inputs.source_mask[row]] = found
        return scores
