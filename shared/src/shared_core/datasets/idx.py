"""MNIST's file format, idx, as arrays: MNIST, Fashion-MNIST, KMNIST and others come in these four files."""

import gzip
import os
from pathlib import Path

import numpy as np

from shared_core.errors import InputError

_SPLITS = {"train": "train", "test": "t10k"}
_IMAGES, _LABELS = 2051, 2049  # the magic numbers of idx files of bytes with three and with one dimension
_CLASSES = 10


def idx_arrays(
    path: str | os.PathLike[str], *, hint: str = "give the folder that has them"
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read images (n, height, width) and labels (n,), both uint8, of the splits train and test.

    Args:
        path: Folder with ``{train,t10k}-{images-idx3,labels-idx1}-ubyte``, packed (``.gz``) or not.
        hint: Ends the error about missing files: where to get them.

    Raises:
        InputError: A file is missing, cut short, or of another format.
    """
    folder = Path(path)
    missing = [name for name in _file_names() if not any(_candidates(folder, name))]
    if missing:
        raise InputError(f"there is no {', no '.join(missing)} (packed as .gz or not): {hint}", file=folder)
    return {split: _pair(folder, stem) for split, stem in _SPLITS.items()}


def _pair(folder: Path, stem: str) -> tuple[np.ndarray, np.ndarray]:
    pixels = _read_idx(next(_candidates(folder, f"{stem}-images-idx3-ubyte")), _IMAGES)
    label_file = next(_candidates(folder, f"{stem}-labels-idx1-ubyte"))
    labels = _read_idx(label_file, _LABELS)
    if len(labels) != len(pixels):
        raise InputError(f"has {len(labels)} labels for {len(pixels)} images", file=label_file)
    if labels.size and labels.max() >= _CLASSES:
        raise InputError("expected labels 0 to 9", file=label_file, value=int(labels.max()))
    return pixels, labels


def _file_names() -> list[str]:
    return [f"{stem}-{kind}-ubyte" for stem in _SPLITS.values() for kind in ("images-idx3", "labels-idx1")]


def _candidates(folder: Path, name: str):
    return (file for file in (folder / f"{name}.gz", folder / name) if file.is_file())


def _read_idx(file: Path, magic: int) -> np.ndarray:
    """Read an idx file: big-endian magic number (its last byte counts the dimensions), sizes, then bytes."""
    data = file.read_bytes()
    if file.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise InputError(f"is not a whole gzip file: {error}", file=file) from error
    dimensions = magic % 256
    header = np.frombuffer(data[: 4 * (1 + dimensions)], dtype=">u4")
    if len(header) != 1 + dimensions or header[0] != magic:
        found = f"magic number {header[0]}" if len(header) else "an empty file"
        raise InputError(
            f"is not an idx file of bytes with {dimensions} dimensions: {found}, expected {magic}", file=file
        )
    shape = tuple(int(size) for size in header[1:])
    body = np.frombuffer(data, dtype=np.uint8, offset=header.nbytes)
    if body.size != np.prod(shape):
        raise InputError(
            f"is cut short or too long: expected {np.prod(shape)} bytes after the header, got {body.size}",
            file=file,
        )
    return body.reshape(shape)
