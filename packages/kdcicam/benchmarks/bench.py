"""The method's own work against what it replaces, as ratios, with the results compared first.

    python packages/kdcicam/benchmarks/bench.py --out runs/bench/kdcicam [--vgg]

Rows: boxes of all contours at 1,000 thresholds against OpenCV tracing at each; the context branch and the
pool's update against the dense form, and as a share of a training step, at 1,000 classes; the
combinational map against combining all class maps; the teachers' forwards.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from kdcicam import CICAM, ClassifierLoss, Teachers, TwoTeacherLoss, contour_boxes, functional
from shared_core.bench import finish, in_turns, row

TORCH = torch.__version__


def fastest(*works: Callable[[], Any], rounds: int = 5) -> list[float]:
    """Milliseconds of each work at its fastest, in processor time, taking turns."""
    return (1e3 * in_turns(works, rounds, warm_up=1).min(axis=0)).tolist()


def traced(gray: np.ndarray, taus: np.ndarray) -> list[list[tuple[int, ...]]]:
    """The reference evaluation's way: threshold and trace at each tau."""
    found = []
    for tau in taus:
        _, binary = cv2.threshold(gray, int(tau * np.max(gray)), 255, cv2.THRESH_BINARY)
        contours = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
        max(contours, key=cv2.contourArea)
        sides = [cv2.boundingRect(contour) for contour in contours]
        found.append([(x, y, min(x + w, 223), min(y + h, 223)) for x, y, w, h in sides])
    return found


def box_rows() -> list[dict[str, Any]]:
    taus, rows, count = np.arange(0, 1, 0.001), [], 8
    for cells in (7, 14, 28):
        generator = np.random.default_rng(0)
        rough = [generator.random((cells, cells)).astype(np.float32) for _ in range(count)]
        maps = [cv2.resize(one, (224, 224)) for one in rough]
        maps = [(one - one.min()) / (one.max() - one.min()) for one in maps]
        grays = [(one.astype(np.float64) * 255).astype(np.uint8) for one in maps]
        for one, gray in zip(maps, grays, strict=True):
            ours = contour_boxes(one, taus)
            for number, theirs in enumerate(traced(gray, taus)):
                assert sorted(map(tuple, ours.at(number).tolist())) == sorted(theirs)
        times = fastest(
            lambda maps=maps: [contour_boxes(one, taus) for one in maps],
            lambda grays=grays: [traced(gray, taus) for gray in grays],
        )
        what = f"boxes of all contours at 1,000 thresholds, 224x224 map of {cells}x{cells} cells"
        each = [time / count for time in times]
        rows.append(row(what, *each, "findContours at each", cv2.__version__, "ms"))
    return rows


def context_rows() -> list[dict[str, Any]]:
    classes, channels, side, batch = 1000, 1024, 14, 8
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(batch, channels, side, side, generator=generator)
    pool = torch.randn(classes, side, side, generator=generator)
    conv, y = nn.Conv2d(classes, channels, 1), torch.arange(batch)
    weight, logits = torch.randn(classes, channels, generator=generator), torch.randn(batch, classes)
    column, bias = conv.weight[:, :, 0, 0], conv.bias

    def dense() -> torch.Tensor:
        contexts = torch.zeros(batch, classes, side, side)
        contexts[y, y] = pool[y]
        return feature + feature * conv(contexts)

    def ours() -> torch.Tensor:
        return functional.intervene(feature, pool, y, column, bias)

    def all_maps() -> torch.Tensor:
        gamma = functional.rank_weights(classes, "quadratic")
        order = logits.argsort(dim=1, descending=True, stable=True)
        maps = functional.class_maps(feature, weight)
        return torch.einsum("bkhw,k->bhw", maps.gather(1, order[:, :, None, None].expand_as(maps)), gamma)

    def one_map() -> torch.Tensor:
        return functional.combinational_map(feature, logits, weight, "quadratic")

    with torch.no_grad():
        torch.testing.assert_close(ours(), dense(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one_map(), all_maps(), rtol=1e-3, atol=1e-2)
        return [
            row("context branch, 1,000 classes, 1,024 channels", *fastest(ours, dense),
                "dense 1x1 convolution", TORCH, "ms"),
            row("combinational map, 1,000 classes", *fastest(one_map, all_maps),
                "combining all class maps", TORCH, "ms"),
        ]  # fmt: skip


def step_rows(width: int, size: int) -> list[dict[str, Any]]:
    """A training step with and without the method's parts, on VGG16 of a width."""
    classes, batch = 1000, 4
    model = CICAM("vgg16", classes, image_size=size, width=width).train()
    images, labels = torch.randn(batch, 3, size, size), torch.arange(batch)
    out = model(images)
    loss = ClassifierLoss()

    def context() -> None:
        feature = out.feature_raw.detach().requires_grad_()
        given = model.context_conv.weight[:, :, 0, 0], model.context_conv.bias
        functional.intervene(feature, model.pool, out.predicted, *given).sum().backward()
        model.update_pool(out, labels)

    def step() -> None:
        model.zero_grad()
        made = model(images)
        loss(model, made, images, labels)["loss"].backward()
        model.update_pool(made, labels)

    teacher = CICAM("vgg16", classes, image_size=size, width=width)
    teachers = Teachers(teacher, teacher, model)
    more = torch.randn(6, 3, size, size)  # a lottery's mean: a third of the images for each teacher
    flags = torch.tensor([0, 1, 2, 0, 1, 2])
    student = TwoTeacherLoss()(model(more), torch.arange(6), flags, *teachers(more, flags))
    assert student["loss"].isfinite()
    with torch.no_grad():
        shares = fastest(lambda: teachers(more, flags), lambda: (teacher(more), teacher(more)), rounds=2)
    return [
        row(f"context branch and pool in a step of VGG16/{64 // width} at {size}, 1,000 classes",
            *fastest(context, step, rounds=3), "the whole step", TORCH, "ms"),
        row("teachers' forwards a batch", *shares, "both on every image", TORCH, "ms"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/kdcicam"))
    parser.add_argument(
        "--vgg", action="store_true", help="VGG16 at its full width and 224: minutes on a CPU"
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rows = box_rows() + context_rows() + (step_rows(64, 224) if asked.vgg else step_rows(16, 224))
    finish("kdcicam", rows, asked.out, torch=TORCH, threads=1)


if __name__ == "__main__":
    main()
