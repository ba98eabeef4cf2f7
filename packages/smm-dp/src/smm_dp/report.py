"""The privacy report of a run: what is guaranteed, to whom, under which assumptions. JSON and HTML."""

import html
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared_core.files import write_json, write_text
from smm_dp.calibration import wrap_probability
from smm_dp.mechanism import SkellamMixture
from smm_dp.numeric import LABEL
from smm_dp.privacy import Accountant, RoundPrivacy

NOT_PRIVATE = "computed from private data: for the operator's eyes, not covered by epsilon"


def privacy_report(
    mechanism: SkellamMixture,
    round_privacy: RoundPrivacy,
    rounds: int,
    delta: float,
    *,
    sampler: str,
    secure_source: bool,
    aggregation: str,
    clip_rate: float | None = None,
    wrap_rate: float | None = None,
    notes: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return the report as plain data.

    Args:
        mechanism: What the participants ran.
        round_privacy: What one round costs.
        rounds: Releases made.
        delta: At which epsilon is stated.
        sampler: The noise's source, in words.
        secure_source: Whether it was cryptographic; a simulation protects nobody.
        aggregation: How residues were summed, in words.
        clip_rate: Share of participants clipped, where known.
        wrap_rate: Share of coordinates wrapped, where known.
        notes: Further sentences.
    """
    accountant = Accountant()
    accountant.add(round_privacy, rounds)
    spent = accountant.guarantee(delta)
    d = mechanism.padded_dim
    signal = (mechanism.participants * mechanism.clip / d) ** 0.5
    return {
        "format": "smm-dp privacy report 1",
        "epsilon": spent.epsilon,
        "delta": delta,
        "order": spent.order,
        "best_order_is_the_last_tried": spent.at_edge,
        "rounds": rounds,
        "protects": bool(secure_source),
        "accounting": "paper (published bound, conditions checked)"
        if round_privacy.accounting == "paper"
        else LABEL,
        "assumptions": round_privacy.assumptions(),
        "round": asdict(round_privacy),
        "mechanism": asdict(mechanism) | {"padded_dim": d, "mu_each": float(mechanism.mu_each)},
        "sampler": {"source": sampler, "total_variation": 0.0},
        "aggregation": aggregation,
        "noise_sd_of_the_sum": (2 * mechanism.mu_total) ** 0.5 / mechanism.scale,
        "expected_wrap_rate": wrap_probability(
            mechanism.mu_total, mechanism.modulus_bits, participants=mechanism.participants, signal_sd=signal
        ),
        "observed": {"about": NOT_PRIVATE, "clip_rate": clip_rate, "wrap_rate": wrap_rate},
        "notes": list(notes),
    }


def write_report(report: dict[str, Any], folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write privacy.json and privacy.html to a folder; return both paths."""
    paths = Path(folder, REPORT_FILES[0]), Path(folder, REPORT_FILES[1])
    write_json(paths[0], report)
    write_text(paths[1], report_html(report))
    return paths


REPORT_FILES = ("privacy.json", "privacy.html")

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;"
    "color-scheme:light dark}table{border-collapse:collapse;width:100%}td,th{padding:.3rem .6rem;"
    "border-bottom:1px solid #8885;text-align:left;vertical-align:top;overflow-wrap:anywhere}"
    "h1{font-size:1.5rem}.warn{border-left:4px solid #d55e00;padding-left:1rem}"
)


def report_html(report: dict[str, Any]) -> str:
    """Return the report as one self-contained page."""
    headline = f"ε = {report['epsilon']:.4f} at δ = {report['delta']:g} after {report['rounds']} release(s)"
    warning = (
        ""
        if report["protects"]
        else (
            "<p class=warn>This was a simulation: noise came from a seeded source, so nobody was "
            "protected by it.</p>"
        )
    )
    assumptions = "".join(f"<li>{html.escape(text)}</li>" for text in report["assumptions"])
    notes = "".join(f"<p>{html.escape(text)}</p>" for text in report["notes"])
    rows = "".join(
        f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in _flat(report)
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Privacy report</title><style>{_STYLE}</style><h1>{html.escape(headline)}</h1>{warning}"
        f"<h2>What has to be true</h2><ul>{assumptions}</ul>{notes}<h2>All "
        f"values</h2><table>{rows}</table></html>\n"
    )


def _flat(report: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for name, value in report.items():
        if isinstance(value, dict):
            out += _flat(value, f"{prefix}{name}: ")
        elif name not in ("assumptions", "notes"):
            out.append((prefix + name, value))
    return out
