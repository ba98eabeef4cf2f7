"""Calibration, deployment and simulation, each beside what a user would do without this package.

Run `python packages/repqvit/benchmarks/bench.py --out DIR`: prints a table of ratios and writes
DIR/bench.json. Peers run in the same process and take turns with ours, so that a busy machine slows both. Of
deployed models the least time and two percentiles are shown; other times are the least of several.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from rich.console import Console
from torch import Tensor, nn

from repqvit import quantize
from repqvit.onnx_export import export_onnx
from repqvit.ranges import PAPER_PERCENTILES, RangeSearch, fit_affine
from repqvit.recipes import named
from shared_core.bench import finish, in_turns, row

CALIBRATION_IMAGES = 32  # the paper's
QUANTILE_LIMIT = 2**24  # torch.quantile refuses more elements
SLICE = 24  # channels of a LayerNorm output that the loop is timed on; its cost is the same for each
FAST = RangeSearch("minmax")  # ranges do not change the speed of a quantized model


def fastest(*works: Callable[[], Any], rounds: int = 3) -> list[float]:
    return in_turns(works, rounds, clock=time.perf_counter).min(0).tolist()


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# (a) Calibration.


def search_one_channel(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The paper's search as one writes it first: three percentiles, three reconstructions, keep the best."""
    best, found = float("inf"), None
    for p in PAPER_PERCENTILES:
        if x.numel() < QUANTILE_LIMIT:
            high, low = torch.quantile(x, p), torch.quantile(x, 1 - p)
        else:
            values = x.numpy()
            high = torch.tensor(np.percentile(values, 100 * p), dtype=x.dtype)
            low = torch.tensor(np.percentile(values, 100 * (1 - p)), dtype=x.dtype)
        scale = (high - low) / (2**bits - 1)
        zero_point = torch.round(-low / scale)
        codes = torch.clamp(torch.round(x / scale) + zero_point, 0, 2**bits - 1)
        error = float(((codes - zero_point) * scale - x).square().mean())
        if error < best:
            best, found = error, (scale, zero_point)
    assert found is not None
    return found


def loop_over_channels(x: Tensor, bits: int) -> list[tuple[Tensor, Tensor]]:
    return [search_one_channel(x[:, channel].contiguous(), bits) for channel in range(x.shape[1])]


def calibration_rows() -> Iterator[dict[str, Any]]:
    """Range search of DeiT-S's tensors at the paper's calibration batch.

    The loop's time grows with the number of channels (rows, for weights) and nothing else, so it is timed on
    SLICE of them.
    """
    tokens, width, blocks, bits = 197, 384, 12, 4
    generator = torch.Generator().manual_seed(0)
    norm = torch.randn(CALIBRATION_IMAGES * tokens, width, generator=generator)
    search = RangeSearch()
    part = norm[:, :SLICE]
    found = fit_affine([part], bits, search)
    looped = loop_over_channels(part, bits)  # both must do the same work
    torch.testing.assert_close(found.scale, torch.stack([scale for scale, _ in looped]))
    torch.testing.assert_close(found.zero_point, torch.stack([zero_point for _, zero_point in looped]))
    ours, theirs = fastest(
        lambda: fit_affine([norm], bits, search), lambda: loop_over_channels(part, bits), rounds=5
    )
    theirs *= width / SLICE
    name, release = "loop over channels, torch.quantile", version("torch")
    yield row("range search, one LayerNorm output (6304 x 384)", ours, theirs, name, release, "s")

    # All LayerNorm outputs and all weights of the model, which is what is searched channel by channel.
    total_ours, total_theirs = 2 * blocks * ours, 2 * blocks * theirs
    for outputs, inner in ((1152, 384), (384, 384), (1536, 384), (384, 1536)):
        weight = torch.randn(inner, outputs, generator=generator)
        mine, loop = fastest(
            lambda w=weight: fit_affine([w], bits, search),
            lambda w=weight: loop_over_channels(w[:, :96], bits),
        )
        total_ours += blocks * mine
        total_theirs += blocks * loop * outputs / 96
    what = "range search, whole DeiT-S: LayerNorm outputs and weights"
    yield row(what, total_ours, total_theirs, name, release, "s")


