"""What bit planes cost in training, beside naive planes and plain quantization-aware training.

Run `python packages/csq-quant/benchmarks/bench.py --out DIR`: prints a table of ratios and writes
DIR/bench.json. A step is forward, backward and fused SGD with momentum. Peers run in the same process, on one
thread, and take turns, so that a busy machine slows all of them; the least time of several counts. Peak
memory (Linux) is that of a process of its own for each variant, above what it had before its model was made.
"""

from __future__ import annotations

import argparse
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

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csq
from csq.functional import naive_bit_weight
from csq.planes import BitPlanes
from csq.resnet import resnet20
from csq.rivals import SteWeight
from csq.rivals import attach as attach_rival
from csq.storage import pack_codes, unpack_codes
from shared_core.bench import finish, row
from shared_core.proof.environment import own_peak_bytes, reset_own_peak

LATE_PLANES = 2
"""Planes a layer in the last third of training, at target 2."""
VARIANTS = ("compiled", "eager", "naive", "STE-QAT", "compiled, late", "eager, late")


class NaivePlanes(BitPlanes):
    """The formula written down, with all that autograd keeps for it."""

    def forward(self) -> Tensor:
        scale = self.scale * self.gain
        return naive_bit_weight(self.positive, self.negative, self.mask, scale, self.temperature)


TORCH = version("torch")
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-20, batch 128": (resnet20, (128, 3, 32, 32)),
    "ViT width 384, 4 blocks, 64 tokens, batch 4": (
        lambda: timm.create_model(
            "vit_small_patch16_224",
            depth=4,
            img_size=128,
            num_classes=10,
            global_pool="avg",
            class_token=False,
        ),
        (4, 3, 128, 128),
    ),
}


def parametrized(model: nn.Module, variant: str) -> nn.Module:
    if variant == "STE-QAT":
        return attach_rival(model, lambda name, weight: SteWeight(2))
    csq.parametrize(model, kernel="compiled" if variant.startswith("compiled") else "eager")
    for planes in csq.bit_layers(model).values():
        if variant == "naive":
            planes.__class__ = NaivePlanes
        if variant.endswith("late"):
            planes.set_live(torch.arange(8) >= 8 - LATE_PLANES, fix=True)
    return model


def stepper(model_name: str, variant: str) -> Callable[[], None]:
    torch.manual_seed(0)
    make, shape = MODELS[model_name]
    model = parametrized(make(), variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    x, y = torch.randn(shape), torch.randint(0, 10, shape[:1])

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def step_times(model_name: str, rounds: int) -> dict[str, float]:
    steps = {variant: stepper(model_name, variant) for variant in VARIANTS}
    for step in steps.values():
        step()
        step()  # compiled, momentum made
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant, step in steps.items():
            times[variant].append(seconds(step))
    return {variant: min(each) for variant, each in times.items()}


def peak(model_name: str, variant: str) -> float:
    """Peak bytes of three steps, in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", model_name, variant]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def print_peak(model_name: str, variant: str) -> None:
    reset_own_peak()
    before = own_peak_bytes()
    step = stepper(model_name, variant)
    for _ in range(3):
        step()
    print(own_peak_bytes() - before)


def training_rows(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name in MODELS:
        times = {variant: 1e3 * value for variant, value in step_times(name, rounds).items()}
        for kernel in ("compiled", "eager"):
            rows.append(
                row(f"step, {name}, {kernel}", times[kernel], times["naive"], "naive planes", TORCH, "ms")
            )
            peer = "STE-QAT of 2 bits, the same loop"
            rows.append(row(f"step, {name}, {kernel}", times[kernel], times["STE-QAT"], peer, TORCH, "ms"))
            late = times[f"{kernel}, late"]
            rows.append(
                row(f"step of the last third, {name}, {kernel}", late, times["STE-QAT"], peer, TORCH, "ms")
            )
        if not Path("/proc/self/clear_refs").exists():
            continue
        memory = {variant: peak(name, variant) / 2**20 for variant in ("eager", "naive", "STE-QAT")}
        rows.append(
            row(f"peak memory, {name}", memory["eager"], memory["naive"], "naive planes", TORCH, "MiB")
        )
        rows.append(row(f"peak memory, {name}", memory["eager"], memory["STE-QAT"], "STE-QAT", TORCH, "MiB"))
    return rows


def weight_rows(rounds: int) -> list[dict[str, Any]]:
    """The weight alone, forward and backward, without layer and optimizer."""
    upstream = torch.randn(1024, 1024)

    def work(variant: str) -> Callable[[], None]:
        planes = csq.BitPlanes(torch.randn(1024, 1024), compiled=variant == "compiled")
        if variant == "naive":
            planes.__class__ = NaivePlanes

        def run() -> None:
            planes.zero_grad()
            planes().backward(upstream)

        return run

    runs = {variant: work(variant) for variant in ("compiled", "eager", "naive")}
    for run in runs.values():
        run()
        run()
    times = [{variant: 1e3 * seconds(run) for variant, run in runs.items()} for _ in range(3 * rounds)]
    least = {variant: min(each[variant] for each in times) for variant in runs}
    what = "weight of 1024 x 1024, forward and backward"
    return [
        row(f"{what}, {v}", least[v], least["naive"], "naive planes", TORCH, "ms")
        for v in ("compiled", "eager")
    ]


@torch.no_grad()
def deployment_rows(rounds: int) -> list[dict[str, Any]]:
    plain = resnet20().eval()
    soft = csq.parametrize(resnet20(), 2, mask="fixed")
    final = csq.harden(soft).eval()
    x = torch.randn(64, 3, 32, 32)
    for model in (final, plain):
        model(x)
    pairs = [(seconds(lambda: final(x)), seconds(lambda: plain(x))) for _ in range(rounds)]
    ours, theirs = (1e3 * min(times) for times in zip(*pairs, strict=True))
    return [row("hardened forward, ResNet-20, batch 64", ours, theirs, "the plain model", TORCH, "ms")]


def packing_rows() -> list[dict[str, Any]]:
    rows = []
    for width in (2, 3, 5, 9):
        half = 1 << (width - 1)
        codes = np.random.default_rng(0).integers(-half + 1, half, 4_000_000).astype(np.int16)
        packed = pack_codes(codes)
        assert packed.width == width
        assert np.array_equal(unpack_codes(packed), codes)
        for what, work in (
            ("pack", lambda c=codes: pack_codes(c)),
            ("unpack", lambda p=packed: unpack_codes(p)),
        ):
            rate = 4 * len(codes) / 1e6 / min(seconds(work) for _ in range(5))
            # The ratio is to the target: 200 MB of float32 weights a second.
            rows.append(
                row(
                    f"{what} {width} bits, time a MB of float32",
                    1e3 / rate,
                    5.0,
                    "target of 200 MB/s",
                    "",
                    "ms",
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/csq-quant"))
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each variant")
    parser.add_argument("--peak-of", nargs=2, metavar=("MODEL", "VARIANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak_of:
        return print_peak(*arguments.peak_of)
    rows = packing_rows() + weight_rows(arguments.rounds) + deployment_rows(3 * arguments.rounds)
    rows += training_rows(arguments.rounds)
    finish("csq-quant", rows, arguments.out, threads=1)
    return None


if __name__ == "__main__":
    main()
