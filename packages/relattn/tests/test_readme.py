"""The README's Python runs as one session on a user's own model; its commands have their options."""

import re
import shutil
from pathlib import Path

import typer.main

from relattn import cli
from relattn.methods import METHODS

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_examples_run(bart_folder, tmp_path, monkeypatch):
    shutil.copytree(bart_folder, tmp_path / "my-summarizer")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    session = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), session)
    assert {"relattn.Steerer(", "steerer.steer("} <= set(re.findall(r"\w+\.\w+\(", "".join(blocks)))


def test_the_commands_have_these_options():
    commands = typer.main.get_command(cli.app).commands
    lines = re.findall(r"^relattn (\w+) (.*)$", TEXT, re.M)
    assert {name for name, _ in lines} == {"summarize", "explain", "eval", "fewshot", "prove"}
    for name, rest in lines:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest.split("#")[0])) <= known


def test_the_methods_named_are_those_there_are():
    (sentence,) = re.findall(r"relattn eval --method`: (.*?)\.\n", TEXT, re.DOTALL)
    names = re.sub(r"\(.*?\)", "", sentence, flags=re.DOTALL).split(",")
    assert tuple(name.strip() for name in names) == METHODS
