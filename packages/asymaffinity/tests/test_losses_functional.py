"""The losses against a plain loop, both implementations against one another, and the laws of the paper."""

from __future__ import annotations

import loop_oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from asymaffinity.edges import EdgeBits, alike, neighbour_offsets, word
from asymaffinity.functional import (
    BOXINST,
    Rule,
    affinity_loss,
    asymmetric_affinity_loss,
    dice_loss,
    projection_loss,
    stacked_cost,
    symmetric_affinity_loss,
)
from asymaffinity.grid import cell_masks
from shared_core import InputError

RULES = {
    "symmetric": BOXINST,
    "symmetric, known": Rule("symmetric", "known"),
    "asymmetric": Rule(),
    "asymmetric, predicted": Rule("asymmetric", "predicted"),
    "discounted": Rule("discounted", "predicted", kappa=0.6),
    "two-sided": Rule("asymmetric", "known", down=1.0, up=0.5),
    "two-sided, predicted": Rule("asymmetric", "predicted", down=0.7, up=1.0),
    "halved": Rule("asymmetric", "known", down=0.5),
}


def scene(h=9, w=11, instances=4, images=2, kernel=3, dilation=2, seed=0, kind=torch.float64):
    """Logits, edges of random features with some cells invalid, boxes anywhere, and which image is whose."""
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(instances, h, w, generator=draw, dtype=kind)
    features = torch.randn(images, 2, h, w, generator=draw, dtype=torch.float64)
    valid = torch.rand(images, h, w, generator=draw) < 0.9
    edges = alike(features, 1.5, 0.4, valid, kernel=kernel, dilation=dilation)
    a = torch.rand(instances, 2, generator=draw) * torch.tensor([w - 1.0, h - 1.0])
    size = 1 + torch.rand(instances, 2, generator=draw) * torch.tensor([w / 1.5, h / 1.5])
    cells = torch.cat([a.long(), (a + size).long().clamp(max=torch.tensor([w, h]))], 1)
    cells[:, 2:] = torch.maximum(cells[:, 2:], cells[:, :2] + 1)
    index = torch.randint(0, images, (instances,), generator=draw)
    return logits, features, valid, edges, cells, index


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (5, 1), (3, 4), (7, 1)])
@pytest.mark.parametrize("name", ["symmetric", "asymmetric", "asymmetric, predicted"])
def test_a_plain_loop_gives_the_same(name: str, kernel: int, dilation: int):
    logits, features, valid, edges, cells, index = scene(kernel=kernel, dilation=dilation)
    boxes = cell_masks(cells, (9, 11)).int().tolist()
    edges_of = [
        list(
            loop_oracle.ordered_edges(
                features[i].tolist(), box, 1.5, 0.4, valid[i].tolist(), kernel, dilation
            )
        )
        for i, box in zip(index.tolist(), boxes, strict=True)
    ]
    cost = loop_oracle.symmetric if name == "symmetric" else loop_oracle.implication
    total, count = loop_oracle.affinity(
        logits.tolist(), edges_of, boxes, cost, RULES[name].outside == "known"
    )
    assert count > 20
    for lean in (True, False):
        loss = affinity_loss(logits, edges, cells, index, RULES[name], lean=lean)
        assert loss.item() == pytest.approx(total / count, rel=1e-10)


@given(
    h=st.integers(1, 14), w=st.integers(1, 14), n=st.integers(0, 5), seed=st.integers(0, 99),
    kernel=st.sampled_from([3, 5]), dilation=st.integers(1, 3), name=st.sampled_from(list(RULES)),
    chunk=st.sampled_from([1, 200, 1 << 17]),
)  # fmt: skip
def test_the_lean_form_is_the_stacked_form_forward_and_backward(h, w, n, seed, kernel, dilation, name, chunk):
    """Whole maps in one group, and windows of several sizes in many."""
    logits, _, _, edges, cells, index = scene(h, w, n, 2, kernel, dilation, seed)
    found = []
    for lean in (True, False):
        x = logits.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("asymaffinity.lean.CHUNK", chunk)
            loss = affinity_loss(x, edges, cells, index, RULES[name], lean=lean)
        loss.backward()
        found.append((loss.item(), x.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-10, abs=1e-14)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-13)


