"""The pictures: curves by layer, maps of tokens, types that moved, and measures along training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from isocse.report import MEASURES, GeometryReport
from shared_core.plot import COLOURS, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from isocse.shift import ShiftReport

CURVES = (
    "anisotropy",
    "adjusted_intra_sentence",
    "adjusted_self_similarity",
    "norm",
    "isoscore_tokens",
    "sentence_cosine",
)
DYNAMICS = (
    "anisotropy",
    "adjusted_intra_sentence",
    "self_similarity_semantic",
    "self_similarity_functional",
    "norm",
    "isoscore_tokens",
)
_CLASS_COLOURS = {
    "semantic": COLOURS[0],
    "functional": COLOURS[1],
    "subword": COLOURS[2],
    "special": COLOURS[3],
    "other": "#999999",
}


STYLES = ("-", "--", ":", "-.")
"""Of the lines of the first model, the second one, ..."""


def label(name: str) -> str:
    """What a measure is called, also one of a class."""
    for kind in ("semantic", "functional"):
        if name.endswith(f"_{kind}"):
            return f"{MEASURES[name.removesuffix(f'_{kind}')].label}, {kind}"
    return MEASURES[name].label if name in MEASURES else name.replace("_", " ")


def layer_curves(reports: Mapping[str, GeometryReport]) -> Figure:
    """Measures by layer of one or more models, with two standard errors where there are any."""
    made, axes = figure(2, 3, height=760, title="Geometry by layer")
    for axis, name in zip(axes, CURVES, strict=True):
        for number, (model, report) in enumerate(reports.items()):
            if name not in report.measures:
                continue
            colour = COLOURS[number % len(COLOURS)]
            values = report.measures[name]
            style = STYLES[number % len(STYLES)]  # a model may equal another one in its lower layers
            axis.plot(
                report.layers, values, style, marker="o", markersize=4, color=colour, label=_short(model)
            )
            error = report.errors.get(name)
            if error is not None:
                axis.fill_between(
                    report.layers, values - 2 * error, values + 2 * error, color=colour, alpha=0.15, lw=0
                )
        axis.set_title(label(name), fontsize=10)
        axis.set_xlabel("layer")
    if len(reports) > 1:
        axes[0].legend(fontsize=8)
    return made


def class_curves(reports: Mapping[str, GeometryReport]) -> Figure:
    """Self-similarity of semantic and of functional types by layer, not adjusted and adjusted."""
    made, axes = figure(1, 2, height=430, title="Semantic against functional types")
    for axis, name in zip(axes, ("self_similarity", "adjusted_self_similarity"), strict=True):
        for number, (model, report) in enumerate(reports.items()):
            for kind in ("semantic", "functional"):
                row = report.by_class[kind]
                if name in row:
                    axis.plot(
                        report.layers,
                        row[name],
                        STYLES[number % len(STYLES)],
                        marker="o",
                        markersize=4,
                        color=_CLASS_COLOURS[kind],
                        label=f"{kind}, {_short(model)}",
                    )
        axis.set_title(label(name), fontsize=10)
        axis.set_xlabel("layer")
    axes[0].legend(fontsize=8)
    return made


def token_maps(reports: Mapping[str, GeometryReport]) -> Figure | None:
    """Drawn tokens by class, and all tokens of a few sentences, on principal components of the last layer."""
    shown = {model: report for model, report in reports.items() if report.map is not None}
    if not shown:
        return None
    made, axes = figure(len(shown), 2, height=520 * len(shown))
    for row, (model, report) in enumerate(shown.items()):
        drawn: Any = report.map
        left, right = axes[2 * row], axes[2 * row + 1]
        classes = np.array(drawn.classes)
        for kind, colour in _CLASS_COLOURS.items():
            inside = classes == kind
            if inside.any():
                x, y = drawn.points[inside].T
                left.scatter(x, y, s=9, color=colour, alpha=0.6, label=kind, lw=0)
        left.legend(fontsize=8)
        share = [f"{100 * value:.0f} %" for value in drawn.explained]
        left.set_title(f"{_short(model)}: one token of each of {len(classes)} sentences", fontsize=10)
        left.set_xlabel(f"first principal component ({share[0]})")
        left.set_ylabel(f"second ({share[1]})")
        right.set_title(f"{_short(model)}: tokens of some sentences, a colour each; x: mean", fontsize=10)
        numbers = np.array(drawn.sentences)
        for number in np.unique(numbers):
            inside = numbers == number
            x, y = drawn.sentence_points[inside].T
            colour = COLOURS[number % len(COLOURS)]
            right.scatter(x, y, s=12, color=colour)
            for text, a, b in zip(np.array(drawn.sentence_texts)[inside], x, y, strict=True):
                right.annotate(_plain_text(text), (a, b), fontsize=7, color=colour, xytext=(2, 2),
                               textcoords="offset points", annotation_clip=False)  # fmt: skip
            right.scatter(x.mean(), y.mean(), s=110, color=colour, marker="x", lw=2)
        right.margins(x=0.12)
        share = [f" ({100 * value:.0f} %)" for value in drawn.sentence_explained] or ["", ""]
        right.set_xlabel(f"their first principal component{share[0]}")
        right.set_ylabel(f"second{share[1]}")
    return made


def moved_types(shift: ShiftReport, count: int = 15) -> Figure:
    """Types whose adjusted self-similarity rose and fell most, and the change against frequency."""
    made, axes = figure(1, 3, height=560, title="Change of adjusted self-similarity, last layer")
    for axis, rows, title in (
        (axes[0], shift.risers(count), "rose most"),
        (axes[1], shift.fallers(count), "fell most"),
    ):
        axis.barh(
            range(len(rows)),
            [value for _, _, value in rows],
            color=[_CLASS_COLOURS[kind] for _, kind, _ in rows],
        )
        axis.set_yticks(range(len(rows)), [_plain_text(token) for token, _, _ in rows], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
    names = np.array(shift.classes)
    for kind in ("semantic", "functional"):
        inside = names == kind
        axes[2].scatter(shift.counts[inside], shift.adjusted_delta[inside], s=10, alpha=0.6, lw=0,
                        color=_CLASS_COLOURS[kind], label=kind)  # fmt: skip
    axes[2].set_xscale("log")
    axes[2].axhline(0, color="#666666", lw=0.8)
    axes[2].set_xlabel("occurrences")
    axes[2].set_title("by frequency", fontsize=10)
    axes[2].legend(fontsize=8)
    return made


def dynamics_curves(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], title: str = "Along training"
) -> Figure:
    """Measures of the last layer by training step: a colour a setting, a line a seed.

    Args:
        runs: Setting to its runs; a run is its records, each with "step" and measures.
        title: Over all.
    """
    made, axes = figure(2, 3, height=760, title=title)
    for axis, name in zip(axes, DYNAMICS, strict=True):
        for number, (setting, seeds) in enumerate(runs.items()):
            for seed, records in enumerate(seeds):
                points = [(row["step"], row[name]) for row in records if row.get(name) is not None]
                if points:
                    x, y = zip(*points, strict=True)
                    axis.plot(x, y, marker="o", markersize=3, lw=1.2, color=COLOURS[number % len(COLOURS)],
                              label=setting if seed == 0 else None)  # fmt: skip
        axis.set_xscale("symlog", linthresh=1)
        steps = sorted({row["step"] for seeds in runs.values() for records in seeds for row in records})
        axis.set_xticks(steps, [f"{step:g}" for step in steps], fontsize=8, minor=False)
        axis.set_xticks([], minor=True)
        axis.set_title(label(name), fontsize=10)
        axis.set_xlabel("step")
    axes[0].legend(fontsize=8)
    return made


def _short(name: str) -> str:
    part = name.rstrip("/").rpartition("/")[2]
    return part if len(part) <= 28 else part[:27] + "…"


def _plain_text(token: str) -> str:
    """A token as text that matplotlib does not read as mathematics."""
    return token.replace("$", r"\$")
