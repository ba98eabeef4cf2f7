"""The privacy ledger: a file that remembers what was spent, and stops a release that would spend too much."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from shared_core import InputError
from shared_core.files import write_json
from smm_dp.calibration import check_budget
from smm_dp.mechanism import SkellamMixture
from smm_dp.privacy import Accountant, RoundPrivacy
from smm_dp.rdp import Guarantee


class BudgetExceeded(RuntimeError):
    """The next release would exceed the privacy budget; it was not made, and nothing was charged."""


class PrivacyLedger:
    """An accountant with a budget, kept in a file.

    `charge` is called *before* a release. It writes the file, to disk, and returns; a process that is killed
    afterwards, or a machine that loses power, has paid for a release that nobody may have seen, never the
    other way round. Several processes may share the file: each charge reads it afresh, under a lock (a file
    beside it, `<name>.lock`).

    Args:
        path: The file; a missing one is started, an existing one is resumed. None keeps it in memory.
        epsilon: Budget of all releases together.
        delta: Budget.
        round_privacy: The kind of round that will be charged; a resumed ledger must have been opened for
            the same.

    Raises:
        InputError: The budget is impossible, the file is not a ledger, or was made for other parameters.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, epsilon: float, delta: float, round_privacy: RoundPrivacy
    ) -> None:
        check_budget(epsilon, delta)
        self.path = None if path is None else Path(path)
        self.epsilon, self.delta, self.round_privacy = epsilon, delta, round_privacy
        self.accountant = Accountant()
        if self.path is not None and self.path.exists():
            self.accountant = Accountant.from_state(self._read()["history"])

    @property
    def rounds(self) -> int:
        """Number of releases charged so far."""
        return sum(rounds for _, rounds in self.accountant.history)

    def spent(self) -> Guarantee:
        """Return what all releases so far cost."""
        return self.accountant.guarantee(
            self.delta, warn=False
        )  # early on, far below the budget, no order is tight

    def charge(self, rounds: int = 1) -> Guarantee:
        """Charge releases that are about to be made; return what all cost then.

        Raises:
            BudgetExceeded: They would exceed the budget; the release must not be made.
        """
        with self._locked():
            return self._charge(rounds)

    def _charge(self, rounds: int) -> Guarantee:
        if self.path is not None and self.path.exists():
            self.accountant = Accountant.from_state(self._read()["history"])
        after = self.accountant.guarantee(self.delta, also=[(self.round_privacy, rounds)], warn=False)
        if after.epsilon > self.epsilon:
            spent = self.spent()
            raise BudgetExceeded(
                f"stopped before release {self.rounds + 1}: epsilon would be {after.epsilon:.4f}, "
                "the budget is "
                f"{self.epsilon:g} at delta {self.delta:g} ({spent.epsilon:.4f} spent in "
                f"{self.rounds} releases)"
            )
        self.accountant.add(self.round_privacy, rounds)
        if self.path is not None:
            write_json(self.path, self._parameters() | {"history": self.accountant.state()})
            _sync_folder(self.path.resolve().parent)
        return after

    def check(self, mechanism: SkellamMixture) -> None:
        """Check that a mechanism gives what the ledger's rounds state.

        Raises:
            InputError: It clips to another bound, or its accounting is another; names which.
        """
        kind = self.round_privacy
        for field, theirs, ours in (
            ("clip", kind.clip, mechanism.clip),
            ("coordinate_bound", kind.coordinate_bound, mechanism.coordinate_bound),
            ("accounting", kind.accounting, mechanism.accounting),
        ):
            if theirs != ours:
                raise InputError(
                    f"the ledger was opened for {theirs}, the mechanism has {ours}", field=field, value=theirs
                )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if self.path is None:
            yield
            return
        try:
            place = self.path.resolve()  # two names of one file have one lock
            handle = open(place.with_name(place.name + ".lock"), "w")  # noqa: SIM115 closed below
        except OSError as error:
            raise InputError(f"cannot be locked: {error.strerror}", file=self.path) from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _parameters(self) -> dict:
        return {
            "format": "smm-dp privacy ledger 1",
            "epsilon": self.epsilon,
            "delta": self.delta,
            "round": asdict(self.round_privacy),
        }

    def _read(self) -> dict:
        try:
            data = json.loads(self.path.read_text()) if self.path else {}
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"is not a privacy ledger: {error}", file=self.path) from error
        if not isinstance(data, dict) or "history" not in data:
            raise InputError("is not a privacy ledger: it has no history", file=self.path)
        for key, value in self._parameters().items():
            if data.get(key) != value:
                raise InputError(
                    f"the ledger was made for {data.get(key)}; start a new one, whose budget then "
                    "comes on top, or "
                    "resume with the same parameters",
                    file=self.path,
                    field=key,
                    value=value,
                )
        return data


def _sync_folder(folder: Path) -> None:
    """Put the renaming of a file in a folder on disk too: without it, a power failure could undo a charge."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
