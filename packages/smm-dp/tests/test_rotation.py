import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard

from shared_core import InputError
from smm_dp.rotation import (
    hadamard_transform,
    hadamard_transform_tensor,
    padded_dimension,
    rotate,
    rotate_tensor,
    rotation_signs,
    unrotate,
    unrotate_tensor,
)


@pytest.mark.parametrize("levels", range(13))
def test_fast_transform_equals_the_matrix(levels, rng):
    x = rng.standard_normal(2**levels)
    expected = hadamard(2**levels) @ x
    np.testing.assert_allclose(hadamard_transform(x.copy()), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(
        hadamard_transform_tensor(torch.tensor(x)).numpy(), expected, rtol=1e-10, atol=1e-10
    )


def test_transform_twice_is_d_times_the_vector_at_2_to_the_17(rng):
    x = rng.standard_normal(1 << 17)
    np.testing.assert_allclose(hadamard_transform(hadamard_transform(x.copy())) / (1 << 17), x, atol=1e-12)


def test_transform_works_in_place(rng):
    x = rng.standard_normal(2048)
    assert hadamard_transform(x) is x


@given(st.integers(1, 300), st.integers(0, 2**40))
def test_rotation_keeps_norms_and_is_undone(dim, seed):
    x = np.random.default_rng(seed).standard_normal(dim)
    y = rotate(x, seed)
    assert y.size == padded_dimension(dim)
    np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-12)
    np.testing.assert_allclose(unrotate(y, seed, dim), x, atol=1e-12)


def test_tensor_rotation_equals_the_array_rotation(rng):
    x = rng.standard_normal((3, 100))
    rotated = rotate_tensor(torch.tensor(x), 5)
    np.testing.assert_allclose(rotated.numpy(), [rotate(row, 5) for row in x], atol=1e-12)
    np.testing.assert_allclose(unrotate_tensor(rotated, 5, 100).numpy(), x, atol=1e-12)


def test_signs_are_a_vector_not_one_global_sign():
    """Toy trap 7: a spike spreads evenly, differently for each seed, and a constant does not concentrate."""
    d = 1024
    spike = np.zeros(d)
    spike[17] = 1
    np.testing.assert_allclose(np.abs(rotate(spike, 1)), 1 / np.sqrt(d), rtol=1e-12)
    assert abs(int(rotation_signs(1, d).astype(int).sum())) < 6 * np.sqrt(d)
    assert np.abs(rotate(np.ones(d), 1)).max() < 6
    assert not np.array_equal(rotation_signs(1, d), rotation_signs(2, d))


def test_other_seeds_at_participants_and_server_do_not_decode(rng):
    x = rng.standard_normal(64)
    assert np.linalg.norm(unrotate(rotate(x, 1), 2, 64) - x) > 1


def test_lengths_that_are_no_power_of_two_are_refused():
    with pytest.raises(InputError, match="power of two"):
        hadamard_transform(np.zeros(12))
    with pytest.raises(InputError, match="power of two"):
        hadamard_transform_tensor(torch.zeros(12))
    with pytest.raises(InputError, match="128 entries"):
        unrotate(np.zeros(64), 0, 100)
    with pytest.raises(InputError, match="non-negative"):
        rotation_signs(-1, 8)
    with pytest.raises(InputError, match="contiguous"):
        hadamard_transform(np.zeros(16)[::2])
