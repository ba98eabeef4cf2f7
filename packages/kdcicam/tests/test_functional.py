"""The core against literal forms: a dense convolution, BatchNorm, double loops, a trace by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdcicam import functional
from shared_core import InputError

SEEDS = st.integers(0, 2**31 - 1)


def draw(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one_hot_contexts(pool: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    contexts = torch.zeros(len(predicted), *pool.shape, dtype=pool.dtype)
    for image, y in enumerate(predicted.tolist()):
        contexts[image, y] = pool[y]
    return contexts


@given(SEEDS, st.integers(1, 3), st.integers(1, 12))
def test_the_rank_one_branch_is_the_dense_convolution(seed, batch, classes):
    conv = nn.Conv2d(classes, 6, 1)
    feature, pool = draw(seed, batch, 6, 4, 5), draw(seed + 1, classes, 4, 5)
    predicted = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed))
    dense = feature + feature * conv(one_hot_contexts(pool, predicted))
    ours = functional.intervene(feature, pool, predicted, conv.weight[:, :, 0, 0], conv.bias)
    torch.testing.assert_close(ours, dense, rtol=1e-6, atol=1e-6)


def test_its_gradients_are_the_dense_ones():
    conv = nn.Conv2d(7, 6, 1).double()
    feature, pool = (
        draw(0, 3, 6, 4, 4, dtype=torch.float64).requires_grad_(),
        draw(1, 7, 4, 4, dtype=torch.float64),
    )
    predicted = torch.tensor([2, 2, 5])
    dense = feature + feature * conv(one_hot_contexts(pool, predicted))
    ours = functional.intervene(feature, pool, predicted, conv.weight[:, :, 0, 0], conv.bias)
    inputs = [feature, conv.weight, conv.bias]
    for a, b in zip(*(torch.autograd.grad(f.sin().sum(), inputs) for f in (dense, ours)), strict=True):
        torch.testing.assert_close(a, b)


@given(SEEDS)
def test_normalization_is_batchnorm_in_training_mode(seed):
    maps = 3 * draw(seed, 5, 6, 7) + 1
    maps[2] = 0
    expected = nn.BatchNorm2d(5)(maps[None])[0]
    torch.testing.assert_close(functional.normalize_maps(maps), expected, rtol=1e-5, atol=1e-5)
    assert (functional.normalize_maps(maps)[2] == 0).all()


def test_three_steps_of_the_pool_by_hand():
    """Four classes; in step 2 one image of class 1 is taken for another: it must leave no trace."""
    steps = [([0, 1, 1], [0, 1, 1]), ([0, 1], [0, 3]), ([2, 2], [2, 2])]
    pool, by_hand, rate = torch.zeros(4, 3, 3), torch.zeros(4, 3, 3), 0.25
    for number, (labels, predicted) in enumerate(steps):
        maps = draw(number, len(labels), 3, 3)
        sums = functional.class_sums(maps, torch.tensor(labels), torch.tensor(predicted), 4)
        pool = functional.updated_pool(pool, sums, rate)
        for k in range(4):
            total = sum(
                (m for m, y, p in zip(maps, labels, predicted, strict=True) if y == p == k), torch.zeros(3, 3)
            )
            scaled = (total - total.mean()) / (total.var(correction=0) + 1e-5).sqrt()
            mixed = by_hand[k] + rate * scaled
            by_hand[k] = (mixed - mixed.mean()) / (mixed.var(correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(pool, by_hand)
    assert pool.abs().sum((1, 2)).gt(0).tolist() == [True, True, True, False]
    assert (pool[3] == 0).all()
    assert pool[:3].square().mean((1, 2)) == pytest.approx(1, abs=1e-3)  # each is of unit deviation


def test_one_update_from_zero_gives_about_the_normalized_sum():
    sums = 5 * draw(0, 3, 8, 8)
    pool = functional.updated_pool(torch.zeros(3, 8, 8), sums, 0.01)
    torch.testing.assert_close(pool, functional.normalize_maps(sums), rtol=0.06, atol=0.01)


def literal(logits: torch.Tensor, maps: torch.Tensor, combine: str, n: int = 20) -> torch.Tensor:
    """The definitions as a double loop over images and ranks."""
    classes = logits.shape[1]
    result = torch.zeros_like(maps[:, 0])
    for image in range(len(logits)):
        ranks = sorted(range(classes), key=lambda k: (-float(logits[image, k]), k))
        for rank, k in enumerate(ranks):
            from_last = rank - (classes - n)
            gamma = {
                "quadratic": -((rank / (classes - 1)) ** 2),
                "linear": 1 - 2 * rank / (classes - 1),
                "cam": float(rank == 0),
                "sum_1": float(rank == 0) - (2 * from_last / (n - 1) / n if from_last >= 0 else 0),
                "mean": float(rank == 0) - (1 / n if from_last >= 0 else 0),
            }[combine]
            result[image] += gamma * maps[image, k]
    return result


@pytest.mark.parametrize("combine", functional.COMBINATIONS)
def test_combining_rows_of_weights_is_combining_the_maps(combine):
    feature, weight, bias = draw(0, 4, 9, 5, 5), draw(1, 25, 9), draw(2, 25)
    logits = F.linear(feature.mean((2, 3)), weight, bias)
    maps = torch.stack([(weight[k][None, :, None, None] * feature).sum(1) for k in range(25)], 1)
    ours = functional.combinational_map(feature, logits, weight, combine)
    torch.testing.assert_close(ours, literal(logits, maps, combine), rtol=1e-5, atol=1e-5)


def test_the_top_class_has_no_weight_in_quadratic_and_the_last_minus_one():
    gamma = functional.rank_weights(25, "quadratic")
    assert (gamma[0], gamma[-1]) == (0, -1)


def test_maps_have_no_bias():
    feature, weight = draw(0, 2, 3, 4, 4), draw(1, 5, 3)
    expected = torch.einsum("kc,bchw->bkhw", weight, feature)
    torch.testing.assert_close(functional.class_maps(feature, weight), expected)
    labels = torch.tensor([4, 0])
    torch.testing.assert_close(
        functional.class_maps(feature, weight, labels), expected[[0, 1], labels], rtol=1e-5, atol=1e-6
    )


def test_the_upsampled_map_begins_at_zero():
    maps = functional.upsampled(draw(0, 2, 4, 4) + 9, (16, 12))
    assert maps.shape == (2, 16, 12)
    assert maps.min() >= 0
    flat = F.interpolate(torch.tensor([[[[0.0, 1.0]]]]), (1, 4), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(functional.upsampled(torch.tensor([[[3.0, 4.0]]]), (1, 4))[0], flat)


@pytest.mark.parametrize("combine", ["quadratic", "linear", "sum_1", "mean"])
def test_one_class_has_nothing_to_combine(combine):
    with pytest.raises(InputError, match="with one class use combine='cam'"):
        functional.rank_weights(1, combine)
    assert functional.rank_weights(1, "cam").tolist() == [1]


def test_more_last_ranks_than_classes_are_refused():
    with pytest.raises(InputError, match=r"last: expected 1 to the 10 classes \(got 11\)"):
        functional.rank_weights(10, "sum_1", 11)
