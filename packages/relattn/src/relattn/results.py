"""What the steerer gives back: relevance of a document, candidates, summaries."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class RelevanceResult:
    """How relevant each token of a document is to its control.

    Attributes:
        a_rel: The relevance distribution, sums to 1.
        scores: Raw scores s before smoothing.
        tokens: The text of each token.
        offsets: Where each token stands in the document, [start, end); None with a slow tokenizer.
        effective_support: Over how many tokens the relevance is spread, exp(entropy).
        controls: The control's phrases.
        warnings: Truncation, phrases that do not occur, and the like.
    """

    a_rel: Float[Tensor, " tokens"]
    scores: Float[Tensor, " tokens"]
    tokens: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...] | None
    effective_support: float
    controls: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A summary that online selection tried.

    Attributes:
        weight: Its steering weight.
        text: The summary.
        kept: Whether it passed the filters.
        decoded: Whether it was written under this weight; False where a coarse grid took it from the weights
            on both sides, which gave the same.
    """

    weight: float
    text: str
    kept: bool
    decoded: bool = True


@dataclass(frozen=True)
class ControlledSummary:
    """A summary about what the reader asked for.

    Attributes:
        text: The summary.
        weight: The steering weight: chosen by online selection, or the given one; the mean over layers and
            heads where these differ. 0 for a document without control.
        relevance: The relevance that steered it.
        candidates: All that online selection tried, weights ascending; empty with a given weight.
        warnings: The relevance's.
    """

    text: str
    weight: float
    relevance: RelevanceResult
    candidates: tuple[Candidate, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Truncation, phrases that do not occur, and the like."""
        return self.relevance.warnings
