"""Profiles: the sizes of instance that a device can be cut into, and where on its axis they may begin."""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from math import ceil, floor
from typing import Any, Protocol, runtime_checkable

from migperf.errors import DeviceError, GeometryError


@dataclass(frozen=True)
class Profile:
    """A size of instance.

    Attributes:
        name: As the driver or backend calls it: `3g.20gb`, `1c.3g.20gb`, `2c`, `whole`.
        id: What the driver takes to create one (MIG: 19, 14, 9, ...; never the enum of the profile).
        slices: Compute slices (MIG) or cores (CPU) that a worker gets; fewer than those of the GPU instance
            when the compute instance is a part of it (`1c.3g.20gb`).
        size: Length on the memory axis, which is what instances must not share.
        starts: Where on the axis it may begin, ascending.
        maximum: How many instances of it may exist at once.
        memory_mib: Memory of one instance, where it is partitioned.
        sms: Streaming multiprocessors, where there are any.
        enum: Index by which NVML lists it; None where NVML does not know the device.
        copy_engines: Of one instance, where known.
        preference: Order in which the driver tries the starts when it is not told one; the starts, ascending,
            where nobody has recorded it.
    """

    name: str
    id: int
    slices: int
    size: int
    starts: tuple[int, ...]
    maximum: int
    memory_mib: float | None = None
    sms: int | None = None
    enum: int | None = None
    copy_engines: int | None = None
    preference: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.preference:
            object.__setattr__(self, "preference", self.starts)

    @property
    def media(self) -> bool:
        """Whether it takes the device's media engines, which only one instance can (`+me`)."""
        return "+me" in self.name


@dataclass(frozen=True)
class Layout:
    """What a device can be cut into.

    Attributes:
        device: Model of the device, `A100-40GB`.
        axis: Length of the memory axis in slices.
        slices: Compute slices of the whole device.
        profiles: All profiles, those with `+me` and doubled memory included.
        total_mib: Memory of the whole device.
        reset_for_mig: Whether turning MIG on or off resets the device (Ampere).
        refused_before_r510: Pairs of profile ids that drivers before R510 do not put beside each other.
        unverified: Fields of the table that no driver's output has confirmed.
    """

    device: str
    axis: int
    slices: int
    profiles: tuple[Profile, ...]
    total_mib: float | None = None
    reset_for_mig: bool = False
    refused_before_r510: tuple[tuple[int, int], ...] = ()
    unverified: tuple[str, ...] = ()

    def by_id(self, profile_id: int) -> Profile:
        """Return the profile that the driver knows by this id.

        Raises:
            GeometryError: There is none.
        """
        for profile in self.profiles:
            if profile.id == profile_id:
                return profile
        raise GeometryError(f"{self.device} has no profile with id {profile_id}")

    def profile(self, name: str) -> Profile:
        """Return the profile of a name, in either case.

        Beside the full names there are short ones, `3g` and `1g+me`: the smallest memory that goes with the
        compute slices. `1c.3g` is a compute instance of one slice in a GPU instance of three.

        Raises:
            GeometryError: There is none; the message lists what exists and the nearest name.

        >>> layout("a100-40gb").profile("3G").name
        '3g.20gb'
        """
        wanted = name.strip().lower()
        part = re.fullmatch(r"(\d+)c\.(.+)", wanted)
        if part:
            return self._compute_part(self.profile(part[2]), int(part[1]), name)
        short = re.fullmatch(r"(\d+g)((?:[+-][\w.]+)?)", wanted)
        found = [
            profile
            for profile in self.profiles
            if profile.name.lower() == wanted
            or (short and re.fullmatch(rf"{short[1]}\.\d+gb{re.escape(short[2])}", profile.name.lower()))
        ]
        if found:
            return min(found, key=lambda profile: (profile.name.lower() != wanted, profile.size))
        names = [profile.name for profile in self.profiles]
        nearest = max(names, key=lambda known: _likeness(wanted, known.lower()))
        raise GeometryError(
            f"{self.device} has no profile {name.strip()!r}: did you mean {nearest}? "
            f"It has {', '.join(names)}"
        )

    def _compute_part(self, whole: Profile, slices: int, name: str) -> Profile:
        sizes = [size for size in (1, 2, 3, 4, 7) if size <= whole.slices]
        if slices not in sizes:
            choice = ", ".join(f"{size}c" for size in sizes)
            raise GeometryError(f"{name.strip()}: a compute instance in {whole.name} can be {choice}")
        if slices == whole.slices:
            return whole
        one = min((p for p in self.profiles if p.slices == 1), key=lambda p: p.size, default=None)
        sms = one.sms * slices if one and one.sms else None
        return replace(whole, name=f"{slices}c.{whole.name}", slices=slices, sms=sms)


