"""Partitions that are put back: what was there is written down before the first change.

A journal file lies beside the lock of its device as long as the device is not as it was found. A process that
is killed leaves it; the next start finds it and can go back.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from migperf import plans
from migperf.backends import Backend, Instances
from migperf.errors import DeviceError, GeometryError
from migperf.geometry import Geometry, Slot

SCHEMA = 1


@dataclass(frozen=True)
class Journal:
    """What a device was before a process changed it.

    Attributes:
        device: Its identity, `GPU-...`.
        spec: What opened it.
        process: Id of the process that changed it.
        started: UTC, ISO 8601.
        enabled: Whether the device could be cut (MIG mode).
        before: Its instances: name and id of the profile, compute slices, start, compute instances.
        wanted: The geometry that the process went to.
        schema: Version of this format.
    """

    device: str
    spec: str
    process: int
    started: str
    enabled: bool
    before: tuple[dict[str, Any], ...]
    wanted: str
    schema: int = SCHEMA

    def geometry(self, backend: Backend) -> Geometry:
        """Return the instances that were there, as a geometry of the device.

        Raises:
            GeometryError: The device has other profiles now.
        """
        slots: list[Slot] = []
        for row in self.before:
            profile = backend.layout.profile(row["profile"])
            if profile.id != row["id"]:
                raise GeometryError(f"{backend.spec}: {profile.name} has another id than in the journal")
            compute = None if row["compute"] is None else tuple(row["compute"])
            slots.append(Slot(profile, row["start"], compute))
        return Geometry(backend.layout, tuple(slots))

    def __str__(self) -> str:
        before = ",".join(f"{row['profile']}@{row['start']}" for row in self.before) or "no instances"
        return (
            f"process {self.process} changed {self.spec} from {before} to {self.wanted} on {self.started} "
            "and did not change it back"
        )


def folder() -> Path:
    """Return where journals lie: $MIGPERF_STATE, or migperf in the user's folder for state."""
    if "MIGPERF_STATE" in os.environ:
        return Path(os.environ["MIGPERF_STATE"])
    return Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local" / "state"), "migperf")


def journal_file(backend: Backend) -> Path:
    """Return the file of a device's journal."""
    return folder() / f"{re.sub(r'[^A-Za-z0-9.-]', '_', backend.identity)}.json"


def pending(backend: Backend) -> Journal | None:
    """Return what a process that no longer lives changed and did not change back; None if nothing.

    Raises:
        DeviceError: The journal cannot be read.
    """
    if not backend.durable:
        return None
    try:
        with locked(backend):
            return _read(journal_file(backend))
    except Busy:
        return None


def restore(backend: Backend) -> plans.Plan | None:
    """Put a device back as it was before the process that left a journal, and remove the journal.

    Returns:
        The steps taken; None when there was nothing to restore.

    Raises:
        DeviceError: A process still works in an instance that has to go, or somebody is changing the device.
    """
    with locked(backend):
        journal = _read(journal_file(backend))
        return None if journal is None else _go_back(backend, journal)


@contextmanager
def partitioned(backend: Backend, geometry: Geometry, *, keep: bool = False) -> Iterator[Instances]:
    """Cut a device as wanted for the length of a block, and put it back after it, also when the block fails.

    Instances that are there already stay as they are. On a GPU whose MIG mode is off the mode is turned on
    and off again, if the backend was opened with consent to that.

    Args:
        backend: The device.
        geometry: What is wanted.
        keep: Leave the geometry when the block ends well. When it fails the device is put back all the same.

    Yields:
        The instances, in the geometry's order; `run` takes them as they are.

    Raises:
        GeometryError: The geometry cannot exist; nothing was changed.
        DeviceError: An instance that has to go is in use, another process is changing the device, or left it
            changed; nothing was changed. Or the driver refused; the device was put back.
    """
    with locked(backend):
        file = journal_file(backend)
        if backend.durable and (left := _read(file)):
            raise DeviceError(
                f"{left}: restore it first (migperf clear --restore, or migperf.restore(device))"
            )
        geometry.require()
        journal = _snapshot(backend, geometry)
        if journal.enabled:
            _refuse_if_used(plans.plan(backend, geometry), backend)
        if backend.durable:
            from shared_core import files

            files.write_json(file, asdict(journal))
        try:
            if not journal.enabled:
                backend.enable(True)
            yield Instances(plans.apply(backend, plans.plan(backend, geometry)), backend)
        except BaseException:
            _go_back(backend, journal)
            raise
        if keep:
            file.unlink(missing_ok=True)
        else:
            _go_back(backend, journal)


def _snapshot(backend: Backend, wanted: Geometry) -> Journal:
    before = tuple(
        {
            "profile": instance.profile.name,
            "id": instance.profile.id,
            "start": instance.start,
            "compute": instance.compute,
        }
        for instance in backend.instances()
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    enabled = backend.enabled()
    return Journal(backend.identity, backend.spec, os.getpid(), now, enabled, before, str(wanted))


def _refuse_if_used(steps: plans.Plan, backend: Backend) -> None:
    for step in steps.steps:
        users = backend.processes(step.instance) if step.instance else ()
        if users:
            pids = ", ".join(map(str, users))
            raise DeviceError(f"{step.slot} has to go, but is in use by process {pids}: end it first")


def _go_back(backend: Backend, journal: Journal) -> plans.Plan:
    if journal.enabled and not backend.enabled():  # a reset or reboot turned the mode off meanwhile
        backend.enable(True)
    way = plans.plan(backend, journal.geometry(backend))
    plans.apply(backend, way)
    if not journal.enabled and backend.enabled():
        backend.enable(False)
    journal_file(backend).unlink(missing_ok=True)
    return way


def _read(file: Path) -> Journal | None:
    try:
        text = file.read_text()
    except FileNotFoundError:
        return None
    try:
        row = json.loads(text)
        if row.get("schema") != SCHEMA:
            raise ValueError(f"schema {row.get('schema')}")
        return Journal(**{**row, "before": tuple(row["before"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DeviceError(
            f"{file} is not a journal of this version ({error}): look at the device, then remove it"
        ) from error


class Busy(DeviceError):
    """Another process is changing the device."""


@contextmanager
def locked(backend: Backend) -> Iterator[None]:
    """Hold the right to change a device; the system takes it back when the process ends, however it ends.

    Raises:
        Busy: Another process has it.
    """
    if not backend.durable:
        yield
        return
    file = journal_file(backend).with_suffix(".lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise DeviceError(
            f"journals cannot be kept in {file.parent} ({error.strerror}): set MIGPERF_STATE"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode() or "unknown"
            raise Busy(f"process {holder} is changing {backend.spec}: wait for it") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)
