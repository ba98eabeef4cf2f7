"""One test for all commands: help, a tiny run, wrong input, an output that cannot be written, Ctrl-C, a kill.

What its work comes to, each package tests itself; this is what who knows one command may expect of the next.
"""

import ast
import contextlib
import json
import os
import re
import shlex
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


TINY = {
    "asymaffinity": "train --data images/train.json --images images/train --affinity color --backbone small "
    "--steps 2 --batch-size 2 --out out/run",
    "csq": "train --model csq/resnet8 --data images --image-size 32 --epochs 1 --batch-size 4 --out out/run",
    "isocse": "measure bert --data text.txt --out out/run",
    "kdcicam": "train-teacher --role cls --backbone timm/test_resnet --data images --image-size 32 "
    "--epochs 1 --batch-size 4 --out out/run",
    "lead-kd": "encode --data beir --model bert --out out/run",
    "migperf": "sweep --device sim:a100-40gb --geometry 3g.20gb,2g.10gb --workload torchvision/resnet18 "
    "--duration 0.2 --repeats 1 --out out/run",
    "relattn": "explain text.txt --model bart --control moon --out out/run.html",
    "repqvit": "quantize --model timm/test_vit --random --num-classes 2 --image-size 32 --images images "
    "--count 4 --out out/run.safetensors",
    "rlogist": "demo-slides --slides 1 --slides-per-patient 1 --size 1024 --out out/run",
    "smm-dp": "aggregate vectors.npy --epsilon 3 --delta 1e-5 --scale 16 --out out/run",
}
"""A small piece of each command's own work on what `tiny_inputs` writes."""
INPUTS = ("images/train.json", "images", "beir", "text.txt", "vectors.npy")
TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}(\..*)?")


def run(command: str, *arguments: str, where: Path | None = None) -> subprocess.CompletedProcess[str]:
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [BIN / command, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=where,
        env=offline,
    )  # fmt: skip


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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    made = [sys.executable, "-m", "tools.tests.tiny_inputs", str(folder)]  # apart: transformers' warnings
    subprocess.run(made, cwd=workspace.ROOT, check=True, capture_output=True)
    (folder / "out").mkdir()
    (folder / ".cache").symlink_to(workspace.ROOT / ".cache")  # wheels with embedded data
    return folder


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tiny_run_writes_below_out_alone_and_wrong_paths_are_told_before_the_work(
    command: str, place: Path
) -> None:
    arguments = shlex.split(TINY[command])
    at = arguments.index("--out") + 1
    arguments[at] = arguments[at].replace("run", command)
    before = files(place)
    done = run(command, *arguments, where=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not errors(done.stderr)
    assert "Traceback" not in done.stderr
    written = files(place) - before
    assert written
    assert {path.relative_to(place).parts[0] for path in written} == {"out"}
    assert not [path for path in written if TEMPORARY.fullmatch(path.name)], "a temporary file is left"

    given = next((number for number, argument in enumerate(arguments) if argument in INPUTS), None)
    wrong = {"text.txt": {at: f"text.txt/{command}"}}
    if given is not None:
        wrong["not-there"] = {given: "not-there/nor-here", at: arguments[at].replace(command, "not-made")}
    for named, changes in wrong.items():
        changed = [changes.get(number, argument) for number, argument in enumerate(arguments)]
        refused = run(command, *changed, where=place)
        assert refused.returncode == 2, refused.stderr
        assert not refused.stdout, "the work was done before the path was looked at"
        (line,) = errors(refused.stderr)
        assert named in line
    assert files(place) - before == written


SAME = {
    "--out": ("path", "file", "directory"),
    "--seed": ("integer range", "integer"),
    "--quick": ("boolean",),
    "--resume": ("boolean",),
    "--device": ("text",),
}
"""The options that mean the same in every command, and what they may take."""
OPTIONS = """
import importlib, json, sys, typer.main
app = importlib.import_module(sys.argv[1] + ".cli").app
print(json.dumps([
    [name, option, parameter.type.name, getattr(parameter, "help", None), parameter.required]
    for name, command in typer.main.get_command(app).commands.items()
    for parameter in command.params
    for option in parameter.opts
]))
"""


@pytest.mark.parametrize("member", workspace.packages(), ids=lambda member: member.name)
def test_the_same_options_mean_the_same(member: workspace.Member) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OPTIONS, member.import_name], capture_output=True, text=True, check=True
    )
    options = json.loads(done.stdout.splitlines()[-1])
    for name, option, kind, text, _ in options:
        assert kind in SAME.get(option, (kind,)), (name, option, kind)
        if option in SAME:
            assert text, f"{name} {option} has no help"
    proofs = {option: kind for name, option, kind, *_ in options if name == "prove"}
    assert {"--out", "--seeds", "--quick"} <= set(proofs)
    assert proofs["--seeds"].startswith("integer")
    for name, *words in full_scale(member):
        known = {option: required for other, option, *_, required in options if other == name}
        given = {word for word in words if word.startswith("--")}
        assert given <= set(known), name
        assert {option for option, required in known.items() if required and "--" in option} <= given, name


def full_scale(member: workspace.Member) -> list[list[str]]:
    """The commands that a proof names for the full-scale job, as words from the subcommand on."""
    tree = ast.parse((member.folder / "src" / member.import_name / "proof.py").read_text(encoding="utf-8"))
    (line,) = (
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "command" and isinstance(node.value, ast.Constant)
    )
    commands = [shlex.split(part) for part in line.split("&&")]
    assert {words[0] for words in commands} == {member.command}
    return [words[1:] for words in commands]


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
        said = stopped[signal.SIGINT].said()
        assert errors(said) == ["error: interrupted"], said
        assert "Traceback" not in said  # of a worker's, which may break into the line besides
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
