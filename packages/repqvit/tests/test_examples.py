"""Examples in docstrings run; those of README.md run in test_readme.py."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["quantized", "onnx_export", "torchao_export"])
# torchao has unescaped backslashes in its docstrings, which warn when it is first compiled.
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore:invalid escape sequence")
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(f"repqvit.{name}"))
    assert results.attempted > 0
    assert results.failed == 0
