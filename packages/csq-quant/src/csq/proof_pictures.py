"""Pictures of the proof: accuracy against size, and the bits of each layer while they grow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from csq.experiments import CHOICES, TARGETS, Architecture, Axis, Outcome, select
from shared_core import plot, proof

_NAMES = ("csq", "csq-uniform", "lsq", "ste", "bsq", "hawq", "random")
_MARKERS = "oDsv^P*"


def draw(run: proof.ProofRun, outcomes: Sequence[Outcome], architectures: Sequence[Architecture]) -> None:
    """Draw and record all pictures."""
    _accuracy(run, outcomes, architectures)
    _growth(run, outcomes, architectures)


def _accuracy(
    run: proof.ProofRun, outcomes: Sequence[Outcome], architectures: Sequence[Architecture]
) -> None:
    axes_of: tuple[tuple[Axis, str], ...] = (
        ("paper_bits", "paper bits a weight"),
        ("stored_bits", "stored bits a weight"),
        ("file_bytes", "size of the file in bytes"),
    )
    figure, axes = plot.figure(
        len(architectures),
        len(axes_of),
        width=1600,
        height=100 + 480 * len(architectures),
        title="Accuracy of hardened models against size (marks: means; dots: seeds; dashed: 32-bit floats)",
    )
    grid = np.asarray(axes, dtype=object).reshape(len(architectures), len(axes_of))
    for row, architecture in zip(grid, architectures, strict=True):
        full = 100 * float(np.mean([o.accuracy for o in select(outcomes, architecture, "fp32")]))
        floor = _floor(outcomes, architecture, full)
        for axis, (size, label) in zip(row, axes_of, strict=True):
            for i, name in enumerate(_NAMES):
                if name in CHOICES[architecture]:
                    _line(axis, select(outcomes, architecture, name), size, i, floor)
            axis.axhline(full, color="0.4", linestyle="--", linewidth=1)
            axis.set_ylim(bottom=floor)
            axis.set_xlabel(label)
            axis.set_ylabel(f"{architecture}: test accuracy in %")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="outside lower center")
    plot.save(figure, run.picture("accuracy-against-size"))


def _floor(outcomes: Sequence[Outcome], architecture: Architecture, full: float) -> float:
    """Where the picture ends below: a collapsed method would squeeze the others, and is named instead."""
    seen = [
        100 * o.accuracy for name in _NAMES for o in select(outcomes, architecture, name) if o.accuracy > 0
    ]
    return max(min(seen), full - 25) - 1


def _line(axis, found: Sequence[Outcome], size: Axis, i: int, floor: float) -> None:
    colour = plot.COLOURS[i % len(plot.COLOURS)]
    axis.plot(
        [o.size(size) for o in found], [100 * o.accuracy for o in found], ".", color=colour, markersize=3
    )
    points = sorted({o.run.point for o in found})
    means = [
        np.mean([(o.size(size), 100 * o.accuracy) for o in found if o.run.point == point], axis=0)
        for point in points
    ]
    means.sort(key=lambda mean: mean[0])
    axis.plot(*zip(*means, strict=True), color=colour, marker=_MARKERS[i], markersize=6, label=_NAMES[i])
    for x, y in means:
        if y < floor:
            axis.annotate(
                f"{_NAMES[i]}: {y:.0f} %",
                (x, floor),
                xytext=(4, 12),
                textcoords="offset points",
                color=colour,
                fontsize=8,
                arrowprops={"arrowstyle": "->", "color": colour},
            )


def _growth(run: proof.ProofRun, outcomes: Sequence[Outcome], architectures: Sequence[Architecture]) -> None:
    figure, axes = plot.figure(
        2,
        len(architectures),
        width=1400,
        height=1000,
        title=f"The scheme while it grows, target {TARGETS[-1]:g} bits, seed {run.seeds[0]}",
    )
    grid = np.asarray(axes, dtype=object).reshape(2, len(architectures))
    for column, architecture in enumerate(architectures):
        outcome = next(
            o
            for o in select(outcomes, architecture, "csq", run.seeds[0])
            if o.run.point == f"{TARGETS[-1]:g} bits"
        )
        records = [record for record in outcome.history if "bits" in record]
        steps = [record["step"] for record in records]
        layers = list(records[-1]["bits"])
        upper, lower = grid[0][column], grid[1][column]
        upper.plot(steps, [record["precision"] for record in records], color=plot.COLOURS[1])
        upper.axhline(TARGETS[-1], color="0.4", linestyle="--", linewidth=1)
        upper.set_ylabel("average paper bits a weight")
        upper.set_xlabel("step")
        upper.set_title(architecture, fontsize=10)
        picture = np.array([[record["bits"][layer] for record in records] for layer in layers], dtype=float)
        edges = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)]
        mesh = lower.pcolormesh(edges, np.arange(len(layers) + 1), picture, vmin=0, vmax=8, cmap="viridis")
        lower.set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=7)
        lower.invert_yaxis()
        lower.set_xlabel("step")
        lower.set_ylabel("layer")
        lower.grid(False)
        for axis in (upper, lower):
            axis.set_xlim(0, edges[-1])
        figure.colorbar(mesh, ax=[upper, lower], label="paper bits of the layer", shrink=0.5, anchor=(0, 0))
    plot.save(figure, run.picture("scheme-over-training"))
