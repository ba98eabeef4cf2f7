"""The proof's pictures: maps and boxes of every method on the same images, and scores by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from kdcicam.overlays import overlay
from kdcicam.proof_arms import SLICES, Measured
from kdcicam.proof_scenes import SIZE, Scene
from shared_core import plot
from shared_core.proof import ProofRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ZOOM = 4
_SCORES = {"top1_loc": "top-1 loc", "max_box_acc_v2": "MaxBoxAccV2", "top1_cls": "top-1 cls"}


def draw(
    run: ProofRun,
    scenes: Mapping[str, Sequence[Scene]],
    found: Sequence[Measured],
    shown: Sequence[int],
) -> None:
    """Draw and record all pictures.

    Args:
        run: Of the proof.
        scenes: Of the first seed.
        found: All results; the maps of the first seed are shown.
        shown: The images of each slice that the maps are of.
    """
    seed = run.seeds[0]
    _maps(run, scenes, [one for one in found if one.seed == seed], shown)
    _scores(run)


def _maps(
    run: ProofRun,
    scenes: Mapping[str, Sequence[Scene]],
    found: Sequence[Measured],
    shown: Sequence[int],
) -> None:
    rows = [(part, scenes[part][index]) for part in SLICES for index in shown]
    figure, axes = plot.figure(
        len(rows),
        len(found) + 1,
        width=130 * (len(found) + 1),
        height=128 * len(rows) + 110,
        title=f"Maps and boxes (white) on test images, true boxes green; upper {len(shown)}: context of the "
        f"class, lower {len(shown)}: of another",
    )
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    for number, (part, scene) in enumerate(rows):
        line = axes[number * (len(found) + 1) :]
        picture = scene.image.resize((_ZOOM * SIZE, _ZOOM * SIZE), Image.Resampling.NEAREST)
        truth = np.array(scene.box) * _ZOOM
        line[0].imshow(np.asarray(picture))
        line[0].set_ylabel(f"{scene.label}, {part}", fontsize=9)
        for column, one in enumerate(found, start=1):
            drawn = overlay(picture, one.maps[number], [one.boxes[number] * _ZOOM], [truth])
            line[column].imshow(np.asarray(drawn))
    for axis, title in zip(axes, ["image", *(one.method for one in found)], strict=False):
        axis.set_title(title.replace(", ", ",\n").replace(" of ", "\nof "), fontsize=9)
    plot.save(figure, run.picture("maps"))


def _scores(run: ProofRun) -> None:
    figure, axes = plot.figure(
        len(SLICES),
        len(_SCORES),
        height=900,
        title="Test images, one point a seed: with the class's context, and apart",
    )
    for axis, (part, (key, label)) in zip(
        axes, [(part, item) for part in SLICES for item in _SCORES.items()], strict=True
    ):
        _bars(axis, {name: values[f"{key} {part}"] for name, values in run.methods.items()}, run.package)
        axis.set_title(f"{label}, {part}", fontsize=10)
    plot.save(figure, run.picture("scores"))


def _bars(axis: Axes, values: Mapping[str, Sequence[float]], own: str) -> None:
    for place, (name, found) in enumerate(values.items()):
        colour = plot.COLOURS[1] if name == own else plot.COLOURS[0]
        axis.barh(place, float(np.mean(found)), color=colour, alpha=0.4)
        axis.plot(found, [place] * len(found), "o", color=colour, markersize=4)
    axis.set_yticks(range(len(values)), list(values), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
