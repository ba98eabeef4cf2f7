"""Stored bits and the streams that realise them."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from csq.storage import (
    pack,
    pack_codes,
    paper_bits,
    reachable_values,
    span,
    stored_bits,
    stored_form,
    unpack,
    unpack_codes,
)
from shared_core import InputError


def planes(text: str) -> tuple[bool, ...]:
    """A mask as it is read, most significant plane first."""
    return tuple(letter == "1" for letter in reversed(text))


@pytest.mark.parametrize(
    ("text", "paper", "stored"),
    [("11111111", 8, 9), ("11000000", 2, 3), ("11010000", 3, 5), ("00010010", 2, 4), ("00000000", 0, 0)],
)
def test_stored_bits_count_sign_and_gaps(text, paper, stored):
    assert paper_bits(planes(text)) == paper
    assert stored_bits(planes(text)) == stored


@given(st.lists(st.booleans(), min_size=1, max_size=6).map(tuple))
def test_reachable_values_are_those_that_gates_can_make(mask):
    digits = [(-1, 0, 1) if on else (0,) for on in mask]
    values = {sum(digit * 2**b for b, digit in enumerate(choice)) for choice in product(*digits)}
    assert reachable_values(mask) == len(values)
    if any(mask):
        low = mask.index(True)
        assert all(abs(value) >> low <= 2 ** span(mask) - 1 for value in values)
        assert stored_bits(mask) == min(span(mask) + 1, math.ceil(math.log2(len(values))))


def test_values_never_used_take_no_bits():
    assert stored_bits(planes("11111111"), used_values=3) == 2
    assert stored_bits(planes("11111111"), used_values=1) == 0


@given(st.integers(0, 9), st.data())
def test_streams_are_inverted_and_as_long_as_they_must_be(width, data):
    values = data.draw(
        hnp.arrays(np.uint16, st.integers(0, 40), elements=st.integers(0, max(0, 2**width - 1)))
    )
    stream = pack(values, width)
    assert stream.size == math.ceil(values.size * width / 8)
    assert np.array_equal(unpack(stream, width, values.size), values)


def test_streams_are_little_endian():
    # 5, 3, 6 in three bits each: 110 011 101 from the top, that is 0b1_1001_1101.
    assert pack(np.array([5, 3, 6], np.uint16), 3).tolist() == [0b10011101, 0b1]


@given(hnp.arrays(np.int16, st.integers(1, 300), elements=st.integers(-255, 255)))
def test_codes_return_from_their_stream(codes):
    packed = pack_codes(codes)
    assert packed.width == stored_form(codes)[0]
    assert packed.stream.size == math.ceil(codes.size * packed.width / 8)
    assert np.array_equal(unpack_codes(packed), codes)


def test_a_codebook_is_taken_where_values_have_gaps_and_pays_for_itself():
    gaps = np.array([-18, -16, -2, 0, 2, 14, 16, 18, -14] * 300, np.int16)  # planes 00010010
    packed = pack_codes(gaps)
    assert packed.width == 4
    assert packed.codebook is not None
    few = pack_codes(gaps[:9])  # 9 weights: nine entries of 16 bits cost more than they save
    assert few.codebook is None
    assert few.width == 6
    assert np.array_equal(unpack_codes(few), gaps[:9])


def test_damaged_streams_are_refused():
    with pytest.raises(InputError, match="expected 3 bytes for 8 numbers of 3 bits"):
        unpack(np.zeros(4, np.uint8), 3, 8)
    with pytest.raises(InputError, match="width: expected 0 to 9 bits"):
        pack(np.zeros(4, np.uint16), 10)
    packed = pack_codes(np.array([-18, -16, 0, 16, 18] * 300, np.int16))
    assert packed.codebook is not None
    packed.stream[0] = 0xFF
    with pytest.raises(InputError, match="beyond the codebook"):
        unpack_codes(packed)
