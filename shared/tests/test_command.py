import dataclasses
import os
import re
import signal
import subprocess
import sys
from typing import Literal

import pytest
import typer

from shared_core import InputError, command

APP = """
import sys, time
from pathlib import Path
import typer
import shared_core.command
from shared_core import InputError

class DeviceError(InputError):
    exit_code = 3

app = typer.Typer()

@app.command()
def work(what: str, bits: int = 4):
    secret = len(what) * "local value "
    match what:
        case "fine": print("done")
        case "bad": raise InputError("expected 2 to 8", field="bits", value=9)
        case "lines": raise InputError("first\\nsecond")
        case "device": raise DeviceError("no driver")
        case "missing": open("not/there.txt")
        case "folder": Path("/").write_text("")
        case "fault": raise RuntimeError("ours")
        case "returns": return 1
        case "exits": raise typer.Exit(3)
        case "sleep":
            print("ready", flush=True)
            time.sleep(60)
        case "abort": raise typer.Abort()

@app.command()
def other(out: Path = typer.Option(None, callback=shared_core.command.file_to_write(".txt", ".md"))):
    print("at work")

shared_core.command.run(app)
"""


@pytest.fixture
def app(tmp_path):
    script = tmp_path / "app.py"
    script.write_text(APP)
    return [sys.executable, str(script)]


