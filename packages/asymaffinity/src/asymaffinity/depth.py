"""Depth maps as files: formats, what their numbers mean, and the field that is differentiated.

What the numbers are cannot be seen from a file, so it is stated: by a convention's name, or by kind and
scale.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from shared_core import InputError

Array = np.ndarray
SUFFIXES = (".png", ".npy", ".pfm", ".exr", ".tif", ".tiff")
KINDS = ("disparity", "inverse_depth", "depth")
SIDECAR = "depth.json"


@dataclass(frozen=True)
class Convention:
    """What the numbers of depth maps mean: value = (number - offset) / scale.

    Attributes:
        kind: ``disparity`` (of stereo: none at 0 or below), ``inverse_depth`` (relative, of a network: any
            finite number) or ``depth`` (a length: none at 0 or below).
        scale: Numbers a unit.
        offset: Number of the value 0.
        invalid: Number that means "not known", before scaling.
        far: Number from which on a depth is the sky's and not known; where None, none.
    """

    kind: str
    scale: float = 1.0
    offset: float = 0.0
    invalid: float | None = 0.0
    far: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"expected one of {', '.join(KINDS)}", field="kind", value=self.kind)
        if not self.scale > 0:
            raise InputError("expected a number above 0", field="scale", value=self.scale)


CONVENTIONS = {
    "cityscapes": Convention("disparity", 256, 1, 0),
    "kitti": Convention("depth", 256, 0, 0),
    "vkitti2": Convention("depth", 100, 0, 0, 65535),
    "nyuv2": Convention("depth", 1000, 0, 0),
    "scannet": Convention("depth", 1000, 0, 0),
    "middlebury": Convention("disparity", 1, 0, None),
    "disparity": Convention("disparity", 1, 0, 0),
    "inverse_depth": Convention("inverse_depth", 1, 0, None),
    "metres": Convention("depth", 1, 0, 0),
}
"""By name. Cityscapes: (p - 1) / 256 pixels. KITTI: p / 256 m. VKITTI2: centimetres. NYUv2, ScanNet:
millimetres."""


def convention(value: str | dict[str, Any]) -> Convention:
    """A convention by name, or of named fields.

    Raises:
        InputError: There is none of that name, or a field is wrong.
    """
    if isinstance(value, str):
        if value not in CONVENTIONS:
            raise InputError(
                f"what the numbers mean must be stated: one of {', '.join(CONVENTIONS)}, or a file {SIDECAR}",
                field="depth kind",
                value=value,
            )
        return CONVENTIONS[value]
    known = {field.name for field in fields(Convention)}
    if not set(value) <= known or "kind" not in value:
        raise InputError(f"expected kind and any of {', '.join(sorted(known))}", field="depth", value=value)
    return Convention(**value)


def sidecar(folder: Path) -> Convention | None:
    """The convention that a folder's depth.json states; None where there is no such file."""
    file = folder / SIDECAR
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        return convention(value.get("convention", value))
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise InputError(f"is no description of depth maps: {error}", file=file) from error
    except InputError as error:
        raise InputError(error.message, file=file, field=error.field, value=error.value) from error


