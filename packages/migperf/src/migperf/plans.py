"""Plans: where instances go, and which steps lead there from the instances that exist now."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from migperf.backends import Backend, Instance
from migperf.errors import DriverError, GeometryError
from migperf.geometry import Geometry, Slot
from migperf.profiles import Profile

FUNCTION_NOT_FOUND = 13
INSUFFICIENT_RESOURCES = 23


def arrange(
    slots: Sequence[Slot], live: Iterable[Slot] = (), occupied: Iterable[Slot] = ()
) -> tuple[Slot, ...] | None:
    """Give every slot a start such that no two share a memory slice; exact.

    Among all ways it takes one that keeps most of the live instances, and of those the first in the driver's
    own order of starts.

    Args:
        slots: The instances, placed or not; starts that are given stay.
        live: Instances that exist and would better stay.
        occupied: Instances that stay in any case, beside the slots.

    Returns:
        The placed slots, in the order of `slots`; None when there is no way.
    """
    taken = 0
    for slot in occupied:
        taken |= slot.mask
    reach = 0
    for profile in {slot.profile for slot in slots}:
        for start in profile.starts:
            reach |= Slot(profile, start).mask
    if sum(slot.profile.size for slot in slots) > (reach & ~taken).bit_count():
        return None
    search = _Search(slots, {(s.profile.id, s.profile.slices, s.start, s.compute) for s in live})
    search.descend(0, taken, 0)
    return search.best


class _Search:
    """Branch and bound over starts, slots with fewest starts first."""

    def __init__(self, slots: Sequence[Slot], live: set[tuple[int, int, int | None, tuple[int, ...] | None]]):
        self.slots = slots
        self.order = sorted(range(len(slots)), key=lambda i: self._rank(slots[i]))
        self.live = live
        self.choices = [self._choices(slots[i]) for i in self.order]
        # What the slots from here on could keep at most, and need at least.
        hopes = [
            any(self._kept(slots[i], s) for s in c) for i, c in zip(self.order, self.choices, strict=True)
        ]
        self.hope = [sum(hopes[depth:]) for depth in range(len(slots) + 1)]
        self.chosen: list[int] = []
        self.best: tuple[Slot, ...] | None = None
        self.best_kept = -1

    @staticmethod
    def _rank(slot: Slot) -> tuple[bool, int, tuple[int, str, int]]:
        return slot.start is None, -slot.profile.size, slot.order

    def _kept(self, slot: Slot, start: int) -> bool:
        return (slot.profile.id, slot.profile.slices, start, slot.compute) in self.live

    def _choices(self, slot: Slot) -> list[int]:
        if slot.start is not None:
            return [slot.start] if slot.start in slot.profile.starts else []
        return sorted(slot.profile.preference, key=lambda start: not self._kept(slot, start))

    def descend(self, depth: int, taken: int, kept: int) -> None:
        if kept + self.hope[depth] <= self.best_kept:
            return
        if depth == len(self.slots):
            starts = dict(zip(self.order, self.chosen, strict=True))
            self.best_kept = kept
            self.best = tuple(Slot(s.profile, starts[i], s.compute) for i, s in enumerate(self.slots))
            return
        slot = self.slots[self.order[depth]]
        for position in range(self._first(depth), len(self.choices[depth])):
            start = self.choices[depth][position]
            mask = ((1 << slot.profile.size) - 1) << start
            if not taken & mask:
                self.chosen.append(start)
                self.descend(depth + 1, taken | mask, kept + self._kept(slot, start))
                self.chosen.pop()
            if self.best_kept >= self.hope[0]:
                return

    def _first(self, depth: int) -> int:
        """Return the first choice worth trying: like slots take theirs in order, for they can be swapped."""
        if depth and self.slots[self.order[depth]] == self.slots[self.order[depth - 1]]:
            return self.choices[depth].index(self.chosen[-1]) + 1
        return 0


def place(geometry: Geometry, live: Iterable[Slot] = (), occupied: Iterable[Slot] = ()) -> Geometry:
    """Return the geometry with a start for every instance, keeping as many live instances as can be kept.

    Args:
        geometry: What is wanted; starts that are given stay.
        live: Instances that exist now.
        occupied: Instances that stay beside the wanted ones.

    Raises:
        GeometryError: The instances do not fit together; the message says which are in the way.

    >>> from migperf.profiles import layout
    >>> str(place(Geometry.parse("3g,2g,1g,1g", layout("a100-40gb"))))
    '3g.20gb@4,2g.10gb@0,1g.5gb@2,1g.5gb@3'
    """
    geometry.require()
    staying = tuple(occupied)
    slots = arrange(geometry.slots, live, staying)
    together = Geometry(geometry.layout, (*geometry.slots, *staying))
    if slots is None or not together.valid:
        raise GeometryError(f"{geometry} does not fit beside {Geometry(geometry.layout, staying)}: "
                            f"{together.explain()}")  # fmt: skip
    return Geometry(geometry.layout, slots)


@dataclass(frozen=True)
class Step:
    """One change of a device.

    Attributes:
        action: What is done.
        slot: The instance that comes or goes.
        instance: The one that goes.
    """

    action: Literal["destroy", "create"]
    slot: Slot
    instance: Instance | None = None

    def __str__(self) -> str:
        uuid = f" ({self.instance.uuid})" if self.instance and self.instance.uuid else ""
        return f"{self.action} {self.slot}{uuid}"


@dataclass(frozen=True)
class Plan:
    """The way from the instances that exist to a geometry.

    Attributes:
        geometry: Where it leads, placed.
        kept: Instances that stay as they are.
        steps: What to do, in order: first what goes, then what comes.
    """

    geometry: Geometry
    kept: tuple[Instance, ...]
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.steps)) or "nothing to do"


def slot_of(instance: Instance) -> Slot:
    """Return the instance as a slot of a geometry."""
    return Slot(instance.profile, instance.start, instance.compute)


def current(backend: Backend) -> Geometry:
    """Return the geometry that exists on the device now."""
    return Geometry(backend.layout, tuple(slot_of(instance) for instance in backend.instances()))


def diff(live: Sequence[Instance], wanted: Geometry) -> Plan:
    """Return the steps from the live instances to the wanted geometry; an instance that fits stays put.

    Args:
        live: What exists now, and may be destroyed.
        wanted: What is to exist; instances without a start go where most live ones can stay.

    Raises:
        GeometryError: The wanted geometry is not valid.
    """
    placed = place(wanted, [slot_of(instance) for instance in live])
    missing = Counter(map(_identity, placed.slots))
    kept: list[Instance] = []
    going: list[Step] = []
    for instance in live:
        slot = slot_of(instance)
        if missing[_identity(slot)]:
            missing[_identity(slot)] -= 1
            kept.append(instance)
        else:
            going.append(Step("destroy", slot, instance))
    coming = [Step("create", slot) for slot in placed.slots if missing[_identity(slot)]]
    return Plan(placed, tuple(kept), (*going, *coming))


def _identity(slot: Slot) -> tuple[int, int, int | None, tuple[int, ...] | None]:
    # Not the whole profile: the driver may report another memory than the table that the wish came from.
    return slot.profile.id, slot.profile.slices, slot.start, slot.compute


def plan(backend: Backend, wanted: Geometry) -> Plan:
    """Return the steps that would lead a device to the geometry, without taking any.

    Raises:
        GeometryError: The geometry is not valid, or names profiles that this device does not have.
    """
    # By name: the ids of another model's profiles may mean other sizes here.
    slots = (Slot(backend.layout.profile(s.profile.name), s.start, s.compute) for s in wanted.slots)
    return diff(backend.instances(), Geometry(backend.layout, tuple(slots)))


def apply(backend: Backend, steps: Plan) -> tuple[Instance, ...]:
    """Take the steps of a plan, and return the instances of its geometry, in the geometry's order.

    A driver that cannot be told where to put an instance is led there by the order of creation.

    Raises:
        DeviceError: An instance that has to go is in use, or the driver refused. What was done until then
            stays: `migperf.partitioned` is what goes back.
    """
    for step in steps.steps:
        if step.instance is not None:
            backend.destroy(step.instance)
    coming = [step.slot for step in steps.steps if step.action == "create"]
    for done, slot in enumerate(coming):
        try:
            backend.create(slot.profile, slot.start, slot.compute)
        except DriverError as error:
            if error.code != FUNCTION_NOT_FOUND:
                raise
            create_in_order(backend, coming[done:])
            break
    there = {_identity(slot_of(instance)): instance for instance in backend.instances()}
    return tuple(there[_identity(slot)] for slot in steps.geometry.slots)


def create_in_order(backend: Backend, slots: Sequence[Slot]) -> tuple[Instance, ...]:
    """Create placed instances through a driver that chooses the starts itself.

    Every order of creation is tried until the instances lie where they should: first those that lead there
    by the recorded preferences, then the others, for a driver may have changed its mind.

    Raises:
        GeometryError: No order leads there. The device is then as it was before.
    """
    occupied = [slot_of(instance) for instance in backend.instances()]
    wanted = Counter(map(_identity, slots))
    for order in orders(slots, occupied):
        made: list[Instance] = []
        try:
            for slot in order:
                made.append(backend.create(slot.profile, None, slot.compute))  # noqa: PERF401 - may raise midway
        except DriverError as error:
            if error.code != INSUFFICIENT_RESOURCES:
                raise
        if Counter(_identity(slot_of(instance)) for instance in made) == wanted:
            return tuple(made)
        for instance in reversed(made):
            backend.destroy(instance)
    names = ",".join(map(str, slots))
    raise GeometryError(f"no order of creation leads to {names}, and this driver cannot be told where to "
                        "put an instance: a driver of 2021 or later can")  # fmt: skip


def orders(slots: Sequence[Slot], occupied: Sequence[Slot] = ()) -> Iterator[tuple[Slot, ...]]:
    """Yield the orders in which slots can be created, those that the recorded preferences lead home first."""
    seen: set[tuple[str, ...]] = set()
    unlikely: list[tuple[Slot, ...]] = []
    for order in permutations(sorted(slots, key=lambda slot: slot.order)):
        names = tuple(slot.profile.name for slot in order)
        if names in seen:  # the driver cannot tell like profiles apart
            continue
        seen.add(names)
        found = predict([slot.profile for slot in order], occupied)
        if found is not None and Counter(map(_identity, found)) == Counter(map(_identity, order)):
            yield order
        else:
            unlikely.append(order)
    yield from unlikely


def predict(profiles: Sequence[Profile], occupied: Sequence[Slot] = ()) -> tuple[Slot, ...] | None:
    """Return where a driver would put instances created in this order, by the recorded preferences.

    None: it would refuse one for want of resources.
    """
    taken = 0
    for slot in occupied:
        taken |= slot.mask
    found: list[Slot] = []
    for profile in profiles:
        free = (Slot(profile, start) for start in profile.preference)
        slot = next((slot for slot in free if not slot.mask & taken), None)
        if slot is None:
            return None
        taken |= slot.mask
        found.append(slot)
    return tuple(found)
