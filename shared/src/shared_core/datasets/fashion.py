"""Fashion-MNIST from the files that Debian and Ubuntu package, or from the same files elsewhere."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared_core.datasets._rows import class_label, make_dataset, netpbm
from shared_core.datasets.idx import idx_arrays
from shared_core.errors import needs_extra

if TYPE_CHECKING:
    import datasets

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def fashion_mnist(path: str | os.PathLike[str] = DEBIAN_FOLDER) -> "datasets.DatasetDict":
    """Fashion-MNIST: splits train (60,000) and test (10,000), 28x28. Columns: image (grey), label.

    Args:
        path: Folder with ``{train,t10k}-{images-idx3,labels-idx1}-ubyte``, packed (``.gz``) or not.

    Raises:
        InputError: A file is missing, cut short, or of another format.
    """
    with needs_extra("vision"):
        from datasets import DatasetDict
    arrays = idx_arrays(path, hint="apt-get install dataset-fashion-mnist, or give the folder that has them")
    return DatasetDict({split: _rows(split, *pair) for split, pair in arrays.items()})


def _rows(split: str, pixels: np.ndarray, labels: np.ndarray) -> "datasets.Dataset":
    return make_dataset(
        netpbm(pixels),
        {"label": labels.tolist()},
        features={"label": class_label(FASHION_CLASSES)},
        about=f"Fashion-MNIST, {split} files",
    )
