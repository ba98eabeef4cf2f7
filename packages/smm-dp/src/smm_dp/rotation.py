"""The public random rotation: signs, then the orthonormal Walsh-Hadamard transform.

Rotating spreads a vector over all coordinates, so that one coordinate bound fits all of them and the
noise in the sum is flat (section 3 of Bao et al. 2022, as in the distributed discrete Gaussian).
The transform runs in place in O(d log d). It never makes a d x d matrix.
"""

import hashlib
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float64, Int8

from shared_core import InputError

if TYPE_CHECKING:
    import torch

_BLOCK = (
    32  # one pass multiplies by a 32 x 32 Hadamard block: five butterfly levels for one trip through memory
)


def padded_dimension(dim: int) -> int:
    """Return the smallest power of two that is at least `dim`.

    >>> padded_dimension(2410)
    4096
    """
    if dim < 1:
        raise InputError("a vector has at least one entry", field="dim", value=dim)
    return 1 << (dim - 1).bit_length()


@cache
def _block(size: int) -> Float64[np.ndarray, "size size"]:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def hadamard_transform(x: Float64[np.ndarray, "*batch d"]) -> Float64[np.ndarray, "*batch d"]:
    """Multiply the last axis of `x` by the Sylvester Hadamard matrix (entries ±1, not normalised), in place.

    The index is read as digits to base 32; each pass transforms one digit. The last digit is a product of
    rows with a small matrix, the others are products from the left, so memory is read in long runs.

    Args:
        x: Float64 array, contiguous; its last axis is a power of two.

    Returns:
        `x` itself.

    Raises:
        InputError: The length is not a power of two, or `x` is not contiguous.

    >>> hadamard_transform(np.array([1.0, 0.0, 0.0, 0.0])).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    d = x.shape[-1]
    if d & (d - 1) or d == 0:
        raise InputError("the length must be a power of two: pad the vector", field="x", value=d)
    if not x.flags.c_contiguous:
        raise InputError("the vector must be contiguous: it is transformed in place", field="x")
    inner = 1
    while inner < d:
        size = min(_BLOCK, d // inner)
        if inner == 1:
            _transform_rows(x.reshape(x.size // size, size))
        else:
            _transform_columns(x.reshape(x.size // (inner * size), size, inner))
        inner *= size
    return x


def _transform_rows(rows: Float64[np.ndarray, "n size"]) -> None:
    block = _block(rows.shape[1])
    step = max(1, (1 << 15) // rows.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        part[:] = part @ block


def _transform_columns(cubes: Float64[np.ndarray, "n size inner"]) -> None:
    block = _block(cubes.shape[1])
    step = max(1, (1 << 15) // cubes.shape[1])
    for cube in cubes:
        for start in range(0, cube.shape[1], step):
            part = cube[:, start : start + step]
            part[:] = block @ part


def rotation_signs(seed: int, d: int) -> Int8[np.ndarray, " d"]:
    """Return the public ±1 vector of a rotation: SHAKE-256 of seed and dimension, one bit a coordinate.

    All participants and the server of a round must use the same seed. It is public, and it should be fresh
    in each round.

    Args:
        seed: Non-negative integer.
        d: Padded dimension.

    Raises:
        InputError: The seed is negative.
    """
    if seed < 0:
        raise InputError("a rotation seed is a non-negative integer", field="rotation_seed", value=seed)
    digest = hashlib.shake_256(f"smm-dp/rotation/{seed}/{d}".encode()).digest((d + 7) // 8)
    bits = np.unpackbits(np.frombuffer(digest, np.uint8), count=d).view(np.int8)
    return 1 - 2 * bits


def rotate(x: Float[np.ndarray, " dim"], seed: int) -> Float64[np.ndarray, " d"]:
    """Return (1/√d) H (s ∘ x), with `x` padded by zeros to a power of two d. Norms are kept.

    Args:
        x: Vector of any length.
        seed: Public seed of the signs s.

    >>> spike = rotate(np.array([1.0, 0.0, 0.0, 0.0]), seed=3)
    >>> np.abs(spike).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    d = padded_dimension(x.size)
    out = np.zeros(d)
    np.multiply(x, rotation_signs(seed, d)[: x.size] / np.sqrt(d), out=out[: x.size])
    return hadamard_transform(out)


def unrotate(y: Float[np.ndarray, " d"], seed: int, dim: int) -> Float64[np.ndarray, " dim"]:
    """Undo `rotate`: the first `dim` entries of s ∘ ((1/√d) H y).

    Args:
        y: Rotated vector; its length is a power of two.
        seed: The seed that `rotate` had.
        dim: Length of the vector before padding.

    Raises:
        InputError: `y` has another length than the padded `dim`.
    """
    d = padded_dimension(dim)
    if y.size != d:
        raise InputError(f"a rotated vector of dimension {dim} has {d} entries", field="y", value=y.size)
    out = hadamard_transform(np.array(y, np.float64))
    out *= rotation_signs(seed, d)
    out /= np.sqrt(d)
    return out[:dim]


def hadamard_transform_tensor(x: "torch.Tensor") -> "torch.Tensor":
    """Multiply the last axis of a tensor by the Hadamard matrix, in place, on the tensor's own device.

    Args:
        x: Contiguous floating tensor; its last axis is a power of two.

    Returns:
        `x` itself.

    Raises:
        InputError: As for `hadamard_transform`.
    """
    d = x.shape[-1]
    if d & (d - 1) or d == 0:
        raise InputError("the last axis must be a power of two: pad the vector", field="x", value=d)
    if not x.is_contiguous():
        raise InputError("the tensor must be contiguous: it is transformed in place", field="x")
    half = 1
    while half < d:
        pairs = x.view(-1, d // (2 * half), 2, half)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        low += high  # a+b
        high.mul_(-2).add_(low)  # a+b-2b = a-b
        half *= 2
    return x


def rotate_tensor(x: "torch.Tensor", seed: int) -> "torch.Tensor":
    """Rotate each row of a batch of vectors on its own device; `rotate` for tensors.

    Args:
        x: Tensor of shape (..., dim).
        seed: Public seed of the signs.

    Returns:
        Tensor of shape (..., d), d the padded dimension, same dtype and device.
    """
    import torch

    d = padded_dimension(x.shape[-1])
    signs = torch.from_numpy(rotation_signs(seed, d)).to(device=x.device, dtype=x.dtype)
    out = torch.zeros((*x.shape[:-1], d), dtype=x.dtype, device=x.device)
    out[..., : x.shape[-1]] = x * signs[: x.shape[-1]]
    return hadamard_transform_tensor(out).mul_(d**-0.5)


def unrotate_tensor(y: "torch.Tensor", seed: int, dim: int) -> "torch.Tensor":
    """Undo `rotate_tensor`; shapes (..., d) -> (..., dim)."""
    import torch

    d = padded_dimension(dim)
    if y.shape[-1] != d:
        raise InputError(f"a rotated vector of dimension {dim} has {d} entries", field="y", value=y.shape[-1])
    signs = torch.from_numpy(rotation_signs(seed, d)).to(device=y.device, dtype=y.dtype)
    out = hadamard_transform_tensor(y.clone(memory_format=torch.contiguous_format))
    return out.mul_(signs).mul_(d**-0.5)[..., :dim]
