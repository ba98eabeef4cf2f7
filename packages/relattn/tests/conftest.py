"""Shapes and types that the annotations state are checked while the tests run."""

import os
import sys
import types
from pathlib import Path

# tiny_models.py stands beside the tests; pytest's importlib mode does not look there.
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Installed before any test imports the package. An int may stand for a float, as everywhere in Python.
_checker = types.ModuleType("relattn_type_checker")  # the hook wants a name to import
_checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules["relattn_type_checker"] = _checker
install_import_hook("relattn", "relattn_type_checker.check")

# The models here are tiny: more threads only wait for one another, long where other work fills the cores.
torch.set_num_threads(1)

settings.register_profile(
    "house", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    # transformers imports torchao where there is one. torchao 0.18 has unescaped backslashes in docstrings,
    # of which Python warns when it compiles them. May go when torchao has none.
    for category in ("DeprecationWarning", "SyntaxWarning"):  # the latter from Python 3.12 on
        config.addinivalue_line("filterwarnings", f"ignore:.*invalid escape sequence:{category}")


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
