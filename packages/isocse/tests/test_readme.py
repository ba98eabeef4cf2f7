"""The README's Python runs as one session on a user's own models; its commands run where they are pasted."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import tiny_encoders
import typer.main
from tiny_encoders import SENTENCES

from isocse import cli
from shared_core import testing

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def _place(tmp_path, monkeypatch):
    tiny_encoders.save_bert(tmp_path / "before", 0)
    tiny_encoders.save_bert(tmp_path / "after", 1)
    shutil.move(tiny_encoders.save_sentence_transformer(tmp_path / "made"), tmp_path / "sentence-encoder")
    (tmp_path / "corpus.txt").write_text("\n".join(SENTENCES) + "\n")
    rows = "".join(f'"{a}","{b}"\n' for a, b in zip(SENTENCES[:20], SENTENCES[20:40], strict=True))
    (tmp_path / "pairs.csv").write_text("anchor,positive\n" + rows)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_place")
@pytest.mark.filterwarnings("ignore:unclosed file")  # the example reads its text in one line
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_examples_run():
    session = None
    for block in testing.fenced_blocks(TEXT, "python"):
        session = testing.run_block(block, session)
    assert session["shift"].tokens


@pytest.mark.usefixtures("_place")
def test_the_commands_run_where_they_are_pasted(capsys):
    (block,) = [one for one in testing.fenced_blocks(TEXT, "sh") if one.startswith("isocse measure")]
    for line in block.strip().splitlines():
        arguments = shlex.split(line)[1:]
        device = [] if arguments[0] == "report" else ["--device", "cpu"]
        assert testing.exit_code(cli.app, *arguments, *device) == 0, capsys.readouterr().err
    for folder in ("before", "shift", "tuned", "sweep"):
        assert "<!doctype html>" in Path("runs", folder, "report.html").read_text()


def test_the_options_named_are_those_there_are():
    commands = typer.main.get_command(cli.app).commands
    known = {option for c in commands.values() for p in c.params for option in (*p.opts, *p.secondary_opts)}
    assert set(re.findall(r"`[^`]*?(--[a-z][a-z-]+)", TEXT)) <= known
    assert set(commands) == {"measure", "compare", "train", "sweep", "report", "prove"}
