import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score

from shared_core.metrics import agreement, classification, sqnr_db


def scores(samples: int, classes: int, seed: int) -> torch.Tensor:
    """Distinct scores in every row, so that no metric has to break ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(classes, generator=generator) for _ in range(samples)]).float()


sizes = {"samples": st.integers(1, 40), "classes": st.integers(3, 8), "seed": st.integers(0, 2**31)}


@given(**sizes)
def test_top_k_accuracy_is_scikit_learns(samples, classes, seed):
    logits = scores(samples, classes, seed)
    labels = torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(seed))
    result = classification(logits, labels, topk=(1, 2))
    for k in (1, 2):
        expected = top_k_accuracy_score(labels.numpy(), logits.numpy(), k=k, labels=range(classes))
        assert result[f"top{k}"] == pytest.approx(expected)


def test_top_k_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([0, 1, 2, 2])
    assert classification(logits, labels, topk=(1, 2, 3, 4)) == {"top1": 0.5, "top2": 0.75, "top3": 1.0}


@given(**sizes)
def test_agreement_is_a_count_of_equal_argmaxes(samples, classes, seed):
    first, second = scores(samples, classes, seed), scores(samples, classes, seed + 1)
    equal = sum(int(np.argmax(a) == np.argmax(b)) for a, b in zip(first.numpy(), second.numpy(), strict=True))
    assert agreement(first, second) == pytest.approx(equal / samples)
    assert agreement(first, 2 * first + 1) == 1.0


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(0.001, 1)), min_size=1, max_size=20))
def test_sqnr_is_the_ratio_of_energies(pairs):
    reference = torch.tensor([value for value, _ in pairs], dtype=torch.float64)
    noise = torch.tensor([error for _, error in pairs], dtype=torch.float64)
    signal_energy = math.fsum(value * value for value, _ in pairs)
    noise_energy = math.fsum(((value + error) - value) ** 2 for value, error in pairs)
    expected = 10 * math.log10(signal_energy / noise_energy) if signal_energy else -math.inf
    assert sqnr_db(reference, reference + noise) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_sqnr_gains_twenty_decibels_for_a_tenth_of_the_noise():
    reference, noise = torch.linspace(-1, 1, 50), torch.linspace(0.01, 0.02, 50)
    gain = sqnr_db(reference, reference + noise / 10) - sqnr_db(reference, reference + noise)
    assert gain == pytest.approx(20, abs=1e-3)


def test_sqnr_of_equal_tensors_is_infinite():
    assert sqnr_db(torch.ones(3, 2), torch.ones(3, 2)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="expected finite scores"):
        classification(torch.tensor([[1.0, math.nan]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"labels: expected 0 to 1, got 0 to 2"):
        classification(torch.ones(2, 2), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"labels: expected 0 to 1, got -1 to 0"):
        classification(torch.ones(2, 2), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r"at least one sample and class, got shape \(0, 3\)"):
        agreement(torch.ones(0, 3), torch.ones(0, 3))


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    classification(scores(4, 3, 0), torch.tensor([0, 1, 2, 0]))
    assert torch.equal(before, torch.get_rng_state())
