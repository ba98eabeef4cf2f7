from __future__ import annotations

import os
import sys
from pathlib import Path

# hosted_models.py stands beside the tests; pytest's importlib mode does not look there.
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ["CSQ_KERNEL"] = "eager"  # compiling takes seconds; test_kernels.py asks for it

from multiprocessing import forkserver, get_context

import pytest
import torch

from shared_core import testing

# Tests of killed runs and of several processes start theirs from one server, which imports torch once.
# torch._dynamo: the first optimizer in a process imports it, which takes seconds.
get_context("forkserver").set_forkserver_preload(
    ["csq.cli", "csq.runs", "csq.experiments", "torch.distributed", "torch._dynamo"]
)

testing.check_annotations("csq")
testing.hypothesis_profile()

# The models here are tiny: more threads only wait for one another, long where other work fills the cores.
torch.set_num_threads(1)

pytest_configure = testing.ignore_torchao_docstrings


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server, where a test wants it, beside the tests that do not."""
    if any("process_server" in getattr(item, "fixturenames", ()) for item in session.items):
        forkserver.ensure_running()


@pytest.fixture
def process_server() -> None:
    """Asked for by tests that start processes."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
