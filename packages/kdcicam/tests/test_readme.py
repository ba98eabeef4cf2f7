"""Every Python example of README.md and of docstrings runs; the options of its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from kdcicam import cli
from shared_core import testing

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
DOCUMENTED = ["annotations", "boxes", "images", "losses", "model", "settings"]


@pytest.mark.parametrize("block", testing.fenced_blocks(TEXT, "python"), ids=["model", "student", "boxes"])
def test_example(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    testing.run_block(block)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_examples(name: str) -> None:
    testing.check_docstring_examples(f"kdcicam.{name}")


def test_every_command_is_shown_with_options_that_exist() -> None:
    named = testing.check_command_lines(cli.app, re.findall(r"\$ (kdcicam .*)", TEXT))
    assert named == set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def test_every_public_name_is_there() -> None:
    testing.check_public_names("kdcicam")
