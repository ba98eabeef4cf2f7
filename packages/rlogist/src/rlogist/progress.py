"""Progress bars on stderr. Where it is no terminal they are hidden: a log gets lines."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A context that gives a function of (done, all), which moves a bar."""
    with _bars(what, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def training(tensorboard: Path | None) -> Iterator[Callable[[str, int, int, dict[str, float]], None]]:
    """A context that gives an `on_epoch` with a bar a stage, and TensorBoard's scalars if asked.

    A log gets a line where a stage begins, or goes on, and after each tenth of it.
    """
    from rlogist.training_run import TensorBoard

    writer = None if tensorboard is None else TensorBoard(tensorboard)
    tasks: dict[str, TaskID] = {}
    with _bars("stage {task.description}", transient=False) as bar:

        def on_epoch(stage: str, done: int, total: int, scalars: dict[str, float]) -> None:
            begins = stage not in tasks
            if begins:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)
            if bar.disable and (begins or done * 10 // total > (done - 1) * 10 // total):
                shown = "".join(f", {name} {value:.4g}" for name, value in scalars.items())
                print(f"stage {stage}: {done} of {total}{shown}", file=sys.stderr, flush=True)
            if writer is not None:
                writer(stage, done, total, scalars)

        yield on_epoch
    if writer is not None:
        writer.close()


def _bars(text: str, transient: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)
