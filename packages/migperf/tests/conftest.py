import sys
from pathlib import Path

# made_records.py stands beside the tests; pytest's importlib mode does not look there.
sys.path.insert(0, str(Path(__file__).parent))

import pytest

from shared_core import testing

testing.check_annotations("migperf", int_for_float=True)
testing.hypothesis_profile()
pytest_configure = testing.ignore_torchao_docstrings


@pytest.fixture(autouse=True)
def _short_look_before_a_run(monkeypatch):
    """Look for foreign load for a moment before each run; tests of the look itself say how long."""
    from migperf import contamination

    monkeypatch.setattr(contamination, "BASELINE_SECONDS", 0.03)
