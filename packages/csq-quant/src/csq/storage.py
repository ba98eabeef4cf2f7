"""What a layer's precision is: paper bits, stored bits, and the bit streams that realise the latter.

The paper counts k selected planes as k bits. A plane of p - n holds -1, 0 or 1, so k neighbouring planes
range over ±(2^k - 1), which is k + 1 bits in two's complement; with gaps between planes, more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Int16, UInt8, UInt16

from shared_core import InputError

MAX_WIDTH = 9
"""Eight planes and the sign."""
CODEBOOK_BITS = 16
"""What an entry of a codebook takes."""


def paper_bits(mask: Sequence[bool]) -> int:
    """The number of selected planes, which the paper calls the bits of a weight."""
    return sum(map(bool, mask))


def span(mask: Sequence[bool]) -> int:
    """Planes from the lowest to the highest selected one, gaps included; 0 if none is selected."""
    planes = [plane for plane, on in enumerate(mask) if on]
    return planes[-1] - planes[0] + 1 if planes else 0


@cache
def reachable(mask: tuple[bool, ...]) -> frozenset[int]:
    """The numbers that selected planes make, each -1, 0 or 1 times its place, in units of the lowest one."""
    values = {0}
    lowest = mask.index(True) if any(mask) else 0
    for plane, on in enumerate(mask[lowest:]):
        if on:
            values = {value + digit * 2**plane for value in values for digit in (-1, 0, 1)}
    return frozenset(values)


def reachable_values(mask: tuple[bool, ...]) -> int:
    """How many different weights selected planes can make."""
    return len(reachable(mask))


def stored_bits(mask: Sequence[bool], used_values: int | None = None) -> int:
    """Bits a weight takes in a file: min(span + 1, ⌈log2 reachable values⌉, ⌈log2 values really used⌉).

    Args:
        mask: selected planes, least significant first.
        used_values: how many different values a layer's weights have, if known.

    Returns:
        0 to 9; 0 where all weights are one value.

    Example:
        >>> stored_bits([False, True, False, False, True, False, False, False])  # 00010010: 9 values
        4
    """
    planes = tuple(map(bool, mask))
    if not any(planes):
        return 0
    widths = [span(planes) + 1, bits_for(reachable_values(planes))]
    if used_values is not None:
        widths.append(bits_for(used_values))
    return min(widths)


def bits_for(values: int) -> int:
    """⌈log2 values⌉: the bits that tell so many values apart."""
    return max(0, values - 1).bit_length()


@dataclass(frozen=True)
class Packed:
    """Whole numbers as a bit stream, each of `width` bits: number - offset, or its index in the codebook."""

    stream: UInt8[np.ndarray, " bytes"]
    count: int
    width: int
    offset: int
    codebook: Int16[np.ndarray, " values"] | None


def pack_codes(codes: Int16[np.ndarray, "..."]) -> Packed:
    """Pack codes at the least width: from their smallest value on, or by a codebook of the values used.

    A codebook, 16 bits an entry, is taken only where it saves more than it costs.
    """
    flat = codes.reshape(-1)
    width, low, codebook = stored_form(codes)
    shifted = (flat - np.int16(low)).view(np.uint16)
    if codebook is None:
        return Packed(pack(shifted, width), flat.size, width, low, None)
    index_of = np.zeros(int(codebook[-1]) - low + 1, np.uint16)
    index_of[codebook - low] = np.arange(len(codebook))
    return Packed(pack(index_of[shifted], width), flat.size, width, 0, codebook)


def stored_form(codes: Int16[np.ndarray, "..."]) -> tuple[int, int, Int16[np.ndarray, " values"] | None]:
    """Width, smallest value and codebook (or None) at which `pack_codes` packs these codes."""
    flat = codes.reshape(-1)
    if not flat.size:
        raise InputError("expected at least one weight", field="codes", value=codes.shape)
    low, high = int(flat.min()), int(flat.max())
    present = np.bincount(flat - np.int16(low), minlength=high - low + 1) > 0
    used = int(present.sum())
    width, narrow = bits_for(high - low + 1), bits_for(used)
    if (width - narrow) * flat.size <= CODEBOOK_BITS * used:
        return width, low, None
    return narrow, low, (np.flatnonzero(present) + low).astype(np.int16)


def file_bits(codes: Int16[np.ndarray, "..."]) -> float:
    """Bits a weight that `pack_codes` takes for these codes, the codebook included."""
    width, _, codebook = stored_form(codes)
    return width + (0.0 if codebook is None else CODEBOOK_BITS * len(codebook) / codes.size)


def unpack_codes(packed: Packed) -> Int16[np.ndarray, " count"]:
    """The inverse of `pack_codes`, flat.

    Raises:
        InputError: the stream has another length than its count and width say, or an index is beyond the
            codebook.
    """
    values = unpack(packed.stream, packed.width, packed.count)
    if packed.codebook is None:
        return values.view(np.int16) + np.int16(packed.offset)
    if values.size and int(values.max()) >= len(packed.codebook):
        raise InputError("an index is beyond the codebook: the stream is damaged", field="stream")
    return packed.codebook[values]


def pack(values: UInt16[np.ndarray, " count"], width: int) -> UInt8[np.ndarray, " bytes"]:
    """Numbers below 2^width one after the other, low bits first, in ⌈count · width / 8⌉ bytes.

    Eight numbers fill exactly `width` bytes, and are moved as one 64-bit word (and a ninth byte).
    """
    _check_width(width)
    if width == 0:
        return np.zeros(0, np.uint8)
    groups = -(-values.size // 8)
    padded = np.zeros((groups, 8), np.uint16)
    padded.reshape(-1)[: values.size] = values
    words = np.zeros(groups, "<u8")
    for place in range(8):
        words |= padded[:, place].astype("<u8") << np.uint64(width * place)  # what passes bit 63 is dropped
    bytes_ = np.empty((groups, width), np.uint8)
    bytes_[:, : min(width, 8)] = words.view(np.uint8).reshape(groups, 8)[:, : min(width, 8)]
    if width == MAX_WIDTH:
        bytes_[:, 8] = padded[:, 7] >> 1
    return bytes_.reshape(-1)[: -(-values.size * width // 8)]


def unpack(stream: UInt8[np.ndarray, " bytes"], width: int, count: int) -> UInt16[np.ndarray, " count"]:
    """The inverse of `pack`.

    Raises:
        InputError: the stream is longer or shorter than `count` numbers.
    """
    _check_width(width)
    if stream.size != -(-count * width // 8):
        raise InputError(
            f"expected {-(-count * width // 8)} bytes for {count} numbers of {width} bits",
            field="stream",
            value=stream.size,
        )
    if width == 0:
        return np.zeros(count, np.uint16)
    groups = -(-count // 8)
    bytes_ = np.zeros(groups * width, np.uint8)
    bytes_[: stream.size] = stream
    bytes_ = bytes_.reshape(groups, width)
    wide = np.zeros((groups, 8), np.uint8)
    wide[:, : min(width, 8)] = bytes_[:, :8]
    words = wide.view("<u8").reshape(-1)
    values = np.empty((groups, 8), np.uint16)
    for place in range(8):
        values[:, place] = (words >> np.uint64(width * place)) & np.uint64(2**width - 1)
    if width == MAX_WIDTH:
        values[:, 7] |= bytes_[:, 8].astype(np.uint16) << 1
    return values.reshape(-1)[:count]


def _check_width(width: int) -> None:
    if not 0 <= width <= MAX_WIDTH:
        raise InputError(f"expected 0 to {MAX_WIDTH} bits", field="width", value=width)
