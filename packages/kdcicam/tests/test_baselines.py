"""Baselines on the same network against what they must equal."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import trees
from PIL import Image

from kdcicam.baselines import BASELINES, LogitsView, grad_cam_maps
from kdcicam.data import load_images
from kdcicam.evaluation import evaluate
from kdcicam.overlays import overlay
from shared_core import InputError


def test_grad_cam_is_the_class_map_without_what_is_negative():
    """With a linear classifier on the mean of the map, Grad-CAM's weights are the classifier's row over the
    number of cells."""
    model, x = tiny.with_pool(tiny.model()).eval(), tiny.images()
    out = model(x)
    classes = torch.tensor([0, 1, 2, 3, 4, 0])
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
