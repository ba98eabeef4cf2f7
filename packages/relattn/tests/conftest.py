from __future__ import annotations

import os
import sys
from pathlib import Path

# tiny_models.py stands beside the tests; pytest's importlib mode does not look there.
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from shared_core import testing

testing.check_annotations("relattn", int_for_float=True)
testing.hypothesis_profile(slow_data=True)

# The models here are tiny: more threads only wait for one another, long where other work fills the cores.
torch.set_num_threads(1)

pytest_configure = testing.ignore_torchao_docstrings


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def bart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny BART with a byte-level BPE tokenizer, as a user's own model directory."""
    from tiny_models import save_bart

    return save_bart(tmp_path_factory.mktemp("bart"))


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny T5 with a Unigram tokenizer."""
    from tiny_models import save_t5

    return save_t5(tmp_path_factory.mktemp("t5"))
