"""Which passage is a summary about? And the rule by which settings are chosen."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from relattn.papers import UNKNOWN, TopicDocument
from relattn.rouge import rouge_n

Setting = TypeVar("Setting", bound=Hashable)


@dataclass(frozen=True)
class Score:
    """One summary against the leads of its document's passages. Unknown words never match.

    Attributes:
        rouge1: Unigram F1 with the target's lead, 0 to 1.
        rouge1_without_control: The same without the control's words on either side.
        contrast: rouge1 minus its mean with the other leads.
        success: Whether the summary is strictly closest to the target's lead; chance is one in three.
    """

    rouge1: float
    rouge1_without_control: float
    contrast: float
    success: bool


def score(document: TopicDocument, summary: str) -> Score:
    """Score one summary."""
    closeness = [known_rouge1(summary, lead) for lead in document.leads]
    own = closeness.pop(document.target)
    dropped = set(document.control)
    without = (
        " ".join(word for word in text.split() if word not in dropped)
        for text in (summary, document.leads[document.target])
    )
    return Score(own, known_rouge1(*without), own - sum(closeness) / len(closeness), own > max(closeness))


def known_rouge1(summary: str, reference: str) -> float:
    """Unigram F1 of the known words: unknown ones, which would match one another, are left out.

    >>> known_rouge1("a <oov> b", "a <oov> c")
    0.5
    """
    first, second = ([word for word in text.split() if word != UNKNOWN] for text in (summary, reference))
    return rouge_n(first, second)


def choose(scores: Mapping[Setting, Sequence[Score]], tolerance: float = 0.02) -> Setting:
    """The setting with the most success among those with a mean ROUGE-1 within `tolerance` of the best."""
    means = {setting: mean(s.rouge1 for s in found) for setting, found in scores.items()}
    near = [setting for setting, mean in means.items() if mean >= max(means.values()) - tolerance]
    return max(near, key=lambda setting: (mean(s.success for s in scores[setting]), means[setting]))


def mean(values: Iterable[float]) -> float:
    """The mean of one number or more."""
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers)
