"""Both plug-ins: they train from boxes, masks never reach them, predictions have torchvision's format."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
import torch.nn.functional as F
from torchvision.models.detection import FasterRCNN, MaskRCNN

from asymaffinity.batches import BoxSupTransform, resize_field
from asymaffinity.condinst import CondInst, DynamicMasks
from asymaffinity.edges import EdgeBits
from asymaffinity.mask_rcnn import boxsup_maskrcnn, enlarged, paste, region_losses
from asymaffinity.metrics import mask_health, mask_iou
from asymaffinity.models import SmallPyramid, build_backbone, build_detector, load_backbone
from shared_core import InputError

HEADS = ("condinst", "maskrcnn")


def batch(n: int = 2, **more):
    pairs = [tiny.scene(seed) for seed in range(n)]
    images = [image for image, _ in pairs]
    targets = [{k: v for k, v in t.items() if k != "true_masks"} | more for _, t in pairs]
    return images, targets


@pytest.mark.parametrize("head", HEADS)
def test_it_trains_from_boxes_and_predicts_as_torchvision_does(head: str):
    model = tiny.detector(head)
    losses = model(*batch())
    assert {"loss_prj", "loss_aff_color", "loss_aff_depthgrad"} <= losses.keys()
    assert "loss_mask" not in losses
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    model.eval()
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 64)]
    model.score_thresh = 0.0
    for image, found in zip(images, model(images), strict=True):
        assert found.keys() == {"boxes", "labels", "scores", "masks"}
        assert found["masks"].shape == (len(found["boxes"]), 1, *image.shape[1:])
        assert ((found["masks"] >= 0) & (found["masks"] <= 1)).all()


@pytest.mark.parametrize("head", HEADS)
def test_masks_among_the_targets_change_nothing(head: str):
    """Trap 2: training with garbage masks is training without."""
    found = []
    for more in ({}, {"masks": torch.rand(2, 64, 64) > 0.5}):
        model = tiny.detector(head)
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "masks among the targets are left out")
            losses = model(*batch(**more))
        found.append({name: value.item() for name, value in losses.items()})
    assert found[0] == found[1]


@pytest.mark.parametrize("head", HEADS)
def test_masks_follow_the_objects_after_some_steps(head: str):
    """One image of a disc: its box is 0.79 of it, and a square would be a trivial mask that scores."""
    model = tiny.detector(head, warmup=80, seed=1)
    image, target = tiny.scene(0)
    disc = target.pop("true_masks")[1:]
    images, targets = [image], [target | {"boxes": target["boxes"][1:], "labels": target["labels"][1:]}]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(60):
        losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    model.eval()
    found = model(images)[0]
    assert len(found["masks"])
    surest = int(found["scores"].argmax())
    found_iou = float(mask_iou(found["masks"][surest] > 0.5, disc)[0])
    assert found_iou > 0.72
    assert mask_health(found["masks"][surest] > 0.5, boxes_of(disc)).fill < 0.95  # and it is no filled box


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    return masks.any(1)[:, None, :] & masks.any(2)[:, :, None]


@pytest.mark.parametrize("head", HEADS)
def test_images_without_objects_and_boxes_smaller_than_a_cell(head: str):
    model = tiny.detector(head)
    images, targets = batch()
    targets[0] = {**targets[0], "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    speck = {"boxes": torch.tensor([[30.2, 30.2, 31.0, 30.9]]), "labels": torch.tensor([1])}
    targets[1] = {**targets[1], **speck}
    for chosen in ([0], [0, 1]):
        losses = model([images[n] for n in chosen], [targets[n] for n in chosen])
        total = sum(losses.values())
        assert total.isfinite()
        total.backward()
        if chosen == [0]:
            assert losses["loss_prj"] == 0


@pytest.mark.parametrize("head", HEADS)
def test_the_projection_loss_alone_needs_no_edges(head: str):
    model = tiny.detector(head)
    owner = model if head == "condinst" else model.roi_heads
    owner.criterion.affinities.clear()
    losses = model(*batch())
    assert 0 < losses["loss_prj"] < 2
    assert not [name for name in losses if name.startswith("loss_aff")]


@pytest.mark.parametrize("head", HEADS)
def test_depth_that_is_missing_or_of_another_shape_is_said(head: str):
    model = tiny.detector(head)
    images, targets = batch()
    lacking = [{k: v for k, v in t.items() if k != "depth"} for t in targets]
    with pytest.raises(InputError, match="targets: the loss has a depth-gradient term"):
        model(images, lacking)
    with pytest.raises(InputError, match=r"targets\[1\]\.depth: expected the aspect of its image, 64x64"):
        model(images, [targets[0], {**targets[1], "depth": torch.zeros(64, 32)}])
    small = {**targets[0], "depth": targets[0]["depth"][::2, ::2]}
    assert sum(model(images[:1], [small]).values()).isfinite()
    with pytest.raises(InputError, match=r"targets: expected targets in training"):
        tiny.detector("condinst")(images)


def test_edges_are_of_the_resized_image_before_normalisation_without_padding():
    crit = tiny.criterion()
    transform = BoxSupTransform(crit, 32, 64, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], bottom=4).train()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 96)]
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    targets = [{**empty, "depth": torch.rand(*image.shape[1:])} for image in images]
    lists, _ = transform(images, targets)
    assert lists.tensors.shape[2:] == (32, 64)
    edges = transform.edges["color"]
    assert edges.bits.shape == (2, 8, 16)
    small = F.interpolate(images[0][None], (32, 32), mode="bilinear", align_corners=False)
    alone = crit.affinities["color"][0](small)
    inner = edges.bits[0, :5, :6] == alone.bits[0, :5, :6]
    assert inner.float().mean() > 0.95
    for n, (dy, dx) in enumerate(edges.offsets):
        for y, x in edges.stack()[0, n].nonzero().tolist():
            assert x + dx < 8
            assert y + dy < 7  # the last four rows are no neighbour
    transform.eval()(images)
    assert transform.edges == {}


def test_a_field_is_resized_around_its_holes():
    field = torch.arange(64.0).reshape(8, 8)
    field[2:4, 2:4] = float("nan")
    large = resize_field(field, (16, 16))
    assert large[4:8, 4:8].isnan().all()
    assert int(large.isnan().sum()) == 16
    whole = resize_field(torch.full((8, 8), 3.0), (5, 6))
    torch.testing.assert_close(whole, torch.full((5, 6), 3.0))


def test_dynamic_masks_are_the_written_down_convolutions():
    masks = DynamicMasks(4, 3, 3)
    assert masks.parameter_count == (6 * 3 + 3) + (3 * 3 + 3) + (3 + 1)
    features, weights = torch.randn(2, 4, 5, 6), torch.randn(3, masks.parameter_count)
    centres, sizes = torch.tensor([[8.0, 8], [20, 12], [40, 30]]), torch.tensor([64.0, 64, 128])
    index = torch.tensor([0, 1, 1])
    found = masks(features, weights, centres, sizes, index)
    for n in range(3):
        x = (torch.arange(6) * 8 + 4.0).expand(5, 6)
        y = (torch.arange(5) * 8 + 4.0)[:, None].expand(5, 6)
        relative = torch.stack([(centres[n, 0] - x) / sizes[n], (centres[n, 1] - y) / sizes[n]])
        hidden = torch.cat([features[index[n]], relative])[None]
        w = weights[n]
        hidden = F.relu(F.conv2d(hidden, w[:18].view(3, 6, 1, 1), w[30:33]))
        hidden = F.relu(F.conv2d(hidden, w[18:27].view(3, 3, 1, 1), w[33:36]))
        expected = F.conv2d(hidden, w[27:30].view(1, 3, 1, 1), w[36:37])[0, 0]
        torch.testing.assert_close(found[n], expected)
    shuffled = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        masks(features, weights[shuffled], centres[shuffled], sizes[shuffled], index[shuffled]),
        found[shuffled],
    )
    assert masks(features, weights[:0], centres[:0], sizes[:0], index[:0]).shape == (0, 5, 6)


def by_hand(model: CondInst, pyramid: list[torch.Tensor], level: int, row: int, column: int) -> torch.Tensor:
    """The mask of one location of image 0, from CondInst's description: its weights, filters, coordinates."""
    x = pyramid[0]
    whole = model.mask_branch.refine[0](x)
    for refine, coarse in zip(list(model.mask_branch.refine)[1:], pyramid[1:3], strict=True):
        whole = whole + F.interpolate(refine(coarse), x.shape[2:], mode="bilinear", align_corners=False)
    features = model.mask_branch.tower(whole)[0]
    own = pyramid[level]
    kernel = own.new_zeros(own.shape[2:])
    kernel[row, column] = 1
    tower = model.head.regression_head.conv(own)
    weights = model.head.controller(tower)[0, :, row, column]
    stride, (c, h, w) = 8 * 2**level, features.shape
    # torchvision's FCOS has its locations at the corners of the cells.
    there = torch.tensor([column * stride, row * stride])
    rows: list[list[torch.Tensor]] = []
    for i in range(h):
        rows.append([])
        for j in range(w):
            here = torch.tensor([8 * j + 4.0, 8 * i + 4.0])
            values = torch.cat([features[:, i, j], (there - here) / (8 * stride)])
            at, end = 0, 8 * (c + 2) + 8 * 8 + 8
            for out, last in ((8, False), (8, False), (1, True)):
                matrix = weights[at : at + out * len(values)].view(out, -1)
                values = matrix @ values + weights[end : end + out]
                at, end = at + matrix.numel(), end + out
                values = values if last else F.relu(values)
            rows[-1].append(values[0])
    coarse = torch.stack([torch.stack(row_) for row_ in rows])
    fine = torch.zeros(2 * h, 2 * w)
    for i in range(2 * h):
        for j in range(2 * w):
            y, x_ = (min(max(k / 2 - 0.25, 0), size - 1) for k, size in ((i, h), (j, w)))
            y0, x0 = int(y), int(x_)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            fy, fx = y - y0, x_ - x0
            upper = (1 - fx) * coarse[y0, x0] + fx * coarse[y0, x1]
            lower = (1 - fx) * coarse[y1, x0] + fx * coarse[y1, x1]
            fine[i, j] = (1 - fy) * upper + fy * lower
    return fine


