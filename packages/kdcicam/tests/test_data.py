"""Layouts of the public data sets, made small; errors name the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from kdcicam.data import coco_boxes, load_images
from kdcicam.images import MEAN, STD, Augmentation, for_evaluation, read_image
from shared_core import InputError

NOTE = "Annotations/CLS-LOC/val/v1.xml"


def object_at(image: Image.Image, box: np.ndarray, label: int) -> bool:
    """Whether the box holds the shape and nothing around it."""
    pixels = np.asarray(image)[..., label] > 180
    x0, y0, x1, y1 = box.astype(int)
    inside = pixels[y0:y1, x0:x1]
    return bool(inside.all() and pixels.sum() == inside.size)


def checked(images) -> None:
    assert len(images) > 0
    for file, label, boxes in zip(images.files, images.labels, images.boxes, strict=True):
        assert object_at(read_image(file), boxes[0], label)


def test_cub(tmp_path: Path):
    root = trees.cub(tmp_path / "CUB_200_2011")
    test, train = load_images(tmp_path, "test"), load_images(root, "train", validation=0)
    assert (len(test), len(train), test.classes[0]) == (6, 6, "001.disc")
    checked(test)
    val = load_images(root, "val", validation=0.5)
    checked(val)
    assert val.labels == [0, 1, 2]
    rest = load_images(root, "train", validation=0.5)
    assert not set(rest.files) & set(val.files)
    assert {*rest.files, *val.files} == set(train.files)


def test_ilsvrc(tmp_path: Path):
    root = trees.ilsvrc(tmp_path)
    test = load_images(root, "test")
    assert (test.labels, test.classes) == ([0, 1, 2], ("n00", "n01", "n02"))
    assert test.boxes[1].tolist() == [[12, 8, 32, 28], [0, 0, 48, 40]]
    val = load_images(root, "val", validation=0.5)
    assert [b.tolist() for b in val.boxes] == [[[12, 8, 32, 28]]] * 3
    assert len(load_images(root, "train", validation=0.5)) == 3


def test_wsolevaluation(tmp_path: Path):
    metadata, images = trees.wsolevaluation(tmp_path)
    test = load_images(metadata, "test", images=images)
    checked(test)
    assert test.boxes[0].tolist() == [[12, 8, 32, 28], [0, 0, 5, 5]]
    train = load_images(metadata, "train", images=images)
    assert (train.boxed, len(train), train.labels) == (0, 6, [0, 0, 1, 1, 2, 2])
    with pytest.raises(InputError, match="which folder are the image ids paths in"):
        load_images(metadata, "test")


def test_class_folders_with_coco_boxes(tmp_path: Path):
    root = trees.class_folders(tmp_path)
    test = load_images(root, "test")
    checked(test)
    assert test.classes == trees.CLASSES
    assert len(load_images(root, "train", validation=0.25)) == 18
    checked(load_images(root, "val", validation=0.25))
    (root / "test.json").unlink()
    assert load_images(root, "test").boxed == 0


@pytest.mark.parametrize(
    ("make", "part", "damage", "words"),
    [
        (trees.cub, "bounding_boxes.txt", None, r"bounding_boxes\.txt: is missing"),
        (trees.cub, "classes.txt", "", r"classes\.txt: is empty"),
        (trees.cub, "image_class_labels.txt", "1 1\n", r"labels\.txt: lacks 11 image ids .*, such as 2"),
        (trees.cub, "images.txt", "1 a.png\n", r"labels\.txt: has 11 image ids that images\.txt lacks"),
        (trees.ilsvrc, NOTE, None, r"v1\.xml: is missing"),
        (trees.ilsvrc, NOTE, "<a>", r"v1\.xml: is no annotation"),
        (trees.ilsvrc, NOTE, trees.voc("n01", (30, 9, 12, 28)), r"v1\.xml: box: .*x0 < x1"),
        (trees.ilsvrc, NOTE, trees.voc("n09", (1, 2, 3, 4)), "names the class n09"),
        (trees.ilsvrc, NOTE, trees.voc("n01", (1, 2, 90, 4)), "outside the image of 48x40"),
        (trees.class_folders, "test.json", "{}", r"test\.json: is no COCO JSON"),
    ],
)  # fmt: skip
def test_a_missing_or_wrong_file_is_named(tmp_path: Path, make, part: str, damage: str | None, words: str):
    root = make(tmp_path)
    (root / part).unlink() if damage is None else (root / part).write_text(damage)
    with pytest.raises(InputError, match=words):
        load_images(root, "test")


@pytest.mark.parametrize(
    ("part", "line", "words"),
    [
        ("class_labels.txt", "x.png,1", r"class_labels\.txt: has 1 image ids .*, such as x\.png"),
        ("localization.txt", "x.png,1,2,3,4", r"localization\.txt: has image ids .* such as x\.png"),
        ("localization.txt", "test/1_0.png,12,8,9,7", "looks like x, y, width, height"),
        ("localization.txt", "test/1_0.png,12,8,99,30", "outside the image of 48x40"),
        ("localization.txt", "test/1_0.png,12,8", "line 8: expected 5 columns"),
        ("image_ids.txt", "test/9.png", r"class_labels\.txt: lacks 1 image ids"),
    ],
)  # fmt: skip
def test_metadata_that_disagrees_is_named(tmp_path: Path, part: str, line: str, words: str):
    metadata, images = trees.wsolevaluation(tmp_path)
    with (metadata / "test" / part).open("a") as file:
        file.write("\n" + line)
    with pytest.raises(InputError, match=words):
        load_images(metadata, "test", images=images)


def test_xyxy_in_cocos_place_is_recognized(tmp_path: Path):
    whole = {
        "images": [{"id": 0, "file_name": "a.png", "width": 48, "height": 40}],
        "annotations": [{"image_id": 0, "bbox": [30, 20, 47, 39]}],
    }
    (tmp_path / "a.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match=r"a\.json: the box of a\.png .* look like x0, y0, x1, y1"):
        coco_boxes(tmp_path / "a.json")


def coco(path: Path, *names: str) -> None:
    """Each image has a box of its own."""
    images = [{"id": k, "file_name": name, "width": 48, "height": 40} for k, name in enumerate(names)]
    notes = [{"image_id": k, "bbox": [k, k, 20, 20]} for k in range(len(names))]
    path.write_text(json.dumps({"images": images, "annotations": notes}))


def test_cocos_entries_of_one_name_are_refused(tmp_path: Path):
    coco(tmp_path / "a.json", "a.png", "b.png", "a.png")
    with pytest.raises(InputError, match=r"a\.json: file_name: .*, found 1 more than once \(got 'a\.png'\)"):
        coco_boxes(tmp_path / "a.json")
    twice = [{"id": 0, "file_name": "a.png"}, {"id": 0, "file_name": "b.png"}]
    (tmp_path / "a.json").write_text(json.dumps({"images": twice, "annotations": []}))
    with pytest.raises(
        InputError, match=r"a\.json: id: expected each once, found 1 more than once \(got 0\)"
    ):
        coco_boxes(tmp_path / "a.json")


def test_a_bare_file_name_that_several_classes_have_is_refused(tmp_path: Path):
    """Class folders that each count from 0: the box would be that of every class's image."""
    root = trees.class_folders(tmp_path)
    coco(root / "test.json", "test0.png")
    words = r"test\.json: 3 images have this file_name: .*, as disc/test0\.png \(got 'test0\.png'\)"
    with pytest.raises(InputError, match=words):
        load_images(root, "test")
    (root / "test" / "square" / "test0.png").rename(root / "test" / "square" / "own.png")
    coco(root / "test.json", "own.png")
    boxes = [b.tolist() for b in load_images(root, "test").boxes]
    assert [b for b in boxes if b] == [[[0, 0, 20, 20]]]


