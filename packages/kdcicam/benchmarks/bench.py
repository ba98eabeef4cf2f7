"""The method's own work against what it replaces, as ratios, with the results compared first.

    python packages/kdcicam/benchmarks/bench.py --out runs/bench/kdcicam [--vgg]

Rows: boxes of all contours at 1,000 thresholds against OpenCV traced at each; the context branch and the
pool's update against the dense form, and as a share of a training step, at 1,000 classes; the
combinational map against combining all class maps; the teachers' forwards; memory of a student's step.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from kdcicam import CICAM, ClassifierLoss, Teachers, TwoTeacherLoss, contour_boxes, functional
from kdcicam.box_sweep import sweep_components
from shared_core.files import write_json

REPEATS = 5


def seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The fastest of a few runs, in processor time: other work on the machine does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def row(
    what: str, ours: float, theirs: float, peer: str, peer_version: str, unit: str = "ms"
) -> dict[str, Any]:
    return {
        "what": what,
        "ours": ours,
        "theirs": theirs,
        "peer": peer,
        "peer_version": peer_version,
        "ratio": theirs / ours,
        "unit": unit,
    }


def box_rows() -> list[dict[str, Any]]:
    taus, rows = np.arange(0, 1, 0.001), []
    for cells in (7, 14, 28):
        values = cv2.resize(np.random.default_rng(0).random((cells, cells)).astype(np.float32), (224, 224))
        scaled = (values - values.min()) / (values.max() - values.min())
        gray = (scaled.astype(np.float64) * 255).astype(np.uint8)

        def traced(gray: np.ndarray = gray) -> list[list[tuple[int, ...]]]:
            found = []
            for tau in taus:
                _, binary = cv2.threshold(gray, int(tau * np.max(gray)), 255, cv2.THRESH_BINARY)
                contours = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
                max(contours, key=cv2.contourArea)
                sides = [cv2.boundingRect(contour) for contour in contours]
                found.append([(x, y, min(x + w, 223), min(y + h, 223)) for x, y, w, h in sides])
            return found

        ours, theirs = contour_boxes(scaled, taus), traced()
        assert all(sorted(map(tuple, ours.at(i).tolist())) == sorted(t) for i, t in enumerate(theirs))
        what = f"boxes of all contours at 1,000 thresholds, 224x224 map of {cells}x{cells} cells"
        fast = seconds(lambda scaled=scaled: contour_boxes(scaled, taus))
        outer = seconds(lambda gray=gray: sweep_components(gray, 255, 8))
        rows.append(row(what, 1e3 * fast, 1e3 * seconds(traced, 2), "findContours at each", cv2.__version__))
        what = f"the same without inner contours and without choosing the largest, {cells}x{cells} cells"
        rows.append(row(what, 1e3 * outer, rows[-1]["theirs"], "findContours at each", cv2.__version__))
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
            row("context branch, 1,000 classes, 1,024 channels", 1e3 * seconds(ours), 1e3 * seconds(dense),
                "dense 1x1 convolution", torch.__version__),
            row("combinational map, 1,000 classes", 1e3 * seconds(one_map), 1e3 * seconds(all_maps),
                "combining all class maps", torch.__version__),
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
    flags = torch.tensor([0, 1, 2, 0])
    both = [
        seconds(lambda: teachers(images, flags), 2),
        seconds(lambda: (teacher(images), teacher(images)), 2),
    ]
    student = TwoTeacherLoss()(model(images), labels, flags, *teachers(images, flags))
    assert student["loss"].isfinite()
    return [
        row(f"context branch and pool in a step of VGG16/{64 // width} at {size}, 1,000 classes",
            1e3 * seconds(context), 1e3 * seconds(step, 3), "the whole step", torch.__version__),
        row("teachers' forwards a batch", 1e3 * both[0], 1e3 * both[1], "both on every image",
            torch.__version__),
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
    for one in rows:
        print(f"{one['what']}: {one['ours']:.3g} {one['unit']}, {one['peer']} {one['theirs']:.3g}: "
              f"{one['ratio']:.1f}x")  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {platform.system()}, torch {version('torch')}, one thread"
    write_json(asked.out / "bench.json", {"package": "kdcicam", "machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