@torch.no_grad()
def test_condinst_masks_are_those_of_a_loop_over_locations_and_cells():
    """At each level: whose weights, which coordinates, which size of interest, how it is made finer."""
    model = tiny.detector("condinst", size=128)
    torch.nn.init.normal_(model.head.controller.weight, std=0.1)
    image, target = tiny.scene(size=128)
    images, targets = [image], [{k: v for k, v in target.items() if k != "true_masks"}]
    seen = []
    criterion = model.criterion.forward
    model.criterion.forward = lambda *a, **k: (seen.append(a), criterion(*a, **k))[1]
    chosen = []
    surest = model._surest
    model._surest = lambda *a: (chosen.append(surest(*a)), chosen[-1])[1]
    targets[0]["boxes"] = torch.tensor([[4.0, 4, 20, 22], [0, 0, 128, 128]])
    model(images, targets)
    lists, _ = model.transform(images, targets)
    pyramid = list(model.backbone(lists.tensors).values())
    sides = [level.shape[2] for level in pyramid]
    logits = seen[0][0]
    assert len(logits) == len(chosen[0]) > 2
    levels = set()
    for n in (0, len(logits) // 2, len(logits) - 1):
        place = int(chosen[0][n])
        level = 0
        while place >= sides[level] ** 2:
            place -= sides[level] ** 2
            level += 1
        levels.add(level)
        found = by_hand(model, pyramid, level, *divmod(place, sides[level]))
        torch.testing.assert_close(logits[n], found, atol=1e-4, rtol=1e-4)
    assert len(levels) > 1


def test_at_most_so_many_instances_an_image_the_surest_of_each_object():
    model = tiny.detector("condinst", max_instances=4)
    found = {"cls_logits": torch.zeros(1, 12, 3), "bbox_ctrness": torch.arange(12.0).reshape(1, 12, 1)}
    matched = torch.tensor([0, 0, 0, 0, 1, 1, -1, 1, 1, 0, -1, 1])
    chosen = model._surest(found, 0, matched, {"labels": torch.tensor([1, 2])})
    assert sorted(chosen.tolist()) == [3, 8, 9, 11]
    few = torch.full((12,), -1)
    few[5] = 0
    assert model._surest(found, 0, few, {"labels": torch.tensor([1])}).tolist() == [5]


def test_pasted_logits_are_bilinear_inside_and_nothing_outside():
    logits = torch.randn(2, 14, 14, dtype=torch.float32, requires_grad=True)
    regions = torch.tensor([[8.0, 4, 36, 40], [0, 0, 64, 64]])
    found = paste(logits, regions, (16, 16))
    for n, (x0, y0, x1, y1) in enumerate(regions.tolist()):
        centre = torch.arange(16) * 4 + 2.0
        gx, gy = ((centre - a) / (b - a) * 2 - 1 for a, b in ((x0, x1), (y0, y1)))
        grid = torch.stack(torch.meshgrid(gx, gy, indexing="xy"), -1)[None]
        own = logits[n : n + 1, None]
        expected = F.grid_sample(own, grid, padding_mode="border", align_corners=False)[0, 0]
        inside = (grid[0].abs() <= 1).all(-1)
        torch.testing.assert_close(found[n][inside], expected[inside], atol=1e-5, rtol=1e-5)
        assert (found[n][~inside] < -1000).all()
    found[0][found[0] > -100].sum().backward()
    assert logits.grad[0].abs().sum() > 0


def test_enlarged_regions_have_cells_beyond_their_boxes():
    assert enlarged(torch.tensor([[10.0, 10, 30, 20]]), 0.1, (100, 25)).tolist() == [[9, 9.5, 25, 20.5]]


def test_the_losses_on_a_regions_own_grid():
    crit = tiny.criterion()
    image, target = tiny.scene()
    colour, depth = crit.affinities["color"][0], crit.affinities["depthgrad"][0]
    gradient, known = depth.features(target["depth"][None])
    regions = enlarged(target["boxes"], 0.3, (64, 64))
    logits = torch.randn(2, 14, 14, requires_grad=True)
    index = torch.zeros(2, dtype=torch.long)
    features = {"color": colour.features(image[None]), "depthgrad": gradient}
    losses = region_losses(crit, logits, regions, target["boxes"], index, features, 0, {"depthgrad": known})
    assert losses.keys() == {"loss_prj", "loss_aff_color", "loss_aff_depthgrad"}
    sum(losses.values()).backward()
    assert logits.grad.abs().sum() > 0
    hidden = region_losses(
        crit, logits, regions, target["boxes"], index, features, 0, {"depthgrad": torch.zeros_like(known)}
    )
    assert hidden["loss_aff_depthgrad"] == 0  # what is unknown is never alike
    nothing = region_losses(crit, logits[:0], regions[:0], target["boxes"][:0], index[:0], features, 0)
    assert all(value == 0 for value in nothing.values())


def test_what_is_no_mask_rcnn_is_said():
    backbone = SmallPyramid(32, 4, 4)
    heads = {k: v for k, v in _small_heads().items() if k != "mask_roi_pool"}
    with pytest.raises(InputError, match=r"model: expected a torchvision MaskRCNN \(got 'FasterRCNN'\)"):
        boxsup_maskrcnn(FasterRCNN(backbone, 3, **heads), tiny.criterion())


def test_any_mask_rcnn_keeps_its_weights_and_their_names():
    torch.manual_seed(0)
    plain = MaskRCNN(SmallPyramid(32, 4, 4), 3, min_size=64, max_size=64, **_small_heads())
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    model = boxsup_maskrcnn(plain, tiny.criterion())
    after = model.state_dict()
    assert set(after) - set(before) == {"roi_heads.criterion.step"}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def _small_heads():
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    names = ["0", "1", "2", "3"]
    return {
        "rpn_anchor_generator": AnchorGenerator(tuple((16 * 2**n,) for n in range(4)), ((1.0,),) * 4),
        "box_roi_pool": MultiScaleRoIAlign(names, 7, 2),
        "mask_roi_pool": MultiScaleRoIAlign(names, 14, 2),
    }


@pytest.mark.parametrize("head", HEADS)
def test_a_residual_network_is_a_backbone(head: str):
    backbone = build_backbone("resnet18", head, "batch")
    model = build_detector(head, backbone, 3, tiny.criterion(depth=False), min_size=64, max_size=64)
    images, targets = batch()
    assert sum(model(images, targets).values()).isfinite()
    other = build_backbone("resnet18", head)
    state = {name: value.clone() for name, value in backbone.body.state_dict().items()}
    assert load_backbone(other, state, "weights.pth") > 60
    assert torch.equal(other.body.conv1.weight, backbone.body.conv1.weight)
    with pytest.raises(InputError, match=r"weights\.pth: expected weights of this backbone; 0 of"):
        load_backbone(other, {}, "weights.pth")


def test_backbones_that_are_none():
    with pytest.raises(InputError, match="backbone: expected small, resnet18"):
        build_backbone("vgg", "condinst")
    with pytest.raises(InputError, match="backbone: there is no such module here"):
        build_backbone("nowhere:make", "condinst")
    assert isinstance(build_backbone("asymaffinity.models:SmallPyramid", "condinst"), SmallPyramid)
    with pytest.raises(InputError, match="head: expected one of condinst, maskrcnn"):
        build_detector("solo", SmallPyramid(), 3, tiny.criterion())
    assert isinstance(tiny.detector("condinst"), CondInst)
    assert EdgeBits(torch.zeros(1, 2, 2, dtype=torch.uint8)).share() == 0
