import gzip
import struct

import numpy as np
import pytest

from shared_core import InputError
from smm_dp.records import read_records, records_of

FILES = {
    "train-images-idx3-ubyte": (5, 4, 4),
    "train-labels-idx1-ubyte": (5,),
    "t10k-images-idx3-ubyte": (3, 4, 4),
    "t10k-labels-idx1-ubyte": (3,),
}


def idx(array):
    return struct.pack(f">I{array.ndim}I", 2048 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def contents():
    generator = np.random.default_rng(0)
    return {n: generator.integers(0, 10 if len(s) == 1 else 256, s) for n, s in FILES.items()}


@pytest.mark.parametrize("inside", ["", "MNIST/raw", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_become_records_of_pixels_over_255(tmp_path, inside, packed):
    folder = tmp_path / inside
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in contents().items():
        data = idx(array)
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    (x, y), (x_test, y_test) = read_records(tmp_path)
    images, labels = list(contents().values())[:2]
    np.testing.assert_allclose(x, images.reshape(5, 16) / 255, rtol=1e-6)
    assert (x.dtype, x_test.shape) == (np.float32, (3, 16))
    assert y.tolist() == labels.tolist()
    assert y_test.shape == (3,)


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        (
            "t10k-labels-idx1-ubyte",
            None,
            "there is no t10k-labels-idx1-ubyte .*expected them here or in MNIST",
        ),
        (
            "train-images-idx3-ubyte",
            lambda data: b"\0\0\x08\x01" + data[4:],
            "train-images-idx3-ubyte: .*magic number 2049, expected 2051",
        ),
        (
            "train-labels-idx1-ubyte",
            lambda data: b"\0\0\x08\x03" + data[4:],
            "train-labels-idx1-ubyte: .*magic number 2051, expected 2049",
        ),
        ("train-images-idx3-ubyte", lambda data: data[:-7], "expected 80 bytes after the header, got 73"),
    ],
)
def test_one_error_names_the_missing_the_wrong_or_the_truncated_file(tmp_path, name, damage, text):
    for each, array in contents().items():
        (tmp_path / each).write_bytes(idx(array))
    if damage is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(InputError, match=text):
        read_records(tmp_path)


def test_a_root_with_two_data_sets_or_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no train-images-idx3-ubyte"):
        read_records(tmp_path)
    for inside in ("MNIST/raw", "FashionMNIST/raw"):
        (tmp_path / inside).mkdir(parents=True)
        (tmp_path / inside / "train-images-idx3-ubyte").touch()
    with pytest.raises(InputError, match="holds 2 data sets"):
        read_records(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        read_records(tmp_path / "nowhere")


def hugging_face(n=4):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    images = [np.full((2, 3), 50 * i, np.uint8) for i in range(n)]
    rows = datasets.Dataset.from_dict(
        {"image": images, "label": [i % 3 for i in range(n)]}, features=features
    )
    return datasets.DatasetDict({"train": rows, "test": rows.select([1])})


def test_hugging_face_data_sets_in_memory_and_on_disk(tmp_path):
    splits = hugging_face()
    splits.save_to_disk(tmp_path / "saved")
    for (x, y), (x_test, y_test) in (records_of(splits), read_records(tmp_path / "saved")):
        np.testing.assert_allclose(x, np.repeat([[0], [50 / 255], [100 / 255], [150 / 255]], 6, 1), rtol=1e-6)
        assert y.tolist() == [0, 1, 2, 0]
        assert (x_test.shape, y_test.tolist()) == ((1, 6), [1])


def test_hugging_face_data_sets_that_do_not_fit_are_refused(tmp_path):
    splits = hugging_face()
    with pytest.raises(InputError, match="splits train and test, found train"):
        records_of({"train": splits["train"]})
    splits["train"].save_to_disk(tmp_path / "one")
    with pytest.raises(InputError, match="splits train and test, found Dataset"):
        read_records(tmp_path / "one")
    with pytest.raises(InputError, match="split train lacks image: it has picture, label"):
        records_of(splits.rename_column("image", "picture"))

    class Rows(dict):
        column_names = ("image", "label")

    uneven = Rows(image=[np.zeros((2, 2)), np.zeros((2, 3))], label=[0, 1])
    with pytest.raises(InputError, match="images of 2 shapes"):
        records_of({"train": uneven, "test": uneven})


def test_npz_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "d.npz"
    x, y = np.zeros((3, 2), np.float32), np.zeros(3, int)
    for arrays, text in (
        ({"x_train": x}, "lacks y_train, x_test, y_test"),
        ({"x_train": x, "y_train": y[:2], "x_test": x, "y_test": y}, "y_train: expected one class number"),
        ({"x_train": x, "y_train": y, "x_test": x + np.nan, "y_test": y}, "x_test: holds values"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=text):
            read_records(path)
    path.write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(InputError, match=r"is no \.npz file"):
        read_records(path)


def test_a_folder_of_idx_files_trains(tmp_path):
    from smm_dp.training_job import TrainingJob, train

    for name, array in contents().items():
        (tmp_path / name).write_bytes(idx(array))
    job = TrainingJob(tmp_path / "run", tmp_path, "none", 3.0, 1e-4, 16.0, 8, 0.5, 2, 4, 0.01, 0)
    assert list(train(job, resume=False))[-1].startswith("accuracy")
