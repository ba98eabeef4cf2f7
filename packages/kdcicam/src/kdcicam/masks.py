"""Masks of pixels, as PxAP is measured with (Choe et al., CVPR 2020)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kdcicam.data import MaskFiles
from kdcicam.images import read_image
from kdcicam.metrics import PROTOCOLS, Protocol
from shared_core import InputError

Array = np.ndarray


def read_mask(
    files: MaskFiles, protocol: Protocol, size: int, resize: int | None = None
) -> Int[Tensor, "size size"]:
    """An image's mask: 1 object, 0 ground, 255 not counted, as `images.for_evaluation` places the image.

    A pixel of a file is marked where it is not black. Files may be of any size; each is resized by itself, to
    the nearest pixel, as the field's evaluation does.

    Args:
        files: Of one image, with one mask at least.
        protocol: Which.
        size: Side of the result.
        resize: Side before the crop of ``center_crop``; size * 344 / 224 where None.

    Raises:
        InputError: A file cannot be read, or the protocol is none.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"expected one of {', '.join(PROTOCOLS)}", field="protocol", value=protocol)
    side = size if protocol == "full" else resize or round(size * 344 / 224)
    if side < size:
        raise InputError(f"expected at least the crop's {size}", field="resize", value=side)
    edge = round((side - size) / 2)
    crop = slice(edge, edge + size)
    objects: Array = np.any([_marked(path, side) for path in files.objects], axis=0)
    counted: Array = objects.astype(np.int64)
    if files.ignore is not None:
        counted[_marked(files.ignore, side) & ~objects] = 255
    return torch.from_numpy(counted[crop, crop].copy())


def _marked(path: Path, side: int) -> Array:
    marked: Array = np.asarray(read_image(path)).max(-1) > 0
    rows, columns = (np.arange(side) * length // side for length in marked.shape)
    return marked[rows[:, None], columns]
