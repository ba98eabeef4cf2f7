"""What secure aggregation hides vectors and keys with: keys, masks over Z_m, and shares of secrets."""

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from jaxtyping import UInt32

from smm_dp.randomness import CipherSource

_HALF = 16  # pycryptodome's Shamir shares secrets of 16 bytes; keys and seeds have two halves


def derive(secret: bytes, purpose: str) -> bytes:
    """Return a key of 32 bytes for one purpose (HKDF-SHA256)."""
    return HKDF(hashes.SHA256(), 32, salt=None, info=b"smm-dp/" + purpose.encode()).derive(secret)


def uniform_mask(seed: bytes, purpose: str, length: int, bits: int) -> UInt32[np.ndarray, " d"]:
    """Return uniform residues from a seed: the low bits of the smallest words that hold them.

    >>> mask = uniform_mask(b"seed", "example", 1000, 4)
    >>> int(mask.max()), bool((mask == uniform_mask(b"seed", "example", 1000, 4)).all())
    (15, True)
    """
    stream = CipherSource(derive(seed, purpose), secure=True, label="mask")
    width = 1 if bits <= 8 else 2 if bits <= 16 else 4
    words = stream.octets(length * width).view(f"<u{width}")
    return words.astype(np.uint32) & np.uint32((1 << bits) - 1)


def split_secret(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Return Shamir shares of a secret of 32 bytes; share i of the list has the index i + 1.

    >>> shares = split_secret(bytes(range(32)), 2, 3)
    >>> combine_shares([(3, shares[2]), (1, shares[0])]) == bytes(range(32))
    True
    """
    from Crypto.Protocol.SecretSharing import Shamir

    halves = [
        Shamir.split(threshold, count, secret[start : start + _HALF], ssss=False) for start in (0, _HALF)
    ]
    return [low[1] + high[1] for low, high in zip(*halves, strict=True)]


def combine_shares(shares: list[tuple[int, bytes]]) -> bytes:
    """Return the secret from `threshold` shares and their indices."""
    from Crypto.Protocol.SecretSharing import Shamir

    return b"".join(
        Shamir.combine([(index, share[start : start + _HALF]) for index, share in shares], ssss=False)
        for start in (0, _HALF)
    )
