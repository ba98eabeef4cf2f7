"""Energy is a difference of counters, or unavailable; an instance's share is an estimate."""

import pytest

from migperf.energy import between, idle_floor, per_item, split
from shared_core import InputError


def test_energy_is_the_counters_difference_in_joules():
    assert between(1_000_000, 1_250_000) == 250.0
    assert per_item(250.0, 1000) == 0.25


@pytest.mark.parametrize(("first", "last"), [(500, 100), (None, 5), (5, None)])
def test_a_counter_that_went_back_or_is_missing_makes_energy_unavailable(first, last):
    assert between(first, last) is None
    assert per_item(between(first, last), 10) is None


def test_no_energy_per_item_where_nothing_was_done():
    assert per_item(3.0, 0) is None


def test_the_split_adds_up_to_the_board_and_is_flagged_estimated():
    parts = split(100.0, {"3g@4": (0.8, 3), "1g@0": (0.4, 1), "2g@2": (0.0, 2)})
    assert sum(part.joules for part in parts.values()) == pytest.approx(100)
    assert parts["3g@4"].joules / parts["1g@0"].joules == pytest.approx(6)
    assert parts["2g@2"].joules == 0
    assert all(part.estimated for part in parts.values())


def test_there_is_no_split_without_a_total_or_activity():
    assert split(None, {"1g@0": (0.5, 1)}) == {}
    assert split(10.0, {"1g@0": (0.0, 1)}) == {}


def test_the_idle_floor_is_measured_from_the_same_counter():
    readings, now = iter([10_000, 130_000]), [0.0]
    floor = idle_floor(lambda: next(readings), 2.0, lambda: now[0], lambda s: now.__setitem__(0, now[0] + s))
    assert floor == 60.0
    with pytest.raises(InputError, match="idle"):
        idle_floor(lambda: 0, 0)
