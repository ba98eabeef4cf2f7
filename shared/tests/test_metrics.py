import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score

from shared_core.metrics import agreement, classification


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
