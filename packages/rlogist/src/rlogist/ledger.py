"""The read ledger: what was read from a slide, at which level, why, and how long it took.

A method that promises to read little has to show what it read. Every read of `Slide` goes through a ledger,
cached answers do not (nothing was read), and every result carries the ledger that paid for it.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Literal, get_args

from shared_core import InputError

Purpose = Literal["segment", "scan", "deep", "prefetch", "picture"]
"""Why pixels were read. `prefetch` is a deep block read ahead of a decision that may fall otherwise."""


@dataclass
class Tally:
    """Sums over reads: how many, how many pixels (of the level that was read), seconds of waiting."""

    reads: int = 0
    pixels: int = 0
    seconds: float = 0.0

    def add(self, other: "Tally") -> None:
        """Add another tally to this one."""
        self.reads += other.reads
        self.pixels += other.pixels
        self.seconds += other.seconds


class ReadLedger:
    """Counts reads by purpose and level, and notes what could not be read. Threads may share it.

    >>> ledger = ReadLedger()
    >>> with ledger.reading("deep", level=0, width=1024, height=1024):
    ...     pass  # the read itself
    >>> ledger.total("deep").pixels
    1048576
    """

    def __init__(self) -> None:
        self._tallies: dict[tuple[Purpose, int], Tally] = {}
        self._lock = threading.Lock()
        self.notes: list[str] = []

    @contextmanager
    def reading(self, purpose: Purpose, level: int, width: int, height: int) -> Iterator[None]:
        """Time the block as one read of `width` x `height` pixels. A read that fails counts too."""
        started = perf_counter()
        try:
            yield
        finally:
            self.record(purpose, level, Tally(1, width * height, perf_counter() - started))

    def record(self, purpose: Purpose, level: int, tally: Tally) -> None:
        """Add reads that were made elsewhere."""
        with self._lock:
            self._tallies.setdefault((purpose, level), Tally()).add(tally)

    def note(self, text: str) -> None:
        """Keep a remark about a read, such as a region that could not be decoded. Said once."""
        with self._lock:
            if text not in self.notes:
                self.notes.append(text)

    def total(self, *purposes: Purpose) -> Tally:
        """Sum over all levels, for some purposes or (without arguments) for all."""
        found = Tally()
        for (purpose, _), tally in self.entries().items():
            if not purposes or purpose in purposes:
                found.add(tally)
        return found

    def levels(self) -> dict[int, Tally]:
        """Sum over purposes, for each level that was read."""
        found: dict[int, Tally] = {}
        for (_, level), tally in self.entries().items():
            found.setdefault(level, Tally()).add(tally)
        return dict(sorted(found.items()))

    def entries(self) -> dict[tuple[Purpose, int], Tally]:
        """A copy of all sums, by purpose and level."""
        with self._lock:
            return {key: Tally(**asdict(tally)) for key, tally in self._tallies.items()}

    def add(self, other: "ReadLedger") -> None:
        """Add all that another ledger holds to this one."""
        for (purpose, level), tally in other.entries().items():
            self.record(purpose, level, tally)
        for text in other.notes:
            self.note(text)

    def since(self, before: "ReadLedger") -> "ReadLedger":
        """What was read after `before`, an earlier `copy` of this ledger."""
        found = ReadLedger()
        earlier = before.entries()
        for key, now in self.entries().items():
            then = earlier.get(key, Tally())
            if now.reads > then.reads:
                rest = Tally(now.reads - then.reads, now.pixels - then.pixels, now.seconds - then.seconds)
                found.record(*key, rest)
        found.notes = [text for text in self.notes if text not in before.notes]
        return found

    def copy(self) -> "ReadLedger":
        """The state of now, which later reads do not change."""
        found = ReadLedger()
        found.add(self)
        return found

    def to_dict(self) -> dict[str, object]:
        """The ledger as JSON has it: `reads` (purpose, level, reads, pixels, seconds) and `notes`."""
        rows = [
            {"purpose": purpose, "level": level, **asdict(tally)}
            for (purpose, level), tally in sorted(self.entries().items())
        ]
        return {"reads": rows, "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, object]) -> "ReadLedger":
        """Make a ledger from what `to_dict` gave.

        Raises:
            InputError: A row or the whole has another form.
        """
        found = cls()
        rows, notes = stored.get("reads"), stored.get("notes", [])
        if not isinstance(rows, list) or not isinstance(notes, list):
            raise InputError("expected a ledger with lists `reads` and `notes`", value=dict(stored))
        for row in rows:
            try:
                purpose, level = row["purpose"], int(row["level"])
                tally = Tally(int(row["reads"]), int(row["pixels"]), float(row["seconds"]))
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(
                    "expected purpose, level, reads, pixels, seconds", field="reads", value=row
                ) from error
            if purpose not in get_args(Purpose):
                raise InputError(
                    f"expected one of {', '.join(get_args(Purpose))}", field="purpose", value=purpose
                )
            found.record(purpose, level, tally)
        for text in notes:
            found.note(str(text))
        return found

    def __getstate__(self) -> dict[str, object]:
        return self.to_dict()

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(ReadLedger.from_dict(state).__dict__)

    def __repr__(self) -> str:
        parts = [
            f"{purpose} level {level}: {tally.reads} reads, {tally.pixels} pixels"
            for (purpose, level), tally in sorted(self.entries().items())
        ]
        return f"ReadLedger({'; '.join(parts)})"