def test_the_lean_form_is_as_exact_in_float32_on_a_large_grid():
    logits, _, _, edges, cells, index = scene(70, 90, 12, 3, kind=torch.float32)
    exact = logits.double().requires_grad_()
    x = logits.clone().requires_grad_()
    for rule in (BOXINST, Rule()):
        exact.grad = x.grad = None
        truth = affinity_loss(exact, edges, cells, index, rule, lean=False)
        loss = affinity_loss(x, edges, cells, index, rule)
        truth.backward()
        loss.backward()
        assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
        torch.testing.assert_close(
            x.grad.double(), exact.grad, rtol=1e-4, atol=1e-4 * float(exact.grad.abs().max())
        )


def test_many_chunks_are_as_one(monkeypatch: pytest.MonkeyPatch):
    logits, _, _, edges, cells, index = scene(30, 40, 20, 3)
    whole = asymmetric_affinity_loss(logits, edges, cells, index)
    monkeypatch.setattr("asymaffinity.lean.CHUNK", 200)
    assert asymmetric_affinity_loss(logits, edges, cells, index).item() == pytest.approx(
        whole.item(), rel=1e-12
    )


@pytest.mark.parametrize(
    "name", ["symmetric", "symmetric, known", "asymmetric", "asymmetric, predicted", "discounted"]
)
def test_autograd_agrees_with_finite_differences(name: str):
    logits, _, _, edges, cells, index = scene(5, 6, 2)
    logits = logits.requires_grad_()
    for lean in (True, False):
        assert gradcheck(
            lambda x, lean=lean: affinity_loss(x, edges, cells, index, RULES[name], lean=lean), logits
        )
    assert gradcheck(lambda x: projection_loss(x, cells), logits)


def test_held_neighbours_get_no_gradient_from_an_edge():
    """With up and down weights, the gradient of an edge is that of its own end alone."""
    own, other = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-0.7, dtype=torch.float64)
    own.requires_grad_()
    other.requires_grad_()
    cost = stacked_cost(own, other, Rule(down=1.0, up=1.0))
    cost.backward()
    p, q = torch.sigmoid(own.detach()), torch.sigmoid(other.detach())
    assert other.grad is None or other.grad == 0
    by_hand = p * (1 - p) * ((1 - q) / (1 - p * (1 - q)) - q / (1 - (1 - p) * q))
    assert own.grad.item() == pytest.approx(by_hand.item())


def flat_scene(h=12, w=12, box=(3, 3, 9, 9)):
    """An image of one colour: every edge is kept, also across the box's border."""
    edges = alike(torch.zeros(1, 3, h, w), 2.0, 0.3)
    return edges, torch.tensor([box]), torch.zeros(1, dtype=torch.long)


def test_everything_foreground_costs_in_the_asymmetric_loss_alone():
    """P1."""
    edges, cells, index = flat_scene()
    full = torch.full((1, 12, 12), 9.0)
    assert symmetric_affinity_loss(full, edges, cells, index) < 1e-3
    assert asymmetric_affinity_loss(full, edges, cells, index) > 1
    filled = torch.where(cell_masks(cells, (12, 12)), 9.0, -9.0)
    assert asymmetric_affinity_loss(filled, edges, cells, index) > 1


def test_swapping_the_labels_changes_the_asymmetric_loss_alone():
    """P2."""
    logits, _, _, edges, cells, index = scene()
    one, other = (symmetric_affinity_loss(x, edges, cells, index) for x in (logits, -logits))
    assert one.item() == pytest.approx(other.item(), rel=1e-12)
    one, other = (asymmetric_affinity_loss(x, edges, cells, index) for x in (logits, -logits))
    assert abs(one.item() - other.item()) > 0.01
    mirrored = [
        asymmetric_affinity_loss(x, edges, cells, index, outside="predicted").item()
        for x in (logits, -logits)
    ]
    assert abs(mirrored[0] - mirrored[1]) > 0.01