def test_one_file_of_boxes_tells_the_splits_apart(tmp_path: Path):
    root = trees.class_folders(tmp_path, train=2, test=2)
    for part in ("train", "test"):
        (root / f"{part}.json").unlink()
        (root / part / "disc" / f"{part}0.png").rename(root / part / "disc" / "same.png")
    coco(root / "boxes.json", "disc/same.png")
    with pytest.raises(InputError, match=r"2 images have this file_name: .*, as train/disc/same\.png"):
        load_images(root, "test")
    coco(root / "boxes.json", "train/disc/same.png", "test/disc/same.png")
    assert load_images(root, "test").boxes[0].tolist() == [[1, 1, 21, 21]]
    assert load_images(root, "train", validation=0).boxes[0].tolist() == [[0, 0, 20, 20]]


def test_an_unknown_folder_says_what_is_looked_for(tmp_path: Path):
    with pytest.raises(InputError, match="holds none of: train_test_split"):
        load_images(tmp_path, "test")
    with pytest.raises(InputError, match="there is no such folder"):
        load_images(tmp_path / "x", "test")


def test_images_of_every_mode_become_rgb(tmp_path: Path):
    wide = Image.fromarray(np.full((4, 5), 51400, dtype=np.uint16))
    for mode in ("L", "CMYK", "RGBA", "P", "1", "LA", "I"):
        Image.new(mode, (5, 4)).save(tmp_path / f"{mode}.tif")
        assert read_image(tmp_path / f"{mode}.tif").mode == "RGB"
    wide.save(tmp_path / "wide.png")
    assert np.unique(np.asarray(read_image(tmp_path / "wide.png"))).tolist() == [200]  # 51400 / 257


