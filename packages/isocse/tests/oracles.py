"""The definitions as plain loops over pairs, which the tests hold the package to."""

import itertools
import math

import numpy as np


def cos(a, b):
    return float(np.dot(a, b) / (math.sqrt(np.dot(a, a)) * math.sqrt(np.dot(b, b))))


def mean_cosine(x):
    x = np.asarray(x, dtype=np.float64)
    return float(np.mean([cos(a, b) for a, b in itertools.permutations(x, 2)]))


def intra(sentence):
    """Of one sentence's states, (tokens, d)."""
    sentence = np.asarray(sentence, dtype=np.float64)
    centre = sum(sentence) / len(sentence)
    return float(np.mean([cos(x, centre) for x in sentence]))


def expected_anisotropy(sentences):
    """Mean over pairs of sentences of the mean cosine over their pairs of tokens."""
    sentences = [np.asarray(s, dtype=np.float64) for s in sentences]
    return float(
        np.mean([np.mean([cos(a, b) for a in s for b in t]) for s, t in itertools.permutations(sentences, 2)])
    )


def contributions(x, diagonal):
    x = np.asarray(x, dtype=np.float64)
    pairs = itertools.product(x, x) if diagonal else itertools.permutations(x, 2)
    return np.mean([a * b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs], axis=0)


def isoscore(x):
    """Rudman et al. 2022, algorithm 1, through the eigenvalues."""
    x = np.asarray(x, dtype=np.float64)
    n = x.shape[1]
    variances = np.linalg.eigvalsh(np.cov(x.T))
    normalised = math.sqrt(n) * variances / np.linalg.norm(variances)
    defect = np.linalg.norm(normalised - 1) / math.sqrt(2 * (n - math.sqrt(n)))
    used = (n - defect**2 * (n - math.sqrt(n))) ** 2 / n
    return (used - 1) / (n - 1)


def partition(x):
    x = np.asarray(x, dtype=np.float64)
    _, vectors = np.linalg.eigh(x.T @ x)
    sums = [sum(math.exp(float(sign * (c @ w))) for w in x) for c in vectors.T for sign in (1, -1)]
    return min(sums) / max(sums)


def uniformity(x, t=2.0):
    units = [np.asarray(v, dtype=np.float64) / np.linalg.norm(v) for v in np.asarray(x, dtype=np.float64)]
    return math.log(
        np.mean([math.exp(-t * float(np.sum((a - b) ** 2))) for a, b in itertools.combinations(units, 2)])
    )
