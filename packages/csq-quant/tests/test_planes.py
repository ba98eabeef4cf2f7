"""Bit planes as the weight of a layer: where they start, what stays constant, what stays float32."""

from __future__ import annotations

import copy
import multiprocessing

import pytest
import torch
from hosted_models import images, randomize_masks, small_net, train
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from traced_model import check_traced

import csq
from csq.functional import naive_bit_weight
from shared_core import InputError


def rounded(weight: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Symmetric uniform rounding to ±(2^n - 1) levels of the largest magnitude."""
    top, levels = weight.abs().max(), 2**n_bits - 1
    return (weight / top * levels).round() / levels * top


@given(n_bits=st.integers(1, 8), temperature=st.floats(1, 200), seed=st.integers(0, 100))
def test_pretrained_start_is_the_rounded_weight_at_every_temperature(n_bits, temperature, seed):
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    planes = csq.BitPlanes(weight, n_bits)
    planes.set_temperature(temperature)
    torch.testing.assert_close(planes(), rounded(weight, n_bits), rtol=1e-5, atol=1e-5)
    hard = planes.codes().float() * planes.step_size()
    torch.testing.assert_close(hard, rounded(weight, n_bits), rtol=1e-5, atol=1e-6)


def test_scratch_start_is_the_official_one():
    weight = torch.randn(6, 7)
    planes = csq.BitPlanes(weight, 8, init="scratch")
    assert set(planes.positive.unique().tolist()) == {0.0, 1.0}
    assert planes.mask.eq(0).all()
    share = 0.5 * (torch.tensor(1.0).sigmoid() - 0.5)  # a set bit, and every mask: 0.116
    torch.testing.assert_close(planes().detach(), share * rounded(weight, 8), rtol=1e-4, atol=1e-6)


def test_layer_weight_follows_the_formula_of_the_paper():
    planes = csq.BitPlanes(torch.randn(3, 4), 5, init="scratch")
    with torch.no_grad():
        for parameter in planes.parameters():
            parameter.add_(torch.randn_like(parameter))
    planes.set_temperature(3.0)
    arguments = (planes.positive, planes.negative, planes.mask, planes.scale, 3.0)
    torch.testing.assert_close(planes(), naive_bit_weight(*arguments))


def test_fixed_masks_start_exact_too_and_never_move():
    weight = torch.randn(5, 5)
    planes = csq.BitPlanes(weight, 3, mask="fixed")
    torch.testing.assert_close(planes().detach(), rounded(weight, 3), rtol=1e-5, atol=1e-5)
    planes().sum().backward()
    assert planes.mask.grad.eq(0).all()
    with torch.no_grad():
        planes.mask.fill_(-5)
    assert planes.selected().all()


def test_place_values_stay_powers_of_two_under_any_optimizer():
    model = csq.parametrize(small_net())
    # Everything decayed, as in the official code, whose place values are trained and leave the powers of two.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    train(model, optimizer, csq.Schedule(model, 3.0, 10, on_miss="settle"), 10)
    for planes in csq.bit_layers(model).values():
        assert all(p.shape != planes.mask.shape or p is planes.mask for p in planes.parameters())
        with torch.no_grad():
            planes.negative.fill_(-1)
            planes.positive.fill_(-1)
            for plane in range(8):  # open one bit of the first weight at a time
                planes.positive[plane].view(-1)[0] = 1
                code = planes.codes(torch.ones(8, dtype=torch.bool)).view(-1)[0]
                assert int(code) == 2**plane
                planes.positive[plane].view(-1)[0] = -1


def test_gates_stay_float32_under_autocast():
    model = csq.parametrize(small_net())
    x, y = images(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
        assert output.dtype == torch.bfloat16
        assert model[0].weight.dtype == torch.float32
        loss = nn.functional.cross_entropy(output, y)
        loss.backward()  # also inside, where autocast would reach the closed forms
    for planes in csq.bit_layers(model).values():
        assert planes.positive.dtype == torch.float32
        assert planes.positive.grad.dtype == torch.float32
        assert planes.positive.grad.ne(0).any()


def test_a_model_in_bfloat16_keeps_float32_gates_and_bfloat16_weights():
    model = csq.parametrize(small_net())
    before = [p.clone() for p in csq.bit_layers(model)["0"].parameters()]
    model.to(torch.bfloat16)
    planes = csq.bit_layers(model)["0"]
    assert all(torch.equal(a, b) for a, b in zip(before, planes.parameters(), strict=True))
    assert model[0].weight.dtype == torch.bfloat16
    x, y = images(8)
    nn.functional.cross_entropy(model(x.bfloat16()), y).backward()
    assert planes.positive.grad.dtype == torch.float32
    final = csq.harden(model)
    assert final[0].weight.dtype == torch.bfloat16
    assert final.eval()(x.bfloat16()).dtype == torch.bfloat16
    assert csq.parametrize(nn.Linear(3, 3).half()).weight.dtype == torch.float16


def test_saturated_gates_do_not_make_gradients_nan():
    planes = csq.BitPlanes(torch.randn(4, 4))
    planes.set_temperature(200.0)
    with torch.no_grad():
        planes.positive.mul_(1e4)
        planes.mask.mul_(1e4)
    planes().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in planes.parameters())


def test_copies_are_independent():
    model = csq.parametrize(small_net())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        csq.bit_layers(twin)["0"].positive.add_(1)
    assert not torch.equal(model[0].weight, twin[0].weight)
    assert csq.bit_layers(model)["0"].positive.abs().max() < 0.2


def test_assigning_a_weight_starts_planes_from_it():
    layer = csq.parametrize(nn.Linear(4, 3))
    wanted = torch.randn(3, 4)
    with torch.no_grad():
        layer.weight = wanted
    torch.testing.assert_close(layer.weight, rounded(wanted, 8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_weights_without_a_scale_are_refused(value):
    with pytest.raises(InputError, match="weight: expected finite values, not all zero"):
        csq.BitPlanes(torch.full((2, 2), value))
    layer = csq.parametrize(nn.Linear(2, 2))
    with torch.no_grad(), pytest.raises(InputError, match="weight: expected finite values"):
        layer.weight = torch.full((2, 2), value)


def test_live_planes_return_with_the_state_dict():
    model = csq.parametrize(small_net())
    randomize_masks(model, 8)
    planes = csq.bit_layers(model)["0"]
    planes.set_live(planes.selected(), fix=True)
    twin = csq.parametrize(small_net())
    twin.load_state_dict(model.state_dict())
    copied = csq.bit_layers(twin)["0"]
    assert not copied.searching
    assert torch.equal(copied.selected(), planes.selected())
    assert torch.equal(twin[0].weight, model[0].weight)


@pytest.mark.usefixtures("process_server")
def test_a_traced_graph_of_the_user_is_one_graph_and_gives_the_same():
    # In a process of its own, without the tests' checks of annotations, which would be traced too.
    process = multiprocessing.get_context("forkserver").Process(target=check_traced)
    process.start()
    process.join(240)
    assert process.exitcode == 0