def ended(app: list[str], *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([*app, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_file_that_cannot_be_written_is_told_before_the_work(app, tmp_path):
    assert ended(app, "other") == (0, "at work\n", "")
    assert ended(app, "other", "--out", str(tmp_path / "a.md")) == (0, "at work\n", "")
    for name, said in (("no/a.txt", "there is no folder"), ("a.png", "ends in .txt or .md, got")):
        code, out, error = ended(app, "other", "--out", str(tmp_path / name))
        assert (code, out) == (2, "")
        assert said in error


def test_a_command_that_ends_exits_0(app):
    assert ended(app, "work", "fine") == (0, "done\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["work", "bad"], "bits: expected 2 to 8 (got 9)"),
        (["work", "lines"], "first second"),
        (["work", "missing"], "not/there.txt: No such file or directory"),
        (["work", "folder"], "/: Is a directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(app, arguments, message):
    assert ended(app, *arguments) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["work", "fine", "--bitz", "3"], "--bitz"),
        (["work", "fine", "--bits", "many"], "--bits"),
        (["work"], "what"),
        (["nothing"], "nothing"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_word_and_exit_2(app, arguments, word):
    code, output, errors = ended(app, *arguments)
    assert (code, output) == (2, "")
    assert re.fullmatch(rf"error: .*{word}.*\n", errors, re.IGNORECASE)


@pytest.mark.parametrize(
    "arguments", [["--debug", "work", "bad"], ["work", "--debug", "bad"], ["work", "bad", "--debug"]]
)
def test_debug_anywhere_shows_the_traceback_of_bad_input(app, arguments):
    code, _, errors = ended(app, *arguments)
    assert code == 2
    assert "Traceback" in errors
    assert errors.endswith("error: bits: expected 2 to 8 (got 9)\n")


def test_after_two_dashes_debug_is_an_argument_like_any_other(app):
    code, _, errors = ended(app, "work", "bad", "--", "--debug")
    assert code == 2
    assert "Traceback" not in errors
    assert "--debug" in errors


def test_a_kind_of_bad_input_may_have_its_own_exit_code(app):
    assert ended(app, "work", "device") == (3, "", "error: no driver\n")


def test_a_fault_of_ours_keeps_its_traceback_without_local_values_and_exits_70(app):
    code, _, errors = ended(app, "work", "fault")
    assert code == 70
    assert "Traceback" in errors
    assert errors.endswith("RuntimeError: ours\n")
    assert "local value local" not in errors
    assert "╭" not in errors  # typer's own pages of traceback are off


def test_the_apps_own_exit_codes_are_kept(app):
    assert ended(app, "work", "returns")[0] == 1
    assert ended(app, "work", "exits")[0] == 3


def test_ctrl_c_exits_130_without_a_traceback(app):
    with subprocess.Popen(
        [*app, "work", "sleep"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
    assert child.returncode == 130
    assert errors.strip() == "error: interrupted"


def test_a_declined_question_exits_130(app):
    assert ended(app, "work", "abort")[0] == 130


def test_help_tells_of_debug_at_both_levels(app):
    for arguments in (["--help"], ["work", "--help"]):
        code, output, _ = ended(app, *arguments)
        assert code == 0
        assert "--debug" in output


def test_an_app_of_one_command_and_arguments_given_by_the_caller(tmp_path):
    script = """
import typer
from shared_core import command

def only(bits: int):
    print(bits + 1)

app = typer.Typer()
app.command()(only)
command.run(app, ["4"])
"""
    assert ended([sys.executable, "-c", script], "not", "these") == (0, "5\n", "")


def test_warnings_for_the_user_are_one_line_and_others_are_not_shown(capsys):
    import warnings

    from shared_core.command import warnings_in_one_line

    with warnings.catch_warnings(), warnings_in_one_line():
        warnings.simplefilter("always")
        warnings.warn("the batch is small", UserWarning, stacklevel=1)
        warnings.warn("old name", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: the batch is small\n"


def test_a_table_in_a_pipe_is_not_cut_to_80_columns(capsys):
    from rich.table import Table

    from shared_core.command import print_table

    table = Table("name")
    table.add_row("x" * 120)
    print_table(table)
    assert "x" * 120 in capsys.readouterr().out


def test_a_device_is_one_that_works_here():
    import torch

    from shared_core.command import usable_device

    assert usable_device("cpu") == "cpu"
    assert usable_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "abacus"):
        with pytest.raises(InputError, match=rf"device: no such device here .*{name}"):
            usable_device(name)


@pytest.mark.parametrize(
    ("check", "good", "bad", "words"),
    [
        (
            command.one_of("a", "b"),
            ["a", None, ["a", "b"]],
            ["c", ["a", "c"]],
            "expected one of a, b, got 'c'",
        ),
        (command.above_zero, [1e-9, None, [1.0, 2.0]], [0.0, [1.0, 0.0]], "expected a number above 0, got 0"),
        (command.above_zero, [3], [float("inf")], "got inf"),
        (command.with_commas, ["0.5,1,-2", None], ["1,x", "1;2", "nan"], "expected numbers with commas"),
    ],
)
def test_options_take_what_they_say(check, good, bad, words):
    for value in good:
        assert check(value) is value
    for value in bad:
        with pytest.raises(typer.BadParameter, match=words):
            check(value)


def test_the_first_process_alone_shows_progress(capsys, monkeypatch):
    for rank, shown in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        assert command.main_process() is shown
        with command.progress_bar("reading", 4) as bar:
            bar(1)
            bar(4, 0.25)
        out, err = capsys.readouterr()
        assert not out
        assert ("reading" in err and "4/4" in err and "loss 0.250" in err) is shown


@pytest.mark.parametrize("before", [None, "cuda:3"])
def test_accelerate_takes_a_numbered_device_from_the_environment(before, monkeypatch):
    name = "ACCELERATE_TORCH_DEVICE"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with command.accelerate_device("cuda:1"):
        assert os.environ[name] == "cuda:1"
    assert os.environ.get(name) == before
    with command.accelerate_device("cuda"):
        assert os.environ.get(name) == before
    assert os.environ.get(name) == before


@dataclasses.dataclass
class Settings:
    role: Literal["cls", "loc"] = "cls"
    lr: float = 0.1
    steps: int | None = None
    folder: str | None = None
    flip: bool = True
    sizes: tuple[int, ...] = ()
    drops: tuple[float, float] = (0.5, 0.75)
    table: dict[str, int] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("role=loc", "loc"),
        ("lr=1e-3", 0.001),
        ("steps=7", 7),
        ("steps=none", None),
        ("folder=a=b", "a=b"),
        ("folder=None", None),
        ("flip=False", False),
        ("sizes=320,352", (320, 352)),
        ("sizes=", ()),
        ("sizes=320,", (320,)),
        ("drops=0.25,1", (0.25, 1.0)),
    ],
)
def test_a_setting_is_read_as_its_field_is(text, value):
    name = text.partition("=")[0]
    assert repr(command.assigned([text], Settings)) == repr({name: value})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr", r"set: expected NAME=VALUE with one of role, lr, .* \(got 'lr'\)"),
        ("rate=1", "set: expected NAME=VALUE with one of role, lr"),
        ("lr=fast", r"lr: expected float \(got 'fast'\)"),
        ("lr=none", r"lr: expected float"),
        ("steps=1.5", r"steps: expected int \| None \(got '1.5'\)"),
        ("flip=maybe", "flip: expected bool"),
        ("sizes=1,a", r"sizes: expected tuple\[int, \.\.\.\]"),
        ("sizes=1,,2", r"sizes: expected tuple\[int, \.\.\.\]"),
        ("drops=1", r"drops: expected tuple\[float, float\]"),
    ],
)
def test_a_setting_that_is_none_or_of_another_kind_is_said(text, words):
    with pytest.raises(InputError, match=words):
        command.assigned(["lr=1", text], Settings)


def test_a_field_that_no_text_stands_for_is_a_fault_of_ours():
    with pytest.raises(TypeError, match="no text stands for dict"):
        command.assigned(["table=1"], Settings)
