"""Examples in docstrings run; those of README.md run in test_readme.py."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["quantized", "onnx_export", "torchao_export"])
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(f"repqvit.{name}"))
    assert results.attempted > 0
    assert results.failed == 0
