import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_core import InputError
from shared_core.datasets import cifar10, cifar100

CIFAR10_FILES = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]


def batch(records: int, limits: tuple[int, ...], seed: int) -> np.ndarray:
    """Records as the archives have them: label bytes, then 1,024 red, 1,024 green, 1,024 blue."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, limits, (records, len(limits)))
    return np.hstack([labels, generator.integers(0, 256, (records, 3072))]).astype(np.uint8)


def write_cifar10(folder, records=2):
    folder.mkdir(parents=True, exist_ok=True)
    batches = [batch(records, (10,), seed) for seed in range(6)]
    for name, data in zip(CIFAR10_FILES, batches, strict=True):
        data.tofile(folder / name)
    return batches


def write_cifar100(folder):
    folder.mkdir(parents=True, exist_ok=True)
    batches = {name: batch(3, (20, 100), seed) for seed, name in enumerate(("train", "test"))}
    for name, data in batches.items():
        data.tofile(folder / f"{name}.bin")
    (folder / "fine_label_names.txt").write_text("".join(f"fine{n}\n" for n in range(100)) + "\n")
    (folder / "coarse_label_names.txt").write_text("".join(f"coarse{n}\n" for n in range(20)))
    return batches


@given(records=st.integers(1, 3))
def test_cifar10_pixel_by_pixel(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("cifar")
    batches = write_cifar10(folder, records)
    splits = cifar10(folder)
    for split, rows in (("train", np.concatenate(batches[:5])), ("test", batches[5])):
        assert splits[split]["label"][:] == rows[:, 0].tolist()
        for image, row in zip(splits[split]["image"], rows, strict=True):
            for x, y in ((0, 0), (31, 0), (5, 17), (31, 31)):
                at = 1 + 32 * y + x
                assert image.getpixel((x, y)) == (row[at], row[at + 1024], row[at + 2048])
    assert splits["test"].features["label"].int2str(9) == "truck"


def test_cifar10_is_found_in_the_folder_that_holds_it(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-bin")
    assert {name: len(split) for name, split in cifar10(tmp_path).items()} == {"train": 10, "test": 2}


def test_cifar100_has_both_labels(tmp_path):
    batches = write_cifar100(tmp_path / "cifar-100-binary")
    splits = cifar100(tmp_path)
    for name, rows in batches.items():
        assert splits[name]["coarse_label"][:] == rows[:, 0].tolist()
        assert splits[name]["label"][:] == rows[:, 1].tolist()
    assert splits["test"].features["label"].int2str(99) == "fine99"
    image = splits["test"][0]["image"]
    assert image.getpixel((1, 0)) == tuple(batches["test"][0, [3, 3 + 1024, 3 + 2048]])


@pytest.mark.parametrize("size", [0, 3072, 3074])
def test_a_file_of_a_wrong_size_is_named_with_the_multiple(tmp_path, size):
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(bytes(size))
    with pytest.raises(
        InputError, match=rf"data_batch_3\.bin: expected a multiple of 3073 bytes, got {size}"
    ):
        cifar10(tmp_path)


def test_a_cifar100_file_of_a_wrong_size_is_named_with_the_multiple(tmp_path):
    write_cifar100(tmp_path)
    (tmp_path / "test.bin").write_bytes(bytes(3073))
    with pytest.raises(InputError, match=r"test\.bin: expected a multiple of 3074 bytes, got 3073"):
        cifar100(tmp_path)


def test_a_label_out_of_range_is_named_with_its_record(tmp_path):
    batches = write_cifar10(tmp_path)
    batches[5][1, 0] = 10
    batches[5].tofile(tmp_path / "test_batch.bin")
    with pytest.raises(
        InputError, match=r"test_batch\.bin: expected a label of 0 to 9 in record 1 \(got 10\)"
    ):
        cifar10(tmp_path)


def test_missing_files_are_named_with_the_archive_that_has_them(tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_2.bin").unlink()
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(
        InputError, match=r"no data_batch_2\.bin, no test_batch\.bin: unpack cifar-10-binary\.tar\.gz"
    ):
        cifar10(tmp_path)
    with pytest.raises(InputError, match=r"nowhere: is not a folder: expected cifar-100-binary"):
        cifar100(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["cifar-10-batches-py/data_batch_1", "data_batch_1"])
def test_the_python_version_is_recognized_and_not_unpickled(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="the Python version, a pickle, which is not read"):
        cifar10(tmp_path)


def test_too_few_class_names_are_refused(tmp_path):
    write_cifar100(tmp_path)
    (tmp_path / "fine_label_names.txt").write_text("apple\n")
    with pytest.raises(
        InputError, match=r"fine_label_names\.txt: expected 100 class names, one a line, got 1"
    ):
        cifar100(tmp_path)
