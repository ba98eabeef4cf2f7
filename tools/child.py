"""Runs a package's command: keeps its output in a log, shows its last line live, ends it at a time limit."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Ended:
    """How a command ended; ``output`` is its stdout, ``error`` says why it could not be run to its end."""

    code: int
    seconds: float
    output: str
    error: str | None = None


def plain(text: str) -> str:
    """The text without terminal codes and without what a progress bar wrote over."""
    lines = _TERMINAL_CODES.sub("", text).split("\n")
    return "\n".join(_last_written(line) for line in lines)


def _last_written(line: str) -> str:
    frames = [frame for frame in line.split("\r") if frame.strip()]
    return frames[-1].rstrip() if frames else ""


def run(
    command: Sequence[str],
    *,
    log: Path,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    tail: Callable[[str], None] = lambda line: None,
) -> Ended:
    """Runs ``command`` to its end; ``tail`` is called a few times a second with the last line it printed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # so that its own children end with it
            )
        except OSError as error:
            file.write(f"{error}\n")
            return Ended(127, 0.0, "", f"cannot start {command[0]}: {error.strerror}")
        try:
            output, in_time = _follow(process, file, start + timeout, tail)
        finally:
            _end(process)
    error = None if in_time else f"stopped at its time limit of {timeout:g} s"
    return Ended(process.returncode, time.monotonic() - start, output, error)


def _follow(
    process: subprocess.Popen[bytes], log: IO[str], deadline: float, tail: Callable[[str], None]
) -> tuple[str, bool]:
    """Copies both streams into the log until the process ends; gives stdout and whether it ended in time."""
    assert process.stdout is not None
    assert process.stderr is not None
    received = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    logged = dict.fromkeys(received, 0)
    with selectors.DefaultSelector() as streams:
        for descriptor in received:
            streams.register(descriptor, selectors.EVENT_READ)
        while streams.get_map() and time.monotonic() < deadline:
            ready = streams.select(timeout=0.2)
            for key, _ in ready:
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    streams.unregister(key.fd)
                received[key.fd] += chunk
                logged[key.fd] = _log_lines(received[key.fd], logged[key.fd], log)
                tail(_tail_line(received[key.fd]))
            if not ready and process.poll() is not None:
                break  # a child that it left behind keeps the stream open: nobody waits for that one
    for descriptor, text in received.items():
        log.write(plain(text[logged[descriptor] :].decode(errors="replace")))
    output = received[process.stdout.fileno()].decode(errors="replace")
    try:
        process.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        return output, False
    return output, True


def _log_lines(received: bytearray, start: int, log: IO[str]) -> int:
    """Writes what has become whole lines since ``start``; returns where the next line begins."""
    end = received.rfind(b"\n", start) + 1
    if end <= start:
        return start
    log.write(plain(received[start:end].decode(errors="replace")))
    log.flush()
    return end


def _tail_line(received: bytearray) -> str:
    lines = plain(received[-2000:].decode(errors="replace")).split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and what it started: asks first, then insists."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except (ProcessLookupError, PermissionError):  # macOS answers the latter for a group of zombies
            break
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    process.wait()
