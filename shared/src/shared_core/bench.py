"""What every benchmark does: take turns, make rows, write bench.json and a table.

A row compares this package with what a user would pick instead, measured in the same run; its ratio says how
many times better ours is.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_core.files import make_folder, write_json


def row(
    what: str,
    ours: float,
    theirs: float,
    peer: str,
    version: str,
    unit: str,
    *,
    more_is_better: bool = False,
) -> dict[str, Any]:
    """Return a row of bench.json.

    Args:
        what: What was measured.
        ours: Our number.
        theirs: The peer's.
        peer: What a user would pick instead, or the target.
        version: The peer's release; empty for a target.
        unit: Of both numbers.
        more_is_better: Whether it is a rate, and no time, size or error.
    """
    return {
        "what": what, "ours": ours, "theirs": theirs, "peer": peer, "peer_version": version,
        "ratio": ours / theirs if more_is_better else theirs / ours, "unit": unit,
    }  # fmt: skip


def in_turns(
    works: Sequence[Callable[[], Any]],
    rounds: int,
    *,
    warm_up: int = 0,
    clock: Callable[[], float] = time.process_time,
) -> np.ndarray:
    """Time several works side by side; every other round runs backwards, so that a drift hits all alike.

    Args:
        works: What is timed.
        rounds: Timed rounds.
        warm_up: Rounds before them that do not count.
        clock: Gives seconds. The default, the process's own processor time, leaves other work on the machine
            out; on one thread it is the time of the work. `time.perf_counter` is the time that passes.

    Returns:
        Seconds, [rounds, works].
    """
    times = np.zeros((warm_up + rounds, len(works)))
    for number in range(warm_up + rounds):
        order = range(len(works)) if number % 2 == 0 else reversed(range(len(works)))
        for place in order:
            begin = clock()
            works[place]()
            times[number, place] = clock() - begin
    return times[warm_up:]


def finish(package: str, rows: Sequence[dict[str, Any]], out: str | os.PathLike[str], **about: Any) -> None:
    """Write bench.json to a folder and print the rows as a table.

    Args:
        package: The package.
        rows: Rows of `row`; they may have more entries.
        out: The folder; made if missing.
        about: More of the machine and the run: threads, versions, load.

    Raises:
        InputError: The folder cannot be made or written to.
    """
    from rich.console import Console
    from rich.table import Table

    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system(), **about}
    file = make_folder(out) / "bench.json"
    write_json(file, {"package": package, "machine": machine, "rows": list(rows)})
    table = Table(
        "what", "ours", "theirs", "unit", "peer", "ratio", title=f"{package}: above 1, ours is better"
    )
    for one in rows:
        numbers = (f"{one['ours']:.4g}", f"{one['theirs']:.4g}", one["unit"])
        table.add_row(one["what"], *numbers, f"{one['peer']} {one['peer_version']}", f"{one['ratio']:.3g}")
    Console(width=160).print(table)
    print(f"written: {Path(file)}")
