from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from csq.data import load_images
from shared_core import InputError


def _folders(root: Path, splits: tuple[str, ...], count: int = 10) -> None:
    rng = np.random.default_rng(0)
    for split in splits:
        for shade, name in ((40, "dark"), (200, "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(shade, shade + 20, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def test_embedded_parts_are_disjoint_and_validation_comes_out_of_training() -> None:
    whole = load_images("digits", validation=0.2)
    less = load_images("digits", validation=0.4)
    assert torch.equal(whole.test.read(torch.arange(599)), less.test.read(torch.arange(599)))
    assert len(whole.train.labels) + len(whole.validation.labels) + len(whole.test.labels) == 1797
    assert len(whole.validation.labels) == round(0.2 * 1198)
    assert whole.shape == (1, 8, 8)
    inputs = whole.inputs(whole.train.read(torch.arange(958)))
    assert inputs.mean().abs() < 0.01
    assert inputs.std() == pytest.approx(1, abs=0.01)


def test_a_limit_keeps_so_many_training_images() -> None:
    data = load_images("digits", limit=300, validation=0.1)
    assert (len(data.train.labels), len(data.validation.labels)) == (270, 30)


def test_folders_with_test_and_val_keep_val_for_validation(tmp_path: Path) -> None:
    _folders(tmp_path, ("train", "val", "test"), 3)
    data = load_images(str(tmp_path), size=16)
    assert [len(part.labels) for part in (data.train, data.validation, data.test)] == [6, 6, 6]
    assert data.shape == (3, 16, 16)
    assert data.classes == ("dark", "light")


def test_folders_with_val_alone_are_tested_on_it_and_validated_on_training_images(tmp_path: Path) -> None:
    _folders(tmp_path, ("train", "val"))
    data = load_images(str(tmp_path), size=8, validation=0.25)
    assert [len(part.labels) for part in (data.train, data.validation, data.test)] == [15, 5, 20]
    for part in (data.train, data.validation, data.test):
        bright = part.read(torch.arange(len(part.labels))).float().mean((1, 2, 3)) > 128
        assert torch.equal(bright.long(), part.labels)


def test_folders_need_a_size_and_two_splits(tmp_path: Path) -> None:
    _folders(tmp_path, ("train",), 2)
    with pytest.raises(InputError, match=r"expected train/ and test/ \(or val/\)"):
        load_images(str(tmp_path), size=8)
    _folders(tmp_path / "two", ("train", "test"), 2)
    with pytest.raises(InputError, match="size: expected the side"):
        load_images(str(tmp_path / "two"))


def test_idx_files_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for stem, count in (("train", 12), ("t10k", 5)):
        header = np.array([2051, count, 6, 6], dtype=">u4").tobytes()
        pixels = rng.integers(0, 256, (count, 6, 6), dtype=np.uint8)
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = np.array([2049, count], dtype=">u4").tobytes()
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(header + bytes(n % 10 for n in range(count)))
    data = load_images(str(tmp_path), validation=0.25)
    assert [len(part.labels) for part in (data.train, data.validation, data.test)] == [9, 3, 5]
    assert np.array_equal(data.test.read(torch.arange(5))[:, 0], pixels)
    assert load_images(str(tmp_path), size=3).shape == (1, 3, 3)


def test_cifar10s_binary_files_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"):
        records = rng.integers(0, 256, (4, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (tmp_path / name).write_bytes(records.tobytes())
    data = load_images(str(tmp_path))
    assert [len(part.labels) for part in (data.train, data.validation, data.test)] == [18, 2, 4]
    assert np.array_equal(data.test.read(torch.arange(4)).flatten(1), records[:, 1:])


def test_cifar100s_binary_files_are_read_with_their_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("train.bin", "test.bin"):
        records = rng.integers(0, 256, (20, 3074), dtype=np.uint8)
        records[:, 0], records[:, 1] = records[:, 0] % 20, np.arange(20) * 5
        (folder / name).write_bytes(records.tobytes())
    for kind, count in (("fine", 100), ("coarse", 20)):
        (folder / f"{kind}_label_names.txt").write_text("\n".join(f"{kind}{k}" for k in range(count)))
    data = load_images(str(tmp_path))
    assert (len(data.classes), data.classes[5]) == (100, "fine5")
    assert data.test.labels.tolist() == (np.arange(20) * 5).tolist()
    assert np.array_equal(data.test.read(torch.arange(20)).flatten(1), records[:, 2:])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_validation_share_of_all_or_nothing_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="validation: expected a share above 0 and below 1"):
        load_images("digits", validation=share)


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(InputError, match="data: expected digits or mnist5k or an existing folder"):
        load_images("cifar1000")
