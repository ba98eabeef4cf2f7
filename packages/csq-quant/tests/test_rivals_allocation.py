from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from csq.rivals.allocation import cheapest_allocation, random_allocation
from csq.rivals.hessian import hessian_traces, rounding_error, sensitivities
from csq.rivals.lsq import lsq_quantize
from shared_core import InputError


@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0.0, 1.0))
def test_the_integer_program_is_as_cheap_as_brute_force(seed: int, layers: int, fraction: float) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.exponential(size=(layers, 4)) * 10.0 ** rng.integers(-6, 3)
    sizes = rng.integers(1, 50, size=(layers, 1)) * np.arange(1.0, 5.0)
    least, most = sizes.min(1).sum(), sizes.max(1).sum()
    budget = float(least + fraction * (most - least))
    chosen = cheapest_allocation(costs, sizes, budget)
    rows = range(layers)
    assert sizes[rows, chosen].sum() <= budget * (1 + 1e-9)
    best = min(
        costs[rows, choice].sum()
        for choice in product(range(4), repeat=layers)
        if sizes[rows, choice].sum() <= budget
    )
    assert costs[rows, chosen].sum() == pytest.approx(best, rel=1e-6, abs=1e-6 * costs.max())


def test_a_budget_below_the_smallest_choices_is_refused() -> None:
    with pytest.raises(InputError, match="expected at least 3, what the smallest choices weigh"):
        cheapest_allocation(np.ones((2, 2)), np.array([[1.0, 2.0], [2.0, 4.0]]), 2.5)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=12), st.floats(1.0, 8.0), st.integers(0, 10**6))
def test_random_allocation_meets_its_budget(weights: list[int], target: float, seed: int) -> None:
    bits = random_allocation(weights, target, np.random.default_rng(seed))
    total = sum(weights)
    left = target * total - sum(b * n for b, n in zip(bits, weights, strict=True))
    assert all(1 <= b <= 8 for b in bits)
    assert left >= -1e-6 * total
    # Nothing that is not full would still fit.
    assert all(n > left - 1e-6 * total for b, n in zip(bits, weights, strict=True) if b < 8)


def test_random_allocation_depends_on_its_generator_alone() -> None:
    weights = [10, 20, 30, 40]
    draws = [tuple(random_allocation(weights, 3.0, np.random.default_rng(s))) for s in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert len(set(draws)) > 1


def _exact_traces(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    names = ["0.weight", "2.weight"]
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weight: torch.Tensor, name: str) -> torch.Tensor:
        return F.cross_entropy(torch.func.functional_call(model, values | {name: weight}, (x,)), y)

    hessians = [torch.autograd.functional.hessian(lambda w, n=n: loss(w, n), values[n]) for n in names]
    return [
        float(h.reshape(values[n].numel(), -1).diagonal().sum()) for h, n in zip(hessians, names, strict=True)
    ]


def test_hutchinsons_estimate_is_the_exact_trace_of_each_layers_hessian() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(20, 3), torch.randint(0, 2, (20,))
    weights = [model[0].weight, model[2].weight]
    exact = _exact_traces(model, x, y)

    def estimate(samples: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return hessian_traces(lambda: F.cross_entropy(model(x), y), weights, samples, generator)

    assert estimate(800, 0).tolist() == pytest.approx(exact, rel=0.1)
    # The error falls with the root of the number of samples.
    few, many = (np.std([estimate(n, seed).numpy() for seed in range(12)], axis=0).mean() for n in (2, 32))
    assert 2 < few / many < 8


def test_a_diagonal_hessian_needs_one_sample() -> None:
    a, b = (nn.Parameter(torch.randn(5)) for _ in range(2))
    traces = hessian_traces(lambda: (3 * a**2).sum() + (b**2).sum(), [a, b], 1, torch.Generator())
    assert traces.tolist() == pytest.approx([30, 10])


def test_a_layer_that_the_loss_is_linear_in_has_trace_0() -> None:
    a, b = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3))
    traces = hessian_traces(lambda: (a**2).sum() + b.sum(), [a, b], 1, torch.Generator())
    assert traces.tolist() == pytest.approx([10, 0])


def test_rounding_error_falls_with_bits_and_beats_the_largest_weight_as_scale() -> None:
    weight = torch.randn(3000)
    errors = [rounding_error(weight, bits) for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    step = weight.abs().max() / 3
    assert errors[1] < float((lsq_quantize(weight, step, -3, 3) - weight).square().sum())
    assert rounding_error(torch.tensor([-0.5, 0.0, 0.5]), 1) == pytest.approx(0, abs=1e-9)


def test_sensitivity_is_mean_trace_times_error_and_always_positive() -> None:
    weights = [torch.randn(10), torch.randn(20)]
    table = sensitivities(weights, torch.tensor([5.0, -1.0]), [1, 2])
    expected = [5 / 10 * rounding_error(weights[0], bits) for bits in (1, 2)]
    assert table[0].tolist() == pytest.approx(expected)
    floor = [0.005 / 20 * rounding_error(weights[1], bits) for bits in (1, 2)]  # a thousandth of 5
    assert table[1].tolist() == pytest.approx(floor)


def test_fused_attention_has_a_trace() -> None:
    layer = nn.Linear(4, 4, bias=False)
    x = torch.randn(1, 1, 3, 4)

    def loss() -> torch.Tensor:
        q = layer(x)
        return F.scaled_dot_product_attention(q, q, q).square().sum()

    (trace,) = hessian_traces(loss, [layer.weight], 2, torch.Generator().manual_seed(0))
    assert torch.isfinite(trace)
    assert trace != 0
