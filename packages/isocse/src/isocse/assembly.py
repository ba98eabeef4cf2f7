"""From the sums of all layers to a report: values by layer, class and frequency, and the map of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isocse.corpus import Types
from isocse.geometry import Geometry, Results
from isocse.options import BASELINES, Options
from isocse.report import MEASURES, GeometryReport, TokenMap, TypeTable
from isocse.types import CLASSES

FREQUENCY_BINS = (5, 10, 20, 50, 100, 1000)
"""Least occurrences of each bin of types."""


def assemble(
    name: str,
    counts: dict[str, int],
    table: Types,
    geometry: Geometry,
    options: Options,
    pooling: str,
    notes: list[str],
) -> GeometryReport:
    """The report of a model whose states are all in.

    Args:
        name: Of the model.
        counts: Of the corpus.
        table: The analysed types.
        geometry: What the states went into.
        options: How it was measured.
        pooling: Of sentences' vectors.
        notes: What a reader should know.
    """
    official = options.compat == "official"
    analysed = np.array([official or not kind.special for kind in table.kinds], dtype=bool)
    analysed &= table.counts >= options.min_count
    results = geometry.results(analysed, table.classes, first_only=official)
    zeros = max((result.zeros for result in results), default=0)
    if zeros:
        counts = counts | {"zero_vectors": zeros}
        notes = [*notes, f"{zeros} tokens have a state of zeros, which no cosine has, at some layer"]
    report = GeometryReport(
        model=name,
        settings=_recorded(options, pooling),
        corpus=counts,
        layers=list(geometry.layers or []),
        measures=_by_layer([result.measures for result in results]),
        errors=_by_layer([result.errors for result in results]),
        by_class={kind: _by_layer([result.by_class[kind] for result in results], None) for kind in CLASSES},
        by_frequency={},
        types=TypeTable(
            [kind.token for kind in table.kinds],
            [kind.text for kind in table.kinds],
            [CLASSES[number] for number in table.classes],
            table.counts,
            analysed,
            np.stack([result.types for result in results]),
        ),
        top_dimensions=[result.top for result in results],
        removal=_nested([result.removal for result in results]),
        treated=_nested([result.treated for result in results]),
        notes=[*notes, *_thin(results, counts)],
    )
    _adjust(report, BASELINES["sampled" if official else options.baseline])
    report.by_frequency = _frequency_table(report)
    return report


def _thin(results: list[Results], counts: dict[str, int]) -> list[str]:
    """A note where IsoScore has too few points."""
    width = max((0 if r.sample is None else r.sample.shape[1] for r in results), default=0)
    if counts["sentences"] >= 10 * width:
        return []
    return [
        f"IsoScore is too low by a little: {counts['sentences']} points in {width} dimensions, "
        f"{10 * width} or more are needed"
    ]


def _recorded(options: Options, pooling: str) -> dict[str, Any]:
    names = (
        "min_count", "sample", "seed", "include_special", "unit", "baseline", "compat",
    )  # fmt: skip
    how = options.classes if isinstance(options.classes, str) else "given"
    found = {name: getattr(options, name) for name in names}
    return found | {"pooling": pooling, "classes": how, "treatments": list(options.treatments)}


def _adjust(report: GeometryReport, baseline: str) -> None:
    """Adjusted values, of all that has them: the value less the anisotropy baseline of its layer."""
    m = report.measures
    base = m.get(baseline, m["anisotropy"])
    for name in ("intra_sentence", "self_similarity"):
        if name in m:
            m[f"adjusted_{name}"] = m[name] - base
    for row in report.by_class.values():
        if "self_similarity" in row:
            row["adjusted_self_similarity"] = row["self_similarity"] - base
    semantic = report.by_class["semantic"].get("adjusted_self_similarity")
    if semantic is not None:
        m["spurious_contextualization"] = 1 - semantic
    for row in report.treated.values():
        for name in ("intra_sentence", "self_similarity"):
            if name in row:
                row[f"adjusted_{name}"] = row[name] - row["anisotropy"]
    ordered = {name: m[name] for name in MEASURES if name in m}
    m.clear()
    m.update(ordered)


def _by_layer(rows: Sequence[Mapping[str, float]], order: Any = MEASURES) -> dict[str, np.ndarray]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    if order is not None:
        names.sort(key=list(order).index)
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


def _nested(rows: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, np.ndarray]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: _by_layer([row.get(name, {}) for row in rows], None) for name in names}


def _frequency_table(report: GeometryReport) -> dict[str, dict[str, np.ndarray]]:
    """Mean self-similarity by frequency bin and class."""
    table, found = report.types, {}
    classes = np.array(table.classes)
    for low, high in zip(FREQUENCY_BINS, (*FREQUENCY_BINS[1:], None), strict=True):
        inside = (table.counts >= low) & (table.counts < (high or np.inf)) & table.analysed
        row = {}
        for name in ("semantic", "functional", "subword"):
            chosen = table.self_similarity[:, inside & (classes == name)]
            chosen = chosen[:, np.isfinite(chosen).all(0)]
            if chosen.shape[1]:
                row[name] = chosen.mean(1)
        if row:
            found[f"{low} or more" if high is None else f"{low} to {high - 1}"] = row
    return found


def token_map(
    report: GeometryReport, geometry: Geometry, drawn: tuple[list[str], Tensor, Tensor] | None
) -> TokenMap | None:
    """The last layer's drawn tokens, and all tokens of some sentences, on principal components of each."""
    layer = geometry.measured[-1]
    if drawn is None or layer.sample.rows is None or layer.sample_kinds.rows is None:
        return None
    points, explained = _principal(layer.sample.rows.double().cpu())
    kinds = layer.sample_kinds.rows.cpu()
    texts, states, kept = drawn
    shown, shown_explained = _principal(states.double()[kept])
    return TokenMap(
        points=points,
        texts=[report.types.texts[row] if row >= 0 else "" for row in kinds[:, 0].tolist()],
        classes=[CLASSES[number] for number in kinds[:, 1].tolist()],
        sentence_points=shown,
        sentence_texts=texts,
        sentences=kept.nonzero()[:, 0].tolist(),
        explained=explained,
        sentence_explained=shown_explained,
    )


def _principal(x: Tensor) -> tuple[np.ndarray, list[float]]:
    """Rows on their first two principal components, and the share of the variance of each component."""
    centred = x - x.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    axes = directions[:, -2:].flip(1)
    axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))  # the sign is arbitrary
    return (centred @ axes).numpy(), (variances[-2:].flip(0) / variances.sum()).tolist()
