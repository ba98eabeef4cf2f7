"""Writes runs/report.html from what the proofs left in runs/: ``python -m tools.report`` makes it anew.

The page tells the outcome of every proof, also of one that crashed, and repeats no verdict that the numbers
and the exit code did not give.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from statistics import fmean

from tools import record, workspace
from tools.page import duration, facts, page, size
from tools.record import Metric, Outcome, Proof, RecordError, Status

_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}
_CLASSES: dict[Status, str] = {"holds": "holds", "does not hold": "fails", "crashed": "crashed"}
_CRASHED = "The run did not finish, so it says nothing about the claims:"


def write(runs: Path, outcomes: list[Outcome]) -> Path:
    """Writes the report of these outcomes and returns its path."""
    target = runs / "report.html"
    record.replace_text(target, render(runs, outcomes))
    return target


def log_tail(folder: Path, lines: int = 30) -> str:
    """The last lines of a proof's log, or what is to be said where there is none."""
    try:
        text = (folder / record.LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join(text.rstrip().split("\n")[-lines:]) or "(the log is empty)"


def render(runs: Path, outcomes: list[Outcome]) -> str:
    """The whole page as HTML."""
    read = [_read(runs / outcome.package, outcome) for outcome in outcomes]
    rows, sections = [], []
    for outcome, proof in read:
        rows.append(_verdict_row(outcome, proof))
        sections.append(_section(runs / outcome.package, outcome, proof))
    title = _title(read)
    return page(
        f"Proofs: {title}",
        f"""<div class="over">Proof report</div>
<h1>{escape(title)}</h1>
<p class="lead">Each package ran its paper’s method and the baselines on the same real data, seeds and budget.
Each claim has a rule that was written down before the run, and the numbers decide by it. A proof holds where
all its claims do; where one does not, the run worked, and it is reported as it is.</p>
<div class="card"><table class="stack">
<thead><tr><th>package</th><th>verdict</th><th>what it means</th><th>time</th></tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
{"".join(sections)}
<footer>Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by <code>make prove</code>. Brackets show the lowest
and the highest seed, dots the single seeds.</footer>""",
    )


def _read(folder: Path, outcome: Outcome) -> tuple[Outcome, Proof | None]:
    try:
        return outcome, record.load(folder / record.PROOF)
    except RecordError as error:
        reason = outcome.reason or str(error)
        return Outcome(
            outcome.package, "crashed", outcome.code, outcome.seconds, outcome.finished, reason
        ), None


def _title(read: list[tuple[Outcome, Proof | None]]) -> str:
    claims = [c for outcome, proof in read if proof and outcome.status != "crashed" for c in proof.claims]
    crashed = sum(outcome.status == "crashed" for outcome, _ in read)
    title = (
        f"{sum(claim.holds for claim in claims)} of {len(claims)} claims hold"
        if claims
        else "No claim was tested"
    )
    return title + (f", {crashed} {'proof' if crashed == 1 else 'proofs'} crashed" if crashed else "")


def _pill(status: Status) -> str:
    return f'<span class="pill {_CLASSES[status]}">{status}</span>'


def _status(holds: bool) -> Status:
    return "holds" if holds else "does not hold"


def _verdict_row(outcome: Outcome, proof: Proof | None) -> str:
    if proof is None or outcome.status == "crashed":
        count, words = "", f"{_CRASHED} {outcome.reason}"
    else:
        count = f"{sum(claim.holds for claim in proof.claims)} of {len(proof.claims)} claims"
        words = proof.meaning or "; ".join(claim.reason or claim.text for claim in proof.claims)
    return (
        f'<tr><th><a href="#{escape(outcome.package)}">{escape(outcome.package)}</a></th>'
        f'<td>{_pill(outcome.status)}<div class="soft small">{count}</div></td><td>{escape(words)}</td>'
        f'<td class="soft" style="white-space:nowrap">{duration(outcome.seconds)}</td></tr>'
    )


def _section(folder: Path, outcome: Outcome, proof: Proof | None) -> str:
    quick = '<span class="pill plainpill">quick run: shows less</span>' if proof and proof.quick else ""
    parts = [
        f'<section class="card" id="{escape(outcome.package)}">'
        f'<div class="head"><h2>{escape(outcome.package)}</h2>{_pill(outcome.status)}{quick}</div>'
    ]
    if proof:
        parts.append(f'<div class="soft small">{escape(proof.source)}</div>')
    if outcome.status == "crashed":
        parts.append(f"<p>{escape(outcome.reason)}</p><h3>Last lines of its log</h3>")
        parts.append(f"<pre>{escape(log_tail(folder))}</pre>")
    if proof:
        parts.append(_proof(folder, outcome, proof))
    return "".join(parts) + "</section>"


def _proof(folder: Path, outcome: Outcome, proof: Proof) -> str:
    judged = outcome.status != "crashed"
    claims = "".join(
        f'<div class="claim is-{_CLASSES[_status(claim.holds)] if judged else "none"}">'
        f'<p class="text">{escape(claim.text)} {_pill(_status(claim.holds)) if judged else ""}</p>'
        f'<p class="soft">Rule, fixed before the run: {escape(claim.rule)}</p>'
        + (f"<p>{escape(claim.reason)}</p>" if claim.reason and judged else "")
        + "</div>"
        for claim in proof.claims
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in proof.notes)
    pictures = "".join(_picture(folder, name) for name in proof.pictures)
    return "".join(
        [
            f"<h3>{'Claim' if len(proof.claims) == 1 else 'Claims'}</h3>{claims}",
            f"<h3>Numbers over {len(proof.seeds)} seeds</h3>{_numbers(proof)}",
            f"<h3>Pictures</h3>{pictures}" if pictures else "",
            f"<h3>Notes</h3>{notes}" if notes else "",
            f"<h3>The run</h3>{_facts(outcome, proof)}",
        ]
    )


def _numbers(proof: Proof) -> str:
    ours = proof.methods.get(proof.package)
    names = sorted(proof.methods, key=lambda name: name != proof.package)
    heads = "".join(f'<th class="num">{_metric_head(metric)}</th>' for metric in proof.metrics)
    rows = []
    for name in names:
        cells = "".join(_cell(proof, name, metric) for metric in proof.metrics)
        row = ' class="ours"' if name == proof.package else ""
        rows.append(f"<tr{row}><th>{escape(name)}</th>{cells}</tr>")
    words = (
        f"Under each baseline: {proof.package} minus that baseline, seed by seed, and how often it is better."
        if ours
        else "No method is named like the package, so no differences are shown."
    )
    note = f'<p class="soft small">{escape(words)}</p>'
    head = f"<thead><tr><th>method</th>{heads}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>{note}'


def _metric_head(metric: Metric) -> str:
    unit = f", {escape(metric.unit)}" if metric.unit else ""
    arrow = {True: "higher is better", False: "lower is better", None: ""}[metric.higher_is_better]
    return f'{escape(metric.label)}{unit}<div class="small soft" style="font-weight:400">{arrow}</div>'


def _cell(proof: Proof, name: str, metric: Metric) -> str:
    values = proof.methods[name].get(metric.name)
    if values is None:
        return '<td class="num soft">–</td>'
    spread = f"[{metric.show(min(values))} … {metric.show(max(values))}]" if len(values) > 1 else ""
    every = [v for metrics in proof.methods.values() for v in metrics.get(metric.name, [])]
    own = name == proof.package
    return (
        f'<td class="num"><span class="value">{metric.show(fmean(values))}</span> '
        f'<span class="soft small spread">{spread}</span>{_strip(values, min(every), max(every), own)}'
        + ("" if own else _difference(proof, values, metric))
        + "</td>"
    )


def _difference(proof: Proof, values: list[float], metric: Metric) -> str:
    """How far our method is from this baseline, seed by seed."""
    ours = proof.methods.get(proof.package, {}).get(metric.name)
    if ours is None or len(ours) != len(values):
        return ""
    gaps = [a - b for a, b in zip(ours, values, strict=True)]
    spread = (
        f" [{metric.show(min(gaps), sign=True)} … {metric.show(max(gaps), sign=True)}]"
        if len(gaps) > 1
        else ""
    )
    words, kind = "", "soft"
    if metric.higher_is_better is not None:
        ahead = sum(gap > 0 if metric.higher_is_better else gap < 0 for gap in gaps)
        behind = sum(gap < 0 if metric.higher_is_better else gap > 0 for gap in gaps)
        kind = "ahead" if ahead == len(gaps) else "behind" if behind == len(gaps) else "soft"
        words = f"; better in {ahead} of {len(gaps)}"
    mean = metric.show(fmean(gaps), sign=True)
    return f'<div class="small {kind}">{escape(proof.package)} {mean}{spread}{words}</div>'


def _strip(values: list[float], low: float, high: float, own: bool) -> str:
    """The seeds as dots on the metric's range over all methods, joined from the lowest to the highest."""
    width = (high - low) or 1.0
    places = [4 + 152 * (value - low) / width for value in values]
    colour = "var(--accent)" if own else "var(--dot)"
    dots = "".join(f'<circle cx="{x:.1f}" cy="7" r="3.4" fill="{colour}" fill-opacity=".8"/>' for x in places)
    return (
        '<svg class="strip" viewBox="0 0 160 14" preserveAspectRatio="xMinYMid meet" aria-hidden="true">'
        '<line x1="0" x2="160" y1="7" y2="7" stroke="var(--line)"/>'
        f'<line x1="{min(places):.1f}" x2="{max(places):.1f}" y1="7" y2="7" stroke="{colour}"'
        ' stroke-width="2.5"/>'
        f"{dots}</svg>"
    )


def _picture(folder: Path, name: str) -> str:
    file = (folder / name).resolve()
    kind = _KINDS.get(file.suffix.lower())
    # A name from proof.json may point only into the folder of its own run.
    if kind is None or not file.is_relative_to(folder.resolve()) or not file.is_file():
        return f'<p class="soft">The picture {escape(name)} is missing.</p>'
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    label = escape(file.stem.replace("_", " ").replace("-", " "))
    image = f'<img src="data:{kind};base64,{data}" alt="{label}">'
    return f'<figure>{image}<figcaption class="soft small">{label}</figcaption></figure>'


def _facts(outcome: Outcome, proof: Proof) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in proof.versions.items())
    return facts(
        [
            ("version", escape(proof.version)),
            ("data", escape(proof.data)),
            ("seeds", escape(", ".join(str(seed) for seed in proof.seeds))),
            ("wall time", duration(proof.wall_seconds)),
            ("peak memory", size(proof.peak_memory_bytes)),
            ("finished", escape(outcome.finished)),
            ("versions", escape(versions)),
            ("details", _details(proof)),
            ("full scale", f"<pre>{escape(proof.command)}</pre>" if proof.command else ""),
        ]
    )


def _details(proof: Proof) -> str:
    if not proof.details:
        return ""
    text = json.dumps(proof.details, indent=2, ensure_ascii=False)
    return f"<details><summary>show as JSON</summary><pre>{escape(text)}</pre></details>"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m tools.report``."""
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__)
    parser.add_argument(
        "--runs", type=Path, default=workspace.ROOT / "runs", help="where tools.prove put its results"
    )
    arguments = parser.parse_args(argv)
    outcomes = record.read_summary(arguments.runs)
    if not outcomes:
        print(
            f"error: {arguments.runs}/{record.SUMMARY} names no proof; run make prove first", file=sys.stderr
        )
        return 2
    print(write(arguments.runs, outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
