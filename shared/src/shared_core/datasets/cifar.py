"""CIFAR-10 and CIFAR-100 from disk, in their binary version.

The Python version of the same data is a pickle, and unpickling a file runs what it says; so it is not read.
Source: Krizhevsky (2009), Learning multiple layers of features from tiny images.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared_core.datasets._rows import class_label, make_dataset, netpbm
from shared_core.errors import InputError, needs_extra

if TYPE_CHECKING:
    import datasets

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

_PIXELS = 3 * 32 * 32  # one byte each: 1,024 red, then green, then blue, row by row


def cifar10(path: str | os.PathLike[str]) -> "datasets.DatasetDict":
    """CIFAR-10: splits train (50,000) and test (10,000), 32x32. Columns: image (RGB), label.

    Args:
        path: The folder ``cifar-10-batches-bin`` out of cifar-10-binary.tar.gz, or the folder that holds it.
            Records of one label byte and 3,072 pixel bytes in data_batch_1.bin to data_batch_5.bin and
            test_batch.bin.

    Raises:
        InputError: A file is missing, its size is no multiple of 3,073, or a label is out of range.
    """
    with needs_extra("vision"):
        from datasets import DatasetDict
    batches = {
        "train": [f"data_batch_{number}.bin" for number in range(1, 6)],
        "test": ["test_batch.bin"],
    }
    names = [name for split in batches.values() for name in split]
    folder = _find(Path(path), "cifar-10-batches-bin", names, "cifar-10-binary.tar.gz")
    splits = {}
    for split, files in batches.items():
        parts = [_read(folder / name, [10]) for name in files]
        labels, pixels = (np.concatenate(part) for part in zip(*parts, strict=True))
        splits[split] = make_dataset(
            netpbm(pixels),
            {"label": labels[:, 0].tolist()},
            features={"label": class_label(CIFAR10_CLASSES)},
            about=f"CIFAR-10, {split}",
        )
    return DatasetDict(splits)


def cifar100(path: str | os.PathLike[str]) -> "datasets.DatasetDict":
    """CIFAR-100: splits train (50,000) and test (10,000), 32x32. Columns: image (RGB), label, coarse_label.

    Args:
        path: The folder ``cifar-100-binary`` out of cifar-100-binary.tar.gz, or the folder that holds it.
            Records of a coarse label byte (0 to 19), a fine one (0 to 99) and 3,072 pixel bytes in train.bin
            and test.bin; class names in fine_label_names.txt and coarse_label_names.txt.

    Raises:
        InputError: A file is missing, its size is no multiple of 3,074, or a label is out of range.
    """
    with needs_extra("vision"):
        from datasets import DatasetDict
    names = ["train.bin", "test.bin", "fine_label_names.txt", "coarse_label_names.txt"]
    folder = _find(Path(path), "cifar-100-binary", names, "cifar-100-binary.tar.gz")
    features = {
        "label": class_label(_class_names(folder / "fine_label_names.txt", 100)),
        "coarse_label": class_label(_class_names(folder / "coarse_label_names.txt", 20)),
    }
    splits = {}
    for split in ("train", "test"):
        labels, pixels = _read(folder / f"{split}.bin", [20, 100])
        splits[split] = make_dataset(
            netpbm(pixels),
            {"label": labels[:, 1].tolist(), "coarse_label": labels[:, 0].tolist()},
            features=features,
            about=f"CIFAR-100, {split}",
        )
    return DatasetDict(splits)


def _find(path: Path, folder_name: str, files: list[str], archive: str) -> Path:
    """The folder that has the files: `path` itself or `folder_name` in it."""
    folder = path / folder_name if (path / folder_name).is_dir() else path
    if not folder.is_dir():
        raise InputError(f"is not a folder: expected {folder_name}, unpacked from {archive}", file=folder)
    missing = [name for name in files if not (folder / name).is_file()]
    if not missing:
        return folder
    pickles = any((folder / name).exists() for name in ("data_batch_1", "train", folder_name[:-4] + "-py"))
    pickles = pickles or any(folder.glob("cifar-*-py*"))
    hint = "this is the Python version, a pickle, which is not read; " if pickles else ""
    raise InputError(
        f"there is no {', no '.join(missing)}: {hint}unpack {archive} (the binary version)", file=folder
    )


def _read(file: Path, label_limits: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (records, labels a record) and pixels (records, 32, 32, 3) of a batch file."""
    record = len(label_limits) + _PIXELS
    data = np.fromfile(file, dtype=np.uint8)
    if data.size == 0 or data.size % record:
        raise InputError(f"expected a multiple of {record} bytes, got {data.size}: not whole", file=file)
    rows = data.reshape(-1, record)
    labels, pixels = rows[:, : len(label_limits)], rows[:, len(label_limits) :]
    wrong = np.argwhere(labels >= np.array(label_limits))
    if wrong.size:
        row, column = wrong[0]
        raise InputError(
            f"expected a label of 0 to {label_limits[column] - 1} in record {row}",
            file=file,
            value=int(labels[row, column]),
        )
    return labels, pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _class_names(file: Path, count: int) -> list[str]:
    names = file.read_text(encoding="utf-8").split()
    if len(names) != count:
        raise InputError(f"expected {count} class names, one a line, got {len(names)}", file=file)
    return names
