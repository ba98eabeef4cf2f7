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
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from asymaffinity import BOXINST, BoxSupLoss, ColorAffinity, CondInst, DepthGradAffinity, EdgeBits, Rule
from asymaffinity.affinity import depth_gradient
from asymaffinity.edges import alike
from asymaffinity.functional import affinity_loss
from asymaffinity.grid import box_cells, to_grid
from asymaffinity.models import SmallPyramid
from shared_core.bench import finish, in_turns, row
from shared_core.proof.environment import own_peak_bytes, reset_own_peak

TORCH = version("torch")
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


def least(*works: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each work at its fastest, taking turns."""
    return in_turns(works, rounds, clock=time.perf_counter).min(axis=0).tolist()


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


def share_of_a_step() -> dict[str, Any]:
    """The losses' part of a training step of CondInst on a small pyramid, 2 images of 512 x 640."""
    torch.manual_seed(0)
    criterion = BoxSupLoss(warmup=0)
    model = CondInst(SmallPyramid(), 3, criterion, min_size=512, max_size=640)
    images = [torch.rand(3, 16, 20).repeat_interleave(32, 1).repeat_interleave(32, 2) for _ in range(2)]
    ramp = torch.linspace(0, 3, 512)[:, None].expand(512, 640).contiguous()
    boxes = torch.tensor([[40.0 + 60 * i, 60, 140 + 60 * i, 300] for i in range(8)])
    targets = [{"boxes": boxes, "labels": torch.ones(8, dtype=torch.long), "depth": ramp}] * 2
    spent: list[float] = []
    inner = criterion.forward

    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        found = inner(*arguments, **named)
        spent.append(time.perf_counter() - start)
        return found

    criterion.forward = timed  # type: ignore[method-assign]

    def step() -> None:
        model.zero_grad()
        torch.stack(list(model(images, targets).values())).sum().backward()

    times = in_turns([step], 3, warm_up=1, clock=time.perf_counter)[:, 0].tolist()
    whole, losses = min(zip(times, spent[1:], strict=True))
    return row("losses' share of a CondInst step, 2 images of 512 x 640, 16 boxes", losses, whole,
               "the whole step, forward and backward", TORCH, "s")  # fmt: skip


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

    colours, depths, depths_slow, holed, holed_slow = least(
        lambda: colour(image),
        lambda: gradient(depth),
        lambda: at_every_pixel(depth),
        lambda: gradient(holes),
        lambda: at_every_pixel(holes),
        rounds=5,
    )
    whole = "edges of an image of 1024 x 2048"
    made = "the gradient made at every pixel"
    return [
        row(f"colour {whole}", colours, 0.005, "target: 5 ms", "", "s"),
        row(f"depth {whole}", depths, 0.005, "target: 5 ms", "", "s"),
        row(f"depth {whole}", depths, depths_slow, made, TORCH, "s"),
        row(f"depth {whole}, with holes", holed, holed_slow, made, TORCH, "s"),
    ]


def measure(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for size in SIZES:
        for boxes in BOXES:
            for form in FORMS:
                if boxes == BOXES[1] and size != "64 x 200 x 304":
                    continue
                works = [stepper(size, boxes, form, lean) for lean in (True, False)]
                ours, theirs = (float(work()) for work in works)
                assert abs(ours - theirs) <= 1e-5 * abs(theirs), (ours, theirs)
                ours, theirs = least(*works, rounds=rounds)
                what = f"{form}, {size}, {boxes}"
                rows.append(row(f"{what}: forward and backward", ours, theirs, PEER, TORCH, "s"))
                if sys.platform == "linux":
                    del works
                    ours, theirs = (peak(size, boxes, form, name) / 2**20 for name in ("lean", "stacked"))
                    rows.append(row(f"{what}: peak memory", ours, theirs, PEER, TORCH, "MiB"))
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
    finish("asymaffinity", measure(options.rounds), options.out, threads=1, numpy=version("numpy"))


if __name__ == "__main__":
    main()
