"""Profiles: the sizes of instance that a device can be cut into, and where on its axis they may begin."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """A size of instance.

    Attributes:
        name: As the driver or backend calls it: `3g.20gb`, `2c`, `whole`.
        id: What the driver takes to create one (MIG: 19, 14, 9, ...; never the enum of the profile).
        slices: Compute slices (MIG) or cores (CPU).
        size: Length on the memory axis, which is what instances must not share.
        starts: Where on the axis it may begin, ascending.
        maximum: How many instances of it may exist at once.
        memory_mib: Memory of one instance, where it is partitioned.
        sms: Streaming multiprocessors, where there are any.
    """

    name: str
    id: int
    slices: int
    size: int
    starts: tuple[int, ...]
    maximum: int
    memory_mib: float | None = None
    sms: int | None = None


@dataclass(frozen=True)
class Layout:
    """What a device can be cut into.

    Attributes:
        device: Model of the device, `A100-40GB`.
        axis: Length of the memory axis in slices.
        slices: Compute slices of the whole device.
        profiles: All profiles, those with `+me` and doubled memory included.
    """

    device: str
    axis: int
    slices: int
    profiles: tuple[Profile, ...]
