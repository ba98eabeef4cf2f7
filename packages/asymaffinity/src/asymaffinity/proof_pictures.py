"""Pictures of the proof: masks by method, and trivial masks and IoU over training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asymaffinity.experiments import STRIDE, Outcome, prepared
from shared_core import plot, proof

_LINES = (
    "projection", "symmetric color", "symmetric depthgrad", "symmetric both", "asymmetric color",
    "asymmetric depthgrad", "asymaffinity",
)  # fmt: skip
_STYLES = {"symmetric": "--", "asymmetric": "-", "asymaffinity": "-", "projection": ":"}
_SHOWN = (
    "projection", "symmetric color", "symmetric depthgrad", "asymmetric depthgrad", "asymaffinity",
    "full masks",
)  # fmt: skip
_COLOURS = {"color": 0, "depthgrad": 1, "both": 2, "asymaffinity": 2, "projection": 6}


def draw(run: proof.ProofRun, outcomes: Sequence[Outcome]) -> None:
    """Draw and record all pictures."""
    _curves(run, outcomes)
    _masks(run, outcomes)


def _curves(run: proof.ProofRun, outcomes: Sequence[Outcome]) -> None:
    figure, axes = plot.figure(1, 3, width=1600, height=560, title="Test masks over training (mean of seeds)")
    columns = (("trivial", "share of trivial masks"), ("fill", "mask area / box area"), ("iou", "mask IoU"))
    for axis, (key, label) in zip(axes, columns, strict=True):
        for name in _LINES:
            curves = [o.curve for o in outcomes if o.run.name == name]
            steps = [look["step"] for look in curves[0]]
            mean = np.mean([[look[key] for look in curve] for curve in curves], axis=0)
            kind, part = name.split()[0], name.split()[-1]
            shown = "asymmetric both (asymaffinity)" if name == "asymaffinity" else name
            axis.plot(steps, mean, _STYLES[kind], color=plot.COLOURS[_COLOURS[part]], label=shown)
        if key == "fill":
            axis.axhline(_true_fill(run), color="0.5", linewidth=1)
            axis.annotate("true", (0, _true_fill(run)), color="0.4", fontsize=8)
        axis.set_xlabel("training step")
        axis.set_ylabel(label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, loc="outside lower center")
    plot.save(figure, run.picture("trivial-masks-over-training"))


def _true_fill(run: proof.ProofRun) -> float:
    _, test = prepared(run.seeds[0])
    return float((test.masks.flatten(1).sum(1) / test.boxes.flatten(1).sum(1)).mean())


def _masks(run: proof.ProofRun, outcomes: Sequence[Outcome]) -> None:
    seed = run.seeds[0]
    _, test = prepared(seed)
    members = np.nonzero(test.scenes.owner.numpy() < 6)[0]
    first = test.scenes.owner.numpy()[members]
    figure, axes = plot.figure(
        6, 2 + len(_SHOWN), width=1600, height=1220, title=f"Masks of test scenes, seed {seed}"
    )
    grid = np.asarray(axes, dtype=object).reshape(6, -1)
    titles = ("truth", "disparity", *("asymmetric both" if n == "asymaffinity" else n for n in _SHOWN))
    for row in range(6):
        image = test.scenes.images[row].permute(1, 2, 0).numpy()
        own = np.nonzero(first == row)[0]
        boxes = test.scenes.boxes[members[own]].numpy()
        truth = test.masks[members[own]].numpy()
        pictures = [_painted(image, truth), test.scenes.disparity[row].numpy()]
        for name in _SHOWN:
            found = next(o for o in outcomes if o.run.name == name and o.run.seed == seed)
            pictures.append(_painted(image, found.masks[own]))
        for column, (axis, picture) in enumerate(zip(grid[row], pictures, strict=True)):
            axis.imshow(picture, cmap="gray", interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(titles[column], fontsize=9)
            if column != 1:
                for n, (x0, y0, x1, y1) in enumerate(boxes):
                    colour = plot.COLOURS[n % len(plot.COLOURS)]
                    around = np.array([[x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0]]) - 0.5
                    axis.plot(*around, color=colour, linewidth=0.8)
    plot.save(figure, run.picture("masks-by-method"))


def _painted(image: np.ndarray, masks: np.ndarray) -> np.ndarray:
    made = 0.25 + 0.5 * image
    for n, mask in enumerate(masks):
        wide = np.kron(mask, np.ones((STRIDE, STRIDE))) > 0
        colour = plot.COLOURS[n % len(plot.COLOURS)]
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        made[wide] = 0.35 * made[wide] + 0.65 * rgb
    return made.clip(0, 1)
