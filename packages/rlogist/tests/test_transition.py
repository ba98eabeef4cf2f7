from __future__ import annotations

import pytest
import torch
from feature_worlds import modules
from hypothesis import given
from hypothesis import strategies as st

from rlogist.modules import GlobalUpdate
from rlogist.rewards import default_discount, reward_of
from rlogist.transition import episode_length, look
from shared_core import InputError


class Sum(GlobalUpdate):
    """f_global by hand: s_i + 10 s_a + 100 v_a."""

    def __init__(self):
        super().__init__(1)

    def forward(self, states, before, after):
        return states + 10 * before.unsqueeze(1) + 100 * after.unsqueeze(1)


def test_a_step_by_hand():
    states = torch.tensor([[[1.0], [2.0], [3.0]]])
    observed = torch.tensor([[True, False, False]])
    after, flags = look(states, observed, torch.tensor([1]), torch.tensor([[5.0]]), Sum())
    # row 0 was looked at: stays. Row 1 is a: v_a. Row 2: 3 + 10*2 (s_a before the look) + 100*5.
    assert after.flatten().tolist() == [1.0, 5.0, 523.0]
    assert flags.tolist() == [[True, True, False]]
    assert states.flatten().tolist() == [1.0, 2.0, 3.0]
    assert observed.tolist() == [[True, False, False]]


def test_without_update_only_the_chosen_row_changes_and_targeted_moves_what_is_alike():
    states = torch.tensor([[[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
    args = (states, torch.zeros(1, 4, dtype=torch.bool), torch.tensor([0]), torch.tensor([[7.0, 7.0]]))
    f = modules(dim=2).f_global
    none, _ = look(*args, f, "none")
    assert torch.equal(none[0, 1:], states[0, 1:])
    targeted, _ = look(*args, f, "targeted")
    whole, _ = look(*args, f, "global")
    # Cosines with row 0: 0.999, 0, -1.
    assert torch.equal(targeted[0, 1], whole[0, 1])
    assert torch.equal(targeted[0, 2:], states[0, 2:])
    assert not torch.equal(whole[0, 2:], states[0, 2:])


@given(st.integers(0, 10_000))
def test_observed_rows_are_exactly_what_looks_gave(seed):
    g = torch.Generator().manual_seed(seed)
    states, seen = torch.randn(2, 6, 3, generator=g), torch.randn(2, 6, 3, generator=g)
    observed, f = torch.zeros(2, 6, dtype=torch.bool), modules(dim=3).f_global
    for action in torch.randperm(6, generator=g)[:4]:
        rows = torch.tensor([action, 5 - action])
        states, observed = look(states, observed, rows, seen[torch.arange(2), rows], f)
    assert torch.equal(states[observed], seen[observed])


@pytest.mark.parametrize(
    ("regions", "rho", "looks"),
    [(200, 0.1, 20), (70, 0.1, 7), (71, 0.1, 8), (1, 0.1, 1), (5, 1.0, 5), (0, 0.2, 0)],
)
def test_episode_length(regions, rho, looks):
    assert episode_length(regions, rho) == looks


@pytest.mark.parametrize("rho", [0.0, -0.1, 1.01, float("nan")])
def test_rho_out_of_range_is_told(rho):
    with pytest.raises(InputError, match="rho: expected a share of regions above 0 and at most 1"):
        episode_length(10, rho)


def test_rewards_by_hand():
    before, after = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]])
    label, done, going = torch.tensor([1]), torch.tensor([True]), torch.tensor([False])
    ce_before, ce_after = 0.6931472, 0.1269280  # log 2; log(1 + e^-2)
    assert reward_of("terminal", before, after, label, done).item() == 1
    assert reward_of("terminal", before, after, label, going).item() == 0
    assert reward_of("terminal", before, after, torch.tensor([0]), done).item() == 0
    assert reward_of("neg_ce", before, after, label, going).item() == pytest.approx(-ce_after, abs=1e-6)
    gain = reward_of("delta_ce", before, after, label, going).item()
    assert gain == pytest.approx(ce_before - ce_after, abs=1e-6)
    assert (default_discount("delta_ce"), default_discount("terminal")) == (1.0, 0.99)
