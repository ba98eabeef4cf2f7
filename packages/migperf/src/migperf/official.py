"""Import of the official project's result files: one JSON a run, latencies in seconds, DCGM series with them.

What those files mean, per the project's code: `qps` ends when results were collected, not when the last
request did; inference was timed in training mode with a graph being built; open-loop latency begins when a
pool thread sends. The records say so, because their numbers are not comparable with those measured here.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from migperf import energy, latency
from migperf.measuring import Result
from migperf.records import Record
from migperf.samplers.dcgm import FIELDS, field_number
from shared_core import InputError

_MEMORY_SLICES = {7: {1: 1, 2: 2, 3: 4, 4: 4, 7: 8}, 4: {1: 1, 2: 2, 4: 4}}
"""Compute slices of a device -> those of a profile -> its memory slices."""


def import_official(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Result:
    """Read result files of the official project into records with raw latencies.

    Args:
        paths: Files, or folders with `*.json`.

    Returns:
        Records with `extra["source"]` official; `save` writes them as our own.

    Raises:
        InputError: A file is no JSON, or no result of that project; none is there.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = [
        file
        for one in given
        for file in (sorted(Path(one).glob("*.json")) if Path(one).is_dir() else [Path(one)])
    ]
    if not files:
        raise InputError("has no *.json", file=given[0] if given else None)
    result = Result()
    for number, file in enumerate(files):
        record, raw = _record(file, _read(file), number)
        result.records.append(record)
        result.raws[record.raw] = raw
    return result


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=file) from error
    except ValueError as error:
        raise InputError(f"is no JSON: {error}", file=file) from error
    if not isinstance(values, dict) or not ("latency" in values or "step_latency" in values):
        raise InputError(
            "is no result of the official project: latency and step_latency are missing", file=file
        )
    return values


