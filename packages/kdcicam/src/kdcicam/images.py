"""Image files: reading, augmentation, and the two evaluation protocols with their boxes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kdcicam.annotations import scale_boxes
from kdcicam.metrics import PROTOCOLS, Protocol
from shared_core import InputError
from shared_core.boxes import clip_boxes
from shared_core.errors import needs_extra

with needs_extra("images", "kdcicam"):
    from PIL import Image, UnidentifiedImageError
    from torchvision.transforms import InterpolationMode, v2
    from torchvision.transforms.v2 import functional

TF: Any = functional  # its annotations say Tensor where PIL images and others are taken too
Array = np.ndarray
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet."""

# Directions and sizes in which colours of ImageNet vary most (Krizhevsky et al. 2012), for the PCA lighting.
_LIGHT_VALUES = torch.tensor([0.2175, 0.0188, 0.0045])
_LIGHT_VECTORS = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image as RGB: grey, palette, CMYK and transparent ones are converted, 16-bit ones scaled to 8.

    Orientation tags are left alone, as annotations are made on the pixels as they are stored.

    Raises:
        InputError: The file is missing, empty, truncated or no image.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            if opened.mode.startswith(("I", "F")):
                values = np.asarray(opened, dtype=np.float64)
                top = 65535.0 if values.max(initial=0) > 255 else 255.0
                grey = (np.clip(values / top, 0, 1) * 255).astype(np.uint8)
                return Image.fromarray(grey).convert("RGB")
            return opened.convert("RGB")
    except FileNotFoundError as error:
        raise InputError("there is no such image", file=path) from error
    except IsADirectoryError as error:
        raise InputError("is a folder, expected an image", file=path) from error
    except UnidentifiedImageError as error:
        empty = os.path.getsize(path) == 0
        raise InputError("is empty" if empty else "is no image, or damaged", file=path) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"cannot be read whole: {error}", file=path) from error


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image; written as ``crop:0.2,1+jitter:0.4+lighting+flip``.

    Parts, joined by ``+``, the first being one of: ``crop:LOW,HIGH`` (random part of the image of this
    share of its area, aspect 3/4 to 4/3, resized), ``resize:R`` (to RxR, then a random crop), ``whole``
    (resized). Then ``flip``, ``jitter:S`` (brightness, contrast, saturation), ``lighting`` (PCA noise),
    ``randaugment:N,M``.

    >>> read = Augmentation.parse("resize:336+flip")
    >>> read.kind, read.resize, read.flip
    ('resize', 336, True)
    """

    kind: str = "whole"
    scale: tuple[float, float] = (1.0, 1.0)
    resize: int = 0
    flip: bool = False
    jitter: float = 0.0
    lighting: bool = False
    rand: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """Read the written form.

        Raises:
            InputError: It is none.
        """
        first, *rest = text.split("+")
        made: dict[str, Any] = {}
        try:
            for part in (first, *rest):
                name, _, value = part.partition(":")
                numbers = [float(n) for n in value.split(",")] if value else []
                if part is first:
                    made["kind"] = name
                    if name == "crop":
                        low, high = numbers
                        if not 0 < low <= high:
                            raise ValueError("crop needs 0 < LOW <= HIGH")
                        made["scale"] = (low, high)
                    elif name == "resize":
                        (size,) = numbers
                        made["resize"] = int(size)
                    elif name != "whole" or numbers:
                        raise ValueError("it begins with crop:LOW,HIGH, resize:R or whole")
                elif name in ("flip", "lighting") and not numbers:
                    made[name] = True
                elif name == "jitter":
                    (made["jitter"],) = numbers
                elif name == "randaugment":
                    count, magnitude = numbers
                    made["rand"] = (int(count), int(magnitude))
                else:
                    raise ValueError(f"there is no {part!r}")
        except ValueError as error:
            raise InputError(
                f"expected such as crop:0.2,1+jitter:0.4+lighting+flip ({error})",
                field="augmentation",
                value=text,
            ) from error
        return cls(**made)

    def __call__(self, image: Image.Image, size: int) -> Float[Tensor, "3 size size"]:
        """Return the image as a normalized tensor; draws from torch's generator."""
        if self.kind == "crop":
            # More than the whole image cannot be cropped: a scale above 1 is the whole.
            low, high = (min(1.0, s) for s in self.scale)
            image = v2.RandomResizedCrop(size, (low, high), antialias=True)(image)
        elif self.kind == "resize":
            if self.resize < size:
                raise InputError(f"expected at least the crop's {size}", field="resize", value=self.resize)
            image = v2.RandomCrop(size)(TF.resize(image, [self.resize, self.resize], antialias=True))
        else:
            image = TF.resize(image, [size, size], antialias=True)
        if self.flip:
            image = v2.RandomHorizontalFlip()(image)
        if self.rand:
            image = v2.RandAugment(self.rand[0], self.rand[1], interpolation=InterpolationMode.BILINEAR)(
                image
            )
        if self.jitter:
            image = v2.ColorJitter(self.jitter, self.jitter, self.jitter)(image)
        pixels = TF.to_dtype(TF.pil_to_tensor(image), torch.float32, scale=True)
        if self.lighting:
            shift = _LIGHT_VECTORS @ (0.1 * torch.randn(3) * _LIGHT_VALUES)
            pixels = pixels + shift[:, None, None]
        return TF.normalize(pixels, list(MEAN), list(STD))


