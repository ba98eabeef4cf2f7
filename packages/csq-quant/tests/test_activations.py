from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import csq
from csq.activations import (
    LsqQuantizer,
    PactQuantizer,
    clipping_value,
    install_activations,
    pact,
    plan_activations,
    quantize_activations,
)
from csq.resnet import resnet8
from shared_core import InputError


def test_pact_is_the_papers_formula_and_has_2_to_the_a_values() -> None:
    alpha = torch.tensor(6.0)
    x = torch.linspace(-2, 8, 1001)
    y = pact(x, alpha, 3)
    clipped = 0.5 * (x.abs() - (x - 6).abs() + 6)  # equation 1
    torch.testing.assert_close(y, (clipped * 7 / 6).round() * 6 / 7)  # equation 2
    assert len(y.unique()) == 8
    assert len(pact(x, alpha, 3, signed=True).unique()) == 1 + 3 + 1  # down to -2, of -6 to 6 in steps of 2
    assert len(pact(4 * x - 10, alpha, 3, signed=True).unique()) == 7


def test_pact_gradients_are_the_papers() -> None:
    x = torch.tensor([-1.0, 0.3, 2.0, 6.0, 9.0], requires_grad=True)
    alpha = torch.tensor(6.0, requires_grad=True)
    g = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    pact(x, alpha, 4).backward(g)
    assert x.grad.tolist() == [0, 2, 4, 0, 0]
    assert alpha.grad.item() == 8 + 16  # equation 3: 1 where x >= alpha


def test_pact_gradient_of_alpha_is_a_finite_difference_where_all_is_clipped() -> None:
    x = torch.tensor([7.0, 8.0, -9.0])
    for signed in (False, True):
        alpha = torch.tensor(2.0, requires_grad=True)
        pact(x, alpha, 4, signed).pow(3).sum().backward()
        above, below = (pact(x, torch.tensor(a), 4, signed).pow(3).sum().item() for a in (2.01, 1.99))
        assert alpha.grad.item() == pytest.approx((above - below) / 0.02, rel=1e-3)


def test_results_do_not_depend_on_the_batch() -> None:
    model = quantize_activations(resnet8(10, 1), 4, torch.rand(16, 1, 8, 8)).eval()
    image = torch.rand(1, 1, 8, 8)
    alone = model(image)
    among = model(torch.cat([image, 100 * torch.rand(7, 1, 8, 8)]))[:1]
    torch.testing.assert_close(alone, among, rtol=1e-5, atol=1e-6)


def test_every_layer_gets_a_quantizer_signed_only_where_inputs_are() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 2)
    )
    quantize_activations(model, 4, torch.rand(8, 1, 8, 8), "lsq")
    found = {name: m for name, m in model.named_modules() if isinstance(m, LsqQuantizer)}
    assert [(name, q.bits, q.signed) for name, q in found.items()] == [
        ("0.input_quantizer", 8, False),  # the image, at 8 bits
        ("2.input_quantizer", 4, False),
        ("5.input_quantizer", 4, True),
    ]


def test_inputs_of_layers_take_at_most_2_to_the_a_values() -> None:
    model = quantize_activations(resnet8(10, 1), 3, torch.rand(16, 1, 8, 8), input_bits=None)
    seen = []
    model.layer2[0].conv1.input_quantizer.register_forward_hook(lambda m, i, out: seen.append(out))
    model(torch.rand(64, 1, 8, 8))
    assert 4 < len(seen[0].unique()) <= 8


def test_the_first_clipping_value_has_the_least_error_of_all_candidates() -> None:
    x = torch.randn(5000).relu()
    value = clipping_value(x, 3, signed=False)
    assert 0 < value < x.max()

    def error(alpha: float) -> float:
        return float((pact(x, torch.tensor(alpha), 3) - x).square().sum())

    top = float(x.max())
    assert error(value) <= min(error(top * share) for share in (0.3, 0.5, 0.7, 0.9, 1.0)) * (1 + 1e-6)


