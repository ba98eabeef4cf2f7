"""A user's labelled images as records: .npz files, idx folders, and Hugging Face data sets."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from shared_core import InputError
from shared_core.datasets import idx_arrays

Split = tuple[Float32[np.ndarray, "_ _"], Int64[np.ndarray, " _"]]
"""Records, one flattened image a row, and their class numbers."""

_INSIDE = ("", "MNIST/raw", "FashionMNIST/raw")  # where torchvision puts the idx files below its root
_NAMES = ("x_train", "y_train", "x_test", "y_test")


def read_records(path: Path) -> tuple[Split, Split]:
    """Read training and test records of a file or folder.

    Args:
        path: An .npz file with x_train, y_train, x_test, y_test (taken as they are); a folder with MNIST's
            four idx files, packed or not, or torchvision's root of them; or a folder that a Hugging Face
            `DatasetDict` with splits train and test, columns image and label, was saved to. Pixels of images
            are divided by 255.

    Raises:
        InputError: The path is none of these; names the file that is missing, cut short, or of another
            format.
    """
    if not path.exists():
        raise InputError("there is no such file or folder", file=path)
    if not path.is_dir():
        return _from_npz(path)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        try:
            from datasets import load_from_disk
        except ModuleNotFoundError as error:
            raise InputError(f"{error.name} is not installed: pip install 'smm-dp[data]'") from error
        return records_of(load_from_disk(path), path)
    arrays = idx_arrays(_idx_folder(path), hint="expected them here or in MNIST/raw below")
    train, test = (_records(*arrays[split]) for split in ("train", "test"))
    return train, test


def records_of(splits: Any, source: Path | None = None) -> tuple[Split, Split]:
    """Return training and test records of a Hugging Face `DatasetDict`, e.g. of mnist or fashion_mnist.

    Args:
        splits: Splits train and test, each with columns image (PIL images or arrays of one shape, 0 to 255)
            and label (class numbers).
        source: Where it comes from, for errors.

    Raises:
        InputError: A split or column is missing, or images differ in shape.
    """
    if not isinstance(splits, Mapping) or not {"train", "test"} <= set(splits):
        found = ", ".join(map(str, splits)) if isinstance(splits, Mapping) else type(splits).__name__
        raise InputError(f"expected a DatasetDict with splits train and test, found {found}", file=source)
    train, test = (_from_columns(splits[name], name, source) for name in ("train", "test"))
    return train, test


def _from_columns(rows: Any, name: str, source: Path | None) -> Split:
    missing = [column for column in ("image", "label") if column not in rows.column_names]
    if missing:
        raise InputError(
            f"split {name} lacks {', '.join(missing)}: it has {', '.join(rows.column_names)}", file=source
        )
    images = [np.asarray(image) for image in rows["image"]]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise InputError(f"split {name}: images of {len(shapes)} shapes, expected one", file=source)
    return _records(np.stack(images), np.asarray(rows["label"]))


def _records(images: np.ndarray, labels: np.ndarray) -> Split:
    return (images.reshape(len(images), -1) / np.float32(255)).astype(np.float32), labels.astype(np.int64)


def _idx_folder(root: Path) -> Path:
    found = [root / inside for inside in _INSIDE if any((root / inside).glob("*-idx?-ubyte*"))]
    if len(found) > 1:
        raise InputError(f"holds {len(found)} data sets: give the folder of one", file=root)
    return found[0] if found else root


def _from_npz(path: Path) -> tuple[Split, Split]:
    try:
        with path.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            arrays = {name: stored[name] for name in _NAMES if name in getattr(stored, "files", ())}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"is no .npz file: {error}", file=path) from error
    missing = [name for name in _NAMES if name not in arrays]
    if missing:
        raise InputError(f"lacks {', '.join(missing)}", file=path)
    train, test = (_checked(arrays, path, part) for part in ("train", "test"))
    return train, test


def _checked(arrays: Mapping[str, np.ndarray], path: Path, part: str) -> Split:
    records, labels = arrays[f"x_{part}"], arrays[f"y_{part}"].astype(np.int64)
    if labels.shape != (len(records),) or len(records) == 0:
        raise InputError(
            f"expected one class number a record, found shape {labels.shape} for {len(records)} records",
            file=path,
            field=f"y_{part}",
        )
    records = records.reshape(len(records), -1).astype(np.float32)
    if not np.isfinite(records).all():
        raise InputError("holds values that are not finite", file=path, field=f"x_{part}")
    return records, labels
