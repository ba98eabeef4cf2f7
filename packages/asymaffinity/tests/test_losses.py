"""The loss module: terms, weights, warm-up, warnings."""

from __future__ import annotations

import warnings

import pytest
import torch

from asymaffinity.affinity import ColorAffinity, DepthGradAffinity
from asymaffinity.functional import BOXINST, affinity_loss, projection_loss
from asymaffinity.grid import box_cells
from asymaffinity.losses import BoxSupLoss
from asymaffinity.metrics import fill_ratio, given_box_ap, logits_health, mask_health, mask_iou, trivial_rate
from shared_core import InputError

BOXES = torch.tensor([[8.0, 8, 40, 44], [20, 4, 60, 60], [2, 30, 20, 62]])
INDEX = torch.tensor([0, 1, 1])


def inputs():
    images = torch.rand(2, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    depth = torch.rand(2, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)[:, 0]
    return images, depth, torch.randn(3, 16, 16, requires_grad=True)


def test_each_modality_has_its_term_normalised_by_itself():
    images, depth, logits = inputs()
    crit = BoxSupLoss(warmup=100)
    edges = crit.edges(images, depth)
    assert edges.keys() == {"color", "depthgrad"}
    losses = crit(logits, BOXES, INDEX, edges, step=25)
    cells, _ = box_cells(BOXES, (16, 16))
    assert losses["loss_prj"].item() == pytest.approx(projection_loss(logits, cells).item())
    for name in edges:
        alone = affinity_loss(logits, edges[name], cells, INDEX, lean=False)
        assert losses[f"loss_aff_{name}"].item() == pytest.approx(0.5 * 0.25 * alone.item(), rel=1e-5)
    sum(losses.values()).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("how", ["and", "or"])
def test_joined_modalities_have_one_term_of_the_whole_weight(how: str):
    images, depth, logits = inputs()
    apart = BoxSupLoss(warmup=0)
    crit = BoxSupLoss(warmup=0, join=how, rule=BOXINST)
    edges = crit.edges(images, depth)
    both = apart.edges(images, depth)
    one, other = (both[name].stack() for name in ("color", "depthgrad"))
    assert torch.equal(edges["joined"].stack(), one & other if how == "and" else one | other)
    losses = crit(logits, BOXES, INDEX, edges)
    cells, _ = box_cells(BOXES, (16, 16))
    whole = affinity_loss(logits, edges["joined"], cells, INDEX, BOXINST, lean=False)
    assert losses["loss_aff_joined"].item() == pytest.approx(whole.item(), rel=1e-5)


def test_the_warm_up_is_linear_and_counts_calls_in_training_alone():
    images, depth, logits = inputs()
    crit = BoxSupLoss(warmup=4)
    edges = crit.edges(images, depth)
    values = [crit(logits, BOXES, INDEX, edges)["loss_aff_color"].item() for _ in range(6)]
    assert values[0] == 0
    assert values[1:5] == pytest.approx([values[4] * t / 4 for t in (1, 2, 3, 4)])
    assert values[5] == values[4]
    crit.eval()
    crit(logits, BOXES, INDEX, edges)
    assert int(crit.step) == 6
    again = BoxSupLoss(warmup=4)
    again.load_state_dict(crit.state_dict())
    assert int(again.step) == 6
    assert BoxSupLoss(warmup=0).warmth(0) == 1


def test_no_instance_costs_exactly_nothing_and_keeps_the_gradient():
    images, depth, _ = inputs()
    crit = BoxSupLoss(warmup=0)
    logits = torch.zeros(0, 16, 16, requires_grad=True)
    losses = crit(logits, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), crit.edges(images, depth))
    assert all(value == 0 and value.requires_grad for value in losses.values())
    sum(losses.values()).backward()


@pytest.mark.parametrize(("thresh", "word"), [(1.0, "no edge"), (1e-30, "nearly every edge")])
def test_thresholds_that_fit_no_edge_are_said_once_with_quantiles(thresh: float, word: str):
    crit = BoxSupLoss({"color": (ColorAffinity(thresh=thresh), 1.0)})
    image = torch.rand(1, 3, 64, 64)
    with pytest.warns(UserWarning, match=f"color: {word} of a batch is kept. Similarities are 0"):
        crit.edges(image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crit.edges(image)


def test_tiny_boxes_are_kept_and_counted():
    images, depth, logits = inputs()
    crit = BoxSupLoss()
    crit(logits, torch.tensor([[9.0, 9, 9.4, 9.4]] * 3), INDEX, crit.edges(images, depth))
    assert crit.widened == 3


def test_wrong_arguments_are_said():
    images, _, logits = inputs()
    with pytest.raises(InputError, match="depth: the loss has a depth-gradient term: expected a depth map"):
        BoxSupLoss().edges(images)
    with pytest.raises(InputError, match="warmup: expected at least 0"):
        BoxSupLoss(warmup=-1)
    with pytest.raises(InputError, match="join: expected and, or, or none"):
        BoxSupLoss(join="xor")
    with pytest.raises(InputError, match="color: expected a weight of at least 0"):
        BoxSupLoss({"color": (ColorAffinity(), -1.0)})
    with pytest.raises(InputError, match="color: expected the stride 4 of the masks"):
        BoxSupLoss({"color": (ColorAffinity(stride=8), 1.0)})
    with pytest.raises(InputError, match="depthgrad is the name of a DepthGradAffinity"):
        BoxSupLoss({"depth": (DepthGradAffinity(), 1.0)})
    crit = BoxSupLoss()
    with pytest.raises(InputError, match="edges: expected edges of color, depthgrad"):
        crit(logits, BOXES, INDEX, {})


def test_health_by_hand():
    box = torch.zeros(4, 6, 6, dtype=torch.bool)
    box[:, 1:5, 1:5] = True
    masks = box.clone()
    masks[1] = False
    masks[2, 1:3] = False
    masks[3, :, 0] = True
    found = mask_health(masks, box)
    assert (found.full, found.empty, found.leaking) == (0.25, 0.25, 0.25)
    assert found.trivial == trivial_rate(masks, box) == 0.75
    assert found.fill == fill_ratio(masks, box) == pytest.approx((1 + 0 + 0.5 + 22 / 16) / 4)
    assert mask_health(masks[:0], box[:0]).trivial == 0
    cells = torch.tensor([[1, 1, 5, 5]] * 4)
    assert logits_health(torch.where(masks, 2.0, -2.0), cells) == found
    assert found.scalars()["masks/full"] == 0.25
    ious = mask_iou(masks, box)
    assert ious.tolist() == pytest.approx([1, 0, 0.5, 16 / 22])
    assert given_box_ap(ious) == pytest.approx((10 + 0 + 1 + 5) / 40)
