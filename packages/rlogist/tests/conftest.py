from __future__ import annotations

import os
import sys
import types
from pathlib import Path

# generated_slides.py stands beside the tests; pytest's importlib mode does not look there.
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import cv2
import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes and types that annotations state are checked in every call. Installed before any test imports it.
_checker = types.ModuleType("rlogist_type_checker")  # the hook wants a name to import
_checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand for a float
sys.modules["rlogist_type_checker"] = _checker
install_import_hook("rlogist", "rlogist_type_checker.check")

# The work here is small: more threads only wait for one another, long where other work fills the cores.
torch.set_num_threads(1)
cv2.setNumThreads(1)

settings.register_profile("house", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    # torchao 0.18, which transformers imports where it is there, has unescaped backslashes in docstrings, of
    # which Python warns when it compiles them. May go when torchao has none.
    for category in ("DeprecationWarning", "SyntaxWarning"):  # the latter from Python 3.12 on
        config.addinivalue_line("filterwarnings", f"ignore:.*invalid escape sequence:{category}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
