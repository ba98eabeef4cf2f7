"""Plug-in points for other libraries' accounting: Opacus and dp-accounting.

Both are imported where they are used, so the package does not need them.
"""

import math
from functools import cache
from typing import TYPE_CHECKING, Any

from shared_core import InputError
from smm_dp.mechanism import Accounting
from smm_dp.privacy import Accountant, Adjacency, RoundPrivacy
from smm_dp.rdp import Guarantee

if TYPE_CHECKING:
    from opacus.accountants.accountant import IAccountant


def noise_multiplier(mu: float, clip: float) -> float:
    """Return √(2μ/c): standard deviation of the noise over the sensitivity, the way Opacus counts noise."""
    return math.sqrt(2 * mu / clip)


def opacus_accountant(
    clip: float,
    coordinate_bound: float,
    accounting: Accounting = "paper",
    *,
    mechanism: str = "skellam-mixture",
) -> "type[IAccountant]":
    """Return an Opacus accountant class for the Skellam mixture, and register it under `mechanism`.

    Opacus' interface is Gaussian-shaped: a step says noise multiplier and sample rate. The multiplier is read
    as √(2μ/c), which with the clip and coordinate bound given here says all about a round.

    Args:
        clip: c, grid units squared.
        coordinate_bound: Δ∞.
        accounting: "paper" or "numeric".
        mechanism: Name for `opacus.accountants.create_accountant`.

    Returns:
        The class; `PrivacyEngine(accountant=mechanism)` finds it by name.

    Raises:
        InputError: opacus is not installed.
    """
    try:
        from opacus.accountants.accountant import IAccountant
        from opacus.accountants.registry import register_accountant
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'smm-dp[opacus]'") from error

    class SkellamMixtureAccountant(IAccountant):
        """Accounts for Skellam mixture noise where Opacus expects Gaussian noise."""

        def __init__(self) -> None:
            self.history: list[tuple[float, float, int]] = []

        def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
            steps = 1
            if self.history and self.history[-1][:2] == (noise_multiplier, sample_rate):
                steps += self.history.pop()[2]
            self.history.append((noise_multiplier, sample_rate, steps))

        def guarantee(self, delta: float) -> Guarantee:
            accountant = Accountant()
            for multiplier, rate, steps in self.history:
                mu = multiplier**2 * clip / 2
                accountant.add(
                    RoundPrivacy(clip, mu, coordinate_bound, accounting, sampling_rate=rate), steps
                )
            return accountant.guarantee(delta)

        def get_epsilon(self, delta: float, *args: Any, **kwargs: Any) -> float:
            return self.guarantee(delta).epsilon

        def __len__(self) -> int:
            return sum(steps for _, _, steps in self.history)

        @classmethod
        def mechanism(cls) -> str:
            return mechanism

    register_accountant(mechanism, SkellamMixtureAccountant, force=True)
    return SkellamMixtureAccountant


@cache
def _dp_accounting_classes() -> tuple[type, type]:
    try:
        import attrs
        from dp_accounting import dp_event
        from dp_accounting.privacy_accountant import NeighboringRelation
        from dp_accounting.rdp import RdpAccountant
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'smm-dp[accounting]'") from error

    relations = {
        "zero-out": NeighboringRelation.REPLACE_SPECIAL,
        "add-remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace-one": NeighboringRelation.REPLACE_ONE,
    }

    @attrs.frozen
    class SkellamMixtureDpEvent(dp_event.DpEvent):
        """One round of the Skellam mixture mechanism, sampling included."""

        round_privacy: RoundPrivacy

    class SkellamMixtureRdpAccountant(RdpAccountant):
        """An RDP accountant at integer orders that also knows `SkellamMixtureDpEvent`."""

        def __init__(self, max_order: int, adjacency: Adjacency) -> None:
            super().__init__(list(range(2, max_order + 1)), relations[adjacency])
            self._adjacency = adjacency

        def _maybe_compose(self, event: Any, count: int, do_compose: bool) -> Any:
            if isinstance(event, SkellamMixtureDpEvent):
                if event.round_privacy.adjacency != self._adjacency:
                    return self.CompositionErrorDetails(
                        invalid_event=event,
                        error_message=f"this accountant is for {self._adjacency} adjacency",
                    )
                if do_compose:
                    self._rdp = self._rdp + count * event.round_privacy.rdp(int(self._orders[-1]))
                return None
            return super()._maybe_compose(event, count, do_compose)

    return SkellamMixtureDpEvent, SkellamMixtureRdpAccountant


def dp_event(round_privacy: RoundPrivacy) -> Any:
    """Return a dp-accounting event of one round, to be composed with other mechanisms' events.

    Sampling is part of `round_privacy`; do not wrap the event in a `PoissonSampledDpEvent`.
    """
    return _dp_accounting_classes()[0](round_privacy)


def rdp_accountant(max_order: int = 128, adjacency: Adjacency = "zero-out") -> Any:
    """Return a `dp_accounting.rdp.RdpAccountant` that also understands `dp_event`.

    Args:
        max_order: Largest order.
        adjacency: Of all that is composed; events of rounds with another one are refused. dp-accounting calls
            them REPLACE_SPECIAL (zero-out), ADD_OR_REMOVE_ONE and REPLACE_ONE.
    """
    return _dp_accounting_classes()[1](max_order, adjacency)