def test_unreadable_images_are_named(tmp_path: Path):
    trees.save(tmp_path / "whole.png", 0, 0)
    data = (tmp_path / "whole.png").read_bytes()
    for name, content, words in (
        ("cut.png", data[:700], "cannot be read whole"),
        ("empty.png", b"", "is empty"),
        ("text.png", b"no image", "is no image"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: {words}"):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match="there is no such image"):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("protocol", ["full", "center_crop"])
def test_boxes_follow_the_image_as_torchvisions_do(protocol):
    image = trees.picture(1, 0)
    boxes = tv_tensors.BoundingBoxes([[12, 8, 32, 28], [0, 0, 2, 2]], format="XYXY", canvas_size=(40, 48))
    steps = [v2.Resize((60, 60)), v2.CenterCrop(44)] if protocol == "center_crop" else [v2.Resize((44, 44))]
    _, expected = v2.Compose(steps)(image, boxes.to(torch.float64))
    tensor, ours = for_evaluation(image, boxes.numpy().astype(float), protocol, 44, 60)
    assert tensor.shape == (3, 44, 44)
    expected = expected.numpy()
    # the second lies outside the crop
    expected = np.floor(expected) if protocol == "full" else expected[:1]
    assert ours == pytest.approx(expected, abs=1e-6)
    green = tensor[1] * STD[1] + MEAN[1]
    x0, y0, x1, y1 = ours[0].round().astype(int)
    assert green[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].min() > 0.7
    outside = green.clone()
    outside[max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2] = 0
    assert outside.max() < 0.6


def test_center_crop_clips_the_boxes():
    image = Image.new("RGB", (100, 100))
    _, boxes = for_evaluation(image, np.array([[0.0, 0, 100, 100]]), "center_crop", 50, 100)
    assert boxes.tolist() == [[0, 0, 50, 50]]
    with pytest.raises(InputError, match="resize: expected at least the crop's 50"):
        for_evaluation(image, np.empty((0, 4)), "center_crop", 50, 40)


@pytest.mark.parametrize(
    "text",
    [
        "crop:0.2,1+jitter:0.4+lighting",
        "resize:60+flip",
        "whole",
        "crop:0.9,1.1",
        "crop:0.2,1+randaugment:3,10",
    ],
)
def test_augmentations_draw_from_torchs_generator_only(text):
    augment, image = Augmentation.parse(text), trees.picture(0, 0)
    torch.manual_seed(5)
    first = augment(image, 32)
    torch.manual_seed(5)
    assert torch.equal(first, augment(image, 32))
    assert first.shape == (3, 32, 32)
    assert text == "whole" or not torch.equal(first, augment(image, 32)) or text.startswith("crop:0.9")


@pytest.mark.parametrize(
    "text", ["zoom:2", "crop:2", "crop:0,1", "whole+jitter", "whole+turn", "resize:x", ""]
)
def test_augmentations_that_are_none(text):
    with pytest.raises(InputError, match="augmentation: expected such as crop"):
        Augmentation.parse(text)
