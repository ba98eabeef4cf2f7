from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))  # tiny_models.py stands beside the tests

import pytest
import torch

from shared_core import testing

testing.check_annotations("lead_kd", int_for_float=True)
testing.hypothesis_profile(slow_data=True)

# The models here are tiny: more threads only wait for one another.
torch.set_num_threads(1)

pytest_configure = testing.ignore_torchao_docstrings


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
