"""Shapes and types that the annotations state are checked while the tests run."""

import os
import sys
import types

import pytest
from beartype import BeartypeConf, beartype
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")
_checker = types.ModuleType("smm_dp_type_checker")  # the hook wants a name to import
_checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand for a float
sys.modules["smm_dp_type_checker"] = _checker
_hook = install_import_hook("smm_dp", "smm_dp_type_checker.check")

settings.register_profile(
    "smm-dp", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("smm-dp")


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(20220704)
