"""Geometries: sets of instances on one device, whether they can exist together, and all that can."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import Literal

from migperf.errors import GeometryError
from migperf.profiles import HasLayout, Layout, Profile, layout_of

EMPTY = "empty"
"""How a device without instances is written."""

LIMIT = 50_000
"""Placed geometries that `enumerate_geometries` lists at most; MIG has 2319, many CPUs far more."""


@dataclass(frozen=True)
class Slot:
    """A wanted or existing instance.

    Attributes:
        profile: Its size.
        start: Where it begins on the memory axis; None: wherever it fits.
        compute: Slices of its compute instances, where they are not one of `profile.slices`: a GPU instance
            that somebody left without any, or cut further.
    """

    profile: Profile
    start: int | None = None
    compute: tuple[int, ...] | None = None
    order: tuple[int, str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        start = 1 << 30 if self.start is None else self.start
        object.__setattr__(self, "order", (-self.profile.slices, self.profile.name, start))

    def __str__(self) -> str:
        return self.profile.name if self.start is None else f"{self.profile.name}@{self.start}"

    @property
    def cells(self) -> range:
        """The memory slices that it takes; it must be placed."""
        if self.start is None:
            raise GeometryError(f"{self} has no place yet")
        return range(self.start, self.start + self.profile.size)

    @property
    def mask(self) -> int:
        """The memory slices that it takes, as bits; it must be placed."""
        return ((1 << self.profile.size) - 1) << self.cells.start


@dataclass(frozen=True)
class Geometry:
    """Instances on one device, largest first; they need not be placed, and need not be valid.

    Attributes:
        layout: What the device can be cut into.
        slots: The instances.

    >>> from migperf.profiles import layout
    >>> str(Geometry.parse("1g*2,3g@4", layout("a100-40gb")))
    '3g.20gb@4,1g.5gb,1g.5gb'
    """

    layout: Layout = field(hash=False, repr=False)
    slots: tuple[Slot, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", tuple(sorted(self.slots, key=attrgetter("order"))))

    @classmethod
    def parse(cls, text: str, device: Layout | HasLayout | str) -> "Geometry":
        """Read `3g.20gb@4,2g.10gb@0,1g.5gb*2`: names, short names, starts after @, multipliers after *.

        Args:
            text: The instances; `empty` for none.
            device: A layout, a backend, or the name of a model.

        Raises:
            GeometryError: The text cannot be read, or names a profile that the device does not have. Whether
                the instances fit together is not asked here: see `valid`, `explain` and `require`.
        """
        known = layout_of(device)
        if text.strip().lower() == EMPTY:
            return cls(known)
        slots: list[Slot] = []
        for part in text.split(","):
            match = re.fullmatch(r"\s*([^@*×\s]+)\s*(?:@\s*(\d+))?\s*(?:[*×]\s*(\d+))?\s*", part)
            if not match or match[3] == "0":
                raise GeometryError(
                    "expected instances like 3g.20gb@4,1g.5gb*2", field="geometry", value=text
                )
            slots += [Slot(known.profile(match[1]), int(match[2]) if match[2] else None)] * int(match[3] or 1)
        return cls(known, tuple(slots))

    @classmethod
    def ordered(cls, layout: Layout, slots: tuple[Slot, ...]) -> "Geometry":
        """Return the geometry of slots that are in order already: enumeration makes thousands."""
        geometry = object.__new__(cls)
        geometry.__dict__.update(layout=layout, slots=slots)
        return geometry

    def __str__(self) -> str:
        return ",".join(map(str, self.slots)) or EMPTY

    @property
    def placed(self) -> bool:
        """Whether every instance has its start."""
        return all(slot.start is not None for slot in self.slots)

    @property
    def profiles(self) -> Counter[str]:
        """How many instances of each profile there are, by name."""
        return Counter(slot.profile.name for slot in self.slots)

    def unplaced(self) -> "Geometry":
        """Return the same instances without their starts."""
        return Geometry(self.layout, tuple(Slot(slot.profile, None, slot.compute) for slot in self.slots))

    def problems(self) -> tuple[str, ...]:
        """Return what keeps the instances from existing together, a line each; () when nothing does."""
        faults = (*_wrong_starts(self.slots), *_collisions(self.slots))
        return (*_maxima(self.slots), *(faults or _unplaceable(self)))

    @property
    def valid(self) -> bool:
        """Whether the instances can exist together, at their starts where those are given."""
        return not self.problems()

    def explain(self) -> str:
        """Return one line: that the geometry is valid, or which slices collide or which maximum is passed."""
        return "; ".join(self.problems()) or f"{self} is valid on {self.layout.device}"

    def require(self) -> "Geometry":
        """Return the geometry itself if it is valid.

        Raises:
            GeometryError: It is not; the message is `explain()`.
        """
        if self.problems():
            raise GeometryError(f"{self} cannot exist on {self.layout.device}: {self.explain()}")
        return self


def _maxima(slots: Sequence[Slot]) -> Iterator[str]:
    wanted = Counter(slot.profile.id for slot in slots)
    for profile in {slot.profile.id: slot.profile for slot in slots}.values():
        if wanted[profile.id] > profile.maximum:
            at_most = f"at most {profile.maximum} can exist"
            yield f"{wanted[profile.id]} of {profile.name} wanted, {at_most}"
    media = [slot.profile.name for slot in slots if slot.profile.media]
    if len(media) > 1 and len(set(media)) > 1:
        yield f"{' and '.join(media)}: at most 1 instance can have the media engines (+me)"


def _wrong_starts(slots: Sequence[Slot]) -> Iterator[str]:
    for slot in slots:
        if slot.start is not None and slot.start not in slot.profile.starts:
            starts = ", ".join(map(str, slot.profile.starts))
            yield f"{slot.profile.name} cannot start at {slot.start}: it starts at {starts}"


def cells_text(cells: Iterable[int]) -> str:
    """Return memory slices as a person would say them: `slice 3`, `slices 0-3`."""
    run = sorted(cells)
    return f"slice {run[0]}" if len(run) == 1 else f"slices {run[0]}-{run[-1]}"


def _collisions(slots: Sequence[Slot]) -> Iterator[str]:
    placed = [slot for slot in slots if slot.start is not None]
    for index, first in enumerate(placed):
        for second in placed[index + 1 :]:
            common = set(first.cells) & set(second.cells)
            if common:
                takes = f"{first} takes {cells_text(first.cells)}, {second} takes {cells_text(second.cells)}"
                yield f"{first} and {second} collide on memory {cells_text(common)} ({takes})"


def _unplaceable(geometry: Geometry) -> Iterator[str]:
    """Say which instance finds no start, and what takes its slices."""
    from migperf.plans import arrange

    if geometry.placed or arrange(geometry.slots) is not None:
        return
    axis = geometry.layout.axis
    need = sum(slot.profile.size for slot in geometry.slots)
    if need > axis:
        like = Counter((slot.profile.name, slot.profile.size) for slot in geometry.slots)
        sizes = " + ".join(f"{count}×{size} ({name})" for (name, size), count in like.items())
        yield f"memory slices {sizes} = {need}, the device has {axis}"
    ordered = sorted(geometry.slots, key=lambda slot: slot.start is None)
    fits: Sequence[Slot] = ()
    for count in range(1, len(ordered) + 1):
        more = arrange(ordered[:count])
        if more is None:
            break
        fits = more
    left = ordered[len(fits)].profile
    ways = {cell for start in left.starts for cell in Slot(left, start).cells}
    takers = (f"{slot} takes {cells_text(slot.cells)}" for slot in fits if ways & set(slot.cells))
    starts = ", ".join(map(str, left.starts))
    yield f"no start of {left.name} ({starts}) is left: {', '.join(takers)}"


def enumerate_geometries(
    device: Layout | HasLayout | str,
    profiles: Literal["base", "all"] | Sequence[str] = "base",
    *,
    maximal: bool = False,
    multisets: bool = False,
    legacy_driver: bool = False,
) -> tuple[Geometry, ...]:
    """Return every geometry that can exist on the device, the empty one included.

    Args:
        device: A layout, a backend, or the name of a model.
        profiles: `base` (without media extensions, and of each number of compute slices the smallest
            memory), `all`, or names.
        maximal: Only those to which no further instance of these profiles can be added.
        multisets: Without starts, each set of profiles once.
        legacy_driver: Without what drivers before R510 refuse.

    Raises:
        GeometryError: A name is unknown, or there are more than `LIMIT` geometries.

    >>> len(enumerate_geometries("a100-40gb")), len(enumerate_geometries("a100-40gb", maximal=True))
    (298, 19)
    """
    known = layout_of(device)
    found = _enumerate(known, _selection(known, profiles), maximal, legacy_driver)
    return _multisets(found) if multisets else found


def undominated(geometries: Iterable[Geometry]) -> tuple[Geometry, ...]:
    """Return the geometries whose profiles are not contained in those of another, starts left aside."""
    found = {tuple(sorted(g.profiles.items())): g.unplaced() for g in geometries}
    return tuple(
        g for g in found.values() if not any(g.profiles < other.profiles for other in found.values())
    )


def _selection(known: Layout, profiles: Literal["base", "all"] | Sequence[str]) -> tuple[Profile, ...]:
    if profiles == "all":
        return known.profiles
    if profiles != "base":
        if isinstance(profiles, str):
            raise GeometryError('expected "base", "all" or a list of names', field="profiles", value=profiles)
        return tuple(dict.fromkeys(known.profile(name) for name in profiles))
    plain = [profile for profile in known.profiles if not re.search(r"[+-][a-z]", profile.name)]
    return tuple(
        profile
        for profile in plain
        if profile.size == min(other.size for other in plain if other.slices == profile.slices)
    )


@lru_cache(maxsize=32)
def _enumerate(
    known: Layout, profiles: tuple[Profile, ...], maximal: bool, legacy: bool
) -> tuple[Geometry, ...]:
    slots = sorted((Slot(p, s) for p in profiles if p.maximum for s in p.starts), key=attrgetter("order"))
    states = _states(slots, known.refused_before_r510 if legacy else (), maximal)
    return tuple(Geometry.ordered(known, state) for state in states)


def _states(
    slots: Sequence[Slot], refused: Sequence[tuple[int, int]], maximal: bool
) -> list[tuple[Slot, ...]]:
    """Return all sets of slots that can exist together, or the maximal ones, by depth-first search.

    Sets of slots are bits here. Two slots exclude each other where their memory overlaps, where both want the
    media engines, or where the driver refuses the pair; only a maximum between 1 and the number of starts is
    counted.
    """
    beside = _beside(slots, {frozenset(pair) for pair in refused})
    counted = [1 < slot.profile.maximum < len(slot.profile.starts) for slot in slots]
    states: list[tuple[Slot, ...]] = []
    visited = 0

    def grow(state: tuple[Slot, ...], free: int, later: int) -> None:
        """Go on from a state: `free` are the slots that can be added, `later` those to try from here."""
        nonlocal visited
        visited += 1
        if visited > LIMIT:
            raise GeometryError(f"more than {LIMIT} geometries: name the profiles to enumerate")
        if not (maximal and free):
            states.append(state)
        while later:
            bit = later & -later
            later ^= bit
            index = bit.bit_length() - 1
            room = beside[index]
            if counted[index]:
                room &= _below_maximum(slots, (*state, slots[index]))
            grow((*state, slots[index]), free & room, later & room)

    everything = (1 << len(slots)) - 1
    grow((), everything, everything)
    return states


def _beside(slots: Sequence[Slot], apart: set[frozenset[int]]) -> list[int]:
    """Return for each slot those that can exist together with it, as bits."""
    known = [(slot.mask, slot.profile.id, slot.profile.media, slot.profile.maximum) for slot in slots]
    found: list[int] = []
    for mask, one, media, maximum in known:
        bits = 0
        for index, (taken, other, also, _) in enumerate(known):
            excluded = mask & taken or (media and also) or (one == other and maximum < 2)
            if not excluded and (not apart or frozenset((one, other)) not in apart):
                bits |= 1 << index
        found.append(bits)
    return found


def _below_maximum(slots: Sequence[Slot], state: Sequence[Slot]) -> int:
    """Return the slots of whose profile there may be one more, as bits."""
    there = Counter(slot.profile.id for slot in state)
    return sum(
        1 << index for index, slot in enumerate(slots) if there[slot.profile.id] < slot.profile.maximum
    )


def _multisets(geometries: Iterable[Geometry]) -> tuple[Geometry, ...]:
    found: dict[tuple[str, ...], Geometry] = {}
    for geometry in geometries:
        names = tuple(slot.profile.name for slot in geometry.slots)
        if names not in found:
            found[names] = geometry.unplaced()
    return tuple(found.values())
