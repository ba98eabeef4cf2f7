"""Baselines on the same network against what they must equal."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import trees
from PIL import Image

from kdcicam.baselines import BASELINES, LogitsView, grad_cam_maps
from kdcicam.data import MaskFiles, load_images
from kdcicam.evaluation import evaluate
from kdcicam.images import for_evaluation, read_image
from kdcicam.masks import read_mask
from kdcicam.metrics import PixelAveragePrecision
from kdcicam.overlays import overlay
from shared_core import InputError


def test_grad_cam_is_the_class_map_without_what_is_negative():
    """With a linear classifier on the mean of the map, Grad-CAM's weights are the classifier's row over the
    number of cells."""
    model, x = tiny.with_pool(tiny.model()).eval(), tiny.images()
    out = model(x)
    classes = out.cam_raw.amax((2, 3)).argmax(1)  # maps with something above 0
    assert len(classes.unique()) > 1
    ours = grad_cam_maps(model, x, classes)
    expected = []
    for one in out.cam_raw[range(6), classes].detach().relu().numpy():
        low, high = one.min(), one.max()
        large = cv2.resize((one - low) / (high - low), (24, 24))
        expected.append((large - large.min()) / (large.max() - large.min()))
    np.testing.assert_allclose(ours.numpy(), np.stack(expected), atol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
    debiased = grad_cam_maps(model, x, classes, raw=False)
    assert not torch.allclose(debiased, ours)
    with pytest.raises(InputError, match=r"model\.eval"):
        grad_cam_maps(tiny.model(), x, classes)


def test_the_view_gives_either_branch():
    model, x = tiny.with_pool(tiny.model()).eval(), tiny.images()
    assert torch.equal(LogitsView(model)(x), model(x).logits)
    torch.testing.assert_close(LogitsView(model, raw=True)(x), model(x).logits_raw)


def test_each_baseline_reads_its_own_branch():
    model, x = tiny.with_pool(tiny.model()).eval(), tiny.images()
    out = model(x)
    maps = {name: make(model, out, x) for name, make in BASELINES.items()}
    top = out.cam_raw[range(6), out.predicted]
    large = F.interpolate((top - top.amin((1, 2), keepdim=True))[:, None], (24, 24), mode="bilinear")[:, 0]
    torch.testing.assert_close(maps["cam"][0], large)
    assert torch.equal(maps["ci-cam"][1], out.logits)
    for name in ("cam", "nl-ccam", "grad-cam"):
        assert torch.equal(maps[name][1], out.logits_raw)
        assert not torch.allclose(maps[name][0], maps["ci-cam"][0])


def test_class_maps_are_the_labels_where_there_are_labels_and_combined_ones_never():
    model, x = tiny.with_pool(tiny.model()).eval(), tiny.images()
    out = model(x)
    labels = (out.predicted + 1) % 5
    for name, make in BASELINES.items():
        free, own, other = (make(model, out, x, given)[0] for given in (None, out.predicted, labels))
        assert torch.equal(free, own)
        assert torch.equal(free, other) == (name in ("ci-cam", "nl-ccam"))


def test_evaluation_hands_labels_to_class_maps(tmp_path, monkeypatch):
    images = load_images(trees.class_folders(tmp_path), "test")
    seen: list[int] = []

    def maker(model, out, x, labels):
        seen.extend(labels.tolist())
        return BASELINES["cam"](model, out, x, labels)

    monkeypatch.setitem(BASELINES, "own", maker)
    evaluate(tiny.model(3), images, threshold="oracle", methods=("own",), batch_size=4)
    assert seen == list(images.labels)


def test_evaluation_chooses_thresholds_on_validation_images_and_counts(tmp_path):
    root = trees.class_folders(tmp_path)
    test, val = load_images(root, "test"), load_images(root, "val", validation=0.25)
    model = tiny.with_pool(tiny.model(3))
    found = evaluate(model, test, val, methods=("ci-cam", "cam"), batch_size=4)
    for result in found.values():
        assert result.scores["threshold_from"] == "validation images"
        assert result.scores["images"] == 9
        assert {"whole_crop", "center_box", "max_box_acc_v2"} <= result.scores.keys()
    one = evaluate(model, test, val, methods=("cam",), batch_size=9)["cam"].scores
    assert one == found["cam"].scores  # whatever the batches
    given = evaluate(model, test, threshold=0.145, contours=False)["ci-cam"].scores
    between = [evaluate(model, test, threshold=t, contours=False)["ci-cam"].scores for t in (0.145, 0.9)]
    assert given == between[0]
    assert (given["threshold"], between[1]["threshold"]) == (0.145, 0.9)
    oracle = evaluate(model, test, threshold="oracle", contours=False)["ci-cam"].scores
    assert oracle["gt_known"] >= found["ci-cam"].scores["gt_known"]
    with pytest.raises(InputError, match="no validation image has a box"):
        evaluate(model, test)
    with pytest.raises(InputError, match="method: expected one of ci-cam"):
        evaluate(model, test, threshold=0.2, methods=("gradcam",))


def test_unreadable_images_raise_or_are_named_and_counted(tmp_path):
    root = trees.class_folders(tmp_path)
    (root / "test" / "disc" / "test1.png").write_bytes(b"")
    test, model = load_images(root, "test"), tiny.with_pool(tiny.model(3))
    with pytest.raises(InputError, match=r"test1\.png: is empty"):
        evaluate(model, test, threshold=0.2)
    with pytest.warns(UserWarning, match=r"left out: .*test1\.png: is empty"):
        result = evaluate(model, test, threshold=0.2, skip=True)["ci-cam"]
    assert (result.skipped, result.scores["images"]) == (1, 8)


def test_an_overlay_shows_the_map_and_both_boxes():
    image = Image.new("RGB", (40, 30), (100, 100, 100))
    values = np.zeros((15, 20))
    values[5:10, 5:10] = 1
    made = np.asarray(overlay(image, values, [np.array([2, 2, 38, 28])], [np.array([5, 5, 20, 20])])).astype(
        int
    )
    assert made.shape == (30, 40, 3)
    assert made[2, 10].tolist() == [255, 255, 255]
    assert made[5, 10].tolist() == [0, 158, 115]
    assert made[14, 14].sum() > made[25, 30].sum() + 200
    assert (np.asarray(overlay(image, np.full((15, 20), np.nan), [])) == 55).all()


def test_masks_give_pixel_average_precision_and_need_no_box(tmp_path):
    metadata, folder = trees.openimages(tmp_path)
    test = load_images(metadata, "test", images=folder)
    model = tiny.with_pool(tiny.model(len(test.classes))).eval()
    found = evaluate(model, test, methods=("ci-cam", "cam"), batch_size=4)
    for name, result in found.items():
        expected = PixelAveragePrecision()
        for index, marked in enumerate(test.masks):
            image = for_evaluation(read_image(test.files[index]), np.empty((0, 4)), "full", 24)[0][None]
            label = torch.tensor([test.labels[index]])
            with torch.no_grad():
                maps, _ = BASELINES[name](model, model(image), image, label)
            expected.update(maps, read_mask(marked, "full", 24)[None])
        assert result.scores["pxap"] == pytest.approx(expected.compute())
        assert result.scores["images"] == len(test)
        assert "gt_known" not in result.scores
    with pytest.raises(InputError, match="has a box or a mask"):
        evaluate(model, replace(test, masks=[]))


def test_masks_count_beside_boxes(tmp_path):
    images = load_images(trees.class_folders(tmp_path), "test")
    mask = tmp_path / "mask.png"
    Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((9, 9), np.uint8))).save(mask)
    some = [MaskFiles((mask,)), *[None] * (len(images) - 1)]
    scores = evaluate(tiny.model(3), replace(images, masks=some), threshold="oracle")["ci-cam"].scores
    assert 0 < scores["pxap"] < 1
    assert {"gt_known", "max_box_acc_v2"} <= scores.keys()
