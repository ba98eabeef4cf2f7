"""One self-contained HTML page: pictures inside, no script and nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from isocse import pictures
from isocse.report import MEASURES, GeometryReport

if TYPE_CHECKING:
    from isocse.shift import GroupTest, ShiftReport

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2rem auto; padding: 0 1rem; color:
#222 } h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; padding-bottom:
# .2rem } table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; display: block; overflow-x: auto
# } th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { background: #f4f4f4 }
img { max-width: 100%; height: auto } .note { color: #555 } .good { color: #007a55 } .bad { color: #b04a00 }
"""


def measure_page(report: GeometryReport) -> str:
    """The page of one model."""
    reports = {report.model: report}
    parts = [
        f"<h1>Geometry of {_text(report.model)}</h1>",
        _facts(report),
        *_figures([pictures.layer_curves(reports), pictures.class_curves(reports)]),
        "<h2>By layer</h2>",
        _layer_table(report),
        _definitions(report),
        "<h2>By class of token, last layer</h2>",
        _class_table(report),
        "<h2>Self-similarity by frequency, last layer</h2>",
        _frequency_table(report),
        "<h2>Rogue dimensions</h2>",
        _dimension_tables(report),
        *_map_section(reports),
    ]
    return _page(f"isocse: {report.model}", parts)


def compare_page(shift: ShiftReport) -> str:
    """The page of a model before and after."""
    from isocse.shift import shift_rows

    reports = _named(shift)
    rows = [
        [_text(name), *(_number(value) for value in (before, after)), _number(change, sign=True)]
        for name, before, after, change in shift_rows(shift)
    ]
    parts = [
        f"<h1>{_text(shift.before.model)} → {_text(shift.after.model)}</h1>",
        _facts(shift.after),
        "<h2>Last layer</h2>",
        _table(["", "before", "after", "change"], rows),
        *_figures([pictures.layer_curves(reports), pictures.class_curves(reports)]),
        "<h2>Spurious contextualization</h2>",
        "<p>A type that keeps its identity across contexts has a high adjusted self-similarity; where that "
        "falls, contexts take over. Semantic types are expected to rise against functional ones.</p>",
        _group_table({"not adjusted": shift.raw, "adjusted": shift.adjusted}),
        *_figures([pictures.moved_types(shift)]),
        *_map_section(reports),
    ]
    if shift.same_sense is not None:
        before, after = shift.same_sense
        parts.append(
            f"<p>Words with the same meaning in both contexts: cosine less anisotropy {_number(before)} "
            f"before, {_number(after)} after.</p>"
        )
    return _page(f"isocse: {shift.before.model} and {shift.after.model}", parts)


def dynamics_page(
    axes: Mapping[str, Mapping[str, Sequence[Sequence[Mapping[str, float]]]]], title: str, facts: str
) -> str:
    """The page of training runs.

    Args:
        axes: What varies (temperature, ...) to setting to runs to records.
        title: Of the page.
        facts: A sentence on how they were trained.
    """
    parts = [f"<h1>{_text(title)}</h1>", f"<p>{_text(facts)}</p>"]
    for axis, runs in axes.items():
        parts.append(f"<h2>By {_text(axis)}</h2>")
        parts.append(_final_table(runs))
        parts += _figures([pictures.dynamics_curves(runs, f"Along training, by {axis}")])
    return _page(f"isocse: {title}", parts)


def _named(shift: ShiftReport) -> dict[str, GeometryReport]:
    before, after = shift.before.model, shift.after.model
    same = pictures._short(before) == pictures._short(after)
    return {
        f"{before} (before)" if same else before: shift.before,
        f"{after} (after)" if same else after: shift.after,
    }


def _facts(report: GeometryReport) -> str:
    c, s = report.corpus, report.settings
    types = c.get("types", len(report.types.tokens))
    text = (
        f"{c['sentences']:,} sentences, {c['tokens']:,} {s['unit']}s, {types:,} types with {s['min_count']} "
        f"occurrences or more; pooling {s['pooling']}; classes by {s['classes']}; "
        f"special tokens {'count' if s['include_special'] else 'do not count'}; adjusted by the "
        f"{s['baseline']} anisotropy; seed {s['seed']}."
    )
    notes = "".join(f"<p class=note>{_text(note)}.</p>" for note in report.notes)
    return f"<p>{_text(text)}</p>{notes}"


def _layer_table(report: GeometryReport) -> str:
    rows = []
    for name, values in report.measures.items():
        errors = report.errors.get(name)
        cells = [
            _number(value) + ("" if errors is None else f" <span class=note>±{errors[n]:.3f}</span>")
            for n, value in enumerate(values)
        ]
        sampled = " *" if MEASURES[name].sampled else ""
        rows.append([_text(MEASURES[name].label + sampled), *cells])
    note = "<p class=note>± one standard error over sentences or types; * of a sample of sentences.</p>"
    return _table(["layer", *map(str, report.layers)], rows) + note


