"""The report: one self-contained page with tables and plots of what a folder of records holds."""

import base64
import html
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migperf import summaries
from migperf.records import Record, read
from migperf.summaries import Comparison, Row
from shared_core import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1240px; padding: 0 1em;
  color: #1b1f24 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td { white-space: nowrap } td.l { white-space: normal; min-width: 5em } td.l small { white-space: normal }
th, td { padding: .3em .6em; border-bottom: 1px solid #d8dee4; text-align: right; vertical-align: top }
th { background: #f4f6f8 } td.l, th.l { text-align: left } small { color: #57606a }
.mark { background: #fff3cd; border: 1px solid #e0c766; padding: .6em 1em }
.bad { color: #9a3412 } img { max-width: 100%; height: auto } ul { padding-left: 1.2em }
"""


def report(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str] = "report.html",
    *,
    mixed: bool = False,
) -> Path:
    """Write one page of all records of a folder; pictures are inside it, nothing is loaded from elsewhere.

    Args:
        folder: With `records.jsonl` or `records.simulated.jsonl`, and raw latencies.
        target: The page. Of simulated records it is named `....simulated.html`, whatever was asked.
        mixed: Whether real and simulated records may stand on one page.

    Returns:
        The page that was written.

    Raises:
        InputError: There are no records, or real and simulated ones are mixed and that was not asked for.
    """
    records = read(folder, mixed=mixed)
    page = Path(target)
    if any(record.simulated for record in records):
        page = marked(page)
    files.write_text(page, render(records, folder if Path(folder).is_dir() else Path(folder).parent))
    return page


def marked(path: Path) -> Path:
    """Return a file's name that says that its numbers are simulated.

    >>> str(marked(Path("runs/report.html"))), str(marked(Path("report.simulated.html")))
    ('runs/report.simulated.html', 'report.simulated.html')
    """
    return path if ".simulated" in path.suffixes else path.with_suffix(f".simulated{path.suffix}")


def render(records: Sequence[Record], folder: str | os.PathLike[str] | None = None) -> str:
    """Return the page's HTML."""
    found = sorted(summaries.rows(records, folder), key=_order)
    simulated = any(record.simulated for record in records)
    devices = ", ".join(dict.fromkeys(record.device.removesuffix(" (simulated)") for record in records))
    title = f"migperf: {devices}" + (" (SIMULATED)" if simulated else "")
    parts = [f"<h1>{_text(title)}</h1>", _banner(records, simulated), _cells(found)]
    compared = summaries.comparisons(found)
    if compared:
        parts.append(_sharing(compared))
    parts += [_pictures(found, simulated), _notes(found), _host(records)]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f"{head}{view}<style>{STYLE}</style>{''.join(parts)}</html>\n"


def _order(row: Row) -> tuple[str, str, int, str, int, str, str]:
    """Sort by what is done, then by how many share the device: sweeps measure in a random order."""
    sharers = row.workers + row.neighbours
    return row.device, row.workload, row.batch, row.load, sharers, row.geometry, row.mode


def _text(value: object) -> str:
    return html.escape(str(value))


def _banner(records: Sequence[Record], simulated: bool) -> str:
    dirty = sum(bool(record.contaminated) for record in records)
    lines = []
    if simulated:
        count = sum(record.simulated for record in records)
        lines.append(
            f"<b>Simulated:</b> {count} of {len(records)} records come from a stated model and not from "
            "a clock. They show how the program works, not how fast a device is."
        )
    if dirty:
        lines.append(
            f"<b>Contaminated:</b> {dirty} of {len(records)} records were taken while something else "
            "used the device. They are left out where a clean repeat of their cell is there, and marked "
            "where none is."
        )
    return "".join(f'<p class="mark">{line}</p>' for line in lines)


Column = tuple[str, Callable[[Row], str], bool]

COLUMNS: tuple[Column, ...] = (
    ("sharing", lambda row: _where(row), True),
    ("workload", lambda row: _what(row.workload), True),
    ("batch", lambda row: str(row.batch), False),
    ("load", lambda row: _text(row.load), True),
    ("items/s<br><small>median (range)</small>", lambda row: _rate(row), False),
    ("p50 ms", lambda row: _percentile(row, "p50"), False),
    ("p95 ms", lambda row: _percentile(row, "p95"), False),
    ("p99 ms<br><small>95 % interval</small>", lambda row: _percentile(row, "p99"), False),
    ("latency", lambda row: "from arrival" if row.open_loop else "service time", True),
    ("requests", lambda row: str(row.samples), False),
    ("Jain", lambda row: _number(row.fairness), False),
    ("MiB", lambda row: _number(row.memory_mib, ".0f"), False),
    ("J/item<br><small>whole board</small>", lambda row: _energy(row), False),
    ("device activity", lambda row: _number(row.activity), False),
    ("clean", lambda row: _clean(row), False),
)


def _cells(found: Sequence[Row]) -> str:
    shown = [c for c in COLUMNS if any(c[1](row) not in ("", "–") for row in found)]
    return f"<h2>Cells</h2>{_table(shown, found)}"


def _table(columns: Sequence[tuple[str, Callable[[Any], str], bool]], found: Iterable[Any]) -> str:
    def line(tag: str, texts: Iterable[tuple[str, bool]]) -> str:
        cells = "".join(f"<{tag}{' class=l' if left else ''}>{text}</{tag}>" for text, left in texts)
        return f"<tr>{cells}</tr>"

    body = [line("td", ((show(row), left) for _, show, left in columns)) for row in found]
    head = line("th", ((name, left) for name, _, left in columns))
    return f'<div class="scroll"><table>{head}{"".join(body)}</table></div>'


def _where(row: Row) -> str:
    others = f"{row.neighbours} other{'s' if row.neighbours > 1 else ''}"
    beside = f" <small>beside {others}</small>" if row.neighbours else ""
    return _breakable(row.label) + beside + (" <small>simulated</small>" if row.simulated else "")


def _breakable(label: str) -> str:
    return _text(label).replace(",", ",<wbr>")


def _what(workload: str) -> str:
    """Return a workload with its options in small print."""
    name, mode, *options = workload.split()
    return f"{_text(name)} {_text(mode)}<br><small>{_text(', '.join(options))}</small>"


def _rate(row: Row) -> str:
    if row.items_per_second is None:
        return ", ".join(f"{_text(status)}" for status in row.statuses)
    low, high = row.span or (row.items_per_second, row.items_per_second)
    mark = "" if set(row.statuses) <= {"ok"} else f" <small>{_text(', '.join(row.statuses))}</small>"
    return f"{row.items_per_second:.4g}{mark}<br><small>{low:.4g} to {high:.4g}</small>"


def _percentile(row: Row, name: str) -> str:
    value = row.latency_ms.get(name)
    if value is None:
        return "–"
    interval = row.interval_ms.get(name) if name == "p99" else None
    return f"{value:.4g}" + (f"<br><small>{interval[0]:.4g} to {interval[1]:.4g}</small>" if interval else "")


def _number(value: float | None, form: str = ".3g") -> str:
    return "–" if value is None else format(value, form)


def _energy(row: Row) -> str:
    if row.joules_per_item is None:
        return "–"
    idle = "" if row.idle_watts is None else f" <small>(idle {row.idle_watts:.0f} W)</small>"
    return f"{row.joules_per_item:.3g}{idle}"


def _clean(row: Row) -> str:
    text = f"{row.clean}/{row.repeats}"
    return text if row.clean else f'<span class="bad">{text} contaminated</span>'


def _sharing(compared: Sequence[Comparison]) -> str:
    columns: Sequence[tuple[str, Callable[[Comparison], str], bool]] = (
        ("sharing", lambda one: _breakable(one.row.label), True),
        ("workload", lambda one: _what(one.row.workload), True),
        ("batch", lambda one: str(one.row.batch), False),
        ("load", lambda one: _text(one.row.load), True),
        ("throughput ÷ whole", lambda one: _number(one.gain, ".2f"), False),
        ("p99 ÷ whole", lambda one: _number(one.p99_ratio, ".2f"), False),
        ("whole", lambda one: _breakable(one.whole.label), True),
    )
    return f"<h2>Sharing beside one worker on all of it</h2>{_table(columns, compared)}"


def _pictures(found: Sequence[Row], simulated: bool) -> str:
    mark = " (SIMULATED)" if simulated else ""
    made = []
    for title, draw, wanted in (
        ("Throughput by geometry", throughput, lambda row: row.items_per_second is not None),
        ("p99 by geometry", tails, lambda row: "p99" in row.latency_ms),
    ):
        some = [row for row in found if wanted(row)]
        if some:
            made.append(f"<h2>{title}{mark}</h2>{_image(draw(some, f'{title}{mark}'), title + mark)}")
    return "".join(made)


def _image(picture: "Figure", title: str) -> str:
    data = io.BytesIO()
    picture.savefig(data, format="png", dpi=picture.dpi)
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{_text(title)}" src="data:image/png;base64,{text}">'


def throughput(found: Sequence[Row], title: str) -> "Figure":
    """Draw items per second of each way of sharing, workload by workload, with the range over repeats."""

    def of(row: Row) -> tuple[float, float, float]:
        value = row.items_per_second or 0.0
        low, high = row.span or (value, value)
        return value, value - low, high - value

    return _bars(found, title, "items/s", of)


def tails(found: Sequence[Row], title: str) -> "Figure":
    """Draw p99 of each way of sharing, with its 95 % interval where the samples bound it."""

    def of(row: Row) -> tuple[float, float, float]:
        value = row.latency_ms["p99"]
        low, high = row.interval_ms.get("p99", (value, value))
        return value, value - low, high - value

    return _bars(found, title, "p99 ms", of)


GROUPS = 12
"""Panels that one picture has at most; the table has all cells."""


def _bars(
    found: Sequence[Row], title: str, unit: str, of: Callable[[Row], tuple[float, float, float]]
) -> "Figure":
    from shared_core.plot import COLOURS, figure

    groups: dict[str, list[Row]] = {}
    for row in found:
        groups.setdefault(f"{_short(row.workload)}\nbatch {row.batch}, {row.load}", []).append(row)
    shown = list(groups.items())[:GROUPS]
    labels = list(dict.fromkeys(row.label for _, some in shown for row in some))
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    most = max(len(some) for _, some in shown)
    more = f" (first {GROUPS} of {len(groups)} workloads)" if len(groups) > GROUPS else ""
    picture, axes = figure(lines, columns, height=90 + lines * (120 + 34 * most), title=f"{title}{more}")
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    for axis, (name, some) in zip(axes, shown, strict=False):
        colours = [COLOURS[labels.index(row.label) % len(COLOURS)] for row in some]
        _panel(axis, name, unit, [(row, of(row)) for row in some], colours)
    return picture


def _panel(
    axis: "Axes",
    name: str,
    unit: str,
    values: Sequence[tuple[Row, tuple[float, float, float]]],
    colours: Sequence[str],
) -> None:
    places = range(len(values))
    middles = [value for _, (value, _, _) in values]
    errors = [[max(0.0, low) for _, (_, low, _) in values], [max(0.0, high) for _, (_, _, high) in values]]
    axis.barh(places, middles, xerr=errors, color=colours, alpha=0.75, error_kw={"lw": 1.2})
    labels = [_counted(row) + ("" if row.clean else "\n(contaminated)") for row, _ in values]
    axis.set_yticks(places, labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_title(name, fontsize=9)
    axis.set_xlabel(unit, fontsize=9)
    reach = max((value + high for value, (_, high) in zip(middles, zip(*errors, strict=True), strict=True)))
    axis.set_xlim(0, reach * 1.18)
    for place, (value, _, high) in zip(places, (one for _, one in values), strict=True):
        axis.text(
            value + high + reach * 0.01,
            place,
            f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
            va="center",
            fontsize=8,
        )


def _short(workload: str) -> str:
    return " + ".join(" ".join(key.split()[:2]) for key in workload.split(" + "))


def _counted(row: Row) -> str:
    """Return how the device is shared without starts: `7 x 1g.5gb`; the table has the whole geometry."""
    if row.mode not in ("partition", "whole"):
        return row.label
    names = Counter(part.partition("@")[0] for part in row.geometry.split(","))
    return " + ".join(f"{count} x {name}" if count > 1 else name for name, count in names.items())


def _notes(found: Sequence[Row]) -> str:
    items = [
        f"<li>{_text(row.label)}, {_text(_short(row.workload))}, batch {row.batch}, {_text(row.load)}: "
        f"{_text('; '.join(row.notes))}</li>"
        for row in found
        if row.notes
    ]
    return f"<h2>Notes</h2><ul>{''.join(items)}</ul>" if items else ""


def _host(records: Sequence[Record]) -> str:
    facts: dict[str, dict[str, None]] = {}
    for record in records:
        for name, value in record.host.items():
            if value not in ("", None, []):
                text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                facts.setdefault(name.replace("_", " "), {})[text] = None
    seeds = dict.fromkeys(str(record.workload.get("seed")) for record in records)
    lines = [f"<li>{_text(name)}: {_text('; '.join(values))}</li>" for name, values in facts.items()]
    lines.append(f"<li>seeds of weights and inputs: {_text(', '.join(seeds))}</li>")
    about = (
        "Closed loop: latency is service time, there is no queue. Open loop: from the scheduled arrival to "
        "completion. Percentiles are of all clean requests pooled, with 95 % intervals of order statistics. "
        "Weights are random: speed does not depend on them. Energy is the whole board's."
    )
    return f"<h2>How it was measured</h2><p>{about}</p><ul>{''.join(lines)}</ul>"
