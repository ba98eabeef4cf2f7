"""Some instances have true masks, the others boxes alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import trees
from training_runs import settings

from asymaffinity.affinity import ColorAffinity
from asymaffinity.datasets import coco_boxes
from asymaffinity.functional import dice_loss
from asymaffinity.losses import BoxSupLoss
from asymaffinity.predictions import decode
from asymaffinity.training import build_model, load_data, train
from shared_core import InputError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
HEADS = ("condinst", "maskrcnn")


def targets(known: torch.Tensor):
    """A scene whose objects have true masks where `known`."""
    image, target = tiny.scene()
    masks = target.pop("true_masks") & known[:, None, None]
    return image, target | {"masks": masks}


def losses_of(head: str, target, supervision: str = "mixed"):
    model = tiny.detector(head)
    owner = model if head == "condinst" else model.roi_heads
    owner.criterion.supervision = supervision
    torch.manual_seed(5)
    losses = model([tiny.scene()[0]], [target])
    sum(losses.values()).backward()
    return {name: value.item() for name, value in losses.items()}


@pytest.mark.parametrize("head", HEADS)
def test_instances_with_a_mask_learn_from_it_and_the_others_from_their_box(head: str):
    whole, none, half = (
        losses_of(head, targets(torch.tensor(known))[1])
        for known in ([True, True], [False, False], [True, False])
    )
    assert whole["loss_prj"] == whole["loss_aff_color"] == 0 < whole["loss_mask"]
    assert none["loss_mask"] == 0 < none["loss_prj"]
    assert half["loss_mask"] > 0
    assert half["loss_prj"] > 0
    _, target = targets(torch.tensor([True, False]))
    boxes = {k: v for k, v in target.items() if k != "masks"}
    assert {k: v for k, v in none.items() if k != "loss_mask"} == losses_of(head, boxes, "boxes")
    garbage = target | {"masks": torch.stack([target["masks"][0].flip(0), target["masks"][1]])}
    assert losses_of(head, garbage)["loss_mask"] != half["loss_mask"]
    assert losses_of(head, garbage)["loss_prj"] == half["loss_prj"]


def test_each_instance_weighs_the_same():
    crit = BoxSupLoss({"color": (ColorAffinity(), 1.0)}, warmup=0, supervision="mixed")
    image, target = tiny.scene()
    edges, index = crit.edges(image[None]), torch.zeros(2, dtype=torch.long)
    masks = target["true_masks"][:, 2::4, 2::4]
    logits = torch.randn(2, 16, 16)
    first = masks & torch.tensor([True, False])[:, None, None]
    losses = crit(logits, target["boxes"], index, edges, 0, first)
    alone = BoxSupLoss({"color": (ColorAffinity(), 1.0)}, warmup=0)
    other = alone(logits[1:], target["boxes"][1:], index[1:], edges, 0)
    assert losses["loss_mask"].item() == pytest.approx(dice_loss(logits[:1], masks[:1].float()).item() / 2)
    for name, value in other.items():
        assert losses[name].item() == pytest.approx(value.item() / 2)
    nothing = crit(logits[:0], target["boxes"][:0], index[:0], edges, 0, masks[:0])
    assert all(value == 0 for value in nothing.values())
    with pytest.raises(InputError, match="supervision: expected boxes or mixed"):
        BoxSupLoss(supervision="masks")


def test_masks_that_are_left_out_are_said_once():
    model = tiny.detector("condinst")
    image, target = targets(torch.tensor([True, True]))
    with pytest.warns(UserWarning, match="masks among the targets are left out: boxes supervise"):
        model([image], [target])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model([image], [target])


def test_a_coco_file_in_which_some_annotations_have_a_segmentation(tmp_path: Path):
    file = trees.coco(tmp_path, masks=True)
    content = json.loads(file.read_text())
    rows = content["annotations"]
    truth = [decode(row["segmentation"]) for row in rows]
    del rows[0]["segmentation"]
    x, y, w, h = rows[2]["bbox"]
    rows[2]["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    runs = np.flatnonzero(np.diff(np.r_[0, truth[3].T.ravel().astype(int), 0]))
    rows[3]["segmentation"] = {"size": [64, 64], "counts": [int(n) for n in np.diff(np.r_[0, runs, 64 * 64])]}
    file.write_text(json.dumps(content))
    data = coco_boxes(file, tmp_path / "images", masks=True)
    first, second = (data[n][1]["masks"].numpy() for n in (0, 1))
    assert not first[0].any()
    assert np.array_equal(first[1], truth[1])
    assert second[0].sum() == w * h
    assert np.array_equal(second[1], truth[3])
    data.flip = True
    seen = {bool((data[epoch, 0][1]["masks"][1].numpy() == truth[1]).all()) for epoch in range(8)}
    assert seen == {True, False}

    asked = settings(tmp_path, supervision="mixed", steps=2)
    trained = train(build_model(asked, 2), load_data(asked), asked)
    assert trained.history[-1]["loss_mask"] > 0

    rows[0]["segmentation"] = {"size": [32, 32], "counts": [1024]}
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"segmentation: expected \(64, 64\) \(got \(32, 32\)\)"):
        _ = coco_boxes(file, tmp_path / "images", masks=True)[0]
    rows[0]["segmentation"] = "garbage"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="segmentation: expected polygons or run lengths"):
        _ = coco_boxes(file, tmp_path / "images", masks=True)[0]


def test_cityscapes_is_either_masks_or_boxes(tmp_path: Path):
    root = trees.cityscapes(tmp_path)
    with pytest.raises(InputError, match="data: expected a COCO file for mixed supervision"):
        load_data(settings(tmp_path, data=str(root), supervision="mixed"))
