"""Every Python example of README.md runs."""

import re
from pathlib import Path

import pytest

from shared_core import testing

README = Path(__file__).parents[1] / "README.md"
BLOCKS = testing.fenced_blocks(README.read_text(encoding="utf-8"), "python")


def _name(block: str) -> str:
    return " ".join(
        re.findall(r"\b(quantize|evaluate|RECIPES|reparameterize_layernorm|embedded|onnx)\b", block)[-1:]
    )


def test_the_readme_has_an_example_for_each_door():
    text = "".join(BLOCKS)
    for name in (
        "repqvit.quantize(",
        "repqvit.load(",
        "repqvit.evaluate(",
        "repqvit.compare(",
        "export_onnx(",
    ):
        assert name in text


@pytest.mark.parametrize("block", BLOCKS, ids=_name)
def test_example(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    testing.run_block(block)