def _record(file: Path, values: dict[str, Any], number: int) -> tuple[Record, Any]:
    trains = "step_latency" in values
    series = values["step_latency" if trains else "latency"]
    if not isinstance(series, list) or not series or not all(_is_time(value) for value in series):
        raise InputError(
            "expected a list of seconds", file=file, field="step_latency" if trains else "latency"
        )
    raw = np.round(np.asarray(series, dtype=float) * 1e9).astype(np.int64)
    found = latency.summarize(raw)
    warnings = [found.warning] if found.warning else []
    if not trains:
        warnings.append("the official client timed a forward in training mode that builds the graph")
    labels = _labels(values)
    if not labels:
        warnings.append(f"{file.name}: labels are missing, so the GPU's UUID and profile are not known")
    profile = str(labels.get("GPU_I_PROFILE") or "")
    device = str(labels.get("modelName") or values.get("gpu_model_name") or "unknown GPU")
    slices, memory = _slices(profile, device)
    joules, means = _metrics(values)
    name = f"raw/official-{number}-{re.sub(r'[^A-Za-z0-9.]+', '-', file.stem)}.npy"
    phases = _phases(values)
    extra: dict[str, Any] = {
        "source": "official",
        "file": file.name,
        "official_qps": values.get("qps"),
        "warnings": warnings,
    }
    if phases:
        extra["phases_ms"] = phases
    siblings = _siblings(values)
    record = Record(
        run_id="official",
        cell=file.stem,
        repeat=0,
        worker=0,
        started=_when(values),
        backend="nvml",
        device=device,
        simulated=False,
        contaminated="",
        mode="partition" if profile else "whole",
        geometry=",".join(siblings) or profile,
        instance=profile,
        profile=profile or ("" if not labels else "whole"),
        slices=slices,
        memory_slices=memory,
        workload=_workload(values, trains),
        load=_load(values),
        status="ok",
        items_per_second=float(values["qps"]) if _is_time(values.get("qps")) else None,
        latency_ms=found.ms,
        latency_interval_ms=found.interval_ms,
        samples=found.samples,
        window_seconds=float(raw.sum() / 1e9 / int(values.get("num_threads") or 1)),
        energy_joules=joules,
        metrics=means,
        host={"uuid": labels.get("UUID", ""), "hostname": labels.get("Hostname", "")},
        raw=name,
        extra=extra,
    )
    return record, raw


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _labels(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the static labels of the GPU, wherever this version of the project put them; {} if nowhere."""
    config, metrics = values.get("config"), values.get("metrics")
    places = [
        config.get("gpu_static_profile") if isinstance(config, dict) else None,
        metrics.get("labels") if isinstance(metrics, dict) else None,
        values.get("labels"),
    ]
    for place in places:
        one = place[0] if isinstance(place, list) and place else place
        if isinstance(one, dict) and one:
            return one
    return {}


def _siblings(values: Mapping[str, Any]) -> list[str]:
    config = values.get("config")
    mig = config.get("mig") if isinstance(config, dict) else None
    found = mig.get("gpu_instance_profiles") if isinstance(mig, dict) else None
    return [str(one) for one in found if one] if isinstance(found, list) else []


def _slices(profile: str, device: str) -> tuple[int, int]:
    """Return compute and memory slices of a profile's name; all of the device's without MIG."""
    all_slices = 4 if "A30" in device else 7
    match = re.match(r"(?:(\d)c\.)?(\d)g\.", profile)
    if not match:
        return all_slices, max(_MEMORY_SLICES[all_slices].values())
    return int(match[1] or match[2]), _MEMORY_SLICES[all_slices].get(int(match[2]), int(match[2]))


def _workload(values: Mapping[str, Any], trains: bool) -> dict[str, Any]:
    model = str(values.get("model_name", "unknown"))
    text = "sequence_length" in values or re.search("bert|gpt|mpnet|minilm", model, re.IGNORECASE)
    spec: dict[str, Any] = {
        "source": "transformers" if text else "torchvision",
        "model": model,
        "mode": "train" if trains else "infer",
        "batch": int(values.get("batch_size", 1)),
        "seed": None,
    }
    if "sequence_length" in values:
        spec["sequence_length"] = values["sequence_length"]
    return spec


def _load(values: Mapping[str, Any]) -> dict[str, Any]:
    if "arrival_rate" in values:
        rate, seconds = values["arrival_rate"], values.get("testing_time")
        return {"kind": "poisson", "rate": rate, "seed": 666, "duration": seconds, "latency_from": "send"}
    return {"kind": "closed", "concurrency": int(values.get("num_threads") or 1)}


def _metrics(values: Mapping[str, Any]) -> tuple[float | None, dict[str, float]]:
    """Return joules of the board between the first and last poll, and means of the other series."""
    metrics = values.get("metrics")
    joules, means = None, {}
    for name, series in metrics.items() if isinstance(metrics, dict) else ():
        number = field_number(name)
        if number is None or not isinstance(series, list):
            continue
        numbers = [float(value) for value in series if _is_time(value)]
        if number == 156 and len(numbers) > 1:
            joules = energy.between(numbers[0], numbers[-1])
        elif len(numbers) >= 3 and number != 156:
            scale = 1e-2 if number == 203 else 1.0
            means[f"dcgm.{FIELDS[number][0]}"] = float(np.mean(numbers)) * scale
    return joules, means


def _phases(values: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    names = {"data_process_time": "data", "forward_time": "forward", "backward_time": "backward"}
    found = {}
    for name, ours in names.items():
        series = values.get(name)
        if isinstance(series, list) and series and all(_is_time(value) for value in series):
            found[ours] = {"mean": float(np.mean(series)) * 1e3, "p50": float(np.median(series)) * 1e3}
    return found


def _when(values: Mapping[str, Any]) -> str:
    """Return when it began; the project's own time has no zone, its epoch seconds do."""
    if _is_time(values.get("start_time")) and values["start_time"] > 0:
        return datetime.fromtimestamp(values["start_time"], UTC).isoformat(timespec="seconds")
    return str(values.get("test_time", ""))
