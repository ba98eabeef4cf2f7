"""Integer codes at their real width: b-bit codes in a contiguous bit stream."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8


def pack(codes: UInt8[np.ndarray, "*shape"], bits: int) -> UInt8[np.ndarray, " bytes"]:
    """Bit stream of codes below 2^bits, most significant bit first; ceil(n bits / 8) bytes for n codes."""
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    planes = np.unpackbits(codes.reshape(-1, 1), axis=1)[:, 8 - bits :]
    return np.packbits(planes)


def unpack(stream: UInt8[np.ndarray, " bytes"], bits: int, count: int) -> UInt8[np.ndarray, " count"]:
    """The `count` codes of a stream written by `pack`; ValueError for a stream of another length."""
    expected = -(-count * bits // 8)
    if stream.size != expected:
        raise ValueError(f"{count} codes of {bits} bits take {expected} bytes, got {stream.size}")
    planes = np.zeros((count, 8), dtype=np.uint8)
    planes[:, 8 - bits :] = np.unpackbits(stream, count=count * bits).reshape(count, bits)
    return np.packbits(planes, axis=1).reshape(-1)
