"""Jobs: what is to run on the device, inference with a rate and an objective, or training with a weight."""

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from shared_core import InputError

PERCENTILES = (50, 90, 95, 99)
"""What records hold, and so what an objective may be about."""


@dataclass(frozen=True)
class InferenceJob:
    """A service: items arrive at a rate, each to be answered in time.

    Attributes:
        name: Of the job, once in a mix.
        workload: As the table has it, `torchvision/resnet50`, or any part that is unique there, `resnet50`.
        rate: Items per second that arrive, > 0.
        slo_ms: Latency that the percentile must not exceed, from arrival to completion, > 0.
        percentile: Of latency: 50, 90, 95 or 99.
        batches: Batches that the server may use; None: all that were measured.
        mode: Of the workload: `infer` or `generate`.
    """

    name: str
    workload: str
    rate: float
    slo_ms: float
    percentile: int = 99
    batches: tuple[int, ...] | None = None
    mode: str = "infer"

    def __post_init__(self) -> None:
        _positive(self, "rate", "slo_ms")
        if self.percentile not in PERCENTILES:
            raise InputError(f"expected one of {PERCENTILES}", field="percentile", value=self.percentile)
        if self.batches is not None and (not self.batches or any(b < 1 for b in self.batches)):
            raise InputError("expected batches of at least 1", field="batches", value=self.batches)
        if self.mode not in ("infer", "generate"):
            raise InputError("expected infer or generate", field="mode", value=self.mode)


@dataclass(frozen=True)
class TrainingJob:
    """A training that runs as fast as its instance lets it.

    Attributes:
        name: Of the job, once in a mix.
        workload: As for `InferenceJob`.
        batch: Items of a step; a different batch would be a different training.
        weight: Of its normalised throughput in the objective, > 0.
        min_memory_mib: Memory that its instance must have, whatever was measured.
        mode: Of the workload.
    """

    name: str
    workload: str
    batch: int
    weight: float = 1.0
    min_memory_mib: float | None = None
    mode: str = "train"

    def __post_init__(self) -> None:
        _positive(self, "batch", "weight")
        if self.min_memory_mib is not None:
            _positive(self, "min_memory_mib")
        if self.mode != "train":
            raise InputError("expected train", field="mode", value=self.mode)


Job = InferenceJob | TrainingJob


def _positive(job: Any, *names: str) -> None:
    for name in names:
        value = getattr(job, name)
        if not (math.isfinite(value) and value > 0):
            raise InputError("expected a finite number above 0", field=name, value=value)


def read_jobs(path: str | os.PathLike[str]) -> tuple[Job, ...]:
    """Read a mix of jobs: a YAML or JSON list (or a mapping with the one key `jobs`) of mappings.

    An entry with a `rate` is an `InferenceJob`, one with a `batch` a `TrainingJob`; the keys are their
    attributes.

    Raises:
        InputError: The file cannot be read or parsed, a key is unknown or missing, or a value is out of
            range; the message names file and field, `jobs[2].rate`.
    """
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML too
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", file=path) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise InputError(f"is neither YAML nor JSON{where}", file=path) from error
    if isinstance(loaded, Mapping) and set(loaded) == {"jobs"}:
        loaded = loaded["jobs"]
    if not isinstance(loaded, list) or not loaded:
        raise InputError("expected a list with at least one job", file=path)
    jobs = tuple(_job(path, f"jobs[{index}]", entry) for index, entry in enumerate(loaded))
    check_names(jobs, path)
    return jobs


def check_names(jobs: tuple[Job, ...], file: str | os.PathLike[str] | None = None) -> None:
    """Refuse an empty mix and two jobs of one name."""
    if not jobs:
        raise InputError("expected at least one job", file=file, field="jobs")
    names = [job.name for job in jobs]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InputError("two jobs have this name", file=file, field=f"jobs[{index}].name", value=name)


def _job(file: str | os.PathLike[str], place: str, entry: Any) -> Job:
    if not isinstance(entry, Mapping):
        raise InputError("expected keys and values", file=file, field=place, value=entry)
    if ("rate" in entry or "slo_ms" in entry) == ("batch" in entry):
        raise InputError(
            "expected either rate and slo_ms (inference) or batch (training)", file=file, field=place
        )
    kind = TrainingJob if "batch" in entry else InferenceJob
    known = {item.name: item for item in fields(kind)}
    for key in entry:
        if key not in known:
            raise InputError(f"unknown key, known: {', '.join(known)}", file=file, field=f"{place}.{key}")
    required = [name for name in ("name", "workload", "rate", "slo_ms", "batch") if name in known]
    for name in required:
        if name not in entry:
            raise InputError("is missing", file=file, field=f"{place}.{name}")
    values = {key: _value(file, f"{place}.{key}", str(key), value) for key, value in entry.items()}
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(
            error.message, file=file, field=f"{place}.{error.field}", value=error.value
        ) from error


def _value(file: str | os.PathLike[str], place: str, key: str, value: Any) -> Any:
    """Return the value as the job wants it, or say which kind was expected."""

    def whole(one: Any) -> bool:
        return isinstance(one, int) and not isinstance(one, bool)

    wrong = functools.partial(InputError, file=file, field=place, value=value)
    if value is None and key in ("batches", "min_memory_mib"):
        return None
    if key in ("name", "workload", "mode"):
        if isinstance(value, str) and value:
            return value
        raise wrong("expected a text")
    if key == "batches":
        items = value if isinstance(value, list) else [value]
        if all(whole(item) for item in items):
            return tuple(items)
        raise wrong("expected a list of whole numbers")
    if key in ("batch", "percentile"):
        if whole(value):
            return value
        raise wrong("expected a whole number")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise wrong("expected a number")
