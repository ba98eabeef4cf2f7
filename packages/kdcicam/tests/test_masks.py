"""Masks of OpenImages in wsolevaluation's layout: which files, and what they say of each pixel."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import trees
from PIL import Image

from kdcicam.data import MaskFiles, load_images
from kdcicam.images import MEAN, STD, for_evaluation, read_image
from kdcicam.masks import read_mask
from shared_core import InputError


def test_masks_are_listed_for_each_image(tmp_path: Path):
    metadata, images = trees.openimages(tmp_path)
    test = load_images(metadata, "test", images=images)
    stem = images / "test" / "0_0"
    assert test.masks[0] == MaskFiles(
        (Path(f"{stem}_m0.png"), Path(f"{stem}_m1.png")), Path(f"{stem}_ignore.png")
    )
    assert (len(test.masks), test.boxed) == (6, 0)
    assert test.take([5]).masks == [test.masks[5]]
    assert load_images(metadata, "train", images=images).masks == []


def test_masks_may_have_a_folder_of_their_own(tmp_path: Path):
    metadata, images = trees.openimages(tmp_path)
    other = tmp_path / "masks" / "test"
    other.mkdir(parents=True)
    for file in (images / "test").glob("*_*_*.png"):
        shutil.move(file, other / file.name)
    with pytest.raises(InputError, match=r"localization\.txt: names 18 masks .* \(the masks option\)"):
        load_images(metadata, "test", images=images)
    test = load_images(metadata, "test", images=images, masks=other.parent)
    assert all(masks is not None and masks.objects[0].is_file() for masks in test.masks)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("test/0_0.png,test/0_0_m1.png,test/0_1_ignore.png", r"names two ignore masks of test/0_0\.png"),
        ("x.png,test/0_0_m0.png,", r"has image ids that image_ids\.txt lacks, such as x\.png"),
        ("test/0_0.png,test/0_0_m0.png", "line 13: expected 3 columns"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, words: str):
    metadata, images = trees.openimages(tmp_path)
    with (metadata / "test" / "localization.txt").open("a") as file:
        file.write("\n" + line)
    with pytest.raises(InputError, match=rf"localization\.txt: {words}"):
        load_images(metadata, "test", images=images)


def test_an_image_without_a_mask_has_none(tmp_path: Path):
    metadata, images = trees.openimages(tmp_path)
    rows = (metadata / "test" / "localization.txt").read_text().splitlines()
    (metadata / "test" / "localization.txt").write_text("\n".join(rows[2:]))
    test = load_images(metadata, "test", images=images)
    assert [masks is None for masks in test.masks] == [True, *[False] * 5]


def literal_mask(files: MaskFiles, size: int) -> np.ndarray:
    """As the field's evaluation does it: OpenCV's nearest pixel, union, ignored only outside of objects."""

    def read(path: Path) -> np.ndarray:
        return cv2.resize(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), (size, size), interpolation=0) > 0.5

    made = np.zeros((size, size), dtype=np.int64)
    if files.ignore is not None:
        made[read(files.ignore)] = 255
    for path in files.objects:
        made[read(path)] = 1
    return made


@pytest.mark.parametrize("size", [20, 24, 57, 224])
def test_masks_are_those_of_the_fields_evaluation(tmp_path: Path, size):
    generator = np.random.default_rng(size)
    for name, shape, mode in (("a", (31, 47), "1"), ("b", (64, 50), "L"), ("i", (40, 40), "L")):
        pixels = Image.fromarray((255 * (generator.random(shape) > 0.5)).astype(np.uint8))
        pixels.convert(mode).save(tmp_path / f"{name}.png")  # OpenImages' own are of one bit
    objects = (tmp_path / "a.png", tmp_path / "b.png")
    for files in (MaskFiles(objects, tmp_path / "i.png"), MaskFiles(objects)):
        assert read_mask(files, "full", size).numpy().tolist() == literal_mask(files, size).tolist()


@pytest.mark.parametrize("protocol", ["full", "center_crop"])
def test_a_mask_lies_where_its_image_does(tmp_path: Path, protocol):
    metadata, images = trees.openimages(tmp_path)
    test = load_images(metadata, "test", images=images)
    files = test.masks[2]
    assert files is not None
    tensor, _ = for_evaluation(read_image(test.files[2]), np.empty((0, 4)), protocol, 44, 60)
    bright = (tensor[1] * STD[1] + MEAN[1]).numpy()  # class 1 is a green square
    mask = read_mask(files, protocol, 44, 60).numpy()
    assert set(np.unique(mask)) == {0, 1, 255}
    assert bright[mask == 0].max() < 0.5  # the ignored frame takes in the blurred edge
    inner = cv2.erode((mask == 1).astype(np.uint8), np.ones((3, 3))) > 0
    assert bright[inner].min() > 0.6


def test_what_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.png: is empty"):
        read_mask(MaskFiles((tmp_path / "a.png",)), "full", 24)
    with pytest.raises(InputError, match="resize: expected at least the crop's 24"):
        read_mask(MaskFiles((tmp_path / "a.png",)), "center_crop", 24, 20)
