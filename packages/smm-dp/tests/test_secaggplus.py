import numpy as np
import pytest

from shared_core import InputError
from smm_dp.secaggplus import WeakMasksWarning, from_secaggplus, secaggplus_settings, to_secaggplus


def test_settings_warn_and_leave_room_for_every_sum():
    with pytest.warns(WeakMasksWarning, match="32-bit seeds"):
        settings = secaggplus_settings(8, 100)
    assert settings["modulus_range"] > 100 * 256
    assert settings["quantization_range"] / (2 * settings["clipping_range"]) == 1
    with pytest.warns(WeakMasksWarning), pytest.raises(InputError, match="need 33 bits"):
        secaggplus_settings(24, 256)


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_integers_survive_quantization_and_averaging_exactly(bits, rng):
    """Flower's quantizer written out: step 1, so nothing is rounded at random."""
    residues = rng.integers(0, 2**bits, (9, 50), dtype=np.uint32)
    half = 2 ** (bits - 1)
    quantized = [np.clip(to_secaggplus(row, bits), -half, half) + half for row in residues]
    mean = sum(quantized) / 9 - half
    assert from_secaggplus(mean, 9, bits).tolist() == (residues.sum(axis=0) % 2**bits).tolist()
    with pytest.raises(InputError, match="not made of integers"):
        from_secaggplus(mean + 0.03, 9, bits)