def read_numbers(path: Path) -> Array:
    """The numbers in a file, as float32 [height, width]; NaN and infinities as they are.

    Raises:
        InputError: It is missing, damaged, of another format, or has several channels.
    """
    if not path.is_file():
        raise InputError("there is no such depth map", file=path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        elif suffix == ".pfm":
            values = _pfm(path)
        elif suffix == ".exr":
            values = _exr(path)
        elif suffix in SUFFIXES:
            with Image.open(path) as image:
                values = np.asarray(image)
        else:
            raise InputError(f"expected one of {', '.join(SUFFIXES)}", file=path, value=suffix)
    except (UnidentifiedImageError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot be read as a depth map: {error}", file=path) from error
    if values.ndim != 2 or not values.size:
        raise InputError("expected one channel of height by width", file=path, value=values.shape)
    if not (np.issubdtype(values.dtype, np.number) or values.dtype == bool):
        raise InputError("expected numbers", file=path, value=values.dtype)
    return values.astype(np.float32)


def to_field(numbers: Array, meaning: Convention, field: str = "disparity") -> Array:
    """The field that `DepthGradAffinity.field` asks for, NaN where it is not known.

    Args:
        numbers: As they stand in the file.
        meaning: What they mean.
        field: ``disparity`` (or inverse depth: known up to a factor), ``depth`` or ``log_depth``.

    >>> to_field(np.array([[0, 257, 513]], np.float32), CONVENTIONS["cityscapes"]).tolist()
    [[nan, 1.0, 2.0]]
    """
    known = np.isfinite(numbers)
    if meaning.invalid is not None:
        known &= numbers != meaning.invalid
    if meaning.far is not None:
        known &= numbers < meaning.far
    values = (np.where(known, numbers, 1).astype(np.float32) - meaning.offset) / meaning.scale
    if meaning.kind == "inverse_depth":
        if field != "disparity":
            raise InputError(
                "relative inverse depth has no scale and shift to make a depth of", field="field", value=field
            )
        return np.where(known, values, np.nan).astype(np.float32)
    known &= values > 0
    values = np.where(known, values, 1)
    turned = (meaning.kind == "depth") != (field != "disparity")  # disparity of depth, or depth of disparity
    values = 1 / values if turned else values
    values = np.log(values) if field == "log_depth" else values
    return np.where(known, values, np.nan).astype(np.float32)


def describe(numbers: Array, meaning: Convention) -> str:
    """Median and range of what is known, and how much is: for an error or a notice."""
    values = to_field(numbers, meaning, "disparity" if meaning.kind != "depth" else "depth")
    known = values[np.isfinite(values)]
    if not known.size:
        return f"no pixel is known (numbers from {np.nanmin(numbers):g} to {np.nanmax(numbers):g})"
    return (
        f"median {np.median(known):.4g}, range {known.min():.4g} to {known.max():.4g}, "
        f"{known.size / values.size:.0%} known"
    )


def read_field(path: Path, meaning: Convention, field: str = "disparity") -> Array:
    """Read a depth map as a field.

    Raises:
        InputError: As for `read_numbers`; or no pixel is known.
    """
    numbers = read_numbers(path)
    values = to_field(numbers, meaning, field)
    if not np.isfinite(values).any():
        raise InputError(f"{describe(numbers, meaning)}; is it of another kind?", file=path)
    return values


def find(folder: Path, stem: str) -> Path:
    """The depth map of an image, by its stem.

    Raises:
        InputError: There is none; the message says which names were looked for.
    """
    for suffix in SUFFIXES:
        if (path := folder / f"{stem}{suffix}").is_file():
            return path
    raise InputError(f"there is no depth map {stem} with one of {', '.join(SUFFIXES)}", file=folder)


def _pfm(path: Path) -> Array:
    data = path.read_bytes()
    parts = data.split(b"\n", 3)
    if len(parts) < 4 or parts[0].strip() not in (b"Pf", b"PF"):
        raise ValueError("no PFM header")
    if parts[0].strip() == b"PF":
        raise ValueError("a PFM of colours")
    width, height = (int(number) for number in parts[1].split())
    kind = "<f4" if float(parts[2]) < 0 else ">f4"
    if len(parts[3]) < 4 * width * height:
        raise ValueError("it is cut short")
    values = np.frombuffer(parts[3], kind, width * height).reshape(height, width)
    return values[::-1]  # rows run from the bottom up


def _exr(path: Path) -> Array:
    import os

    os.environ.setdefault("OPENCV_IO_ENABLE_OPENEXR", "1")  # read when the first image is
    try:
        values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ValueError(f"OpenCV: {str(error).splitlines()[0]}") from error
    if values is None:
        raise ValueError("OpenCV cannot read it")
    return values[..., 0] if values.ndim == 3 else values
