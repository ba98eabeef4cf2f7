from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import csq
from csq import rivals
from csq.rivals.bsq import PLANES, BsqWeight, bsq_penalty
from csq.rivals.lsq import LsqWeight, lsq_quantize
from csq.rivals.ste import SteWeight, levels
from shared_core import InputError


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_k_bits_are_really_2_to_the_k_plus_1_less_1_values_for_every_rival(bits: int) -> None:
    weight = torch.linspace(-1, 1, 4001)
    ste = SteWeight(bits)
    lsq = LsqWeight(weight, bits)
    lsq.set_step(1 / levels(bits))  # as wide as the weights
    bsq = BsqWeight(weight)
    with torch.no_grad():
        bsq.log_scale.fill_(0.0)
        bsq.n_planes.fill_(bits)
        values = torch.arange(2**bits)
        bsq.planes.zero_()
        bsq.planes[0, :, : 2**bits] = ((values >> torch.arange(PLANES)[:, None]) & 1).float()
        bsq.planes[1, :, 2**bits : 2 ** (bits + 1)] = ((values >> torch.arange(PLANES)[:, None]) & 1).float()
    for out in (ste(weight), lsq(weight), bsq()):
        assert len(out.unique()) == 2 ** (bits + 1) - 1
        assert out.max() == -out.min()


def test_integers_times_scale_are_the_weight_bit_for_bit() -> None:
    weight = torch.randn(50)
    for rival in (SteWeight(2), LsqWeight(weight, 3)):
        codes, scale = rival.integers(weight)
        assert torch.equal(codes * scale, rival(weight))
    bsq = BsqWeight(weight)
    codes, scale = bsq.integers()
    assert torch.equal(codes * scale, bsq())


def test_ste_scales_by_the_largest_weight_and_passes_the_gradient_unchanged() -> None:
    weight = torch.tensor([1.0, -0.2, 0.6, -0.9], requires_grad=True)
    out = SteWeight(1)(weight)
    assert out.tolist() == [1, 0, 1, -1]
    gradient = torch.tensor([1.0, 2.0, 3.0, 4.0])
    out.backward(gradient)
    assert torch.equal(weight.grad, gradient)  # the paper's S is a constant


def test_ste_of_zero_weights_is_zero() -> None:
    assert not SteWeight(2)(torch.zeros(3)).any()


def test_lsq_gradients_are_the_papers_equations() -> None:
    step, low, high = 0.5, -3, 3
    x = torch.tensor([-4.0, -1.4, -0.3, 0.0, 0.2, 0.6, 1.3, 1.6, 9.0], requires_grad=True)
    s = torch.tensor(step, requires_grad=True)
    g = torch.randn(9)
    lsq_quantize(x, s, low, high, gradient_scale=0.25).backward(g)
    by_step = 0.0
    for value, weight in zip(x.tolist(), g.tolist(), strict=True):  # equation 3, value by value
        v = value / step
        by_step += weight * (low if v <= low else high if v >= high else round(v) - v)
    inside = [low * step < v < high * step for v in x.tolist()]
    assert torch.equal(x.grad, g * torch.tensor(inside))  # equation 5
    assert s.grad.item() == pytest.approx(0.25 * by_step, abs=1e-5)


def test_lsq_step_gradient_outside_the_range_is_a_finite_difference() -> None:
    # Where everything is clipped, the function is linear in the step: no straight-through estimate is left.
    x = torch.tensor([5.0, 7.0, -6.0])
    s = torch.tensor(0.5, requires_grad=True)
    lsq_quantize(x, s, -3, 3).square().sum().backward()

    def loss(step: float) -> float:
        return lsq_quantize(x, torch.tensor(step), -3, 3).square().sum().item()

    assert s.grad.item() == pytest.approx((loss(0.51) - loss(0.49)) / 0.02, rel=1e-3)


def test_lsq_starts_at_the_papers_step_and_scales_its_gradient_by_size() -> None:
    weight = torch.randn(400)
    rival = LsqWeight(weight, 2)
    assert rival.step.item() == pytest.approx(2 * weight.abs().mean().item() / 3**0.5)
    assert rival.gradient_scale == pytest.approx((400 * 3) ** -0.5)


