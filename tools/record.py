"""What a package's proof left behind: its proof.json, read with care, and the outcome that follows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tools.child import Ended

PROOF = "proof.json"
LOG = "prove.log"
SUMMARY = "summary.json"

Status = Literal["holds", "does not hold", "crashed"]
EXIT_CODES: Mapping[Status, int] = {"holds": 0, "does not hold": 1, "crashed": 70}
"""What ``python -m tools.prove`` returns: its packages' largest code. 2 is kept for wrong arguments."""


class RecordError(ValueError):
    """A proof.json that does not say what the schema asks for; the message is one line."""


@dataclass(frozen=True)
class Claim:
    """One claim, the rule that was fixed before the run, and the verdict that the rule gave."""

    text: str
    rule: str
    holds: bool
    reason: str = ""


@dataclass(frozen=True)
class Metric:
    """How a metric's numbers are to be shown."""

    name: str
    label: str
    higher_is_better: bool | None = None
    unit: str = ""
    fmt: str = ".3f"
    measured: bool = False

    def show(self, value: float, *, sign: bool = False) -> str:
        """The value as the package wants its numbers written; ``sign`` for differences."""
        try:
            return format(value, ("+" if sign else "") + self.fmt)
        except ValueError:
            return f"{value:+.4g}" if sign else f"{value:.4g}"


@dataclass(frozen=True)
class Proof:
    """The fields of proof.json that the report shows."""

    package: str
    version: str
    source: str
    data: str
    holds: bool
    quick: bool
    seeds: list[Any]
    claims: list[Claim]
    metrics: list[Metric]
    methods: dict[str, dict[str, list[float]]]
    wall_seconds: float
    peak_memory_bytes: float
    versions: dict[str, str]
    pictures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class Outcome:
    """How the proof of one package ended; ``reason`` says why where it crashed."""

    package: str
    status: Status
    code: int
    seconds: float
    finished: str
    reason: str = ""


def judge(ended: Ended, folder: Path, package: str, finished: str) -> Outcome:
    """The outcome of a proof run. A verdict counts only where the exit code and proof.json agree on it."""
    status, reason = _verdict(ended, folder)
    return Outcome(package, status, ended.code, round(ended.seconds, 2), finished, reason)


def _verdict(ended: Ended, folder: Path) -> tuple[Status, str]:
    if ended.error:
        return "crashed", ended.error
    if ended.code not in (0, 1):
        how = f"ended by signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
        return "crashed", how + (" (bad input)" if ended.code == 2 else "")
    try:
        proof = load(folder / PROOF)
    except RecordError as error:
        return "crashed", f"exit code {ended.code}, but {error}"
    if proof.holds != (ended.code == 0):
        return "crashed", f"exit code {ended.code} contradicts holds = {str(proof.holds).lower()} in {PROOF}"
    return ("holds" if proof.holds else "does not hold"), ""


