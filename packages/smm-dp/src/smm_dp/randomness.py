"""Where random bits come from, and whether they may protect anyone.

Every sampler here takes a `RandomSource` and reads whole words from it. `secure_source()` is the only
source whose `secure` is true: AES-256 in counter mode under a key from the operating system. The seeded
sources exist for tests, for public randomness and for simulations, and say so.
"""

import hashlib
import os
from typing import Protocol, runtime_checkable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from jaxtyping import UInt8, UInt16, UInt64

from shared_core import InputError

_ZEROS = bytes(1 << 16)  # what the cipher encrypts to give its key stream, block by block


@runtime_checkable
class RandomSource(Protocol):
    """A stream of independent uniform bits."""

    label: str
    """What the source is, in words for a report."""
    secure: bool
    """True where the bits come from a cryptographic generator with a secret key."""

    def octets(self, count: int) -> UInt8[np.ndarray, " count"]:
        """Return `count` uniform bytes."""
        ...


class CipherSource:
    """AES-256 in counter mode: about one block per 16 bytes, and nothing to tell it from uniform bits.

    Args:
        key: 32 secret bytes.
        secure: Whether the key came from the operating system and is used once.
        label: What the source is, for a report.
    """

    def __init__(self, key: bytes, *, secure: bool, label: str) -> None:
        if len(key) != 32:
            raise InputError("the key of AES-256 has 32 bytes", field="key", value=len(key))
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._process = os.getpid()
        self.secure = secure
        self.label = label

    def octets(self, count: int) -> UInt8[np.ndarray, " count"]:
        """Return `count` uniform bytes.

        Raises:
            RuntimeError: The process was forked since: parent and child would give the same noise.
        """
        if os.getpid() != self._process:
            raise RuntimeError("a cipher stream does not survive a fork: make a source in the child")
        out = np.empty(count + 15, np.uint8)  # the cipher wants room for one block less a byte
        view = memoryview(out)  # pyright: ignore[reportArgumentType] an array is a buffer since Python has them
        for start in range(0, count, len(_ZEROS)):
            size = min(len(_ZEROS), count - start)
            self._stream.update_into(memoryview(_ZEROS)[:size], view[start : start + size + 15])
        return out[:count]

    def __reduce__(self) -> tuple:
        raise TypeError("a cipher stream is not copied or pickled: two copies would give the same noise")


def secure_source() -> CipherSource:
    """Return a fresh source keyed by the operating system: what a release uses.

    >>> secure_source().secure
    True
    """
    return CipherSource(os.urandom(32), secure=True, label="AES-256-CTR keyed by the operating system")


def seeded_source(seed: int, purpose: str = "simulation") -> CipherSource:
    """Return a reproducible source for tests and simulations. It protects nobody: the seed tells all.

    >>> int(seeded_source(1).octets(1)[0]) == int(seeded_source(1).octets(1)[0])
    True
    """
    key = hashlib.sha256(f"smm-dp/{purpose}/{seed}".encode()).digest()
    return CipherSource(key, secure=False, label=f"AES-256-CTR from seed {seed} (simulation only)")


def words16(source: RandomSource, count: int) -> UInt16[np.ndarray, " count"]:
    """Return `count` uniform 16-bit words."""
    return source.octets(2 * count).view(np.uint16)


def words64(source: RandomSource, count: int) -> UInt64[np.ndarray, " count"]:
    """Return `count` uniform 64-bit words."""
    return source.octets(8 * count).view(np.uint64)


class IntegerReader:
    """Uniform integers in any range, exactly, by rejection; reads its source in pages.

    >>> IntegerReader(seeded_source(0)).below(1)
    0
    """

    def __init__(self, source: RandomSource) -> None:
        self._source = source
        self._page = b""
        self._position = 0

    def below(self, bound: int) -> int:
        """Return a uniform integer in [0, bound).

        Raises:
            InputError: The bound is below 1.
        """
        if bound < 1:
            raise InputError("expected a bound of at least 1", field="bound", value=bound)
        bits = (bound - 1).bit_length()
        size, mask = (bits + 7) // 8, (1 << bits) - 1
        while True:
            if self._position + size > len(self._page):
                self._page = self._source.octets(max(4096, size)).tobytes()
                self._position = 0
            end = self._position + size
            draw = int.from_bytes(self._page[self._position : end], "little") & mask
            self._position = end
            if draw < bound:
                return draw