def test_an_lsq_step_moves_as_in_the_paper_to_first_order() -> None:
    weight, lr = torch.randn(300), 1e-3
    rival = LsqWeight(weight, 2)
    before = rival.step.item()
    s = torch.tensor(before, requires_grad=True)
    target = torch.randn(300)
    (lsq_quantize(weight, s, -3, 3, rival.gradient_scale) * target).sum().backward()
    (rival(weight) * target).sum().backward()
    with torch.no_grad():
        rival.log_step -= lr * rival.log_step.grad
    assert rival.step.item() == pytest.approx(before - lr * s.grad.item(), rel=1e-5)


def test_an_lsq_step_never_reaches_zero_or_turns_signs_around() -> None:
    weight = torch.randn(50)
    rival = LsqWeight(weight, 2)
    optimizer = torch.optim.SGD(rival.parameters(), lr=0.5, momentum=0.9)
    for _ in range(20):  # a pull towards zero that carries the paper's update far beyond it
        optimizer.zero_grad()
        (rival(weight).abs().sum() * 100).backward()
        optimizer.step()
    assert 0 < rival.step.item() < 1e-2
    assert (rival(weight) * weight >= 0).all()


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_outside_1_to_8_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match="expected 1 to 8 bits a weight"):
        SteWeight(bits)


# BSQ


def _bsq(integers: list[int], n: int = PLANES, scale: float = 1.0) -> BsqWeight:
    """Planes of given integers at n planes, scale s."""
    largest = 2**PLANES - 1
    layer = BsqWeight(torch.tensor([*integers, largest]).float() / largest)  # the last one sets max |W|
    with torch.no_grad():
        layer.planes = nn.Parameter(layer.planes[..., :-1].clone())
        layer.n_planes.fill_(n)
        layer.log_scale.fill_(math.log(scale))
    return layer


def test_bsq_starts_as_the_weight_rounded_to_8_bits() -> None:
    weight = torch.randn(200)
    top = weight.abs().max()
    expected = (weight / top * 255).round() / 255 * top
    torch.testing.assert_close(BsqWeight(weight)(), expected, rtol=1e-6, atol=0)


def test_bsq_gradient_of_a_plane_is_its_place_value() -> None:
    layer = _bsq([3, -2], n=2, scale=0.6)
    layer().backward(torch.tensor([1.0, 10.0]))
    # dW/dp_b = s 2^b / (2^n - 1), and minus that for n_b.
    for place in range(2):
        expected = torch.tensor([1.0, 10.0]) * 0.6 * 2**place / 3
        torch.testing.assert_close(layer.planes.grad[0, place], expected)
        torch.testing.assert_close(layer.planes.grad[1, place], -expected)
    assert not layer.planes.grad[:, 2:].any()


def test_bsq_regularizer_by_hand() -> None:
    # 5 = 101b, -4 = -100b, n = 3: plane norms 1 (place 0: 5), 0 (place 1), sqrt 2 (place 2: 5 and -4).
    first = _bsq([5, -4], n=3)
    norms = 1 + 0 + 2**0.5
    assert first.lasso().item() == pytest.approx(norms, abs=2e-4)  # sqrt(1e-8) for the empty plane
    second = _bsq([1, 1, 1, 0, 0, 0], n=1)
    expected = norms * 2 * 3 / 8 + 3**0.5 * 6 * 1 / 8  # weighted by #params #bits / all params
    assert bsq_penalty([first, second]).item() == pytest.approx(expected, abs=2e-4)


def test_bsq_drops_empty_planes_at_both_ends_and_keeps_the_weight() -> None:
    # 12 = 01100b, -8 = -01000b in 5 planes: planes 4 and 0, 1 are empty; left are 3 and 2: 11b and 10b.
    layer = _bsq([12, -8, 0], n=5, scale=0.7)
    before = layer().clone()
    assert layer.requantize() == 2
    torch.testing.assert_close(layer(), before, rtol=1e-6, atol=0)
    codes, scale = layer.integers()
    assert codes.tolist() == [3, -2, 0]
    assert scale.item() == pytest.approx(0.7 / 31 * 4)


