"""Averages counted by hand, and schemes brought to their target."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csq.budget import Average, settle, top_run


def row(text: str) -> torch.Tensor:
    """Most significant plane first, as masks are read."""
    return torch.tensor([letter == "1" for letter in reversed(text)])


def text_of(mask: torch.Tensor) -> str:
    return "".join("01"[on] for on in reversed(mask.tolist()))


def test_three_ways_of_counting():
    scheme = torch.stack([row("11111111"), row("00010010")])
    assert float(Average([8, 800], 8, "weights")(scheme)) == pytest.approx((8 * 8 + 800 * 2) / 808)
    assert float(Average([8, 800], 8, "layers")(scheme)) == 5
    assert float(Average([8, 800], 8, "bytes")(scheme)) == pytest.approx((8 * 9 + 800 * 4) / 808)


@pytest.mark.parametrize(
    ("scheme", "run"),
    [("01001000", "01100000"), ("00000101", "00000110"), ("11111111", "11111111"), ("00000000", "00000000")],
)
def test_runs_have_as_many_planes_and_hang_from_the_top_one(scheme, run):
    assert text_of(top_run(row(scheme))) == run


@given(
    seed=st.integers(0, 10_000),
    target=st.floats(1.2, 7.5),
    budget=st.sampled_from(["weights", "layers", "bytes"]),
    contiguous=st.booleans(),
)
def test_settling_never_goes_away_from_the_target_nor_past_it(seed, target, budget, contiguous):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randn(9, 8, generator=generator)
    scheme = masks >= 0
    scheme[~scheme.any(1), -1] = True
    if contiguous:
        scheme = torch.stack([top_run(each) for each in scheme])
    average = Average(torch.randint(1, 100, (9,), generator=generator).tolist(), 8, budget)
    settled, reached = settle(scheme, masks, average, target, contiguous=contiguous)
    assert reached == pytest.approx(float(average(settled)))
    before, after = float(average(scheme)) - target, float(average(settled)) - target
    assert abs(after) <= max(abs(before), 0.02 * target + 1e-9)
    assert settled.any(1).all()
    if contiguous:
        assert all(torch.equal(top_run(each), each) for each in settled)


def test_settling_spends_no_plane_that_does_not_change_the_count():
    # By bytes, an inner plane of a run costs nothing: 10101 and 11111 both take 6 bits.
    masks = torch.full((1, 8), 0.5)
    masks[0, 1] = 0.01
    settled, _ = settle(row("00011111")[None], masks, Average([10], 8, "bytes"), 5.0)
    assert text_of(settled[0])[3:] != "11101"
    assert float(Average([10], 8, "bytes")(settled)) == 5


def test_settling_counts_by_what_is_known_of_a_layer():
    masks = torch.tensor([[0.5, 0.5, 0.5, 0.01]] * 2)
    scheme = torch.ones(2, 4, dtype=torch.bool)

    def cost(layer: int, mask: tuple[bool, ...]) -> float:
        return sum(mask) if layer else 1.0  # the first layer's weights are few values, whatever its mask

    settled, reached = settle(scheme, masks, Average([10, 10], 4, "weights"), 2.0, cost=cost)
    assert (settled.sum(1).tolist(), reached) == ([4, 3], 2.0)
