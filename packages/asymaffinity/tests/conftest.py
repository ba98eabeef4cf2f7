from __future__ import annotations

import os
import sys
from pathlib import Path

# Modules that several tests build their input from stand beside them; pytest's importlib mode does not look.
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub

import pytest
import torch

from shared_core import testing

testing.check_annotations("asymaffinity", int_for_float=True)
testing.hypothesis_profile()

# The models here are tiny: more threads only wait for one another, long where other work fills the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