# (b) Deployment.


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def export_float(model: nn.Module, image: Tensor, path: Path) -> None:
    with torch.no_grad():
        torch.onnx.export(
            model,
            (image,),
            path,
            dynamo=True,
            external_data=False,
            input_names=["image"],
            output_names=["logits"],
            verbose=False,
        )


def quantize_stock(source: Path, target: Path, images: np.ndarray) -> None:
    """onnxruntime's own recipe: shape inference, then static QDQ with its defaults and per-channel
    weights."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"image": image[None]} for image in images])

        def get_next(self) -> dict[str, np.ndarray]:
            return next(self.left, None)  # pyright: ignore[reportReturnType]

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(target), Images(), quant_format=QuantFormat.QDQ, per_channel=True)


def deployment_rows(rounds: int) -> Iterator[dict[str, Any]]:
    model = timm.create_model("vit_small_patch16_224").eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    fast = {"search": FAST, "weight_search": FAST}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, f"{name}.onnx") for name in ("float", "stock", "w8a8", "w4a4")}
        export_float(model, images[:1], paths["float"])
        quantize_stock(paths["float"], paths["stock"], images.numpy())
        for bits in (8, 4):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # two images are few, but enough for a timing
                quantized = quantize(model, images, replace(named("repqvit", bits, bits), **fast))
            export_onnx(quantized, paths[f"w{bits}a{bits}"], images[:1])
        sizes = {name: path.stat().st_size / 1e6 for name, path in paths.items()}
        sessions = {name: session(path) for name, path in paths.items()}
        feed = {"image": images[:1].numpy()}
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for name in sessions:
            sessions[name].run(None, feed)
        for _ in range(rounds):
            for name, each in sessions.items():
                times[name].append(1e3 * seconds(lambda s=each: s.run(None, feed)))
    release = version("onnxruntime")
    for name, label in (("w8a8", "W8A8"), ("w4a4", "W4A4")):
        for quantile, word in ((0, "least"), (50, "p50"), (90, "p90")):
            ours, theirs, stock = (
                float(np.percentile(times[key], quantile)) for key in (name, "float", "stock")
            )
            what = f"ViT-S/16 224, batch 1, one thread, {label}, {word}"
            yield row(what, ours, theirs, "onnxruntime fp32", release, "ms")
            yield row(what, ours, stock, "onnxruntime quantize_static QDQ", release, "ms")
        what = f"ViT-S/16 file, {label}"
        for peer, key in (("onnxruntime fp32", "float"), ("onnxruntime quantize_static QDQ", "stock")):
            yield row(what, sizes[name], sizes[key], peer, release, "MB")


# (c) Simulation.


@torch.no_grad()
def simulation_rows(rounds: int) -> Iterator[dict[str, Any]]:
    model = timm.create_model("vit_small_patch16_224").eval()
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    recipe = replace(named("repqvit", 4, 4), search=FAST, weight_search=FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images, but enough for a timing
        quantized = quantize(model, images, recipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the deployed models
    fastest(lambda: quantized(images), lambda: model(images), rounds=1)  # warm up
    ours, theirs = fastest(lambda: quantized(images), lambda: model(images), rounds=rounds)
    torch.set_num_threads(threads)
    what = "simulated forward, ViT-S/16, batch 4, W4A4, one thread"
    yield row(what, ours, theirs, "torch fp32 forward", version("torch"), "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/repqvit"))
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of each deployed model")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # onnxruntime's stock recipe warns of every LayerNorm weight
    console = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    for title, part in (
        ("calibration", calibration_rows()),
        ("deployment", deployment_rows(arguments.rounds)),
        ("simulation", simulation_rows(max(3, arguments.rounds // 4))),
    ):
        start = time.perf_counter()
        rows += part
        console.print(f"{title}: {time.perf_counter() - start:.0f} s")
    finish("repqvit", rows, arguments.out, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
