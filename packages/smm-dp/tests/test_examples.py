"""The examples in docstrings run and give what they say."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import smm_dp
from shared_core import testing

README = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
BLOCKS = testing.fenced_blocks(README, "python")
HEAVY = {"smm_dp.cli", "smm_dp.proof", "smm_dp.flower"}
MODULES = [m.name for m in pkgutil.iter_modules(smm_dp.__path__, "smm_dp.") if m.name not in HEAVY]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_importing_the_package_is_light():
    import subprocess
    import sys

    heavy = "('torch', 'opacus', 'flwr', 'dp_accounting')"
    code = f"import sys, smm_dp; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize("number", range(len(BLOCKS)))
@pytest.mark.filterwarnings("ignore")  # flwr and opacus warn of their own future
def test_the_readme_examples_run(number):
    block = BLOCKS[number]
    for library in ("flwr", "opacus"):
        if library in block:
            pytest.importorskip(library)
    testing.run_block(block)
