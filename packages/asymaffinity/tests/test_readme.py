"""Every Python example of README.md and of docstrings runs; the options of its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from asymaffinity import cli
from shared_core import testing

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = testing.fenced_blocks(TEXT, "python")
DOCUMENTED = ["affinity", "condinst", "depth", "edges", "grid", "losses", "mask_rcnn", "metrics"]


@pytest.mark.parametrize(
    "block", testing.fenced_blocks(TEXT, "python"), ids=["losses", "mask_rcnn", "condinst"]
)
@pytest.mark.filterwarnings("ignore:color. no edge:UserWarning", "ignore:depthgrad. :UserWarning")  # noise
def test_example(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    testing.run_block(block)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_examples(name: str) -> None:
    testing.check_docstring_examples(f"asymaffinity.{name}")


def test_every_command_is_shown_with_options_that_exist() -> None:
    named = testing.check_command_lines(cli.app, re.findall(r"\$ (asymaffinity .*)", TEXT))
    assert named | {"prove"} == set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def test_every_public_name_is_there() -> None:
    testing.check_public_names("asymaffinity")
