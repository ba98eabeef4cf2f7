from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

from rlogist.evaluate import accuracy, auc, auc_interval, f1, hit_rate
from shared_core import InputError


@given(st.integers(0, 10_000), st.integers(2, 4), st.booleans())
def test_auc_and_f1_are_scikit_learns(seed, classes, ties):
    rng = np.random.default_rng(seed)
    label = np.concatenate([np.arange(classes), rng.integers(classes, size=20)])
    p = rng.dirichlet(np.ones(classes), len(label))
    if ties:
        p = np.round(p, 1) + 1e-3
        p /= p.sum(1, keepdims=True)
    if classes == 2:
        expected, score = roc_auc_score(label, p[:, 1]), f1_score(label, p.argmax(1), zero_division=0)
    else:
        expected = np.mean([roc_auc_score(label == c, p[:, c]) for c in range(classes)])
        score = f1_score(label, p.argmax(1), average="macro", zero_division=0)
    assert auc(p, label) == pytest.approx(expected)
    assert f1(p, label) == pytest.approx(score)


def test_one_class_has_no_auc_and_that_is_told():
    with pytest.raises(InputError, match=r"AUC is not defined .* slides a class: \[3, 0\]"):
        auc(np.full((3, 2), 0.5), np.zeros(3, np.int64))


def test_the_interval_covers_the_auc_and_shrinks_with_more_slides():
    rng = np.random.default_rng(0)

    def width(count: int) -> float:
        label = np.arange(count) % 2
        score = 1 / (1 + np.exp(-(label + rng.normal(size=count))))
        p = np.stack([1 - score, score], 1)
        low, high = auc_interval(p, label, 300)
        assert low < auc(p, label) < high
        return high - low

    assert width(400) < width(40)


def test_hits_and_accuracy_by_hand():
    lesions = [np.array([True, False]), np.array([False, True]), np.array([False, False])]
    assert hit_rate([[0], [0], [1]], lesions) == 0.5  # the slide without lesions does not count
    assert hit_rate([[0]], [np.array([False])]) is None
    assert accuracy(np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([0, 0])) == 0.5
