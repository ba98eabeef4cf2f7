"""Online selection: which of the candidates that a grid of weights gives is the summary.

Nothing here sees a reference, the control or a likelihood: the candidates alone decide.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from relattn.rouge import pairwise_rouge, rouge_n, stems
from shared_core import InputError

GRID = tuple(round(0.01 * step, 2) for step in range(1, 31))
"""The steering weights that online selection tries: 0.01, 0.02, ..., 0.30."""

DRIFT_LIMIT = 0.2
"""A candidate is kept only if its ROUGE-1 F1 with the first candidate is above this."""

DISTINCT_LIMIT = 0.6
"""A candidate is kept only if its share of different words is above this."""

PairwiseSimilarity = Callable[[Sequence[str]], Float[ndarray, "texts texts"]]
Similarity = str | PairwiseSimilarity


@dataclass(frozen=True)
class Consensus:
    """What online selection saw.

    Attributes:
        index: The chosen candidate.
        kept: The candidates that passed the filters, ascending.
        agreement: For each kept candidate the sum of its similarities to the other kept ones.
    """

    index: int
    kept: tuple[int, ...]
    agreement: tuple[float, ...]


def online_select(candidates: Sequence[str], similarity: Similarity = "rouge1") -> int:
    """The candidate that agrees most with the others: the paper's online selection.

    Args:
        candidates: One summary a steering weight, weights ascending. The first one, of the smallest weight,
            is the anchor from which the others may not drift away.
        similarity: "rouge1" (the default), "rouge2", "rougeL" (F1 with stemming), "bertscore" (F1; loads its
            model at each call: for many calls give a `relattn.bertscore.BertScore`), or a function from n
            texts to their n x n similarities.

    Returns:
        Index of the chosen candidate; 0 if no candidate passes the filters, the smallest weight in a tie.

    Raises:
        InputError: There is no candidate, or the similarity is unknown or of the wrong shape.

    >>> online_select(["the cat sat on a mat", "a cat sat on the red mat", "the red cat sat", "mat mat mat"])
    1
    """
    return consensus(candidates, similarity).index


def consensus(candidates: Sequence[str], similarity: Similarity = "rouge1") -> Consensus:
    """`online_select` with its reasons. Arguments and errors are the same."""
    kept = keep(candidates)
    if not kept:
        return Consensus(0, (), ())
    matrix = _pairwise([candidates[index] for index in kept], similarity)
    np.fill_diagonal(matrix, 0.0)
    # fsum rounds once: sums of the same numbers in another order stay equal, so that ties are ties.
    agreement = tuple(math.fsum(row) for row in matrix.tolist())
    return Consensus(kept[agreement.index(max(agreement))], kept, agreement)


def loaded(similarity: Similarity, device: Any = "cpu") -> Similarity:
    """The similarity for many calls: "bertscore" becomes its model, loaded once, on that device."""
    if similarity != "bertscore":
        return similarity
    from relattn.bertscore import BertScore

    return BertScore.from_pretrained(device=device)


def keep(candidates: Sequence[str]) -> tuple[int, ...]:
    """Candidates that are new, near the first one and not degenerate, ascending.

    Raises:
        InputError: There is no candidate.
    """
    if not candidates:
        raise InputError("expected one candidate or more, got none", field="candidates")
    anchor = stems(candidates[0])
    seen: set[str] = set()
    kept = []
    for index, text in enumerate(candidates):
        if text in seen or distinct_word_ratio(text) <= DISTINCT_LIMIT:
            continue
        if rouge_n(stems(text), anchor) > DRIFT_LIMIT:
            seen.add(text)
            kept.append(index)
    return tuple(kept)


def coarse_to_fine(
    sizes: Sequence[int], stride: int, decode: Callable[[Sequence[tuple[int, int]]], Sequence[str]]
) -> list[dict[int, str]]:
    """Candidates of grids of weights, of which not all need be decoded. Ours, not the paper's.

    Every `stride`-th weight is decoded first, and the last one. Where two neighbours say the same, the
    weights between them are taken to say it, too; where they differ, the middle is decoded, until no gap is
    left.
    What is taken for granted may be wrong: a weight between two equal summaries may give a third.

    Args:
        sizes: Number of weights of each document, 1 or more.
        stride: Of the coarse grid, 1 or more; 1 decodes all.
        decode: (Document, index of the weight) pairs to their candidates; called once a round.

    Returns:
        For each document the candidates that were decoded, by the weight's index.

    Raises:
        InputError: The stride is below 1.

    >>> texts = "aaaabcccc"
    >>> coarse_to_fine([9], 4, lambda pairs: [texts[i] for _, i in pairs])
    [{0: 'a', 4: 'b', 8: 'c', 2: 'a', 6: 'c', 3: 'a', 5: 'c'}]
    """
    if stride < 1:
        raise InputError("expected 1 or more", field="coarse", value=stride)
    texts: list[dict[int, str]] = [{} for _ in sizes]
    asked = [(row, i) for row, size in enumerate(sizes) for i in sorted({*range(0, size, stride), size - 1})]
    while asked:
        for (row, index), text in zip(asked, decode(asked), strict=True):
            texts[row][index] = text
        asked = [
            (row, (a + b) // 2)
            for row, known in enumerate(texts)
            for a, b in pairwise(sorted(known))
            if b - a > 1 and known[a] != known[b]
        ]
    return texts


def filled(decoded: Mapping[int, str], size: int) -> list[str]:
    """A candidate for each weight: its own, or that of the decoded ones on both sides of it.

    >>> filled({0: "a", 3: "a", 4: "b"}, 5)
    ['a', 'a', 'a', 'a', 'b']
    """
    found: list[str] = []
    for index in range(size):
        found.append(decoded[index] if index in decoded else found[-1])
    return found


def distinct_word_ratio(text: str) -> float:
    """Different whitespace-separated words over all of them, 0 for a text without words.

    >>> distinct_word_ratio("so so so fine")
    0.5
    """
    words = text.split()
    return len(set(words)) / len(words) if words else 0.0


def coverage_select(
    candidates: Sequence[str],
    candidate_tokens: Sequence[Sequence[int]],
    source_tokens: Sequence[int],
    relevance: Sequence[float],
) -> int:
    """The candidate whose words cover the most relevance mass. Ours, *not* the paper's online selection.

    Among candidates with more than 0.6 different words it takes the largest sum of a_rel over the source
    tokens that occur in the candidate. It can be gamed by echoing control words: report ROUGE without them
    beside it.

    Args:
        candidates: One summary a steering weight, weights ascending.
        candidate_tokens: Ids of each candidate, in the source's vocabulary.
        source_tokens: Ids of the source.
        relevance: a_rel, one number a source token.

    Returns:
        Index of the chosen candidate; 0 if all are degenerate, the smallest weight in a tie.

    Raises:
        InputError: There is no candidate, or lengths do not match.
    """
    if not candidates:
        raise InputError("expected one candidate or more, got none", field="candidates")
    if len(candidates) != len(candidate_tokens) or len(source_tokens) != len(relevance):
        raise InputError(
            "expected tokens of each candidate and one relevance a source token", field="candidates"
        )
    best, best_mass = 0, -1.0
    for index, (text, tokens) in enumerate(zip(candidates, candidate_tokens, strict=True)):
        if distinct_word_ratio(text) <= DISTINCT_LIMIT:
            continue
        present = set(tokens)
        mass = math.fsum(a for token, a in zip(source_tokens, relevance, strict=True) if token in present)
        if mass > best_mass:
            best, best_mass = index, mass
    return best


def _pairwise(texts: Sequence[str], similarity: Similarity) -> Float[ndarray, "texts texts"]:
    similarity = loaded(similarity)
    if isinstance(similarity, str):
        return pairwise_rouge(texts, similarity)
    matrix = np.array(similarity(texts), dtype=np.float64)
    if matrix.shape != (len(texts), len(texts)):
        raise InputError(
            f"expected similarities of shape {(len(texts),) * 2}, got {matrix.shape}", field="similarity"
        )
    return matrix
