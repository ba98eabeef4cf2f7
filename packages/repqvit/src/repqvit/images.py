"""Image files as calibration and evaluation data: which files, in which order, and in batches of tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from repqvit.sources import Preprocessing
from shared_core import InputError


@dataclass(frozen=True)
class ImageFiles:
    """Image files of one folder, in the order of use."""

    folder: Path
    files: list[Path]
    labels: list[int] | None = None
    """Number of each file's class folder, by sorted names; None for unlabelled images."""
    classes: list[str] = field(default_factory=list)
    seed: int | None = None

    def record(self) -> dict[str, Any]:
        """What was used, for the record: paths are relative to the folder."""
        relative = [file.relative_to(self.folder).as_posix() for file in self.files]
        return {"folder": str(self.folder), "seed": self.seed, "count": len(self.files), "files": relative}


def calibration_files(folder: Path, count: int, seed: int = 0) -> ImageFiles:
    """`count` images drawn by the seed from a folder: from train/ where it has that, else from all below it.

    Labels are not looked at. Warns where there are fewer images than asked.

    Raises:
        InputError: no such folder, no image in it, or a folder that has val/ or test/ but no train/.
    """
    if count < 1:
        raise InputError("expected at least 1 image", field="count", value=count)
    splits = [split for split in ("train", "val", "test") if (folder / split).is_dir()]
    if splits and "train" not in splits:
        raise InputError(
            f"has {' and '.join(splits)} but no train: calibrate on training images, or name one split",
            file=folder,
        )
    files = _listed(folder / "train" if splits else folder)
    order = np.random.default_rng(seed).permutation(len(files))[:count]
    if len(files) < count:
        warnings.warn(f"{folder} has {len(files)} images, fewer than the {count} asked for", stacklevel=2)
    return ImageFiles(folder, [files[index] for index in order], seed=seed)


def evaluation_files(folder: Path, labelled: bool = True) -> ImageFiles:
    """All images of a folder in the order of their paths: of val/ where it has that, else of all below it.

    labelled: number the class folders, if there are any, as torchvision's ImageFolder does.
    """
    from shared_core.datasets import class_folders

    root = folder / "val" if (folder / "val").is_dir() else folder
    if not labelled or not root.is_dir() or not any(e.is_dir() and e.name[0] != "." for e in root.iterdir()):
        return ImageFiles(root, _listed(root))
    rows = class_folders(root, check=False)
    files = [Path(path) for path in rows["path"]]
    return ImageFiles(root, files, list(rows["label"]), list(rows.features["label"].names))


def _listed(folder: Path) -> list[Path]:
    from shared_core.datasets import image_folder

    rows: Any = image_folder(folder, check=False)
    return [Path(path) for path in rows["path"]]


def with_model_labels(images: ImageFiles, outputs: int, class_numbers: dict[str, int]) -> ImageFiles:
    """Labels as the model's outputs number them.

    As many class folders as outputs are numbered in order. Fewer are looked up by name: in the model's own
    class names, or as WordNet ids of ImageNet-1k for a model with 1000 outputs.

    Raises:
        InputError: the folders' names do not tell which outputs they are.
    """
    if images.labels is None or len(images.classes) == outputs:
        return images
    numbers = class_numbers
    if outputs == 1000 and not set(images.classes) <= set(numbers):
        numbers = _wordnet_numbers()
    unknown = [name for name in images.classes if name not in numbers]
    if unknown:
        raise InputError(
            f"has {len(images.classes)} class folders, the model {outputs} outputs, and {unknown[0]!r} names "
            "none of them: give a folder with all classes, or --no-labels to compare with fp32 only",
            file=images.folder,
        )
    labels = [numbers[images.classes[label]] for label in images.labels]
    return ImageFiles(images.folder, images.files, labels, images.classes)


def _wordnet_numbers() -> dict[str, int]:
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ModuleNotFoundError:
        return {}
    return {name: number for number, name in enumerate(ImageNetInfo().label_names())}


def read_image(file: Path, preprocessing: Preprocessing) -> Float[Tensor, "channels height width"]:
    """One preprocessed image. Raises InputError with the file's name where it cannot be decoded."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = opened.convert(preprocessing.mode)
    except FileNotFoundError as error:
        raise InputError("no such file", file=file) from error
    except (
        OSError,
        SyntaxError,
        ValueError,
    ) as error:  # what PIL raises for damaged files of various formats
        raise InputError(f"not a readable image ({error})", file=file) from error
    return preprocessing.transform(image)


def batches(
    images: ImageFiles, preprocessing: Preprocessing, batch_size: int, workers: int = 2
) -> Iterator[tuple[Float[Tensor, "batch channels height width"], Int[Tensor, " batch"] | None]]:
    """Batches (images, labels or None) in the order of the files; the next is decoded while one is in use."""
    parts = [slice(i, i + batch_size) for i in range(0, len(images.files), batch_size)]
    with ThreadPoolExecutor(workers) as pool:

        def begin(part: slice) -> list[Any]:
            return [pool.submit(read_image, file, preprocessing) for file in images.files[part]]

        ahead = begin(parts[0]) if parts else []
        for number, part in enumerate(parts):
            current, ahead = ahead, begin(parts[number + 1]) if number + 1 < len(parts) else []
            pixels = _stacked([future.result() for future in current], images.files[part])
            yield pixels, None if images.labels is None else torch.tensor(images.labels[part])


def _stacked(
    tensors: Sequence[Tensor], files: Sequence[Path]
) -> Float[Tensor, "batch channels height width"]:
    for tensor, file in zip(tensors, files, strict=True):
        if tensor.shape != tensors[0].shape:
            raise InputError(
                f"is {tuple(tensor.shape)} after preprocessing, the image before it "
                f"{tuple(tensors[0].shape)}: set --image-size, or a batch size of 1",
                file=file,
            )
    return torch.stack(list(tensors))
