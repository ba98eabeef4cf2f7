"""The YAML of `migperf bench`: a superset of the official example, read with the line of whatever is wrong.

gpus:
  - id: 0                      # nvml:0; or device: sim:a100-40gb, cpu, cuda:0
    mig: true
    devices:
      - {gi_profile: 3g.20gb, job: train}
      - {gi_profile: 1g.5gb, count: 3, job: serve}
job_configs:
  train: {workload: torchvision/resnet50, mode: train, batch: 32}
  serve: {workload: timm/vit_small_patch16_224, batch: 1, load: {kind: poisson, rate: 50, seed: 666}}
duration: 30
repeats: 3
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from shared_core import InputError


@dataclass(frozen=True)
class JobConfig:
    """What one kind of worker does.

    Attributes:
        name: In the file.
        workload: `torchvision/NAME`, `timm/NAME`, `transformers/NAME`, `module:callable`, ...
        mode: `infer`, `train` or `generate`.
        batch: Items of a step.
        load: Of the load generator: kind, concurrency or rate, seed.
        options: The workload's own: image size, sequence length, dtype, ...
    """

    name: str
    workload: str
    mode: str = "infer"
    batch: int = 1
    load: Mapping[str, Any] = field(default_factory=lambda: {"kind": "closed"})
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceConfig:
    """One device: how it is cut, and which job runs in which part.

    Attributes:
        spec: What opens it.
        mode: `partition`, `timeslice` or `mps`.
        parts: Profile, with an optional `@start`, and the job's name, one a worker.
    """

    spec: str
    mode: str
    parts: tuple[tuple[str, str], ...]

    @property
    def geometry(self) -> str:
        """The parts as `Geometry.parse` reads them."""
        return ",".join(profile for profile, _ in self.parts)


@dataclass(frozen=True)
class BenchConfig:
    """What `migperf bench` runs."""

    devices: tuple[DeviceConfig, ...]
    jobs: Mapping[str, JobConfig]
    duration: float = 10.0
    repeats: int = 3


def read(path: str | os.PathLike[str]) -> BenchConfig:
    """Read a configuration.

    Raises:
        InputError: The file is missing or no YAML, a key is unknown or missing, a value is of the wrong kind,
            or a device names a job that is not there; the message has the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError("is no UTF-8 text", file=path) from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _no_key_twice(path, node)
        loader = yaml.SafeLoader("")
        root = _Reader(path, node, None if node is None else loader.construct_document(node), "the file")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{where}{getattr(error, 'problem', None) or 'is no YAML'}", file=path) from error
    return _config(root)


