from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repqvit.packing import pack, unpack


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=70))
def test_codes_survive_at_their_width(bits, values):
    codes = np.array(values, dtype=np.uint8) & (2**bits - 1)
    stream = pack(codes, bits)
    assert stream.nbytes == -(-len(values) * bits // 8)
    np.testing.assert_array_equal(unpack(stream, bits, len(values)), codes)


def test_the_stream_is_most_significant_bit_first():
    assert pack(np.array([0b101, 0b001, 0b111], dtype=np.uint8), 3).tolist() == [0b10100111, 0b10000000]


def test_wide_codes_and_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="code 9 does not fit in 3 bits"):
        pack(np.array([9], dtype=np.uint8), 3)
    with pytest.raises(ValueError, match="3 codes of 4 bits take 2 bytes, got 1"):
        unpack(np.zeros(1, dtype=np.uint8), 4, 3)
