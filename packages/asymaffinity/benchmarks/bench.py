"""What the affinity losses cost, beside the straightforward stack of unfolded neighbours.

Run `python packages/asymaffinity/benchmarks/bench.py --out DIR`: prints a table of ratios and writes
DIR/bench.json. 100 instances of masks on a 200 x 320 grid (and 64 on 200 x 304), boxes of 2 to 5 percent of
the image and, as the worst case, of all of it. Forward and backward. Both run in the same process on one
thread and take turns, so that a busy machine slows both; the least time of several counts. Peak memory is
that of a process of its own for each, above what it had before the loss (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from asymaffinity import BOXINST, BoxSupLoss, ColorAffinity, CondInst, DepthGradAffinity, EdgeBits, Rule
from asymaffinity.affinity import depth_gradient
from asymaffinity.edges import alike
from asymaffinity.functional import affinity_loss
from asymaffinity.grid import box_cells, to_grid
from asymaffinity.models import SmallPyramid
from shared_core.files import write_json
from shared_core.proof.environment import own_peak_bytes, reset_own_peak

PEER = "stacked unfold, float weights for each instance, autograd"
SIZES = {"100 x 200 x 320": (100, 200, 320), "64 x 200 x 304": (64, 200, 304)}
BOXES = ("boxes of 2 to 5 %", "boxes of the whole image")
FORMS = {"symmetric": BOXINST, "asymmetric": Rule()}


def inputs(size: str, boxes: str) -> tuple[Tensor, EdgeBits, Tensor, Tensor]:
    """Logits, edges of four images of smooth colours, boxes in cells, and whose each mask is."""
    n, h, w = SIZES[size]
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, h // 8, w // 8, generator=draw)
    images = torch.nn.functional.interpolate(coarse, (4 * h, 4 * w), mode="bilinear", align_corners=False)
    edges = ColorAffinity(theta=10)(images)
    logits = 2 * torch.randn(n, h, w, generator=draw)
    if boxes == BOXES[0]:
        share = 0.02 + 0.03 * torch.rand(n, generator=draw)
        aspect = torch.exp(0.6 * torch.randn(n, generator=draw)).clamp(0.4, 2.5)
        wide = ((share * h * w * aspect).sqrt()).clamp(8, w - 1)
        high = (share * h * w / wide).clamp(8, h - 1)
        corner = torch.rand(n, 2, generator=draw) * torch.stack([w - wide, h - high], 1)
        pixels = 4 * torch.cat([corner, corner + torch.stack([wide, high], 1)], 1)
    else:
        pixels = torch.tensor([[0.0, 0, 4 * w, 4 * h]]).expand(n, 4)
    cells, _ = box_cells(pixels, (h, w))
    return logits, edges, cells, torch.arange(n) % 4


def stepper(size: str, boxes: str, form: str, lean: bool) -> Callable[[], Tensor]:
    logits, edges, cells, index = inputs(size, boxes)
    logits.requires_grad_()

    def step() -> Tensor:
        logits.grad = None
        loss = affinity_loss(logits, edges, cells, index, FORMS[form], lean=lean)
        loss.backward()
        return loss.detach()

    return step


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def least(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    return {name: min(each) for name, each in times.items()}


def peak(*case: str) -> float:
    """Peak bytes of a step, in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", *case]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def print_peak(size: str, boxes: str, form: str, lean: str) -> None:
    warm = stepper("64 x 200 x 304", BOXES[0], form, True)
    warm()  # libraries are loaded
    step = stepper(size, boxes, form, lean == "lean")
    del warm
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the warm-up has freed would hide the step's own peak
    reset_own_peak()
    before = own_peak_bytes()
    step()
    print(own_peak_bytes() - before)


def row(what: str, ours: float, theirs: float, unit: str, peer: str = PEER) -> dict[str, Any]:
    return {
        "what": what, "ours": ours, "theirs": theirs, "peer": peer, "peer_version": version("torch"),
        "ratio": theirs / max(ours, 1e-12), "unit": unit,
    }  # fmt: skip


