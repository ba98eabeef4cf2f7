"""The README's Python runs as one session on a user's own model; its commands have their options."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from tiny_models import CORPUS

from relattn import cli
from relattn.methods import METHODS
from shared_core import testing

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_examples_run(bart_folder, tmp_path, monkeypatch):
    shutil.copytree(bart_folder, tmp_path / "my-summarizer")
    monkeypatch.chdir(tmp_path)
    blocks = testing.fenced_blocks(TEXT, "python")
    session = None
    for block in blocks:
        session = testing.run_block(block, session)
    assert {"relattn.Steerer(", "steerer.steer("} <= set(re.findall(r"\w+\.\w+\(", "".join(blocks)))


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_the_commands_run_where_they_are_pasted(kind, bart_folder, t5_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(bart_folder if kind == "bart" else t5_folder, tmp_path / "my-summarizer")
    monkeypatch.chdir(tmp_path)
    Path("article.txt").write_text(f"{CORPUS[0]} {CORPUS[1]} The storm came.")
    (line,) = re.findall(r"^A line of `data.jsonl` is `(\{.*?\})`", TEXT, re.M)
    rows = [json.loads(line) | {"id": str(n), "document": f"{n} {CORPUS[n % 8]} A storm."} for n in range(20)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (block,) = [one for one in testing.fenced_blocks(TEXT, "sh") if one.startswith("relattn summarize")]
    for command in block.strip().splitlines():
        arguments = shlex.split(command)[1:]
        arguments += ["--steps", "2"] if arguments[0] == "fewshot" else []  # 100 take long
        assert testing.exit_code(cli.app, *arguments, "--device", "cpu") == 0, capsys.readouterr().err
    assert "<!doctype html>" in Path("relevance.html").read_text()
    assert len(Path("runs/relattn/results.jsonl").read_text().splitlines()) == 20
    assert Path("runs/module/relattn.safetensors").is_file()


def test_the_commands_have_these_options():
    named = testing.check_command_lines(cli.app, re.findall(r"^relattn \w+ .*$", TEXT, re.M))
    assert named == {"summarize", "explain", "eval", "fewshot", "prove"}


def test_the_methods_named_are_those_there_are():
    (sentence,) = re.findall(r"relattn eval --method`: (.*?)\.\n", TEXT, re.DOTALL)
    names = re.sub(r"\(.*?\)", "", sentence, flags=re.DOTALL).split(",")
    assert tuple(name.strip() for name in names) == METHODS
