"""Energy: the difference of the board's counter at the edges of the window; by instance it is an estimate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter, sleep

from shared_core import InputError


def between(first_mj: float | None, last_mj: float | None) -> float | None:
    """Return the joules between two readings of the board's counter of millijoules.

    Returns:
        None where a reading is missing, or the counter went back: the driver was loaded anew, and what was
        used in between is unknown.

    >>> between(5_000, 12_500), between(12_500, 40)
    (7.5, None)
    """
    if first_mj is None or last_mj is None or last_mj < first_mj:
        return None
    return (last_mj - first_mj) / 1000


def per_item(joules: float | None, items: float) -> float | None:
    """Return joules per item, None where the energy is unavailable or nothing was done."""
    return None if joules is None or items <= 0 else joules / items


@dataclass(frozen=True)
class Estimate:
    """Joules of one instance, which no counter measures.

    Attributes:
        joules: The instance's part of the board's total.
        estimated: Always true: only the board is measured.
        model: How it was split.
    """

    joules: float
    estimated: bool = True
    model: str = "board total by SM activity x slices"


def split(board_joules: float | None, parts: Mapping[str, tuple[float, int]]) -> dict[str, Estimate]:
    """Split the board's energy among its instances in proportion to activity times slices.

    Args:
        board_joules: Of the whole board, idle floor included; None gives nothing.
        parts: Instance -> activity of its SMs in 0 to 1, compute slices.
    """
    weights = {name: activity * slices for name, (activity, slices) in parts.items()}
    total = sum(weights.values())
    if board_joules is None or total <= 0:
        return {}
    return {name: Estimate(board_joules * weight / total) for name, weight in weights.items()}


def idle_floor(
    read_mj: Callable[[], float | None],
    seconds: float = 2.0,
    clock: Callable[[], float] = perf_counter,
    rest: Callable[[float], None] = sleep,
) -> float | None:
    """Measure the board's power in watts while nothing runs, to be shown beside what a run used.

    Args:
        read_mj: Reads the board's counter.
        seconds: How long to measure.
        clock: Seconds.
        rest: Waits.
    """
    if seconds <= 0:
        raise InputError("expected seconds above 0", field="idle", value=seconds)
    begin, first = clock(), read_mj()
    rest(seconds)
    end, last = clock(), read_mj()
    joules = between(first, last)
    return None if joules is None else joules / (end - begin)
