"""COCO's and Cityscapes' layouts, and depth maps in each format; what is wrong with them is said in one
line."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
import torch
import trees
from PIL import Image

from asymaffinity.datasets import (
    BoxImages,
    cityscapes_boxes,
    coco_boxes,
    collate,
    first_depth,
    mirrored,
    read_image,
)
from asymaffinity.depth import (
    CONVENTIONS,
    convention,
    describe,
    find,
    read_field,
    read_numbers,
    sidecar,
    to_field,
)
from shared_core import InputError


def test_a_coco_file_with_boxes_alone(tmp_path: Path):
    data = coco_boxes(trees.coco(tmp_path), tmp_path / "images", depth=tmp_path / "depth")
    assert data.classes == ("square", "disc")  # by category id
    assert data.category_ids == (3, 7)
    assert len(data) == 4
    image, target = data[1]
    expected, wanted = tiny.scene(1)
    torch.testing.assert_close(image, expected, atol=1 / 255, rtol=0)
    assert torch.equal(target["boxes"], wanted["boxes"])
    assert torch.equal(target["labels"], wanted["labels"])
    torch.testing.assert_close(target["depth"][1:], wanted["depth"][1:], atol=2e-3, rtol=0)
    assert target["depth"][0].isnan().all()  # disparity 0
    assert target.keys() == {"boxes", "labels", "image_id", "depth"}
    images, targets = collate([data[0], data[1]])
    assert (len(images), len(targets)) == (2, 2)


def test_masks_in_the_file_are_never_read(tmp_path: Path):
    """Trap 2."""
    file = trees.coco(tmp_path, masks=True)
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = "garbage"
    file.write_text(json.dumps(content))
    assert coco_boxes(file, tmp_path / "images")[0][1].keys() == {"boxes", "labels", "image_id"}


def test_crowds_specks_and_empty_images_are_left_out_and_counted(tmp_path: Path):
    file = trees.coco(tmp_path)
    content = json.loads(file.read_text())
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"][2]["bbox"] = [5, 5, 0.3, 9]
    content["annotations"] = content["annotations"][:6]
    file.write_text(json.dumps(content))
    data = coco_boxes(file, tmp_path / "images")
    assert data.skipped == {"crowds": 1, "boxes smaller than a pixel": 1, "images without a box": 1}
    assert len(data) == 3
    assert len(coco_boxes(file, tmp_path / "images", keep_empty=True)) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"annotations": None}, "annotations: expected a list, as COCO has it"),
        ({"bbox": [50, 5, -40, 9]}, r"bbox of image 10: expected finite x, y, width, height with a width"),
        ({"bbox": [5, 5, float("nan"), 9]}, r"bbox of image 10: expected finite"),
        ({"bbox": [5, 5]}, r"bbox of image 10: expected four numbers"),
        ({"category_id": 99}, r"annotations\[0\]: expected bbox and a known category_id"),
        ({"image_id": 99}, r"image_id: is no image of this file \(got 99\)"),
        ({"file_name": "nowhere.png"}, "nowhere.png: there is no such image"),
    ],
)
def test_a_file_that_is_wrong_is_said(tmp_path: Path, change, words):
    file = trees.coco(tmp_path)
    content = json.loads(file.read_text())
    if "annotations" in change:
        content |= change
    else:
        part = content["images" if "file_name" in change else "annotations"]
        part[0] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=words):
        coco_boxes(file, tmp_path / "images")


def test_files_that_are_missing_or_no_json_are_said(tmp_path: Path):
    with pytest.raises(InputError, match="there is no such file"):
        coco_boxes(tmp_path / "none.json", tmp_path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        coco_boxes(tmp_path / "bad.json", tmp_path)
    file = trees.coco(tmp_path)
    (tmp_path / "depth" / "street_002.png").unlink()
    with pytest.raises(InputError, match=r"there is no depth map street_002 with one of \.png"):
        coco_boxes(file, tmp_path / "images", depth=tmp_path / "depth")
    (tmp_path / "depth" / "depth.json").unlink()
    with pytest.raises(InputError, match="what the numbers mean must be stated: --depth-kind with one of"):
        coco_boxes(file, tmp_path / "images", depth=tmp_path / "depth")


def test_boxes_are_cut_at_the_image(tmp_path: Path):
    file = trees.coco(tmp_path)
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"] = [-5, 50, 100, 40]
    file.write_text(json.dumps(content))
    assert coco_boxes(file, tmp_path / "images").records[0].boxes[0].tolist() == [0, 50, 64, 64]


def test_cityscapes_gives_tight_boxes_and_disparity(tmp_path: Path):
    data = cityscapes_boxes(trees.cityscapes(tmp_path))
    assert len(data) == 2
    assert data.skipped == {"images without a box": 1}
    _, target = data[0]
    _, wanted = tiny.scene(0)
    by_class = {
        data.classes[label - 1]: box
        for label, box in zip(target["labels"].tolist(), target["boxes"], strict=True)
    }
    assert torch.equal(by_class["car"], wanted["boxes"][0])
    assert torch.equal(by_class["person"], wanted["boxes"][1])
    assert target["depth"][50:, :10].isnan().all()
    torch.testing.assert_close(target["depth"][20, 20], wanted["depth"][20, 20] * 10, atol=0.01, rtol=0)
    assert "depth" not in cityscapes_boxes(tmp_path, depth=False)[0][1]
    with pytest.raises(InputError, match="expected leftImg8bit/val/<city>"):
        cityscapes_boxes(tmp_path, "val")
    next((tmp_path / "disparity").rglob("*000000*.png")).unlink()
    with pytest.raises(InputError, match="there is no such disparity map"):
        cityscapes_boxes(tmp_path)


def test_mirrored_samples_are_drawn_by_epoch_and_index(tmp_path: Path):
    data = coco_boxes(trees.coco(tmp_path), tmp_path / "images", depth=tmp_path / "depth", flip=True)
    plain = coco_boxes(tmp_path / "boxes.json", tmp_path / "images", depth=tmp_path / "depth")
    flips = []
    for epoch in range(8):
        image, target = data[epoch, 0]
        same = torch.equal(image, plain[0][0])
        if not same:
            expected = mirrored(*plain[0])
            assert torch.equal(image, expected[0])
            assert torch.equal(target["boxes"], expected[1]["boxes"])
            x0, y0, x1, y1 = plain[0][1]["boxes"][0].tolist()
            assert target["boxes"][0].tolist() == [64 - x1, y0, 64 - x0, y1]
        flips.append(same)
        assert torch.equal(data[epoch, 0][0], image)
    assert 0 < sum(flips) < 8


def test_images_of_other_kinds(tmp_path: Path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    torch.testing.assert_close(
        read_image(tmp_path / "grey.png"), read_image(tmp_path / "deep.png"), atol=1e-3, rtol=0
    )
    (tmp_path / "bad.png").write_bytes(b"\x89PNG no")
    with pytest.raises(InputError, match="cannot be read as an image"):
        read_image(tmp_path / "bad.png")


def test_every_format_of_depth_maps(tmp_path: Path):
    values = np.random.default_rng(0).uniform(1, 60, (7, 9)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    header = b"Pf\n9 7\n-1.0\n"
    (tmp_path / "a.pfm").write_bytes(header + values[::-1].astype("<f4").tobytes())
    (tmp_path / "b.pfm").write_bytes(b"Pf\n9 7\n1.0\n" + values[::-1].astype(">f4").tobytes())
    Image.fromarray(values).save(tmp_path / "a.tiff")
    for name in ("a.npy", "a.pfm", "b.pfm", "a.tiff"):
        np.testing.assert_array_equal(read_numbers(tmp_path / name), values)
    assert find(tmp_path, "a") == tmp_path / "a.npy"
    for name, data, words in (
        ("c.pfm", header + b"123", "it is cut short"),
        ("d.pfm", b"P5\n9 7\n255\n", "no PFM header"),
        ("e.npy", b"no", "cannot be read as a depth map"),
        ("f.txt", b"1", "expected one of .png, .npy"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=words):
            read_numbers(tmp_path / name)
    np.save(tmp_path / "g.npy", np.zeros((3, 4, 3)))
    with pytest.raises(InputError, match="expected one channel of height by width"):
        read_numbers(tmp_path / "g.npy")


def test_openexr_where_opencv_has_it(tmp_path: Path):
    values = np.linspace(1, 9, 20, dtype=np.float32).reshape(4, 5)
    import os

    os.environ["OPENCV_IO_ENABLE_OPENEXR"] = "1"
    try:
        written = cv2.imwrite(str(tmp_path / "a.exr"), values)
    except cv2.error:
        written = False
    if not written:
        pytest.skip("this build of OpenCV has no OpenEXR")
    np.testing.assert_allclose(read_numbers(tmp_path / "a.exr"), values, rtol=1e-3)


def test_conventions_are_those_that_the_data_sets_document():
    assert to_field(np.array([[0, 1 + 256 * 30]], np.float32), CONVENTIONS["cityscapes"])[0, 1] == 30
    assert to_field(np.array([[0, 256 * 4]], np.float32), CONVENTIONS["kitti"], "depth")[0, 1] == 4
    assert to_field(np.array([[65535, 400]], np.float32), CONVENTIONS["vkitti2"])[0, 1] == 0.25
    assert np.isnan(to_field(np.array([[65535, 400]], np.float32), CONVENTIONS["vkitti2"])[0, 0])
    for name in ("nyuv2", "scannet"):
        assert to_field(np.array([[2000]], np.float32), CONVENTIONS[name], "log_depth")[
            0, 0
        ] == pytest.approx(np.log(2))
    odd = np.array([[np.nan, np.inf, -3, 0, 2]], np.float32)
    assert np.isnan(to_field(odd, CONVENTIONS["middlebury"]))[0].tolist() == [True, True, True, True, False]
    assert to_field(odd, CONVENTIONS["inverse_depth"])[0, 2] == -3
    with pytest.raises(InputError, match="relative inverse depth has no scale"):
        to_field(odd, CONVENTIONS["inverse_depth"], "depth")


def test_numbers_whose_meaning_is_not_stated_or_not_plausible_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="what the numbers mean must be stated: one of cityscapes, kitti"):
        convention("millimetres")
    with pytest.raises(InputError, match="expected kind and any of"):
        convention({"scale": 2})
    with pytest.raises(InputError, match="kind: expected one of disparity"):
        convention({"kind": "metres"})
    (tmp_path / "depth.json").write_text('{"convention": "kitti"}')
    assert sidecar(tmp_path) == CONVENTIONS["kitti"]
    (tmp_path / "depth.json").write_text("[1]")
    with pytest.raises(InputError, match=r"depth\.json: is no description of depth maps"):
        sidecar(tmp_path)
    np.save(tmp_path / "a.npy", np.full((4, 4), -2.0))
    with pytest.raises(InputError, match=r"no pixel is known .* is it of another kind"):
        read_field(tmp_path / "a.npy", CONVENTIONS["metres"])
    words = describe(np.array([[0, 512, 1024]], np.float32), CONVENTIONS["kitti"])
    assert words == "median 3, range 2 to 4, 67% known"


def test_the_first_depth_map_is_described(tmp_path: Path):
    """Depth of another kind, and one of another size, are seen before training."""
    file = trees.coco(tmp_path)
    data = coco_boxes(file, tmp_path / "images", depth=tmp_path / "depth")
    words = first_depth(data)
    assert words is not None
    assert words.startswith("street_000.png: disparity, median 1.5, range 0.05 to ")
    assert "resized" not in words
    small = np.full((32, 32), 1501, np.uint16)
    Image.fromarray(small).save(tmp_path / "depth" / "street_000.png")
    assert first_depth(data) == (
        "street_000.png: disparity, median 1.5, range 1.5 to 1.5, 100% known; "
        "32x32 is resized to its image's 64x64"
    )
    Image.fromarray(0 * small).save(tmp_path / "depth" / "street_000.png")
    with pytest.raises(InputError, match="no pixel is known"):
        first_depth(data)
    assert first_depth(coco_boxes(file, tmp_path / "images")) is None


def test_a_data_set_of_ones_own_records():
    with pytest.raises(IndexError):
        BoxImages([], ["a"])[0]
