"""Similarity of token states: within a type (self), a sentence (intra), and of random tokens (anisotropy).

All are means of cosines over pairs. A sum over pairs of unit vectors is the square of their sum, so each
costs O(n d) and no n by n matrix is made. Sources: Ethayarajh 2019, sections 3.2 to 3.4; Xiao, Long, Al
Moubayed 2023 (arXiv 2212.09170). Rows of zeros have no direction and are left out everywhere.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isocse.vectors import Rows, rows, unit_rows
from shared_core import InputError

States = Float[Tensor, "sentences tokens d"]
Mask = Bool[Tensor, "sentences tokens"] | Int[Tensor, "sentences tokens"]


def mean_cosine(x: Rows) -> float:
    """Mean cosine of all pairs of different rows: `(|sum u|^2 - n) / (n (n - 1))`.

    The anisotropy of a set of vectors: 0 where directions are spread evenly, 1 where all are alike.

    Args:
        x: Two or more vectors as rows.

    >>> mean_cosine(torch.eye(3))  # pairs i = j do not count, so this is 0 and not 1/3
    0.0
    """
    units = unit_rows(x)
    n = units.shape[0]
    return float((units.sum(0).square().sum() - n) / (n * (n - 1)))


def self_similarity(x: Rows) -> float:
    """Mean cosine of a type's states in different contexts (Ethayarajh 2019, section 3.2).

    Args:
        x: The states of one type's occurrences, two or more.

    >>> round(self_similarity(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])), 4)
    0.3333
    """
    return mean_cosine(x)


def intra_sentence_similarity(h: States, mask: Mask) -> Float[Tensor, " sentences"]:
    """Mean cosine of a sentence's tokens with the mean of their states (Ethayarajh 2019, section 3.3).

    Not the mean cosine of pairs: two tokens at right angles give cos 45 degrees, not 0.

    Args:
        h: States; what stands where the mask is 0 does not matter.
        mask: 1 at tokens, 0 at padding.

    Returns:
        One value a sentence, float64; NaN where no token has a direction, or where their mean has none.

    >>> intra_sentence_similarity(torch.eye(2)[None], torch.ones(1, 2, dtype=torch.int64)).item().__round__(4)
    0.7071
    """
    sums, unit_sums, counts = sentence_sums(h, mask)
    norm = sums.norm(dim=1)
    return (sums * unit_sums).sum(1) / (norm * counts)  # 0 / 0 is NaN


def sentence_sums(
    h: States, mask: Mask
) -> tuple[Float[Tensor, "sentences d"], Float[Tensor, "sentences d"], Float[Tensor, " sentences"]]:
    """By sentence: the sum of its states, of their unit vectors, and how many tokens have a direction."""
    _check_states(h, mask)
    states = h.double().masked_fill(~mask.bool()[..., None], 0.0)
    norms = states.norm(dim=2, keepdim=True)
    units = torch.where(norms > 0, states / norms, 0.0)
    return states.sum(1), units.sum(1), (norms[..., 0] > 0).sum(1).double()


def expected_anisotropy(h: States, mask: Mask) -> float:
    """Mean cosine that one expects of two tokens drawn from two different sentences, exactly.

    The published baseline draws 1,000 sentences and one token of each; this is the mean over all such draws:
    with `m_s` the mean unit vector of sentence s, `(|sum m_s|^2 - sum |m_s|^2) / (N (N - 1))`. Long sentences
    count no more than short ones.

    Args:
        h: States of two or more sentences.
        mask: 1 at tokens, 0 at padding.
    """
    _, unit_sums, counts = sentence_sums(h, mask)
    return mean_over_sentences(unit_sums[counts > 0] / counts[counts > 0, None])


def mean_over_sentences(means: Float[Tensor, "sentences d"]) -> float:
    """`expected_anisotropy` of the sentences' mean unit vectors."""
    n = means.shape[0]
    if n < 2:
        raise InputError("expected at least 2 sentences with tokens", field="sentences", value=n)
    return float((means.sum(0).square().sum() - means.square().sum()) / (n * (n - 1)))


