"""Labelled images for training: embedded sets and a user's own, each as training, validation and test part.

The validation part is always cut out of the training images, or is a folder of its own; it is never the test
part. Pixels stay bytes until a batch is made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from shared_core import InputError

EMBEDDED = ("digits", "mnist5k")


@runtime_checkable
class Split(Protocol):
    """Images with labels, read by number."""

    @property
    def labels(self) -> Int[Tensor, " n"]:
        """The images' class numbers."""
        ...

    def read(self, indices: Int[Tensor, " m"]) -> UInt8[Tensor, "m channels h w"]:
        """Return pixels of the images with these numbers."""
        ...

    def subset(self, indices: Int[Tensor, " m"]) -> Split:
        """Return the images with these numbers as a split of their own."""
        ...


@dataclass(frozen=True)
class PixelSplit:
    """Images in memory."""

    pixels: UInt8[Tensor, "n channels h w"]
    labels: Int[Tensor, " n"]

    def read(self, indices: Int[Tensor, " m"]) -> UInt8[Tensor, "m channels h w"]:
        """Return pixels of the images with these numbers."""
        return self.pixels[indices]

    def subset(self, indices: Int[Tensor, " m"]) -> PixelSplit:
        """Return the images with these numbers as a split of their own."""
        return PixelSplit(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True)
class RowSplit:
    """Images of a Hugging Face data set, decoded, resized and cropped to a square when they are read."""

    rows: Any
    labels: Int[Tensor, " n"]
    size: int
    numbers: Int[Tensor, " n"]
    """Row numbers in `rows`."""

    def read(self, indices: Int[Tensor, " m"]) -> UInt8[Tensor, "m channels h w"]:
        """Decode these images: the shorter side is resized to 8/7 of `size`, then the central square cut."""
        chosen = self.numbers[indices].tolist()
        return torch.stack([_square(self.rows[number]["image"], self.size) for number in chosen])

    def subset(self, indices: Int[Tensor, " m"]) -> RowSplit:
        """Return the images with these numbers as a split of their own."""
        return replace(self, labels=self.labels[indices], numbers=self.numbers[indices])


@dataclass(frozen=True)
class ImageData:
    """What a training run reads."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of each channel, of pixels in [0, 1]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return tuple(self.train.read(torch.tensor([0])).shape[1:])

    def inputs(self, pixels: UInt8[Tensor, "m channels h w"]) -> Float[Tensor, "m channels h w"]:
        """Return what a model gets: pixels in [0, 1], normalized."""
        mean, std = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


def load_images(
    source: str, *, size: int | None = None, validation: float = 0.1, limit: int | None = None, seed: int = 0
) -> ImageData:
    """Read a data set.

    Args:
        source: "digits" or "mnist5k", or a folder: CIFAR-10 or CIFAR-100 (binary), four files in MNIST's idx
            format, or train/ and test/ (or val/) with one folder a class. Where train/, val/ and test/ are
            there, val/ is the validation part; else it is cut out of the training images.
        size: Side of the square that images become. Required for folders of images; others are resized
            where it differs from their own.
        validation: Share of the training images, above 0 and below 1.
        limit: Training images kept, chosen at random, before the validation part is cut out.
        seed: Of the choice of images.

    Raises:
        InputError: The source is none of these, a file is damaged, or too few images are left.
    """
    if not 0 < validation < 1:
        raise InputError("expected a share above 0 and below 1", field="validation", value=validation)
    train, held, test, classes = _parts(source, size)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.labels), generator=generator)[:limit]
    if held is None:
        count = max(1, round(validation * len(order)))
        held, order = train.subset(order[:count].sort().values), order[count:]
    train = train.subset(order.sort().values)
    if not len(train.labels):
        raise InputError("no training image is left beside the validation part", file=source)
    sample = train.read(torch.arange(min(len(train.labels), 2000))).float() / 255
    mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1e-3)
    return ImageData(source, train, held, test, classes, tuple(mean.tolist()), tuple(std.tolist()))


def _parts(source: str, size: int | None) -> tuple[Split, Split | None, Split, tuple[str, ...]]:
    from shared_core import datasets

    if source in EMBEDDED:
        rows: Any = getattr(datasets, source)()
        whole, names = pixel_split(rows, size), tuple(rows.features["label"].names)
        order = torch.randperm(len(whole.labels), generator=torch.Generator().manual_seed(0))
        test = len(order) // 3
        return whole.subset(order[test:]), None, whole.subset(order[:test]), names
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(
            f"expected {' or '.join(EMBEDDED)} or an existing folder", field="data", value=source
        )
    cifars = {"data_batch_1.bin": datasets.cifar10, "fine_label_names.txt": datasets.cifar100}
    read = next((cifar for file, cifar in cifars.items() if any(folder.glob(f"**/{file}"))), None)
    if read is not None:
        splits: Any = read(folder)
        names = tuple(splits["train"].features["label"].names)
        return pixel_split(splits["train"], size), None, pixel_split(splits["test"], size), names
    if any(folder.glob("*-ubyte*")):
        arrays = datasets.idx_arrays(folder)
        train, test = (
            _resized(PixelSplit(torch.tensor(p)[:, None], torch.tensor(y).long()), size)
            for p, y in (arrays["train"], arrays["test"])
        )
        return train, None, test, tuple("0123456789")
    return _folders(folder, size)


def _folders(folder: Path, size: int | None) -> tuple[Split, Split | None, Split, tuple[str, ...]]:
    from shared_core import datasets

    splits: Any = datasets.image_folder(folder)
    if not isinstance(splits, dict) or "train" not in splits or len(splits) < 2:
        raise InputError(
            "expected train/ and test/ (or val/) of class folders, CIFAR's binary files, or idx files",
            file=folder,
        )
    if size is None:
        raise InputError("expected the side that images are resized to, in pixels", field="size", value=size)
    parts = {
        name: RowSplit(rows, torch.tensor(rows["label"]), size, torch.arange(len(rows)))
        for name, rows in splits.items()
    }
    names = tuple(splits["train"].features["label"].names)
    if "test" in parts:
        return parts["train"], parts.get("val"), parts["test"], names
    return parts["train"], None, parts["val"], names


def pixel_split(rows: Any, size: int | None = None) -> PixelSplit:
    """Return the images of a Hugging Face data set with columns image and label, all of one size.

    Args:
        rows: The data set.
        size: Side of the square that images are resized to; None leaves them.
    """
    arrays = [np.asarray(image) for image in rows["image"]]
    pixels = torch.from_numpy(np.stack(arrays))
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return _resized(PixelSplit(pixels.contiguous(), torch.tensor(rows["label"])), size)


def _resized(split: PixelSplit, size: int | None) -> PixelSplit:
    """Resize with a filter that averages, so that fine strokes survive."""
    if size is None or split.pixels.shape[-1] == size:
        return split
    resized = torch.nn.functional.interpolate(
        split.pixels.float(), (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return replace(split, pixels=resized.round().clamp(0, 255).to(torch.uint8))


def _square(image: Any, size: int) -> UInt8[Tensor, "3 size size"]:
    image = image.convert("RGB")
    share = size * 8 / 7 / min(image.size)
    width, height = (max(size, round(side * share)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height)).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
