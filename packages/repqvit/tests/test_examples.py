"""Examples in docstrings run; those of README.md run in test_readme.py."""

from __future__ import annotations

import pytest

from shared_core import testing


@pytest.mark.parametrize("name", ["quantized", "onnx_export", "torchao_export"])
def test_docstring_examples(name):
    testing.check_docstring_examples(f"repqvit.{name}")