def share_of_a_step() -> dict[str, Any]:
    """The losses' part of a training step of CondInst on a small pyramid, 2 images of 512 x 640."""
    torch.manual_seed(0)
    criterion = BoxSupLoss(warmup=0)
    model = CondInst(SmallPyramid(), 3, criterion, min_size=512, max_size=640)
    images = [torch.rand(3, 16, 20).repeat_interleave(32, 1).repeat_interleave(32, 2) for _ in range(2)]
    ramp = torch.linspace(0, 3, 512)[:, None].expand(512, 640).contiguous()
    boxes = torch.tensor([[40.0 + 60 * i, 60, 140 + 60 * i, 300] for i in range(8)])
    targets = [{"boxes": boxes, "labels": torch.ones(8, dtype=torch.long), "depth": ramp}] * 2
    spent = {"loss": 0.0}
    inner = criterion.forward

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        found = inner(*arguments)
        spent["loss"] = time.perf_counter() - start
        return found

    criterion.forward = timed  # type: ignore[method-assign]

    def step() -> None:
        model.zero_grad()
        torch.stack(list(model(images, targets).values())).sum().backward()

    step()
    best = min((seconds(step), spent["loss"]) for _ in range(3))
    return row("losses' share of a CondInst step, 2 images of 512 x 640, 16 boxes", best[1], best[0], "s",
               "the whole step, forward and backward")  # fmt: skip


def edge_rows() -> list[dict[str, Any]]:
    image = torch.rand(1, 3, 1024, 2048)
    depth = torch.rand(1, 1024, 2048)
    holes = depth.masked_fill(torch.rand(depth.shape) < 0.001, float("nan"))
    holes[:, 300:500, 200:600] = float("nan")
    colour, gradient = ColorAffinity(), DepthGradAffinity()

    def at_every_pixel(field: Tensor) -> None:
        slopes, known = depth_gradient(field)
        share = to_grid(known.float(), 4)
        mean = to_grid(slopes * known[:, None], 4) / share.clamp(min=1e-6)[:, None]
        alike(mean, 1.0, 0.5, share >= 0.5, both=True)

    works = {"colour": lambda: colour(image), "depth": lambda: gradient(depth)}
    works |= {"depth, pixels": lambda: at_every_pixel(depth), "holes": lambda: gradient(holes)}
    times = least(works | {"holes, pixels": lambda: at_every_pixel(holes)}, 5)
    whole = "edges of an image of 1024 x 2048"
    made = "the gradient made at every pixel"
    return [
        row(f"colour {whole}", times["colour"], 0.005, "s", "target: 5 ms"),
        row(f"depth {whole}", times["depth"], 0.005, "s", "target: 5 ms"),
        row(f"depth {whole}", times["depth"], times["depth, pixels"], "s", made),
        row(f"depth {whole}, with holes", times["holes"], times["holes, pixels"], "s", made),
    ]


def measure(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for size in SIZES:
        for boxes in BOXES:
            for form in FORMS:
                if boxes == BOXES[1] and size != "64 x 200 x 304":
                    continue
                works = {name: stepper(size, boxes, form, name == "lean") for name in ("lean", "stacked")}
                ours, theirs = (float(works[name]()) for name in works)
                assert abs(ours - theirs) <= 1e-5 * abs(theirs), (ours, theirs)
                times = least(works, rounds)
                what = f"{form}, {size}, {boxes}"
                rows.append(row(f"{what}: forward and backward", times["lean"], times["stacked"], "s"))
                if sys.platform == "linux":
                    del works
                    lean, stacked = (peak(size, boxes, form, name) for name in ("lean", "stacked"))
                    rows.append(row(f"{what}: peak memory", lean / 2**20, stacked / 2**20, "MiB"))
    return [*rows, share_of_a_step(), *edge_rows()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/asymaffinity"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        print_peak(*options.peak_of)
        return
    rows = measure(options.rounds)
    machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": 1, "numpy": np.__version__}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "bench.json", {"package": "asymaffinity", "machine": machine, "rows": rows})
    table = Table("what", "ours", "theirs", "ratio", "peer")
    for each in rows:
        table.add_row(
            each["what"],
            f"{each['ours']:.4g} {each['unit']}",
            f"{each['theirs']:.4g} {each['unit']}",
            f"{each['ratio']:.1f}",
            each["peer"],
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