@runtime_checkable
class HasLayout(Protocol):
    """A backend, or whatever else knows what its device can be cut into."""

    layout: Layout


def layout_of(device: Layout | HasLayout | str) -> Layout:
    """Return the layout of a device: itself, a backend's, or the table of a model's name."""
    if isinstance(device, str):
        return layout(device)
    return device if isinstance(device, Layout) else device.layout


def _likeness(wanted: str, known: str) -> tuple[bool, float]:
    same_slices = wanted.partition("g")[0] == known.partition("g")[0]
    return same_slices, difflib.SequenceMatcher(None, wanted, known).ratio()


def _canonical(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _profile(row: dict[str, Any]) -> Profile:
    lists = {name: tuple(row.pop(name)) for name in ("starts", "preference") if name in row}
    return Profile(**lists, **row)


@lru_cache
def _tables() -> dict[str, Layout]:
    tables: dict[str, Layout] = {}
    for file in sorted(
        resources.files("migperf").joinpath("data/placements").iterdir(), key=lambda file: file.name
    ):
        if not file.name.endswith(".json"):
            continue
        table = json.loads(file.read_text())
        aliases = table.pop("aliases")
        profiles = tuple(map(_profile, table.pop("profiles")))
        pairs = tuple((first, second) for first, second in table.pop("refused_before_r510"))
        unverified = tuple(table.pop("unverified"))
        known = Layout(profiles=profiles, refused_before_r510=pairs, unverified=unverified, **table)
        tables |= {_canonical(name): known for name in (known.device, *aliases)}
    return tables


def devices() -> tuple[str, ...]:
    """Return the models whose tables are built in.

    >>> "A30-24GB" in devices()
    True
    """
    return tuple(dict.fromkeys(table.device for table in _tables().values()))


def layout(device: str) -> Layout:
    """Return the built-in table of a model: `a100-40gb`, `H100`, `rtx-pro-6000`; any case and punctuation.

    The tables serve planning and the simulator. On a real device the driver is always asked.

    Raises:
        DeviceError: There is no such table; the message lists the models.
    """
    try:
        return _tables()[_canonical(device)]
    except KeyError:
        raise DeviceError(f"no table for {device!r}: there are {', '.join(devices())}") from None


@lru_cache
def recorded(profile_id: int, starts: tuple[int, ...]) -> tuple[int, ...]:
    """Return the order in which drivers were seen to fill a profile's starts, () where nobody has looked."""
    for table in _tables().values():
        for profile in table.profiles:
            if profile.id == profile_id and profile.starts == starts and profile.preference != starts:
                return profile.preference
    return ()


def refused_before_r510(profiles: Sequence[Profile]) -> tuple[tuple[int, int], ...]:
    """Return the pairs of a device's profiles that drivers before R510 do not put beside each other."""
    have = {(profile.id, profile.starts) for profile in profiles}
    for table in _tables().values():
        if {(profile.id, profile.starts) for profile in table.profiles} & have:
            ids = {one for one, _ in have}
            pairs = tuple(pair for pair in table.refused_before_r510 if set(pair) <= ids)
            if pairs:
                return pairs
    return ()


def memory_in_name(mig_mib: float, total_mib: float) -> int:
    """Return the GB in a profile's name from the memory of the instance and of the device, in MiB.

    Eighths of the device's whole GiB, halves rounded away from zero (Python's `round` would not).

    >>> memory_in_name(20992, 183359)  # an eighth of 180 is 22.5
    23
    """
    return floor(ceil(8 * mig_mib / total_mib) / 8 * ceil(total_mib / 1024) + 0.5)
