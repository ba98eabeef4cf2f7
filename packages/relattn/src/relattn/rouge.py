"""ROUGE-1, ROUGE-2 and ROUGE-L F1 with stemming, equal to rouge-score's, from stems made once a text.

Online selection compares each of 30 candidates with each other. A scorer call per pair would tokenize and
stem a candidate 29 times; here each text is stemmed once, n-gram overlaps of all pairs are one array
operation, and the longest common subsequence goes by machine words.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from nltk.stem.porter import PorterStemmer
from numpy import ndarray

from shared_core import InputError

_stemmer = PorterStemmer()
_NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    return _stemmer.stem(word) if len(word) > 3 else word


def stems(text: str) -> tuple[str, ...]:
    """A text's words as ROUGE counts them: lower case, a-z and digits, those of 4 letters or more stemmed.

    >>> stems("The dancers danced, twice.")
    ('the', 'dancer', 'danc', 'twice')
    """
    return tuple(_stem(word) for word in _NOT_ALPHANUMERIC.sub(" ", text.lower()).split())


def rouge_n(first: Sequence[str], second: Sequence[str], n: int = 1) -> float:
    """ROUGE-n F1 of two lists of stems, 0 to 1."""
    a, b = _ngrams(first, n), _ngrams(second, n)
    return _f1((a & b).total(), a.total(), b.total())


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """ROUGE-L F1 of two lists of stems (sentence level), 0 to 1."""
    return _f1(_common_subsequence(first, second), len(first), len(second))


def rouge_f1(first: str, second: str, kind: str = "rouge1") -> float:
    """ROUGE F1 of two texts, 0 to 1; the order does not matter.

    >>> round(rouge_f1("jazz music at night", "music at dawn"), 4)
    0.5714
    """
    a, b = stems(first), stems(second)
    return rouge_l(a, b) if _checked(kind) == "rougeL" else rouge_n(a, b, int(kind[-1]))


def pairwise_rouge(texts: Sequence[str], kind: str = "rouge1") -> Float[ndarray, "texts texts"]:
    """ROUGE F1 of each text with each other, 0 to 1, float64; symmetric."""
    stemmed = [stems(text) for text in texts]
    if _checked(kind) == "rougeL":
        return _pairwise_l(stemmed)
    counts = _count_matrix([_ngrams(words, int(kind[-1])) for words in stemmed])
    overlap = (
        np.stack([np.minimum(row, counts).sum(1) for row in counts]) if len(counts) else np.zeros((0, 0))
    )
    totals = counts.sum(1)
    precision = overlap / np.maximum(totals, 1)[None, :]
    recall = overlap / np.maximum(totals, 1)[:, None]
    return _harmonic(precision, recall)


def _checked(kind: str) -> str:
    if kind not in ("rouge1", "rouge2", "rougeL"):
        raise InputError('expected "rouge1", "rouge2" or "rougeL"', field="similarity", value=kind)
    return kind


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _count_matrix(counters: Sequence[Counter[tuple[str, ...]]]) -> ndarray:
    column: dict[tuple[str, ...], int] = {}
    for counter in counters:
        for ngram in counter:
            column.setdefault(ngram, len(column))
    counts = np.zeros((len(counters), len(column)), dtype=np.int32)
    for row, counter in zip(counts, counters, strict=True):
        row[[column[ngram] for ngram in counter]] = list(counter.values())
    return counts


def _f1(common: int, first: int, second: int) -> float:
    precision, recall = common / max(first, 1), common / max(second, 1)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def _harmonic(precision: ndarray, recall: ndarray) -> ndarray:
    total = precision + recall
    return 2 * precision * recall / np.where(total > 0, total, 1.0)


def _pairwise_l(stemmed: Sequence[tuple[str, ...]]) -> ndarray:
    found = np.zeros((len(stemmed), len(stemmed)))
    for i, first in enumerate(stemmed):
        positions = _positions(first)
        for j in range(i, len(stemmed)):
            common = _common_subsequence(first, stemmed[j], positions)
            found[i, j] = found[j, i] = _f1(common, len(first), len(stemmed[j]))
    return found


def _positions(words: Sequence[str]) -> dict[str, int]:
    """For each word a number whose bit i is set where it stands at position i."""
    bits: dict[str, int] = {}
    for place, word in enumerate(words):
        bits[word] = bits.get(word, 0) | 1 << place
    return bits


def _common_subsequence(
    first: Sequence[str], second: Sequence[str], positions: dict[str, int] | None = None
) -> int:
    """Length of the longest common subsequence, a row of the table per word as one long integer.

    Bit i of `row` is 0 where the table's row grows at column i (Crochemore et al., "A fast and practical
    bit-vector algorithm for the longest common subsequence problem", 2001).
    """
    positions = _positions(first) if positions is None else positions
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matches = row & positions.get(word, 0)
        row = (row + matches | row - matches) & full
    return len(first) - row.bit_count()