def test_bsq_keeps_a_gap_between_used_planes() -> None:
    layer = _bsq([9, 1], n=5)  # 1001b
    assert layer.requantize() == 4


def test_bsq_grows_on_overflow_but_not_beyond_8_planes() -> None:
    layer = _bsq([3], n=2, scale=1.0)
    with torch.no_grad():
        layer.planes[0, :2] = 2.0  # 2 (1 + 2) = 6 needs three planes
    before = layer().clone()
    assert layer.requantize() == 2  # 6 = 110b: grown to three, and the empty lowest one is dropped
    torch.testing.assert_close(layer(), before)
    full = _bsq([255, 1])
    with torch.no_grad():
        full.planes[0, 7, 0] = 2.0  # 383
    assert full.requantize() == 8
    assert full.integers()[0].tolist() == [255, 1]


def test_bsq_with_nothing_left_keeps_one_plane() -> None:
    layer = _bsq([0, 0], n=4)
    assert layer.requantize() == 1
    assert not layer().any()


def test_bsq_planes_are_clipped_to_0_and_2() -> None:
    layer = _bsq([1])
    with torch.no_grad():
        layer.planes.copy_(torch.linspace(-1, 3, layer.planes.numel()).view_as(layer.planes))
    layer.clip()
    assert layer.planes.min() == 0
    assert layer.planes.max() == 2


# Attached to models


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.body = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(self.embed(x))))


MAKERS = {
    "ste": lambda name, weight: SteWeight(2),
    "lsq": lambda name, weight: LsqWeight(weight, 2),
    "bsq": lambda name, weight: BsqWeight(weight),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_hardened_rivals_are_plain_models_with_the_same_outputs_and_shared_weights_once(make) -> None:
    model = _Tied()
    rivals.attach(model, make)
    x = torch.arange(7)
    expected = model(x)
    assert list(rivals.rival_layers(model)) == ["embed", "body"]
    hard = rivals.harden(model)
    assert torch.equal(hard(x), expected)
    assert type(hard) is _Tied
    assert type(hard.body) is nn.Linear
    assert hard.head.weight is hard.embed.weight
    assert set(hard.state_dict()) == {"embed.weight", "body.weight", "body.bias", "head.weight"}


def test_a_rivals_report_counts_as_csqs_does() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    hard = rivals.harden(rivals.attach(model, lambda name, w: LsqWeight(w, 1 if name == "0" else 2)))
    report = hard.report
    assert report.average_bits == pytest.approx((1200 * 1 + 600 * 2) / 1800)
    assert report.average_stored_bits == pytest.approx((1200 * 2 + 600 * 3) / 1800)  # ternary takes 2 bits
    assert report.float_parameters == 50


def test_a_rivals_file_loads_into_a_plain_model(tmp_path) -> None:
    import csq

    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    hard = rivals.harden(rivals.attach(model, lambda name, w: LsqWeight(w, 2)))
    csq.save(hard, tmp_path / "m.safetensors")
    loaded = csq.load(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)), tmp_path / "m.safetensors")
    x = torch.randn(3, 40)
    assert torch.equal(loaded(x), hard(x))


def test_a_bsq_model_hardened_between_two_requantizations_has_numbers_that_its_planes_make(tmp_path):
    model = rivals.attach(nn.Sequential(nn.Linear(6, 5)), lambda _, weight: BsqWeight(weight))
    (layer,) = rivals.rival_layers(model).values()
    with torch.no_grad():
        layer.n_planes.fill_(3)
        layer.planes[:, 3:] = 0
        layer.planes[0, :3, 0, 0], layer.planes[1, :3, 0, 0] = 2, 0  # 14, where three planes make 7
    before = model[0].weight.detach().clone()
    final = rivals.harden(model)
    torch.testing.assert_close(final[0].weight.detach(), before)
    assert final.report.layers[0].bits == 4
    csq.save(final, tmp_path / "m.safetensors")
    found = csq.load(nn.Sequential(nn.Linear(6, 5)), tmp_path / "m.safetensors")
    assert torch.equal(found[0].weight, final[0].weight)
