"""How well a summary says what was asked for: overlap, control, copying; intervals by document.

All numbers are shares from 0 to 1, but `density`, which counts words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from relattn.controls import occurs_in
from relattn.examples import Example
from relattn.rouge import rouge_f1, rouge_n, stems
from relattn.selection import PairwiseSimilarity, distinct_word_ratio
from relattn.sentences import sentences
from shared_core import InputError

METRICS = (
    "rouge1", "rouge2", "rougeL", "rougeLsum", "rouge1_without_control", "control_contrast", "success",
    "mentions", "distinct_words", "copy_coverage", "copy_density", "words", "bertscore",
)  # fmt: skip


def score_summary(example: Example, summary: str) -> dict[str, float]:
    """All metrics of one summary that its example allows; without reference, for instance, no ROUGE."""
    found: dict[str, float] = {}
    if example.summary is not None:
        found |= {kind: rouge_f1(summary, example.summary, kind) for kind in ("rouge1", "rouge2", "rougeL")}
        found["rougeLsum"] = rouge_lsum(summary, example.summary)
        found["rouge1_without_control"] = rouge1_without_control(summary, example.summary, example.control)
        if example.other_summaries:
            found["control_contrast"] = control_contrast(summary, example.summary, example.other_summaries)
    coverage, density = copied_fragments(example.document, summary)
    return found | {
        "success": success_rate(summary, example.control),
        "mentions": mention_rate(summary, example.control),
        "distinct_words": distinct_word_ratio(summary),
        "copy_coverage": coverage,
        "copy_density": density,
        "words": float(len(summary.split())),
    }


def bertscore_f1(summary: str, reference: str, scorer: PairwiseSimilarity) -> float:
    """BERTScore F1 of a summary with its reference, by a `relattn.bertscore.BertScore`."""
    return float(scorer([summary, reference])[0, 1])


def success_rate(summary: str, control: Sequence[str]) -> float:
    """Share of the control's phrases found verbatim in the summary, as the released code counts it.

    Letter by letter: "art" is found in "start". `mention_rate` counts whole words. 0 for an empty control.
    Copying the control's words makes it 1, so look at `control_contrast` and `rouge1_without_control` beside
    it.

    >>> success_rate("jazz and blues", ["jazz", "opera"])
    0.5
    """
    return sum(phrase in summary for phrase in control) / len(control) if control else 0.0


def mention_rate(summary: str, control: Sequence[str]) -> float:
    """Share of the control's phrases that stand in the summary as whole words, whatever the case.

    >>> mention_rate("They start. Art matters.", ["art", "music"])
    0.5
    """
    return sum(occurs_in(phrase, summary) for phrase in control) / len(control) if control else 0.0


def control_contrast(summary: str, reference: str, others: Sequence[str]) -> float:
    """ROUGE-1 F1 with the reference minus its mean with the document's other references; -1 to 1.

    A summary of the whole document gets about 0, however good it is: only control raises it.

    Raises:
        InputError: There is no other reference.
    """
    if not others:
        raise InputError(
            "expected a reference of the same document for another control, got none", field="others"
        )
    return rouge_f1(summary, reference) - sum(rouge_f1(summary, other) for other in others) / len(others)


def rouge1_without_control(summary: str, reference: str, control: Sequence[str]) -> float:
    """ROUGE-1 F1 after the control's words (by stem) are removed from both sides: echoing them earns nothing.

    >>> rouge1_without_control("jazz jazz jazz", "a night of jazz", ["jazz"])
    0.0
    """
    dropped = {stem for phrase in control for stem in stems(phrase)}
    first, second = ([stem for stem in stems(text) if stem not in dropped] for text in (summary, reference))
    return rouge_n(first, second)


def rouge_lsum(summary: str, reference: str) -> float:
    """ROUGE-Lsum F1, sentence by sentence (union of the longest common subsequences), by rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    lines = ["\n".join(sentences(text)) for text in (reference, summary)]
    return RougeScorer(["rougeLsum"], use_stemmer=True).score(*lines)["rougeLsum"].fmeasure


def copied_fragments(document: str, summary: str) -> tuple[float, float]:
    """Coverage and density of the fragments that a summary copies from its document.

    Coverage is the share of the summary's words that lie in copied fragments, density the mean length, over
    its words, of the fragment that each lies in. Words are compared in small letters, without the marks
    around them.

    Grusky, Naaman, Artzi: "Newsroom", NAACL 2018, section 4 (their greedy algorithm F(A, S)).

    >>> copied_fragments("the band played all night long", "The band sang all night.")
    (0.8, 1.6)
    """
    source, words = _words(document), _words(summary)
    if not words:
        return 0.0, 0.0
    places: dict[str, list[int]] = {}
    for place, word in enumerate(source):
        places.setdefault(word, []).append(place)
    lengths = []
    at = 0
    while at < len(words):
        longest = max(
            (_common_length(words, at, source, place) for place in places.get(words[at], ())), default=0
        )
        if longest:
            lengths.append(longest)
        at += max(longest, 1)
    return sum(lengths) / len(words), sum(length**2 for length in lengths) / len(words)


def _words(text: str) -> list[str]:
    stripped = (word.strip(".,;:!?\"'()[]“”‘’«»").lower() for word in text.split())  # noqa: RUF001
    return [word for word in stripped if word]


def _common_length(words: Sequence[str], at: int, source: Sequence[str], place: int) -> int:
    length = 0
    while (
        at + length < len(words)
        and place + length < len(source)
        and words[at + length] == source[place + length]
    ):
        length += 1
    return length


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval.

    Attributes:
        mean: Over examples.
        low: Lower end.
        high: Upper end.
        documents: Number of different documents, which the interval rests on.
    """

    mean: float
    low: float
    high: float
    documents: int


def bootstrap_interval(
    values: Sequence[float] | Float[ndarray, " examples"],
    documents: Sequence[str],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over examples, and its percentile bootstrap interval over *documents*.

    Whole documents are drawn, with all their examples: two summaries of one document are no two independent
    observations. For the difference of two methods give the differences, example by example.

    Args:
        values: One number an example.
        documents: The example's document.
        level: Of the interval, between 0 and 1.
        resamples: Number of draws.
        seed: Of the draws.

    Raises:
        InputError: There is no example, or another number of documents than values.
    """
    if not len(values) or len(values) != len(documents):
        raise InputError(
            f"expected a document for each value, at least 1, got {len(documents)} for {len(values)}",
            field="values",
        )
    names, member = np.unique(np.asarray(documents), return_inverse=True)
    numbers = np.asarray(values, dtype=np.float64)
    sums = np.bincount(member, weights=numbers, minlength=len(names))
    counts = np.bincount(member, minlength=len(names))
    draws = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(numbers.mean()), float(low), float(high), len(names))


def summarize_scores(
    scores: Sequence[Mapping[str, float]], documents: Sequence[str], *, seed: int = 0
) -> dict[str, Interval]:
    """Each metric's mean and interval, over the examples that have it."""
    found = {}
    for metric in METRICS:
        having = [(row[metric], name) for row, name in zip(scores, documents, strict=True) if metric in row]
        if having:
            found[metric] = bootstrap_interval(
                [v for v, _ in having], [name for _, name in having], seed=seed
            )
    return found
