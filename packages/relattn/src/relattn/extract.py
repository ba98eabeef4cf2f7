"""Extract, then summarize: only the sentences that have to do with the control reach the summarizer."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from relattn.results import RelevanceResult
from relattn.sentences import sentence_spans
from shared_core import InputError


@dataclass(frozen=True)
class SentenceRelevance:
    """One sentence of a document, and its part of the relevance.

    Attributes:
        begin: Where it begins, in characters.
        end: Where it ends.
        mass: Sum of a_rel over its tokens, 0 to 1. Long sentences have more of it where relevance is flat.
        excess: The same above a uniform distribution, sum of max(a_rel - 1 / tokens, 0): what it is ranked
            by.
    """

    begin: int
    end: int
    mass: float
    excess: float


def sentence_relevance(document: str, result: RelevanceResult) -> list[SentenceRelevance]:
    """The relevance of each sentence, in the document's order; what lies behind a length limit has none.

    Raises:
        InputError: The tokenizer gives no offsets (a slow one).
    """
    if result.offsets is None:
        raise InputError(
            "gives no offsets, so tokens cannot be put into sentences: use a fast one", field="tokenizer"
        )
    relevance = result.a_rel.tolist()
    uniform = 1 / len(relevance)
    spans = sentence_spans(document)
    begins = [begin for begin, _ in spans]
    inside: list[list[float]] = [[] for _ in spans]
    for a, (start, stop) in zip(relevance, result.offsets, strict=True):
        place = _first_letter(start, stop, document)
        number = bisect_right(begins, place) - 1
        if stop > start and number >= 0 and place < spans[number][1]:
            inside[number].append(a)
    return [
        SentenceRelevance(begin, end, sum(mine), sum(max(a - uniform, 0.0) for a in mine))
        for (begin, end), mine in zip(spans, inside, strict=True)
    ]


def relevant_sentences(sentences: Sequence[SentenceRelevance], keep: int) -> list[SentenceRelevance]:
    """The `keep` most relevant sentences, in the document's order; the earlier one of equals."""
    if keep < 1:
        raise InputError("expected 1 sentence or more", field="keep", value=keep)
    ranked = sorted(sentences, key=lambda sentence: (-sentence.excess, sentence.begin))[:keep]
    return sorted(ranked, key=lambda sentence: sentence.begin)


def extract(document: str, result: RelevanceResult, keep: int = 3) -> str:
    """The `keep` most relevant sentences of a document as one text. Errors as for `sentence_relevance`."""
    chosen = relevant_sentences(sentence_relevance(document, result), keep)
    return " ".join(document[sentence.begin : sentence.end] for sentence in chosen)


def _first_letter(start: int, stop: int, document: str) -> int:
    """Where a token stands; its leading space, which byte-level tokens have, does not count."""
    while start < stop - 1 and document[start].isspace():
        start += 1
    return start
