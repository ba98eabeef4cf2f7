"""Examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["functional", "parametrization", "schedule", "hardened", "storage"])
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(f"csq.{name}"))
    assert results.attempted > 0
    assert results.failed == 0
