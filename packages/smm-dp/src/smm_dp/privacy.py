"""What is protected, from whom, and what a sequence of rounds costs.

A round is described by `RoundPrivacy`; `Accountant` adds rounds up. The adjacency and the observer are
decisions of the user and part of every statement about privacy, so they are named here and in reports.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float64

from shared_core import InputError
from smm_dp.mechanism import Accounting
from smm_dp.numeric import LABEL, certified_rates
from smm_dp.rdp import (
    ORDERS,
    Guarantee,
    paper_order_allowed,
    paper_orders,
    paper_rdp,
    poisson_sampled,
    poisson_sampled_reverse,
    to_epsilon,
)

Adjacency = Literal["zero-out", "replace-one", "add-remove"]
Observer = Literal["model-release", "server"]
NoiseShare = Literal["constant-total", "fixed-each"]

NUMERIC_MAX_ORDER = 128
"""Largest order of numeric accounting: its table is computed, not a formula."""


class AccountingWarning(UserWarning):
    """A privacy statement is true but not as good as it could be, or is easily misread."""


@dataclass(frozen=True)
class RoundPrivacy:
    """One round of the mechanism, as far as privacy is concerned.

    Args:
        clip: c, bound of Σφ(x) (paper) or Σx² (numeric), grid units squared.
        mu: Total Skellam parameter of the noise that the observer does not know: of honest participants who
            surely take part (see `honest_mu`).
        coordinate_bound: Δ∞, bound of |x_i|.
        accounting: "paper" (default of the package) or "numeric".
        sampling_rate: q, chance that a participant takes part, independent of everything (Poisson sampling).
        adjacency: "zero-out": a vector is replaced by zero, its noise is still added. "replace-one": it is
            replaced by another one. "add-remove": the participant is absent; only with constant total noise,
            and only against an observer who does not see who takes part.
        observer: "model-release" sees the results only. "server" also knows who takes part in which round, so
            sampling hides nothing from it: the cost is counted per participation, with rate 1.
        noise_share: "constant-total": who takes part divides `mu` among themselves, whoever they are
            (mu/count).
            "fixed-each": each adds a fixed amount, and the total varies with the number of participants.

    Raises:
        InputError: A value is out of range, or the combination has no proof.
    """

    clip: float
    mu: float
    coordinate_bound: float
    accounting: Accounting = "paper"
    sampling_rate: float = 1.0
    adjacency: Adjacency = "zero-out"
    observer: Observer = "model-release"
    noise_share: NoiseShare = "constant-total"

    def __post_init__(self) -> None:
        for field in ("clip", "mu", "coordinate_bound"):
            if not (getattr(self, field) > 0 and math.isfinite(getattr(self, field))):
                raise InputError("expected a positive finite number", field=field, value=getattr(self, field))
        if not 0 < self.sampling_rate <= 1:
            raise InputError(
                "a sampling rate lies in (0, 1]", field="sampling_rate", value=self.sampling_rate
            )
        choices = {
            "accounting": Accounting,
            "adjacency": Adjacency,
            "observer": Observer,
            "noise_share": NoiseShare,
        }
        for field, kind in choices.items():
            if getattr(self, field) not in get_args(kind):
                raise InputError(f"expected one of {get_args(kind)}", field=field, value=getattr(self, field))
        if self.adjacency == "add-remove" and self.noise_share == "fixed-each":
            raise InputError(
                "with add-remove adjacency the total noise would betray an absent participant: its "
                "law differs in "
                "every coordinate, which no bound here covers. Use noise_share='constant-total' "
                "(mu/count each) or "
                "adjacency='zero-out'",
                field="adjacency",
            )
        if self.adjacency == "add-remove" and self.observer == "server":
            raise InputError(
                "the server sees who takes part, so it sees that a participant is absent: use "
                "adjacency='zero-out' for this observer",
                field="adjacency",
                value=self.adjacency,
            )
        if self.effective_rate < 1 and self.adjacency == "replace-one":
            raise InputError(
                "amplification by sampling is proved here for zero-out and add-remove adjacency only: use "
                "sampling_rate=1 for replace-one",
                field="sampling_rate",
                value=self.sampling_rate,
            )
        if self.effective_rate < 1 and self.noise_share == "fixed-each":
            raise InputError(
                "amplification by sampling needs the same total noise whether or not a participant "
                "is drawn: use "
                "noise_share='constant-total' (mu/count each) or sampling_rate=1",
                field="noise_share",
            )

    @property
    def effective_rate(self) -> float:
        """The rate that amplification may use: 1 for an observer who knows who takes part."""
        return 1.0 if self.observer == "server" else self.sampling_rate

    def rdp(self, max_order: int | None = None) -> Float64[np.ndarray, " n"]:
        """Return τ(α) of one round for α = 2 .. max_order; infinite where no proof covers it."""
        if self.accounting == "paper":
            return self._paper(max_order or ORDERS[-1])
        return self._numeric(max_order or NUMERIC_MAX_ORDER)

    def _paper(self, max_order: int) -> Float64[np.ndarray, " n"]:
        orders = range(2, max_order + 1)
        clip, bound = self.clip, math.ceil(self.coordinate_bound)
        if (
            self.adjacency == "replace-one"
        ):  # E|Y − Y'|² ≤ 2E|Y|² + 2E|Y'|², and the shift reaches twice the bound
            clip, bound = 4 * clip, 2 * bound
        paper_orders(self.mu, bound, orders[:1])  # an error that names the mu needed, where none is allowed
        rdp = np.array([paper_rdp(order, clip, self.mu) for order in orders])
        allowed = np.array([paper_order_allowed(order, self.mu, bound) for order in orders])
        return np.where(allowed, poisson_sampled(rdp, self.effective_rate), np.inf)

    def _numeric(self, max_order: int) -> Float64[np.ndarray, " n"]:
        if self.adjacency == "replace-one":  # weak triangle inequality through the zero vector (Mironov 2017)
            rates = certified_rates(self.mu, self.coordinate_bound, 2 * max_order)
            a = np.arange(2, max_order + 1)
            return self.clip * ((a - 0.5) / (a - 1) * rates.forward[2 * a - 2] + rates.reverse[2 * a - 3])
        rates = certified_rates(self.mu, self.coordinate_bound, max_order)
        forward, reverse = rates.forward * self.clip, rates.reverse * self.clip
        rate = self.effective_rate
        return np.maximum(
            poisson_sampled(forward, rate), poisson_sampled_reverse(reverse, float(forward[0]), rate)
        )

    def assumptions(self) -> list[str]:
        """Return what has to be true for the guarantee, one sentence each, for reports."""
        unit = {
            "zero-out": (
                "Two runs are compared that differ in one participant's vector being zero; "
                "its noise is still added."
            ),
            "replace-one": "Two runs are compared that differ in one participant's vector being another one.",
            "add-remove": (
                "Two runs are compared that differ in one participant being absent; the "
                "total noise is the same."
            ),
        }[self.adjacency]
        seen = {
            "model-release": (
                "The guarantee holds against whoever sees the results but not who took part in a round."
            ),
            "server": (
                "The guarantee holds against the server, which knows who takes part: no "
                "amplification by sampling."
            ),
        }[self.observer]
        out = [
            unit,
            seen,
            f"Noise of honest participants adds up to at least mu = {self.mu:.6g} (variance 2 mu).",
        ]
        if self.effective_rate < 1:
            out.append(
                f"Each participant takes part with chance {self.sampling_rate:g}, independently; "
                "sums are divided by "
                "the expected number, and those who take part share one constant total noise."
            )
        out.append("Participants keep their rounding coins and their noise to themselves.")
        out.append(
            "Nobody drops out once a round has begun: that it is given up would show who took part."
            if self.adjacency == "add-remove"
            else "Whether a participant drops out does not depend on its vector."
        )
        out.append(
            "Accounting: the paper's bound, at orders whose conditions hold at the rounded coordinate bound."
            if self.accounting == "paper"
            else f"Accounting: certified numeric divergence ({LABEL})."
        )
        return out


def honest_mu(mu_each: float, participants: int, *, dropouts: int = 0, colluders: int = 0) -> float:
    """Return the noise that surely protects a participant: of those who neither drop out nor collude.

    Args:
        mu_each: Skellam parameter of one participant's noise.
        participants: Number who start the round.
        dropouts: Number who may drop out; the round is given up below that.
        colluders: Number who may tell the observer their noise.

    Raises:
        InputError: Nobody is left.

    >>> honest_mu(5.95, 240, dropouts=24)
    1285.2
    """
    left = participants - dropouts - colluders
    if left < 1:
        raise InputError(
            "no honest participant is left to add noise", field="participants", value=participants
        )
    return mu_each * left


def _check_adjacency(first: RoundPrivacy, kind: RoundPrivacy) -> None:
    if first.adjacency != kind.adjacency:
        raise InputError(
            f"the rounds before protect against {first.adjacency}: statements about different adjacencies do "
            "not add up",
            field="adjacency",
            value=kind.adjacency,
        )


class Accountant:
    """Adds up rounds and says what they cost together.

    >>> accountant = Accountant()
    >>> kind = RoundPrivacy(clip=4096, mu=240 * 5.95, coordinate_bound=4, sampling_rate=0.004)
    >>> accountant.add(kind, rounds=1000)
    >>> spent = accountant.guarantee(delta=1e-5)
    >>> round(spent.epsilon, 6), spent.order
    (2.998798, 5)
    """

    def __init__(self) -> None:
        self._history: list[tuple[RoundPrivacy, int]] = []

    @property
    def history(self) -> tuple[tuple[RoundPrivacy, int], ...]:
        """Kinds of rounds and how many of each, in order."""
        return tuple(self._history)

    def add(self, round_privacy: RoundPrivacy, rounds: int = 1) -> None:
        """Charge `rounds` rounds.

        Raises:
            InputError: No round at all, or one of another adjacency than those before.
        """
        if rounds < 1:
            raise InputError("expected at least 1 round", field="rounds", value=rounds)
        if self._history:
            _check_adjacency(self._history[0][0], round_privacy)
        if self._history and self._history[-1][0] == round_privacy:
            rounds += self._history.pop()[1]
        self._history.append((round_privacy, rounds))

    def rdp(self, also: Sequence[tuple[RoundPrivacy, int]] = ()) -> Float64[np.ndarray, " n"]:
        """Return the composed divergence at orders 2, 3, ... of the history and of `also`."""
        history = [*self._history, *also]
        for kind, _ in history:
            _check_adjacency(history[0][0], kind)
        paper_only = all(kind.accounting == "paper" for kind, _ in history)
        top = ORDERS[-1] if paper_only else NUMERIC_MAX_ORDER
        total = np.zeros(top - 1)
        for kind, rounds in history:
            total += rounds * kind.rdp(top)
        return total

    def guarantee(
        self, delta: float, also: Sequence[tuple[RoundPrivacy, int]] = (), *, warn: bool = True
    ) -> Guarantee:
        """Return (epsilon, delta) of all rounds so far, and of those in `also` if they were added.

        Args:
            delta: At which epsilon is wanted.
            also: Further rounds.
            warn: Whether to warn where epsilon is true but not tight.

        Warns:
            AccountingWarning: The best order is the largest that was tried.
        """
        if not self._history and not also:
            return Guarantee(0.0, delta, ORDERS[0], at_edge=False)
        rdp = self.rdp(also)
        spent = to_epsilon(range(2, rdp.size + 2), rdp, delta)
        if spent.at_edge and warn:
            warnings.warn(
                f"the best order {spent.order} is the largest one tried: epsilon {spent.epsilon:.4g} "
                "is true, not tight",
                AccountingWarning,
                stacklevel=2,
            )
        return spent

    def state(self) -> list[dict]:
        """Return the history as plain data; `from_state` reads it."""
        return [{"round": asdict(kind), "rounds": rounds} for kind, rounds in self._history]

    @classmethod
    def from_state(cls, state: Sequence[dict]) -> "Accountant":
        """Return an accountant with that history.

        Raises:
            InputError: An entry is not one that `state` writes.
        """
        accountant = cls()
        for entry in state:
            try:
                accountant.add(RoundPrivacy(**entry["round"]), int(entry["rounds"]))
            except (KeyError, TypeError) as error:
                raise InputError(
                    f"not an entry of a privacy history: {error}", field="history", value=entry
                ) from error
        return accountant
