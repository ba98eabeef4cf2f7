"""What a layer's precision is: paper bits, stored bits, and the bit streams that realise the latter.

The paper counts k selected planes as k bits. A plane of p - n holds -1, 0 or 1, so k neighbouring planes
range over ±(2^k - 1), which is k + 1 bits in two's complement; with gaps between planes, more.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache


def paper_bits(mask: Sequence[bool]) -> int:
    """The number of selected planes, which the paper calls the bits of a weight."""
    return sum(map(bool, mask))


def span(mask: Sequence[bool]) -> int:
    """Planes from the lowest to the highest selected one, gaps included; 0 if none is selected."""
    planes = [plane for plane, on in enumerate(mask) if on]
    return planes[-1] - planes[0] + 1 if planes else 0


@cache
def reachable_values(mask: tuple[bool, ...]) -> int:
    """How many different weights selected planes can make, each being -1, 0 or 1 times its place value."""
    values = {0}
    for plane, on in enumerate(mask):
        if on:
            values = {value + digit * 2**plane for value in values for digit in (-1, 0, 1)}
    return len(values)


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
