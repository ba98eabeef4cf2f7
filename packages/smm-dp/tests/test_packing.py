import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_core import InputError
from smm_dp import pack_bits, unpack_bits
from smm_dp.packing import add_residues, check_residues


@given(st.integers(2, 32), st.integers(0, 400), st.integers(0, 2**32 - 1))
def test_unpacking_undoes_packing_in_as_few_bytes_as_the_bits_need(bits, count, seed):
    residues = np.random.default_rng(seed).integers(0, 2**bits, count, dtype=np.uint32)
    packed = pack_bits(residues, bits)
    assert packed.size == (count * bits + 7) // 8
    np.testing.assert_array_equal(unpack_bits(packed, count, bits), residues)


@given(st.integers(2, 32), st.integers(1, 70))
def test_packing_equals_a_long_integer_written_out(bits, count):
    residues = np.random.default_rng(bits).integers(0, 2**bits, count, dtype=np.uint32)
    number = sum(int(value) << (bits * index) for index, value in enumerate(residues))
    assert pack_bits(residues, bits).tobytes() == number.to_bytes((count * bits + 7) // 8, "little")


@pytest.mark.parametrize("bits", [2, 8, 31, 32])
def test_adding_many_vectors_is_addition_modulo_m(bits):
    vectors = np.random.default_rng(0).integers(0, 2**bits, (300, 7), dtype=np.uint32)
    total = add_residues(iter(vectors), 7, bits)
    assert total.tolist() == [int(sum(map(int, column)) % 2**bits) for column in vectors.T]


def test_bad_payloads_are_refused_with_the_senders_name():
    good = np.zeros(4, np.uint32)
    with pytest.raises(InputError, match=r"client-3 sent at index 2 a residue outside \[0, 2\^8\).*256"):
        check_residues(np.array([0, 1, 256, 3], np.uint32), 4, 8, "client-3")
    with pytest.raises(InputError, match=r"participant number 1 sent a vector of shape \(3,\)"):
        add_residues([good, good[:3]], 4, 8)
    with pytest.raises(InputError, match="unsigned"):
        check_residues(np.zeros(4), 4, 8)
    with pytest.raises(InputError, match="residue outside"):
        pack_bits(np.array([4], np.uint32), 2)
    with pytest.raises(InputError, match="take 3 bytes"):
        unpack_bits(np.zeros(4, np.uint8), 4, 6)
    with pytest.raises(InputError, match="2 to 32 bits"):
        pack_bits(good, 1)
