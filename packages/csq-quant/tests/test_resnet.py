from __future__ import annotations

import pytest
import torch
from torch import nn

from csq.resnet import CifarResNet, resnet8, resnet20
from shared_core import InputError


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_resnet20_has_the_papers_270_thousand_parameters() -> None:
    # Table 6 of He et al. gives 0.27 M. By hand, shortcuts without parameters:
    stem, head, norms = 3 * 9 * 16, 64 * 10 + 10, 2 * (16 * 7 + 32 * 6 + 64 * 6)
    stages = 9 * (6 * 16 * 16 + (16 * 32 + 5 * 32 * 32) + (32 * 64 + 5 * 64 * 64))
    assert _parameters(CifarResNet(20, shortcut="pad")) == stem + head + norms + stages == 269722
    # Shortcuts by 1x1 convolutions with BatchNorm add theirs.
    added = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert _parameters(resnet20()) == 269722 + added


def test_resnet8_has_ten_layers_with_weights() -> None:
    model = resnet8(10, 1)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == 10
    assert sorted(layer.weight.shape[0] for layer in layers) == [8] * 3 + [10] + [16] * 3 + [32] * 3


@pytest.mark.parametrize("shortcut", ["conv", "pad"])
@pytest.mark.parametrize("size", [8, 32])
def test_maps_are_halved_twice_and_scores_come_out(shortcut: str, size: int) -> None:
    model = CifarResNet(8, num_classes=7, in_channels=3, width=4, shortcut=shortcut)  # type: ignore[arg-type]
    shapes = []
    model.layer3.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)
    assert shapes == [(2, 16, size // 4, size // 4)]


def test_a_padding_shortcut_passes_every_other_pixel_and_zero_channels() -> None:
    block = CifarResNet(8, width=2, shortcut="pad").layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # the other branch is silent
    x = torch.rand(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3]].any()


def test_other_depths_are_refused() -> None:
    with pytest.raises(InputError, match=r"depth: expected 6 n \+ 2.*\(got 18\)"):
        CifarResNet(18)
