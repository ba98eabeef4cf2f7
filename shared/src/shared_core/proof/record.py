"""What proof.json holds, and how it is read back: the dataclass `ProofRecord` is the schema."""

import json
import math
import os
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from shared_core.errors import InputError

FILE_NAME = "proof.json"


@dataclass(frozen=True)
class Metric:
    """A column of numbers: how it is called, which way is better, its unit and number format.

    `measured`: a time or a rate of this machine; all other numbers are the same whenever the seeds are.
    """

    name: str
    label: str
    higher_is_better: bool
    unit: str
    fmt: str
    measured: bool

    def show(self, value: float, *, sign: bool = False) -> str:
        """The value in the metric's format, with the sign of a difference where asked for."""
        return format(value, ("+" if sign else "") + self.fmt)


@dataclass(frozen=True)
class Claim:
    """A claim, the rule by which numbers decide it, the decision, and the numbers that made it."""

    text: str
    rule: str
    holds: bool
    reason: str


@dataclass(frozen=True)
class Spread:
    """Mean, least and greatest of values over seeds."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class ProofRecord:
    """The content of proof.json, field by field.

    methods: method -> metric -> one value a seed, in the order of `seeds`; `package` names the method itself.
    claim, rule, holds: all `claims` together. peak_memory_bytes: of the process or of its largest child.
    pictures: file names beside proof.json. command: runs the same at full scale. meaning: what the verdicts
    come to for somebody who would use the method, in plain words.
    """

    package: str
    version: str
    claim: str
    source: str
    data: str | dict[str, Any]
    rule: str
    holds: bool
    seeds: list[int]
    methods: dict[str, dict[str, list[float]]]
    wall_seconds: float
    peak_memory_bytes: int
    versions: dict[str, str]
    quick: bool
    claims: list[Claim]
    metrics: list[Metric]
    pictures: list[str]
    notes: list[str]
    details: dict[str, Any]
    command: str
    meaning: str

    def difference(self, baseline: str, metric: str) -> Spread:
        """The method minus a baseline, paired by seed."""
        return paired_difference(self.methods[self.package][metric], self.methods[baseline][metric])


def spread(values: Sequence[float]) -> Spread:
    """Mean, least and greatest of at least one value.

    >>> spread([1.0, 2.0, 6.0])
    Spread(mean=3.0, low=1.0, high=6.0)
    """
    return Spread(math.fsum(values) / len(values), min(values), max(values))


def paired_difference(method: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Method minus baseline seed by seed, so that what a seed does to both cancels.

    >>> paired_difference([3.0, 5.0], [2.0, 2.0])
    Spread(mean=2.0, low=1.0, high=3.0)
    """
    return spread([ours - theirs for ours, theirs in zip(method, baseline, strict=True)])


def load(path: str | os.PathLike[str]) -> ProofRecord:
    """Read and check a proof.json, or the one in the folder `path`. Fields not in the schema are passed over.

    Raises:
        InputError: The file is missing or no JSON; a field is missing, of another type or contradicts
            another.
    """
    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=file) from error
    except ValueError as error:
        raise InputError(f"is not JSON: {error}", file=file) from error
    try:
        record = _read(content, ProofRecord, "")
    except InputError as error:
        raise InputError(error.message, file=file, field=error.field) from error
    problem = next(_contradictions(record), None)
    if problem:
        raise InputError(problem[1], file=file, field=problem[0])
    return record


def _read(value: Any, kind: Any, place: str) -> Any:
    """The value as the annotated type of a dataclass field says; an InputError names the place otherwise."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind) and isinstance(kind, type):
        return _read_fields(value, kind, place)
    if origin is types.UnionType:
        plain = {typing.get_origin(option) or option: option for option in arguments}
        return _read(value, plain.get(type(value), arguments[0]), place)
    if origin is list and isinstance(value, list):
        return [_read(item, arguments[0], f"{place}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _read(item, arguments[1], f"{place}.{key}") for key, item in value.items()}
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is not float and type(value) is kind:
        return value
    name = {"str": "text", "bool": "true or false", "int": "an integer", "float": "a finite number"}
    expected = name.get(getattr(kind, "__name__", ""), "an object" if origin is dict else "a list")
    raise InputError(f"expected {expected}, got {json.dumps(value)[:60]}", field=place or None)


def _read_fields(value: Any, kind: type, place: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"expected an object, got {json.dumps(value)[:60]}", field=place or None)
    hints = typing.get_type_hints(kind)
    prefix = f"{place}." if place else ""
    missing = [prefix + field.name for field in fields(kind) if field.name not in value]
    if missing:
        raise InputError("is missing", field=", ".join(missing))
    return kind(
        **{
            field.name: _read(value[field.name], hints[field.name], prefix + field.name)
            for field in fields(kind)
        }
    )


def _contradictions(record: ProofRecord) -> Iterator[tuple[str, str]]:
    if not record.claims:
        yield "claims", "expected at least one"
    if record.holds != all(claim.holds for claim in record.claims):
        yield "holds", f"is {record.holds}, but the claims say otherwise"
    if record.package not in record.methods:
        yield "methods", f"lacks {record.package}, the method itself"
    declared = {metric.name for metric in record.metrics}
    for method, metrics in record.methods.items():
        for metric, values in metrics.items():
            place = f"methods.{method}.{metric}"
            if len(values) != len(record.seeds):
                yield place, f"expected a value for each of {len(record.seeds)} seeds, got {len(values)}"
            if metric not in declared:
                yield place, "is not declared in metrics"
