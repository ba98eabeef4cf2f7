"""The examples in docstrings run, and give what they show."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["cosines", "dimensions", "isotropy", "postprocess", "streams"])
def test_docstring_examples(module):
    found = importlib.import_module(f"isocse.{module}")
    outcome = doctest.testmod(found, extraglobs={"torch": importlib.import_module("torch")})
    assert outcome.attempted > 0
    assert outcome.failed == 0
