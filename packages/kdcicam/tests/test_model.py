"""Promises of the model: whose context, what is shared, what is saved, what bad input says."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from kdcicam.boxes import boxes_from_map
from kdcicam.model import CICAM
from shared_core import InputError


def test_both_branches_are_the_formulas():
    model = tiny.with_pool(tiny.model())
    x = tiny.images()
    out = model(x)
    assert len(out.predicted.unique()) >= 3  # each image's own context
    f = model.backbone(x)
    w, b = model.classifier.weight, model.classifier.bias
    z = f.mean((2, 3)) @ w.T + b
    a, a0 = model.context_conv.weight[:, :, 0, 0], model.context_conv.bias
    m = torch.stack([a[:, y][:, None, None] * model.pool[y] + a0[:, None, None] for y in z.argmax(1)])
    torch.testing.assert_close(out.logits_raw, z)
    torch.testing.assert_close(out.feature, f + f * m)
    torch.testing.assert_close(out.logits, (f + f * m).mean((2, 3)) @ w.T + b)
    torch.testing.assert_close(out.cam, torch.einsum("kc,bchw->bkhw", w, f + f * m))
    torch.testing.assert_close(out.cam_raw, torch.einsum("kc,bchw->bkhw", w, f))


def test_the_context_is_that_of_the_prediction_and_labels_have_no_part():
    """Trap 1: the forward pass has no labels; the pool's update reads them and leaves f' as it is."""
    model = tiny.with_pool(tiny.model())
    x = tiny.images()
    out = model(x)
    before = out.feature.clone()
    model.update_pool(out, (out.predicted + 1) % 5)
    assert torch.equal(out.feature, before)
    other = tiny.with_pool(tiny.model())
    for y in set(range(5)) - set(out.predicted.tolist()):
        other.pool[y] = 99  # contexts of classes that are not predicted
    assert torch.equal(other(x).feature, before)


def test_wrong_predictions_leave_the_pool_at_exactly_zero():
    """Trap 2."""
    model = tiny.model()
    out = model(tiny.images())
    labels = (out.predicted + 1) % 5
    labels[0] = out.predicted[0]
    assert model.update_pool(out, labels) == 1
    touched = model.pool.flatten(1).any(1)
    assert touched.tolist() == [k == int(labels[0]) for k in range(5)]
    assert model.classes_in_pool == 1


def test_the_pool_takes_the_maps_of_the_forward_pass_and_not_those_of_changed_weights():
    model = tiny.model()
    out = model(tiny.images())
    out.logits.sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(InputError, match=r"call update_pool before optimizer\.step\(\)"):
        model.update_pool(out, out.predicted)


def test_images_of_a_batch_do_not_see_each_others_update():
    model = tiny.with_pool(tiny.model())
    x = tiny.images()
    torch.testing.assert_close(model(x).logits[:1], model(x[:1]).logits)


def test_the_classifier_is_one_and_gets_both_gradients():
    """Trap 4."""
    model = tiny.with_pool(tiny.model())
    assert [name for name, p in model.named_parameters() if p.shape == (5, 8)] == ["classifier.weight"]
    out = model(tiny.images())
    assert out.weight.data_ptr() == model.classifier.weight.data_ptr()
    weight = model.classifier.weight
    parts = [
        torch.autograd.grad(z.square().sum(), weight, retain_graph=True)[0]
        for z in (out.logits, out.logits_raw)
    ]
    (out.logits.square().sum() + out.logits_raw.square().sum()).backward()
    torch.testing.assert_close(weight.grad, sum(parts))
    assert all(part.abs().sum() > 0 for part in parts)


def test_no_gradient_reaches_the_pool():
    """Trap 5."""
    model = tiny.with_pool(tiny.model())
    assert not model.pool.requires_grad
    assert "pool" not in dict(model.named_parameters())
    out = model(tiny.images())
    out.cam.sum().backward()
    model.update_pool(out, out.predicted)
    assert model.pool.grad_fn is None
    assert model.pool.grad is None


def test_the_pool_is_saved_and_loaded_bit_for_bit():
    """Trap 3."""
    model, x = tiny.model().eval(), tiny.images()
    out = model(x)
    model.update_pool(out, out.predicted)
    expected = model(x)
    other = tiny.model(seed=3).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x).logits, expected.logits)
    assert torch.equal(other(x).combined(), expected.combined())
    assert not torch.equal(expected.logits, out.logits)  # the pool does make a difference


def test_without_context_the_branches_are_one():
    out = tiny.with_pool(tiny.model(context=False))(tiny.images())
    assert out.logits is out.logits_raw
    assert out.feature is out.feature_raw


def test_localize_boxes_the_combined_map():
    model, x = tiny.with_pool(tiny.model()).eval(), tiny.images()
    found = model.localize(x, 0.3, topk=3)
    maps = model(x).combined("quadratic", 5)
    shifted = maps - maps.amin((1, 2), keepdim=True)
    large = nn.functional.interpolate(shifted[:, None], (24, 24), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found.maps, large)
    assert found.boxes.tolist() == [list(boxes_from_map(m.detach().numpy(), 0.3).box) for m in large]
    torch.testing.assert_close(found.scores, model(x).logits.softmax(1).topk(3).values)
    assert model.localize(x, 0.3, size=(48, 12)).maps.shape == (6, 48, 12)


def test_localize_needs_evaluation_mode():
    with pytest.raises(InputError, match=r"model\.eval\(\)"):
        tiny.model().localize(tiny.images())


def test_images_of_another_size_name_both_maps():
    model = tiny.with_pool(tiny.model()).eval()
    with pytest.raises(InputError, match=r"pool is 6x6 \(images of 24\); images of 32x32 give maps of 8x8"):
        model(tiny.images(size=32))
    model.resize_pool(32)
    assert model(tiny.images(size=32)).cam.shape == (6, 5, 8, 8)
    assert model.pool.square().mean((1, 2)) == pytest.approx(1, abs=1e-3)


def test_a_stated_map_size_must_be_the_backbones():
    assert CICAM(tiny.backbone(), 3, 6, image_size=24).map_size == (6, 6)
    with pytest.raises(
        InputError, match=r"map_size: the backbone's map is 6x6 at images of 24 \(got \(14, 14\)"
    ):
        CICAM(tiny.backbone(), 3, 14, image_size=24)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([0.0, 1, 2, 3, 4, 0]), r"expected whole numbers \(got 'torch.float32'"),
        (torch.tensor([0, 1, 2, 3, 5, 0]), r"expected 0 to 4 \(got '0 to 5'"),
        (torch.tensor([0, 1, -1, 3, 4, 0]), r"expected 0 to 4 \(got '-1 to 4'"),
    ],
)
def test_labels_out_of_range_are_refused(labels, words):
    from kdcicam.model import check_labels

    with pytest.raises(InputError, match=f"labels: {words}"):
        check_labels(labels, 5)


def test_an_overflow_does_not_reach_the_pool():
    model = tiny.with_pool(tiny.model())
    before = model.pool.clone()
    x = tiny.images()
    x[0] = float("inf")
    out = model(x)
    model.update_pool(out, out.predicted)
    assert torch.equal(model.pool, before)
    assert model.skipped_updates == 1


@pytest.mark.parametrize("classes", [0, 1])
def test_too_few_classes_are_refused(classes):
    with pytest.raises(InputError, match="num_classes"):
        CICAM(tiny.backbone(), classes, image_size=24)
    if classes:
        assert CICAM(tiny.backbone(), 1, image_size=24, combine="cam")(tiny.images()).cam.shape == (
            6,
            1,
            6,
            6,
        )


def test_a_batch_is_the_same_under_bfloat16_autocast_but_for_rounding():
    model, x = tiny.with_pool(tiny.model()), tiny.images()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        model.update_pool(out, out.predicted)
    assert model.pool.dtype == torch.float32
    torch.testing.assert_close(out.logits.float(), tiny.with_pool(tiny.model())(x).logits, rtol=0.1, atol=0.1)
