from __future__ import annotations

import os
import sys
from pathlib import Path

# hosted_models.py stands beside the tests; pytest's importlib mode does not look there.
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ["CSQ_KERNEL"] = "eager"  # compiling takes seconds; test_kernels.py asks for it

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes and types that annotations state are checked in every call. Installed before any test imports it.
install_import_hook("csq", "beartype.beartype")

# The models here are tiny: more threads only wait for one another, long where other work fills the cores.
torch.set_num_threads(1)

# The machines that run the tests are shared and slow at times: no law here is about speed.
settings.register_profile("house", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    # torchao 0.18, which transformers imports where it is installed, has unescaped backslashes in docstrings,
    # of which Python warns when it first compiles them. May go when torchao has none.
    for category in ("DeprecationWarning", "SyntaxWarning"):  # the latter from Python 3.12 on
        config.addinivalue_line("filterwarnings", f"ignore:.*invalid escape sequence:{category}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
