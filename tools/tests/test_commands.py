"""One test for all commands: help, wrong options, an output that cannot be written, Ctrl-C, a kill.

What its work comes to, each package tests itself; this is what who knows one command may expect of the next.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import workspace

COMMANDS = [str(member.command) for member in workspace.packages()]
BIN = Path(sys.executable).parent
BEGUN = 5.0
"""Seconds in which most commands have come to their work; Ctrl-C and a kill have to be safe before it too."""


def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / command, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_same_options(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert "prove" in done.stdout
    proof = run(command, "prove", "--help")
    assert proof.returncode == 0
    for option in ("--out", "--seeds", "--quick", "--debug"):
        assert option in proof.stdout, option


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "arguments", [["no-such-thing"], ["prove", "--no-such-option"], ["prove", "--seeds", "0"]], ids=" ".join
)
def test_bad_input_is_one_line_and_exit_code_2(command: str, arguments: list[str]) -> None:
    done = run(command, *arguments)
    assert done.returncode == 2
    assert len(errors(done.stderr)) == 1
    assert "Traceback" not in done.stderr
    assert "Traceback" in run(command, "--debug", *arguments).stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_written_ctrl_c_and_a_kill(command: str, tmp_path: Path) -> None:
    """An output that cannot be written is told before the work; a stopped run leaves an earlier proof.json.

    Ctrl-C is one line and 130, and no process is left behind, not even by a kill. All at once, for the time.
    """
    (tmp_path / "file").write_text("mine")
    refused = Proving(command, tmp_path / "file" / "proof", tmp_path)
    stopped = {number: Proving(command, tmp_path / number.name, tmp_path) for number in STOPS}
    try:
        assert refused.ended() == 2
        (line,) = errors(refused.said())
        assert str(tmp_path / "file") in line
        assert "Traceback" not in refused.said()
        assert (tmp_path / "file").read_text() == "mine"
        time.sleep(BEGUN)
        for number, proving in stopped.items():
            proving.stop(number)
        for number, code in STOPS.items():
            assert stopped[number].ended() == code
            assert until(stopped[number].all_gone), "processes are left behind"
            assert (tmp_path / number.name / "proof.json").read_text() == "of an earlier run"
        assert errors(stopped[signal.SIGINT].said()) == ["error: interrupted"]
    finally:
        for proving in (refused, *stopped.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(proving.process.pid, signal.SIGKILL)


STOPS = {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}


class Proving:
    """A quick proof in a process group of its own, in a folder that holds an earlier proof.json."""

    def __init__(self, command: str, out: Path, logs: Path) -> None:
        if not out.parent.is_file():
            out.mkdir()
            (out / "proof.json").write_text("of an earlier run")
        self.log = logs / f"{out.name}.txt"
        with open(self.log, "w") as stderr:
            self.process = subprocess.Popen(
                [BIN / command, "prove", "--quick", "--out", str(out)],
                stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True,
            )  # fmt: skip

    def stop(self, number: signal.Signals) -> None:
        """Send what a terminal's Ctrl-C sends to all processes, or kill the one that was started."""
        assert self.process.poll() is None, self.said()
        (os.killpg if number == signal.SIGINT else os.kill)(self.process.pid, number)

    def ended(self) -> int:
        return self.process.wait(120)

    def all_gone(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def said(self) -> str:
        return self.log.read_text()


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.1)
    return condition()
