"""Runs the tests of shared/, tools/ and every package; ``make test`` calls it.

Each member's tests run in a pytest process of their own, so that import hooks and warning filters of one
cannot hide or cause a failure in another. Two run at a time where there are two cores, each with one thread
for mathematics; what one prints is shown when it ends. The last line sums all up in pytest's own form.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tools import workspace


@dataclass(frozen=True)
class Counts:
    """How many tests ended how; ``broken`` names suites that pytest could not run to their end."""

    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0
    broken: tuple[str, ...] = ()

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.passed + other.passed,
            self.failed + other.failed,
            self.errors + other.errors,
            self.skipped + other.skipped,
            self.broken + other.broken,
        )

    @property
    def good(self) -> bool:
        """Whether tests ran and none of them failed."""
        return self.passed > 0 and not (self.failed or self.errors or self.broken)

    def line(self, seconds: float) -> str:
        """The closing line."""
        shown = {"failed": self.failed, "passed": self.passed, "skipped": self.skipped, "errors": self.errors}
        words = ", ".join(f"{count} {name}" for name, count in shown.items() if count) or "no tests ran"
        return f" {words} in {seconds:.2f}s ".center(80, "=")


def read_counts(file: Path, code: int, name: str) -> Counts:
    """Counts of one pytest run from its JUnit file and exit code."""
    try:
        suites = list(ElementTree.parse(file).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return Counts(broken=(name,))
    total, failed, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    counts = Counts(total - failed - errors - skipped, failed, errors, skipped)
    # pytest can also end badly without a failed test: an interrupted session, a warning while it closes.
    unexplained = code not in (0, 1) or (code == 1 and not (failed or errors))
    return counts + Counts(broken=(name,)) if unexplained else counts


def run(name: str, tests: Path, root: Path, options: Sequence[str], *, live: bool) -> tuple[Counts, str]:
    """One pytest process for one member's tests: its counts, and what it printed unless that was live."""
    if not tests.is_dir():
        return Counts(broken=(name,)), ""  # a member without tests is not done: it is not clean
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # more would only wait for one another
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.xml"
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", str(tests), f"--junitxml={result}", "-q", *options],
            cwd=root,
            env={**os.environ, **threads},
            stdout=None if live else subprocess.PIPE,
            stderr=None if live else subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        return read_counts(result, ended.returncode, name), ended.stdout or ""


def run_all(chosen: Sequence[tuple[str, Path]], root: Path, options: Sequence[str], jobs: int) -> Counts:
    """All suites, `jobs` at a time."""
    if jobs == 1 or len(chosen) == 1:
        counts = Counts()
        for name, tests in chosen:
            print(f"== {name}", flush=True)
            counts += run(name, tests, root, options, live=True)[0]
        return counts
    return sum(_side_by_side(chosen, root, options, jobs), Counts())


def _side_by_side(
    chosen: Sequence[tuple[str, Path]], root: Path, options: Sequence[str], jobs: int
) -> Iterator[Counts]:
    with ThreadPoolExecutor(jobs) as pool:
        running = {name: pool.submit(run, name, tests, root, options, live=False) for name, tests in chosen}
        try:
            for name, future in running.items():
                counts, output = future.result()
                print(f"== {name}\n{output}", end="", flush=True)
                yield counts
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def suites(root: Path, only: str | None) -> list[tuple[str, Path]]:
    """The names and folders of tests: a member's or, with no choice, those of tools/ and every member."""
    chosen = workspace.members(root, only)
    found = [] if only else [("tools", root / "tools" / "tests")]
    return [*found, *((member.name, member.folder / "tests") for member in chosen)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m tools.suite``."""
    parser = argparse.ArgumentParser(prog="python -m tools.suite", description=__doc__)
    parser.add_argument("--package", help="only the tests of this member")
    parser.add_argument(
        "--root", type=Path, default=workspace.ROOT, help="another workspace than this repository"
    )
    parser.add_argument("--jobs", type=int, default=min(2, _cores()), help="suites at a time (default: 2)")
    parser.add_argument("options", nargs="*", help="handed on to pytest, after --")
    arguments = parser.parse_args(argv)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # Started in the background of a shell: what tests start would ignore their Ctrl-C too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    try:
        chosen = suites(arguments.root, arguments.package)
    except workspace.WorkspaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = run_all(chosen, arguments.root, arguments.options, max(1, arguments.jobs))
    for name in counts.broken:
        print(f"error: the tests of {name} are missing or did not run to their end", file=sys.stderr)
    print(counts.line(time.monotonic() - start), flush=True)
    return 0 if counts.good else 1


if __name__ == "__main__":
    sys.exit(main())
