"""Multiply-accumulates counted by hand."""

from __future__ import annotations

import pytest
import torch
import torchvision
import transformers
from torch import nn

import csq


def test_layers_count_their_products():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.ConvTranspose2d(6, 2, 2, stride=2),
        nn.Flatten(),
        nn.Linear(200, 3),
    )
    csq.parametrize(model, 4)
    csq.bit_layers(model)["3"].set_live(torch.tensor([False, False, True, True]), fix=True)
    found = csq.bit_operations(model, torch.randn(1, 4, 5, 5), activation_bits={"0": 8})
    conv, transposed, linear = 6 * 25 * 2 * 9, 6 * 25 * 2 * 4, 200 * 3
    assert found.layers == {"0": (conv, 4, 8), "1": (transposed, 4, 32), "3": (linear, 2, 32)}
    assert found.macs == conv + transposed + linear
    assert found.total == conv * 4 * 8 + transposed * 4 * 32 + linear * 2 * 32


@pytest.mark.filterwarnings("ignore:hardened at temperature")
def test_soft_and_hard_models_agree_with_the_published_count_of_resnet18():
    model = csq.parametrize(torchvision.models.resnet18(), 2).train()
    sample = torch.randn(1, 3, 224, 224)
    soft = csq.bit_operations(model, sample, 4)
    hard = csq.bit_operations(csq.harden(model), sample, 4)
    assert soft == hard
    assert soft.macs == pytest.approx(1.814e9, rel=1e-3)  # 1.81 GMACs
    assert soft.total == soft.macs * 2 * 4
    assert model.training


def test_transformers_layers_and_embeddings():
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=8)
    model = csq.parametrize(transformers.GPT2LMHeadModel(config))
    found = csq.bit_operations(model, {"input_ids": torch.arange(6).view(1, 6)})
    per_token = 16 * 48 + 16 * 16 + 16 * 64 + 64 * 16 + 16 * 50  # attention, its output, mlp, head
    assert found.macs == 6 * per_token