def draw_tokens(mask: Mask, count: int, generator: np.random.Generator) -> Int[np.ndarray, "drawn 2"]:
    """The published draw: sentences without replacement, and of each one token, uniformly.

    Args:
        mask: 1 at tokens, 0 at padding. Sentences without tokens are not drawn.
        count: Sentences to draw; all where there are no more.
        generator: Of the draw.

    Returns:
        Sentence and position of each drawn token.
    """
    attended = mask.bool().numpy()
    sentences = np.flatnonzero(attended.any(1))
    chosen = generator.permutation(sentences)[:count]
    positions = [generator.choice(np.flatnonzero(attended[sentence])) for sentence in chosen]
    return np.stack([chosen, np.array(positions, dtype=chosen.dtype)], axis=1)


def bootstrap_error(x: Rows, generator: np.random.Generator, replicates: int = 100) -> float:
    """Standard error of `mean_cosine`, by resampling rows with replacement.

    Pairs of a row with its own copy are left out, since two different tokens are never the same vector.

    Args:
        x: The sampled vectors, two or more.
        generator: Of the resampling.
        replicates: Number of resamples.
    """
    return resampled_error(x, resamples(len(x), generator, replicates))


def resamples(n: int, generator: np.random.Generator, replicates: int = 100) -> Float[Tensor, "replicates n"]:
    """How often each of n rows is in a resample with replacement."""
    return torch.as_tensor(generator.multinomial(n, np.full(n, 1 / n), size=replicates)).double()


def resampled_error(x: Rows, weights: Float[Tensor, "replicates n"]) -> float:
    """`bootstrap_error` with given resamples, which several measures of the same rows may share."""
    vectors = rows(x)
    kept = (vectors != 0).any(1)
    weights = weights[:, kept]
    sums, totals = weights @ unit_rows(vectors), weights.sum(1)
    return float(weighted_mean_cosine(sums, weights.square().sum(1), totals).std())


def weighted_mean_cosine(
    sums: Float[Tensor, "replicates d"],
    diagonal: Float[Tensor, " replicates"],
    total: Float[Tensor, " replicates"],
) -> Float[Tensor, " replicates"]:
    """Mean over weighted pairs of different vectors: `(|sum w u|^2 - diagonal) / (total^2 - sum w^2)`.

    Args:
        sums: `sum_i w_i u_i`.
        diagonal: `sum_i w_i^2`, of unit vectors.
        total: `sum_i w_i`.
    """
    return (sums.square().sum(1) - diagonal) / (total.square() - diagonal)


def common_component(x: Rows) -> tuple[float, float]:
    """Distance of the mean vector from the origin, and its share `|mean|^2 / mean |x|^2` of all energy.

    >>> common_component(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    (1.0, 0.5)
    """
    vectors = rows(x)
    mean = vectors.mean(0)
    energy = vectors.square().sum(1).mean()
    return float(mean.norm()), float(mean.square().sum() / energy) if energy > 0 else 0.0


def residual_anisotropy(x: Rows) -> float:
    """Mean cosine of all pairs once the mean vector is taken away: what anisotropy is not a common offset."""
    vectors = rows(x, least=2)
    return mean_cosine(vectors - vectors.mean(0))


def cosine_to_mean(x: Rows) -> Float[Tensor, " m"]:
    """Cosine of each row with the mean of all rows."""
    mean = rows(x).mean(0)
    return unit_rows(x, least=1) @ (mean / mean.norm())


def _check_states(h: Tensor, mask: Tensor) -> None:
    bad = ~torch.isfinite(h).all(2) & mask.bool()
    if bad.any():
        sentence, token = (int(index) for index in bad.nonzero()[0])
        raise InputError(f"NaN or infinity at sentence {sentence}, token {token}", field="h")
