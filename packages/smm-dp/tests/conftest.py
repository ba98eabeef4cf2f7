"""Shapes and types that the annotations state are checked while the tests run."""

import os

import pytest

from shared_core import testing

os.environ.setdefault("OMP_NUM_THREADS", "1")
testing.check_annotations("smm_dp", int_for_float=True)
testing.hypothesis_profile(40, slow_data=True)


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(20220704)