@pytest.mark.parametrize("lean", [True, False])
def test_cells_outside_the_box_get_no_gradient(lean: bool):
    """P3."""
    logits, _, _, edges, cells, index = scene()
    inside = cell_masks(cells, (9, 11))
    x = logits.clone().requires_grad_()
    asymmetric_affinity_loss(x, edges, cells, index, lean=lean).backward()
    assert torch.equal(x.grad[~inside], torch.zeros_like(x.grad[~inside]))
    assert x.grad[inside].abs().max() > 0
    x.grad = None
    symmetric_affinity_loss(x, edges, cells, index, lean=lean).backward()
    assert x.grad[~inside].abs().max() > 0


def test_a_mask_that_follows_all_edges_costs_nothing():
    """P4: an object of its own colour in the middle of its box."""
    image = torch.zeros(1, 3, 14, 14)
    image[:, 0, 5:10, 5:10] = 50
    edges = alike(image, 2.0, 0.3)
    cells, index = torch.tensor([[3, 3, 12, 12]]), torch.zeros(1, dtype=torch.long)
    mask = torch.where(image[:, 0] > 0, 40.0, -40.0)
    assert asymmetric_affinity_loss(mask, edges, cells, index) < 1e-12
    assert asymmetric_affinity_loss(-mask, edges, cells, index) > 1


def test_an_inside_pair_pushes_half_as_hard_at_saturation():
    """Asymmetric against symmetric: 1 against 2 inside, 1 in both across the border."""
    edges = EdgeBits(torch.tensor([[[1 << 4, 1 << 3]]], dtype=torch.uint8), 3, 1)
    index = torch.zeros(1, dtype=torch.long)
    pushes = {}
    for name, box in (("inside", [0, 0, 2, 1]), ("border", [0, 0, 1, 1])):
        for rule in (BOXINST, Rule()):
            x = torch.tensor([[[18.0, -30.0]]], dtype=torch.float64, requires_grad=True)
            loss = affinity_loss(x, edges, torch.tensor([box]), index, rule)
            (loss * (2 if name == "inside" else 1)).backward()
            pushes[name, rule.form] = x.grad[0, 0, 0].item()
    assert pushes["inside", "symmetric"] == pytest.approx(2, abs=1e-4)
    assert pushes["inside", "asymmetric"] == pytest.approx(1, abs=1e-4)
    assert pushes["border", "symmetric"] == pytest.approx(1, abs=1e-4)
    assert pushes["border", "asymmetric"] == pytest.approx(1, abs=1e-4)


def test_discounting_moves_the_tipping_point():
    for kappa in (1.0, 0.5, 0.25):
        tip = 1 / (1 + kappa)
        for offset in (-0.01, 0.01):
            p = torch.tensor(tip + offset, dtype=torch.float64)
            own = torch.logit(p).requires_grad_()
            stacked_cost(own, torch.logit(p), Rule("discounted", "predicted", kappa=kappa)).backward()
            assert (own.grad < 0) == (offset > 0)  # above the tip the mask grows


def test_edges_beyond_the_image_do_not_count():
    """Trap 3: nine cells, one colour, distance 1: 4 corners with 3, 4 sides with 5, the middle with 8."""
    edges = alike(torch.zeros(1, 3, 3, 3), 2.0, 0.3, kernel=3, dilation=1)
    assert sum(bin(b).count("1") for b in edges.bits.flatten().tolist()) == 4 * 3 + 4 * 5 + 8
    cells, index = torch.tensor([[0, 0, 3, 3]]), torch.zeros(1, dtype=torch.long)
    x = torch.full((1, 3, 3), torch.logit(torch.tensor(0.7)).item(), dtype=torch.float64)
    for lean in (True, False):
        loss = symmetric_affinity_loss(x, edges, cells, index, lean=lean)
        assert loss.item() == pytest.approx(-torch.log(torch.tensor(0.49 + 0.09)).item(), rel=1e-6)


