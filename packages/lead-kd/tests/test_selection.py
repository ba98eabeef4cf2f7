from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lead_kd.selection import LayerSchedule, select_layers
from shared_core import InputError


@given(st.integers(1, 24), st.integers(1, 12), st.integers(0, 999))
def test_random_pairs_are_sorted_on_both_sides_without_repetition(n, m, seed):
    for k in range(1, min(n, m) + 1):
        pairs = select_layers(n, m, k, generator=torch.Generator().manual_seed(seed))
        teacher, student = zip(*pairs, strict=True)
        assert list(teacher) == sorted(set(teacher))
        assert list(student) == sorted(set(student))
        assert len(pairs) == k
        assert set(teacher) <= set(range(n))
        assert set(student) <= set(range(m))


def test_every_layer_is_drawn_equally_often_the_last_too():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(6)
    for _ in range(3000):
        for teacher, _ in select_layers(6, 4, 2, generator=generator):
            counts[teacher] += 1
    torch.testing.assert_close(counts / 3000, torch.full((6,), 2 / 6), atol=0.04, rtol=0)


def test_the_papers_other_choices():
    """Student 2-6 with teacher 8-12, 1-6 with 7-12, and 2-6 with 1, 3, 5, 7, 9, counted from 1."""
    assert select_layers(12, 6, 5, "last") == [(7, 1), (8, 2), (9, 3), (10, 4), (11, 5)]
    assert select_layers(12, 6, 6, "last") == [(6, 0), (7, 1), (8, 2), (9, 3), (10, 4), (11, 5)]
    assert select_layers(12, 6, 5, "skip") == [(0, 1), (2, 2), (4, 3), (6, 4), (8, 5)]


@pytest.mark.parametrize("k", [0, 3])
def test_k_is_at_most_the_layers_of_either(k):
    with pytest.raises(
        InputError, match=f"expected 1 to 2: the teacher has 6 layers and the student 2 .got {k}"
    ):
        select_layers(6, 2, k, "last")


def test_pairs_are_drawn_anew_every_so_many_steps_from_seed_and_step_alone():
    schedule = LayerSchedule(12, 6, 3, every=10, seed=1)
    again = LayerSchedule(12, 6, 3, every=10, seed=1)
    draws = [schedule.pairs(step) for step in range(200)]
    assert draws == [again.pairs(step) for step in range(200)]
    assert all(draws[step] == draws[step - step % 10] for step in range(200))
    assert len({tuple(draws[step]) for step in range(0, 200, 10)}) > 10
    assert schedule.pairs(150) == draws[150]  # not in order: nothing is remembered
    other = LayerSchedule(12, 6, 3, every=10, seed=2)
    assert draws != [other.pairs(step) for step in range(200)]


def test_pairs_of_ones_own_hold_for_all_steps_and_are_checked():
    schedule = LayerSchedule(12, 6, fixed=[(11, 5)])
    assert schedule.pairs(0) == schedule.pairs(999) == [(11, 5)]
    with pytest.raises(InputError, match=r"expected a teacher layer 0 to 11 and a student layer 0 to 5"):
        LayerSchedule(12, 6, fixed=[(12, 5)])
    with pytest.raises(InputError, match="expected 1 to 6"):
        LayerSchedule(12, 6, 7)
