"""Every Python example of README.md runs, and its commands have options that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from csq import cli
from csq.storage import paper_bits, stored_bits
from shared_core import testing

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = testing.fenced_blocks(TEXT, "python")


def _name(block: str) -> str:
    names = r"\b(harden|quantize_activations|bit_weight|Trainer|Accelerator|export_onnx)\b"
    return re.findall(names, block)[0]


def test_the_readme_has_an_example_for_each_door() -> None:
    text = "".join(BLOCKS)
    for name in (
        "csq.Schedule(",
        "csq.harden(",
        "csq.load(",
        "add_schedule(",
        "Accelerator(",
        "export_onnx(",
    ):
        assert name in text


@pytest.mark.filterwarnings("ignore:hardened at temperature", "ignore:.*the search kept fewer")
@pytest.mark.parametrize("block", BLOCKS, ids=_name)
def test_example(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    testing.run_block(block)


def test_options_of_the_commands_exist() -> None:
    lines = [line.replace("\\\n", " ") for line in re.findall(r"\$ (csq .*(?:\\\n.*)?)", TEXT)]
    named = testing.check_command_lines(cli.app, lines)
    assert named == {"train", "harden", "inspect", "export", "evaluate"}


def test_the_table_of_bits_is_what_is_counted() -> None:
    rows = re.findall(r"^\| `([01]{8})` \| (\d) \| (\d) \|", TEXT, re.MULTILINE)
    assert len(rows) == 4
    for mask, paper, stored in rows:
        planes = [bit == "1" for bit in reversed(mask)]
        assert (paper_bits(planes), stored_bits(planes)) == (int(paper), int(stored))
