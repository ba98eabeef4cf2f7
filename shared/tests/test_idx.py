import gzip
import struct

import numpy as np
import pytest

from shared_core import InputError
from shared_core.datasets import idx_arrays


def idx(array: np.ndarray) -> bytes:
    """The idx format: two zero bytes, 8 for bytes, the number of dimensions, the sizes, the bytes."""
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for stem, count in (("train", 3), ("t10k", 2)):
        images, labels = generator.integers(0, 256, (count, 28, 28)), np.arange(count)
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_arrays_of_the_same_files(folder):
    arrays = idx_arrays(folder)
    images, labels = arrays["test"]
    assert (images.shape, images.dtype, labels.tolist()) == ((2, 28, 28), np.uint8, [0, 1])
    np.testing.assert_array_equal(arrays["train"][0], np.random.default_rng(0).integers(0, 256, (3, 28, 28)))
    with pytest.raises(InputError, match=r"no train-images-idx3-ubyte, .*give the folder that has them"):
        idx_arrays(folder / "elsewhere")


def test_missing_files_are_named_with_a_hint(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match=r"no t10k-labels-idx1-ubyte .*: look in the attic"):
        idx_arrays(folder, hint="look in the attic")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an idx file of bytes with 1 dimensions: an empty file, expected 2049"),
        (
            idx(np.zeros((2, 2))),
            "is not an idx file of bytes with 1 dimensions: magic number 2050, expected 2049",
        ),
        (idx(np.arange(3))[:-1], "is cut short or too long: expected 3 bytes after the header, got 2"),
        (idx(np.arange(4)), "has 4 labels for 3 images"),
        (idx(np.array([0, 1, 10])), r"expected labels 0 to 9 \(got 10\)"),
    ],
)
def test_a_damaged_file_is_named(folder, content, message):
    (folder / "train-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(InputError, match=f"train-labels-idx1-ubyte: {message}"):
        idx_arrays(folder)


def test_a_damaged_packed_file_is_named(folder):
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: is not a whole gzip file"):
        idx_arrays(folder)