def _definitions(report: GeometryReport) -> str:
    rows = "".join(
        f"<li><b>{_text(MEASURES[name].label)}</b>: {_text(MEASURES[name].definition)}</li>"
        for name in report.measures
    )
    return f"<details><summary>What the numbers are</summary><ul>{rows}</ul></details>"


def _class_table(report: GeometryReport) -> str:
    columns = ("types", "tokens", "self_similarity", "adjusted_self_similarity", "anisotropy", "norm")
    rows = [
        [
            kind,
            *(
                f"{row[name][-1]:,.0f}"
                if name in ("types", "tokens")
                else _number(row[name][-1])
                if name in row
                else ""
                for name in columns
            ),
        ]
        for kind, row in report.by_class.items()
    ]
    return _table(["class", *(name.replace("_", " ") for name in columns)], rows)


def _frequency_table(report: GeometryReport) -> str:
    kinds = ("semantic", "functional", "subword")
    rows = [
        [low, *(_number(row[kind][-1]) if kind in row else "" for kind in kinds)]
        for low, row in report.by_frequency.items()
    ]
    return _table(["occurrences", *kinds], rows)


def _dimension_tables(report: GeometryReport) -> str:
    rows = []
    for layer, top in zip(report.layers, report.top_dimensions, strict=True):
        cells = [
            f"{k}: {absolute:.4f}" + (f" ({100 * share:.0f} %)" if share is not None else "")
            for k, absolute, share in top
        ]
        rows.append([str(layer), *cells])
    first = _table(["layer", *(f"dimension {n + 1}" for n in range(5))], rows)
    note = "<p class=note>Dimension: what it adds to the anisotropy (share, where that is not noise).</p>"
    rows = [
        [f"{name}: {measure}", *map(_number, values)]
        for name, row in report.removal.items()
        for measure, values in row.items()
    ]
    second = _table(["drawn tokens", *(f"layer {n}" for n in report.layers)], rows) if rows else ""
    return first + note + second


def _group_table(tests: Mapping[str, GroupTest]) -> str:
    rows = []
    for name, test in tests.items():
        rows.append(
            [
                name,
                _with_interval(test.semantic, test.semantic_interval),
                _with_interval(test.functional, test.functional_interval),
                _with_interval(test.difference, test.difference_interval),
                probability(test.p),
                f"{_number(test.matched_difference, sign=True)} (p {probability(test.matched_p)})",
                f"{_number(test.slope, sign=True)} (p {probability(test.slope_p)})",
            ]
        )
    heads = ["change", "semantic", "functional", "difference", "p", "at equal frequency", "by log frequency"]
    return _table(heads, rows)


def _final_table(runs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> str:
    names = [
        *pictures.DYNAMICS, "sentence_cosine", "isoscore_sentences", "mean_distance", "similarity_spearman",
    ]  # fmt: skip
    names = [
        name for name in names if any(name in row for seeds in runs.values() for run in seeds for row in run)
    ]
    rows = []
    for setting, seeds in runs.items():
        for which, pick in (("before", 0), ("after", -1)):
            cells = []
            for name in names:
                found = [run[pick][name] for run in seeds if run and run[pick].get(name) is not None]
                spread = f" ±{np.std(found, ddof=1):.3f}" if len(found) > 1 and which == "after" else ""
                cells.append(_number(float(np.mean(found))) + spread if found else "")
            rows.append([f"{setting}, {which}", *cells])
    return _table(["", *(pictures.label(name) for name in names)], [[_text(r[0]), *r[1:]] for r in rows])


def _map_section(reports: Mapping[str, GeometryReport]) -> list[str]:
    made = pictures.token_maps(reports)
    return [] if made is None else ["<h2>Maps of tokens, last layer</h2>", *_figures([made])]


def _figures(made: Iterable[Any]) -> list[str]:
    found = []
    for picture in made:
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png", dpi=picture.dpi)
        data = base64.b64encode(buffer.getvalue()).decode()
        found.append(f'<p><img alt="picture" src="data:image/png;base64,{data}"></p>')
    return found


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: float, *, sign: bool = False) -> str:
    return format(value, "+.3f" if sign else ".3f") if np.isfinite(value) else "–"


def probability(p: float) -> str:
    """A p value as text.

    >>> probability(3e-9), probability(0.0213)
    ('< 0.0001', '0.0213')
    """
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:+.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}]"


def _text(value: str) -> str:
    return html.escape(str(value))


def _page(title: str, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )
