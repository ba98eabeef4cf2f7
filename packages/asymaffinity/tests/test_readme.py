"""Every Python example of README.md and of docstrings runs; the options of its commands exist."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import typer.main

import asymaffinity
from asymaffinity import cli

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
DOCUMENTED = ["affinity", "condinst", "depth", "edges", "grid", "losses", "mask_rcnn", "metrics", "settings"]


@pytest.mark.parametrize("block", BLOCKS, ids=["losses", "mask_rcnn", "condinst"])
@pytest.mark.filterwarnings("ignore:color. no edge:UserWarning", "ignore:depthgrad. :UserWarning")  # noise
def test_example(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"asymaffinity.{name}"))
    assert results.attempted > 0
    assert results.failed == 0


def test_options_of_the_commands_exist() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    lines = re.findall(r"\$ (asymaffinity .*)", TEXT)
    assert {line.split()[1] for line in lines} == set(commands) - {"prove"}
    for line in lines:
        known = {option for parameter in commands[line.split()[1]].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", line)) <= known


def test_every_public_name_is_there() -> None:
    for name in asymaffinity.__all__:
        assert getattr(asymaffinity, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        asymaffinity.nothing  # noqa: B018
