"""The examples in docstrings run, and give what they show."""

import doctest
import importlib

import pytest

MODULES = (
    "analysis", "corpus", "cosines", "dimensions", "dynamics", "embedded", "isotropy", "postprocess",
    "streams", "sweep", "types",
)  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    found = importlib.import_module(f"isocse.{module}")
    outcome = doctest.testmod(found, extraglobs={"torch": importlib.import_module("torch")})
    assert outcome.attempted > 0
    assert outcome.failed == 0
