"""Residues modulo m: wrapping, centring, adding, and packing at b bits each for transport."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int64, Integer, UInt8, UInt32

from shared_core import InputError

MIN_BITS, MAX_BITS = 2, 32


def check_bits(bits: int) -> int:
    """Return `bits` where 2 ≤ bits ≤ 32, the widths that a residue fits into a uint32 with.

    Raises:
        InputError: It is outside the range.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise InputError(
            f"expected {MIN_BITS} to {MAX_BITS} bits a coordinate", field="modulus_bits", value=bits
        )
    return bits


def wrap(y: Integer[np.ndarray, " d"], bits: int) -> UInt32[np.ndarray, " d"]:
    """Return y mod 2^bits in [0, 2^bits).

    >>> wrap(np.array([-1, 0, 4, 5]), bits=2).tolist()
    [3, 0, 0, 1]
    """
    return (y & ((1 << check_bits(bits)) - 1)).astype(np.uint32)


def centre(residues: Integer[np.ndarray, " d"], bits: int) -> Int64[np.ndarray, " d"]:
    """Return the representatives in (−m/2, m/2], m = 2^bits, of residues in [0, m).

    >>> centre(np.array([0, 1, 2, 3], np.uint32), bits=2).tolist()
    [0, 1, 2, -1]
    """
    modulus = 1 << check_bits(bits)
    signed = residues.astype(np.int64)
    signed[signed > modulus // 2] -= modulus
    return signed


def check_residues(residues: np.ndarray, dim: int, bits: int, sender: str = "a participant") -> None:
    """Refuse what is not a vector of `dim` residues modulo 2^bits.

    Raises:
        InputError: Wrong length, wrong kind of number, or a residue outside [0, 2^bits); names the sender.
    """
    if residues.shape != (dim,):
        raise InputError(
            f"{sender} sent a vector of shape {residues.shape}, expected ({dim},)", field="residues"
        )
    if residues.dtype.kind != "u":
        raise InputError(f"{sender} sent {residues.dtype}, expected unsigned integers", field="residues")
    if residues.size and int(residues.max()) >> check_bits(bits):
        index = int(np.argmax(residues >> bits > 0))
        raise InputError(
            f"{sender} sent at index {index} a residue outside [0, 2^{bits})",
            field="residues",
            value=int(residues[index]),
        )


def add_residues(
    vectors: Iterable[UInt32[np.ndarray, " d"]], dim: int, bits: int
) -> UInt32[np.ndarray, " d"]:
    """Return the sum modulo 2^bits of a stream of vectors, holding one of them at a time.

    The accumulator is a uint32 that overflows modulo 2^32; that is a multiple of 2^bits, so no number of
    participants can make it wrong.

    Raises:
        InputError: A vector is not `dim` residues modulo 2^bits.
    """
    total = np.zeros(dim, np.uint32)
    for number, vector in enumerate(vectors):
        check_residues(vector, dim, bits, f"participant number {number}")
        total += vector
    return total & np.uint32((1 << bits) - 1)


def pack_bits(residues: UInt32[np.ndarray, " d"], bits: int) -> UInt8[np.ndarray, " size"]:
    """Return the residues as a string of ceil(d·bits/8) bytes, b bits each, least significant bit first.

    Args:
        residues: Values in [0, 2^bits).
        bits: Width.

    Raises:
        InputError: A residue does not fit.

    >>> pack_bits(np.array([1, 2, 3], np.uint32), bits=4).tolist()
    [33, 3]
    """
    check_residues(residues, residues.size, bits)
    size = (residues.size * bits + 7) // 8
    if bits in (8, 16, 32):
        return residues.astype(f"<u{bits // 8}").view(np.uint8)
    lanes = np.zeros(((residues.size + 63) // 64, 64), np.uint64)  # 64 residues fill exactly `bits` words
    lanes.reshape(-1)[: residues.size] = residues
    words = np.zeros((len(lanes), bits), np.uint64)
    for lane in range(64):
        word, shift = divmod(lane * bits, 64)
        words[:, word] |= lanes[:, lane] << np.uint64(shift)
        if shift + bits > 64:
            words[:, word + 1] |= lanes[:, lane] >> np.uint64(64 - shift)
    return words.astype("<u8").reshape(-1).view(np.uint8)[:size]


def unpack_bits(packed: UInt8[np.ndarray, " size"], count: int, bits: int) -> UInt32[np.ndarray, " count"]:
    """Undo `pack_bits`.

    Args:
        packed: The bytes.
        count: Number of residues.
        bits: Width.

    Raises:
        InputError: The string has another length than `count` residues need.
    """
    size = (count * check_bits(bits) + 7) // 8
    if packed.size != size:
        raise InputError(
            f"{count} residues of {bits} bits take {size} bytes", field="packed", value=packed.size
        )
    if bits in (8, 16, 32):
        return packed.view(f"<u{bits // 8}").astype(np.uint32)
    groups = (count + 63) // 64
    padded = np.zeros(groups * bits * 8, np.uint8)
    padded[:size] = packed
    words = padded.view("<u8").astype(np.uint64).reshape(groups, bits)
    lanes = np.empty((groups, 64), np.uint32)
    mask = np.uint64((1 << bits) - 1)
    for lane in range(64):
        word, shift = divmod(lane * bits, 64)
        value = words[:, word] >> np.uint64(shift)
        if shift + bits > 64:
            value = value | words[:, word + 1] << np.uint64(64 - shift)
        lanes[:, lane] = value & mask
    return lanes.reshape(-1)[:count]