def test_edges_are_counted_over_all_instances_together():
    """Trap 5: a large box and a small one; each edge weighs the same."""
    edges = alike(torch.zeros(1, 3, 20, 20), 2.0, 0.3)
    cells = torch.tensor([[0, 0, 18, 18], [2, 2, 4, 4]])
    x = torch.stack([torch.full((20, 20), 4.0), torch.full((20, 20), 0.0)]).double()
    index = torch.zeros(2, dtype=torch.long)
    parts = [asymmetric_affinity_loss(x[i : i + 1], edges, cells[i : i + 1], index[:1]) for i in range(2)]
    counts = [int((edges.stack()[0] & cell_masks(cells[i : i + 1], (20, 20))).sum()) for i in range(2)]
    together = sum(part * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
    assert asymmetric_affinity_loss(x, edges, cells, index).item() == pytest.approx(together.item())
    assert abs(together.item() - (sum(parts) / 2).item()) > 0.05


def test_the_projection_loss_is_the_plain_loops():
    logits, _, _, _, cells, _ = scene()
    boxes = cell_masks(cells, (9, 11)).int().tolist()
    assert projection_loss(logits, cells).item() == pytest.approx(
        loop_oracle.projection(logits.tolist(), boxes)
    )
    perfect = torch.where(cell_masks(cells, (9, 11)), 50.0, -50.0)
    assert projection_loss(perfect, cells) < 1e-5
    assert dice_loss(perfect, cell_masks(cells, (9, 11)).float()) < 1e-5


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_stay_finite(name: str, kind: torch.dtype):
    logits, _, _, edges, cells, index = scene(kind=torch.float32)
    extreme = logits.sign().mul(torch.inf).to(kind)
    extreme[0] = torch.linspace(-300, 300, 99).reshape(9, 11).to(kind)
    for lean in (True, False):
        x = extreme.clone().requires_grad_()
        loss = affinity_loss(x, edges, cells, index, RULES[name], lean=lean) + projection_loss(x, cells)
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()
        assert loss.dtype == torch.float32


def test_no_instance_and_no_edge_cost_exactly_nothing():
    logits, _, _, edges, cells, index = scene()
    for lean in (True, False):
        x = logits[:0].clone().requires_grad_()
        loss = affinity_loss(x, edges, cells[:0], index[:0], lean=lean) + projection_loss(x, cells[:0])
        loss.backward()
        assert loss == 0
        assert x.grad.shape == (0, 9, 11)
        none = EdgeBits(torch.zeros(2, 9, 11, dtype=torch.uint8))
        x = logits.clone().requires_grad_()
        loss = affinity_loss(x, none, cells, index, lean=lean)
        loss.backward()
        assert loss == 0
        assert not x.grad.any()


def test_wrong_arguments_are_said():
    logits, _, _, edges, cells, index = scene()
    with pytest.raises(InputError, match=r"logits: expected the grid of the edges, \(9, 11\)"):
        affinity_loss(logits[:, :8], edges, cells, index)
    with pytest.raises(InputError, match=r"image_index: expected 0 to 1 \(got \("):
        affinity_loss(logits, edges, cells, index + 1)
    with pytest.raises(InputError, match="form: expected one of symmetric, asymmetric, discounted"):
        Rule(form="boxinst")
    with pytest.raises(InputError, match="kappa: expected a number above 0"):
        Rule(kappa=0.0)
    with pytest.raises(InputError, match="up: expected a number of at least 0"):
        Rule(up=-1.0)
    with pytest.raises(InputError, match="kernel: expected 3, 5 or 7"):
        neighbour_offsets(4, 2)
    with pytest.raises(InputError, match="dilation: expected at least 1"):
        neighbour_offsets(3, 0)
    assert word(5) == torch.int32