def test_alpha_is_decayed_and_an_lsq_step_is_not() -> None:
    for method, decay in (("pact", 5e-4), ("lsq", 0.0)):
        model = quantize_activations(resnet8(10, 1), 4, torch.rand(4, 1, 8, 8), method)  # type: ignore[arg-type]
        quantizer = model.fc.input_quantizer
        parameter = quantizer.alpha if isinstance(quantizer, PactQuantizer) else quantizer.log_step
        (group,) = [g for g in csq.param_groups(model, 5e-4) if any(p is parameter for p in g["params"])]
        assert group["weight_decay"] == decay


def test_alpha_learns() -> None:
    quantizer = PactQuantizer(4, alpha=1.0)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.2)
    x = 3 * torch.rand(500)
    for _ in range(60):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert 2.5 < quantizer.alpha.item() < 3.2


def test_a_plan_installs_the_same_quantizers_without_an_example() -> None:
    model = resnet8(10, 1)
    twin = copy.deepcopy(model)
    plan = plan_activations(model, 4, torch.rand(8, 1, 8, 8))
    install_activations(model, plan)
    install_activations(twin, plan)
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(model.eval()(x), twin.eval()(x))


def test_32_bits_leave_the_model_alone_and_its_mode_is_kept() -> None:
    model = resnet8(10, 1)
    keys = set(model.state_dict())
    quantize_activations(model, 32, torch.rand(4, 1, 8, 8))
    assert set(model.state_dict()) == keys
    quantize_activations(model, 4, torch.rand(4, 1, 8, 8))
    assert model.training
    assert model.bn1.num_batches_tracked == 0  # observing moved no statistics


def test_projections_that_attention_does_not_call_are_named() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.warns(UserWarning, match=r"not called as modules.*self_attn\.out_proj"):
        quantize_activations(model, 8, torch.rand(2, 3, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "expected 1 to 16 bits"),
        ({"bits": 17}, "expected 1 to 16 bits"),
        ({"bits": 4, "skip": ["nope"]}, "no convolution or linear layer is called nope"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize_activations(resnet8(10, 1), example=torch.rand(2, 1, 8, 8), **arguments)


def test_quantizing_twice_is_refused() -> None:
    model = quantize_activations(resnet8(10, 1), 4, torch.rand(2, 1, 8, 8))
    with pytest.raises(InputError, match="activations are quantized already"):
        quantize_activations(model, 4, torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize("method", ["pact", "lsq"])
def test_ranges_of_an_untrained_network_are_those_that_training_sees(method: str) -> None:
    """BatchNorm's initial statistics normalize nothing: 12 layers would shrink activations a millionfold."""
    layers = [
        layer for _ in range(12) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.Flatten(), nn.Linear(512, 4))
    with torch.no_grad():
        for convolution in model[1:-2:3]:
            convolution.weight.mul_(0.3)
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(16, 3, 8, 8)
    quantized = quantize_activations(copy.deepcopy(model), 8, x, method)
    assert all(torch.equal(value, quantized.state_dict()[key]) for key, value in state.items())
    assert all(
        norm.momentum == 0.1 and norm.training
        for norm in quantized.modules()
        if isinstance(norm, nn.BatchNorm2d)
    )
    expected, found = model.train()(x), quantized.train()(x)
    assert (found - expected).norm() < 0.6 * expected.norm()  # ranges too small: 1.0


def test_ranges_of_a_trained_network_follow_its_statistics_and_one_value_a_channel_is_no_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    quantize_activations(copy.deepcopy(model), 4, torch.randn(1, 4))
    model.train()(torch.randn(8, 4))
    model[1].running_mean.fill_(-50.0)
    plan = plan_activations(model, 8, torch.randn(16, 4))
    assert plan["3"]["alpha"] > 20
