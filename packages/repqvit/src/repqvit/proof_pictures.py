"""Pictures of the proof: scores by method, one LayerNorm's channels, saliency maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from repqvit import embedded
from repqvit.quantized import QuantizedModel
from repqvit.quantizers import UniformAffine
from shared_core import plot, proof

if TYPE_CHECKING:
    from repqvit.proof import Judge

SHOWN = ("repqvit", "percentile-mse")
"""The methods whose saliency maps are shown; the first is the method that is proved."""
_NORM, _READER = "blocks.10.norm1", "blocks.10.attn.qkv"
"""The LayerNorm whose channels are shown, late in the network, and the layer that reads it."""


def draw(
    run: proof.ProofRun,
    judge: Judge,
    model: nn.Module,
    shown: dict[str, QuantizedModel],
    calibration: Float[Tensor, "n 3 h w"],
) -> None:
    """Draw and record all pictures."""
    _scores(run, judge.fp32_accuracy)
    _channels(run, model, shown["repqvit"], calibration)
    _saliency(run, judge, shown)


def _scores(run: proof.ProofRun, fp32_accuracy: float) -> None:
    settings = [s for s in ("components", "W6A6", "W4A4") if f"{s} accuracy" in run.methods["repqvit"]]
    titles = {"components": "LayerNorm, softmax 4 bit; rest 8", "W6A6": "all 6 bit", "W4A4": "all 4 bit"}
    figure, axes = plot.figure(
        1,
        len(settings),
        height=560,
        title="DINOv2 ViT-S/14: accuracy of a fp32 probe on quantized features\n"
        "(dots: calibration seeds; dashed: fp32)",
    )
    for axis, setting in zip(axes, settings, strict=True):
        names = [name for name in run.methods if f"{setting} accuracy" in run.methods[name]]
        for i, name in enumerate(names):
            values = run.methods[name][f"{setting} accuracy"]
            colour = plot.COLOURS[1] if name == "repqvit" else plot.COLOURS[0]
            axis.barh(i, np.mean(values), color=colour, alpha=0.35)
            axis.plot(values, [i] * len(values), "o", color=colour, markersize=5)
        axis.axvline(fp32_accuracy, color=plot.COLOURS[6], linestyle="--", linewidth=1)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_title(titles.get(setting, setting), fontsize=10)
        axis.set_xlabel("accuracy")
    plot.save(figure, run.picture("scores.png"))


@torch.no_grad()
def _norm_output(model: nn.Module, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "tokens channels"]:
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append(output)

    handle = model.get_submodule(_NORM).register_forward_hook(keep)
    model(images)
    handle.remove()
    return outputs[0].flatten(0, 1)


def _channels(
    run: proof.ProofRun, model: nn.Module, quantized: QuantizedModel, images: Float[Tensor, "n 3 h w"]
) -> None:
    """Channel ranges of one LayerNorm output before and after, on the one 4-bit grid that each would get."""
    figure, axes = plot.figure(
        1,
        2,
        height=500,
        title=f"Channels of one LayerNorm output ({_NORM}); grey: the 16 levels of one scale",
    )
    before, after = (_norm_output(host, images) for host in (model, quantized.model))
    one_scale = UniformAffine(4)
    one_scale.fit_from([before])
    merged: Any = quantized.model.get_submodule(_READER).input_quantizer
    order = (before.quantile(0.999, 0) - before.quantile(0.001, 0)).argsort()
    for axis, columns, grid, title in (
        (axes[0], before, one_scale, "before: one scale for all wastes levels on most channels"),
        (axes[1], after, merged, "reparameterized: one scale fits every channel"),
    ):
        low, high = columns.quantile(0.001, 0)[order], columns.quantile(0.999, 0)[order]
        for level in (torch.arange(16) - grid.zero_point) * grid.scale:
            axis.axhline(float(level), color="#999999", linewidth=0.6)
        axis.fill_between(
            range(len(order)), low, high, step="mid", color=plot.COLOURS[0], alpha=0.6, zorder=3
        )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("channel, ordered by its range before")
        axis.set_ylabel("0.1 % to 99.9 % of its values")
        axis.grid(False)
    plot.save(figure, run.picture("channels.png"))


def _saliency(run: proof.ProofRun, judge: Judge, shown: dict[str, QuantizedModel]) -> None:
    from repqvit.proof import TEST_PICTURES, features

    crops = judge.data.crops
    per_picture = len(crops) // len(TEST_PICTURES)
    chosen = list(range(0, len(crops), per_picture))
    columns = {"fp32": judge.saliency}
    for name in SHOWN:
        columns[f"{name}, 4 bit"] = judge.saliency_of(features(shown[name], crops))
    figure, axes = plot.figure(
        len(columns) + 1,
        len(chosen),
        height=880,
        title="Saliency map from quantized features (components table)",
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (embedded.MEAN, embedded.STD))
    for j, crop in enumerate(chosen):
        axes[j].imshow((crops[crop] * std + mean).permute(1, 2, 0).clamp(0, 1))
        for i, (title, maps) in enumerate(columns.items(), start=1):
            axis = axes[i * len(chosen) + j]
            axis.imshow(maps[crop], vmin=0, vmax=1, cmap="magma")
            if j == 0:
                axis.set_ylabel(title)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(False)
    plot.save(figure, run.picture("saliency.png"))
