import sys
from pathlib import Path

# made_records.py stands beside the tests; pytest's importlib mode does not look there.
sys.path.insert(0, str(Path(__file__).parent))

from shared_core import testing

testing.check_annotations("migperf", int_for_float=True)
testing.hypothesis_profile()
pytest_configure = testing.ignore_torchao_docstrings