def load(file: Path) -> Proof:
    """Reads a proof.json; a RecordError names what is missing or of the wrong kind."""
    try:
        # json reads NaN and Infinity, which are not JSON: a proof that holds by them proves nothing.
        raw = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    except FileNotFoundError:
        raise RecordError(f"{file.name} was not written") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"{file.name} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise RecordError(f"{file.name}: expected an object, found {type(raw).__name__}")
    record = _Fields(raw, file.name)
    methods = _methods(record)
    proof = Proof(
        package=record.text("package"),
        version=record.text("version"),
        source=record.text("source"),
        data=_readable(record.get("data", (str, dict, list))),
        holds=record.get("holds", bool),
        quick=record.get("quick", bool),
        seeds=record.get("seeds", list),
        claims=_claims(record),
        metrics=_metrics(record, methods),
        methods=methods,
        wall_seconds=record.number("wall_seconds"),
        peak_memory_bytes=record.number("peak_memory_bytes"),
        versions={str(name): str(version) for name, version in record.get("versions", dict).items()},
        pictures=[str(name) for name in record.optional("pictures", list, [])],
        notes=[str(note) for note in record.optional("notes", list, [])],
        details=record.optional("details", dict, {}),
        command=record.optional("command", str, ""),
        meaning=record.optional("meaning", str, ""),
    )
    if proof.holds != all(claim.holds for claim in proof.claims):
        raise RecordError(f"{file.name}: holds is {str(proof.holds).lower()}, but its claims say otherwise")
    return proof


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number that can be compared")


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_readable(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(_readable(part) for part in value)
    return str(value)


class _Fields:
    """Typed access to a decoded JSON object; every error names the file and the field."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def get(self, name: str, kind: type | tuple[type, ...]) -> Any:
        if name not in self.raw:
            raise RecordError(f"{self.where}: the field {name} is missing")
        value = self.raw[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise RecordError(f"{self.where}: {name} should be {expected}, found {value!r}")
        return value

    def text(self, name: str) -> str:
        return self.get(name, str)

    def number(self, name: str) -> float:
        return float(self.get(name, (int, float)))

    def optional(self, name: str, kind: type, default: Any) -> Any:
        return default if self.raw.get(name) is None else self.get(name, kind)


def _claims(record: _Fields) -> list[Claim]:
    entries = record.optional("claims", list, [])
    if not entries:
        return [Claim(record.text("claim"), record.text("rule"), record.get("holds", bool))]
    claims = []
    for position, entry in enumerate(entries):
        where = f"{record.where}: claims[{position}]"
        if not isinstance(entry, dict):
            raise RecordError(f"{where} should be an object, found {entry!r}")
        one = _Fields(entry, where)
        text = one.text("claim" if "text" not in entry else "text")
        claims.append(Claim(text, one.text("rule"), one.get("holds", bool), one.optional("reason", str, "")))
    return claims


def _methods(record: _Fields) -> dict[str, dict[str, list[float]]]:
    methods: dict[str, dict[str, list[float]]] = {}
    for method, metrics in record.get("methods", dict).items():
        if not isinstance(metrics, dict):
            raise RecordError(f"{record.where}: methods.{method} should be an object, found {metrics!r}")
        methods[method] = {
            name: _numbers(v, f"{record.where}: methods.{method}.{name}") for name, v in metrics.items()
        }
    return methods


def _numbers(values: Any, where: str) -> list[float]:
    if not isinstance(values, list) or not values:
        raise RecordError(f"{where} should be a list with one number a seed, found {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RecordError(f"{where} should hold numbers, found {value!r}")
    return [float(value) for value in values]


def _metrics(record: _Fields, methods: dict[str, dict[str, list[float]]]) -> list[Metric]:
    """The declared metrics in their order, then those that only the numbers know."""
    declared: list[Metric] = []
    entries = record.optional("metrics", (list, dict), [])  # type: ignore[arg-type]
    if isinstance(entries, dict):
        entries = [
            {"name": name, **(about if isinstance(about, dict) else {})} for name, about in entries.items()
        ]
    for position, entry in enumerate(entries):
        where = f"{record.where}: metrics[{position}]"
        if not isinstance(entry, dict):
            raise RecordError(f"{where} should be an object, found {entry!r}")
        one = _Fields(entry, where)
        name = one.text("name")
        better = one.optional("higher_is_better", bool, None)
        unit, fmt = one.optional("unit", str, ""), one.optional("fmt", str, ".3f")
        measured = one.optional("measured", bool, False)
        declared.append(Metric(name, one.optional("label", str, name), better, unit, fmt, measured))
    known = {metric.name for metric in declared}
    used = dict.fromkeys(name for metrics in methods.values() for name in metrics)
    return [m for m in declared if m.name in used] + [
        Metric(name, name) for name in used if name not in known
    ]


def differences(first: Proof, second: Proof) -> list[str]:
    """What two runs of the same proof do not have in common, but for what is measured on the machine."""
    measured = {metric.name for metric in first.metrics if metric.measured}

    def numbers(proof: Proof) -> dict[str, list[float]]:
        return {
            f"{method}, {metric}": values
            for method, metrics in proof.methods.items()
            for metric, values in metrics.items()
            if metric not in measured
        }

    one, other = numbers(first), numbers(second)
    return [
        f"{name}: {one.get(name)} and {other.get(name)}"
        for name in {**one, **other}
        if one.get(name) != other.get(name)
    ]


def write_summary(outcomes: list[Outcome], exit_code: int, runs: Path) -> None:
    """Writes runs/summary.json: this run's exit code and every package's last outcome, for scripts."""
    text = json.dumps({"exit_code": exit_code, "packages": [asdict(o) for o in outcomes]}, indent=2)
    replace_text(runs / SUMMARY, text + "\n")


def read_summary(runs: Path) -> list[Outcome]:
    """The outcomes of runs/summary.json; none where it is absent or not ours."""
    try:
        entries = json.loads((runs / SUMMARY).read_text(encoding="utf-8"))["packages"]
        return [Outcome(**entry) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def replace_text(target: Path, text: str) -> None:
    """Writes a file whole or not at all: under a temporary name beside it, then renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)