def _no_key_twice(file: str | os.PathLike[str], node: Any) -> None:
    """Refuse what YAML's own reader would let pass: the last of two equal keys would win in silence."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise _Reader(file, key, None, key.value).wrong("stands there twice")
            seen.add(key.value)
            _no_key_twice(file, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _no_key_twice(file, value)


class _Reader:
    """A value of the file with its place in it."""

    def __init__(self, file: str | os.PathLike[str], node: Any, value: Any, name: str) -> None:
        self.file, self.node, self.value, self.name = file, node, value, name

    def wrong(self, message: str) -> InputError:
        line = 1 if self.node is None else self.node.start_mark.line + 1
        return InputError(f"line {line}: {message}", file=self.file, field=self.name)

    def mapping(self, known: Sequence[str] | None = None) -> dict[str, "_Reader"]:
        """Return the entries of a mapping by key; with `known`, other keys are refused."""
        if not isinstance(self.value, Mapping):
            raise self.wrong(f"expected keys and values, got {self.value!r}")
        nodes = {key.value: (key, value) for key, value in self.node.value}  # own keys come after merged ones
        entries = {}
        for key, value in self.value.items():
            name = str(key)
            key_node, value_node = nodes.get(name, (self.node, self.node))
            if known is not None and key not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
                raise _Reader(self.file, key_node, key, name).wrong(f"unknown key{hint}")
            entries[name] = _Reader(self.file, value_node, value, name)
        return entries

    def items(self) -> list["_Reader"]:
        if not isinstance(self.value, Sequence) or isinstance(self.value, str) or not self.value:
            raise self.wrong(f"expected a list with at least one entry, got {self.value!r}")
        return [
            _Reader(self.file, node, value, f"{self.name}[{i}]")
            for i, (node, value) in enumerate(zip(self.node.value, self.value, strict=True))
        ]

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.wrong(f"expected a text, got {self.value!r}")
        return self.value

    def whole(self, least: int) -> int:
        if type(self.value) is not int or self.value < least:
            raise self.wrong(f"expected a whole number of at least {least}, got {self.value!r}")
        return self.value

    def seconds(self) -> float:
        if type(self.value) not in (int, float) or not 0 < self.value < float("inf"):
            raise self.wrong(f"expected seconds above 0, got {self.value!r}")
        return float(self.value)

    def truth(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.wrong(f"expected true or false, got {self.value!r}")
        return self.value

    def one_of(self, *known: str) -> str:
        if self.value not in known:
            raise self.wrong(f"expected one of {', '.join(known)}, got {self.value!r}")
        return self.value


def _config(root: _Reader) -> BenchConfig:
    entries = root.mapping(("gpus", "job_configs", "duration", "repeats"))
    for key in ("gpus", "job_configs"):
        if key not in entries:
            raise root.wrong(f"{key} is missing")
    jobs = {name: _job(name, entry) for name, entry in entries["job_configs"].mapping().items()}
    return BenchConfig(
        tuple(_device(entry, jobs) for entry in entries["gpus"].items()),
        jobs,
        entries["duration"].seconds() if "duration" in entries else BenchConfig.duration,
        entries["repeats"].whole(1) if "repeats" in entries else BenchConfig.repeats,
    )


def _job(name: str, reader: _Reader) -> JobConfig:
    entries = reader.mapping(("workload", "mode", "batch", "load", "options"))
    if "workload" not in entries:
        raise reader.wrong("workload is missing")
    return JobConfig(
        name,
        entries["workload"].text(),
        entries["mode"].one_of("infer", "train", "generate") if "mode" in entries else "infer",
        entries["batch"].whole(1) if "batch" in entries else 1,
        _plain(entries["load"]) if "load" in entries else {"kind": "closed"},
        _plain(entries["options"]) if "options" in entries else {},
    )


def _plain(reader: _Reader) -> dict[str, Any]:
    return {key: entry.value for key, entry in reader.mapping().items()}


def _device(reader: _Reader, jobs: Mapping[str, JobConfig]) -> DeviceConfig:
    entries = reader.mapping(("id", "device", "mig", "mps", "devices"))
    if ("id" in entries) == ("device" in entries):
        raise reader.wrong("expected either id, the number of a GPU, or device, such as cpu or sim:a100-40gb")
    spec = entries["device"].text() if "device" in entries else f"nvml:{entries['id'].whole(0)}"
    mig = entries["mig"].truth() if "mig" in entries else spec.partition(":")[0] != "cuda"
    mps = entries["mps"].truth() if "mps" in entries else False
    if mig and mps:
        raise entries["mps"].wrong("MIG and MPS together are not measured here: set one of them to false")
    if not mig and spec.startswith("nvml:"):
        spec = f"cuda:{spec.removeprefix('nvml:')}"
    if "devices" not in entries:
        raise reader.wrong("devices is missing: the parts and their jobs")
    parts: list[tuple[str, str]] = []
    for part in entries["devices"].items():
        fields = part.mapping(("gi_profile", "start", "count", "job"))
        for key in ("job", "gi_profile") if mig else ("job",):
            if key not in fields:
                raise part.wrong(f"{key} is missing")
        job = fields["job"].text()
        if job not in jobs:
            raise fields["job"].wrong(f"{job} is not in job_configs, which has {', '.join(jobs) or 'none'}")
        profile = fields["gi_profile"].text() if "gi_profile" in fields else "whole"
        count = fields["count"].whole(1) if "count" in fields else 1
        if "start" in fields:
            if count > 1:
                raise fields["start"].wrong("a start is for one instance: write one entry for each")
            profile = f"{profile}@{fields['start'].whole(0)}"
        parts += [(profile, job)] * count
    return DeviceConfig(spec, "partition" if mig else "mps" if mps else "timeslice", tuple(parts))