def for_evaluation(
    image: Image.Image, boxes: Array, protocol: Protocol, size: int, resize: int | None = None
) -> tuple[Float[Tensor, "3 size size"], Array]:
    """The image as a normalized tensor, and its boxes in the tensor's pixels.

    ``full``: the whole image is resized to size x size; corners of boxes are cut to whole pixels as the
    field's evaluation does. ``center_crop`` (the authors'): resized to resize x resize, the middle is
    cropped, and boxes are clipped to the crop. A box outside the crop is left out where
    another one is inside; where none is, they stay as empty ones at its edge, which no map can hit.

    Args:
        image: RGB.
        boxes: xyxy [n, 4] in the image's pixels.
        protocol: Which.
        size: Side of the tensor.
        resize: Side before the crop; size * 344 / 224 where None, the authors' for CUB.

    >>> tensor, boxes = for_evaluation(Image.new("RGB", (100, 50)), np.array([[10, 10, 60, 40]]), "full", 50)
    >>> tensor.shape, boxes.tolist()
    (torch.Size([3, 50, 50]), [[5.0, 10.0, 30.0, 40.0]])
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"expected one of {', '.join(PROTOCOLS)}", field="protocol", value=protocol)
    before = image.size
    if protocol == "full":
        image = TF.resize(image, [size, size], antialias=True)
        boxes = np.floor(scale_boxes(boxes, before, (size, size)))
    else:
        side = resize or round(size * 344 / 224)
        if side < size:
            raise InputError(f"expected at least the crop's {size}", field="resize", value=side)
        image = TF.center_crop(TF.resize(image, [side, side], antialias=True), [size, size])
        edge = round((side - size) / 2)
        boxes = clip_boxes(scale_boxes(boxes, before, (side, side)) - edge, size, size)
        inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        boxes = boxes[inside] if inside.any() else boxes
    pixels = TF.to_dtype(TF.pil_to_tensor(image), torch.float32, scale=True)
    return TF.normalize(pixels, list(MEAN), list(STD)), boxes


def readable(paths: list[Path], skip: bool) -> Iterator[tuple[int, Image.Image | InputError]]:
    """Read images one by one; an unreadable one raises, or where `skip`, is named and given as its error."""
    for number, path in enumerate(paths):
        try:
            yield number, read_image(path)
        except InputError as error:
            if not skip:
                raise
            warnings.warn(f"left out: {error}", stacklevel=2)
            yield number, error
