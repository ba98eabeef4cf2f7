"""From microns per pixel to what has to be read: level, pixels of it, footprint on level 0.

Levels are chosen by microns per pixel, never by index: level 1 is 20x in one scanner's files and 10x in
another's. All positions are level-0 pixels, as OpenSlide wants them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shared_core import InputError

TOLERANCE = 0.05
"""A level whose resolution is within this share of the wanted one is taken as it is, without resampling."""


@dataclass(frozen=True)
class Level:
    """One stored resolution of a slide: its index, width and height in pixels, and microns per pixel."""

    index: int
    width: int
    height: int
    downsample: float
    mpp: float


@dataclass(frozen=True)
class Plane:
    """A magnification: its patches are `read` pixels of `level`, over `footprint` level-0 pixels.

    Where `read` is not the patch size, no level has the wanted resolution, and what was read is reduced to
    it.
    """

    level: int
    footprint: int
    read: int
    mpp: float


@dataclass(frozen=True)
class Geometry:
    """How a slide is read: a scan patch covers `side` x `side` deep patches exactly."""

    patch: int
    side: int
    scan: Plane
    deep: Plane
    scan_from_deep: bool
    """No level between the two is there: scan patches are deep blocks, reduced. Nothing is saved."""

    @property
    def patches_per_region(self) -> int:
        """K, the number of deep patches in one region."""
        return self.side**2


def levels_of(sizes: Sequence[tuple[int, int]], downsamples: Sequence[float], mpp: float) -> list[Level]:
    """Levels from what a slide library reports and the microns per pixel of level 0.

    Scanners round level sizes down, so reported factors are 4.0002 where 4 is meant; those are put right.
    """
    found = []
    for index, ((width, height), reported) in enumerate(zip(sizes, downsamples, strict=True)):
        whole = round(reported)
        factor = float(whole) if abs(reported - whole) <= 0.01 * reported else float(reported)
        found.append(Level(index, width, height, factor, mpp * factor))
    return found


def geometry(levels: Sequence[Level], scan_mpp: float, deep_mpp: float, patch: int) -> Geometry:
    """Choose what to read for patches of `patch` pixels at two resolutions (microns per pixel).

    Args:
        levels: The slide's levels, finest first.
        scan_mpp: Resolution of the scan, 2.0 for 5x.
        deep_mpp: Resolution of the deep look, 0.5 for 20x. `scan_mpp` is a whole multiple of it.
        patch: Side of a patch in pixels, the same at both resolutions.

    Raises:
        InputError: The resolutions are no multiples, or the slide lacks them; the message lists its own.
    """
    side = _side(scan_mpp, deep_mpp, patch)
    finest = levels[0].mpp
    if deep_mpp < finest * (1 - TOLERANCE):
        raise InputError(
            f"the slide's finest level has {finest:.3g} microns per pixel, expected that or more "
            f"({_available(levels)})",
            field="deep_mpp",
            value=deep_mpp,
        )
    deep_level = _coarsest_not_above(levels, deep_mpp)
    matches = abs(deep_level.mpp - deep_mpp) <= TOLERANCE * deep_mpp
    deep_downsample = deep_level.downsample if matches else deep_mpp / finest
    deep_footprint = round(patch * deep_downsample)
    footprint = side * deep_footprint
    scan_level = _coarsest_not_above(levels, scan_mpp)
    from_deep = side > 1 and scan_level.index <= deep_level.index
    coarsest = levels[-1].mpp
    if len(levels) > 1 and scan_mpp > coarsest * (1 + TOLERANCE):
        raise InputError(
            f"the slide's coarsest level has {coarsest:.3g} microns per pixel, expected that or less "
            f"({_available(levels)})",
            field="scan_mpp",
            value=scan_mpp,
        )
    return Geometry(
        patch,
        side,
        scan=Plane(
            scan_level.index, footprint, _read(footprint, scan_level, patch), finest * footprint / patch
        ),
        deep=Plane(
            deep_level.index,
            deep_footprint,
            _read(deep_footprint, deep_level, patch),
            finest * deep_footprint / patch,
        ),
        scan_from_deep=from_deep,
    )


def _side(scan_mpp: float, deep_mpp: float, patch: int) -> int:
    if patch < 1:
        raise InputError("expected at least 1 pixel", field="patch", value=patch)
    for field, value in (("scan_mpp", scan_mpp), ("deep_mpp", deep_mpp)):
        if not 0 < value < float("inf"):
            raise InputError("expected microns per pixel above 0", field=field, value=value)
    side = round(scan_mpp / deep_mpp)
    if side < 1 or abs(scan_mpp / deep_mpp - side) > 0.01 * side:
        raise InputError(
            f"expected a whole multiple of deep_mpp {deep_mpp:g}, so that a region holds whole deep patches",
            field="scan_mpp",
            value=scan_mpp,
        )
    return side


def _coarsest_not_above(levels: Sequence[Level], mpp: float) -> Level:
    fine_enough = [level for level in levels if level.mpp <= mpp * (1 + TOLERANCE)]
    return max(fine_enough or levels[:1], key=lambda level: level.mpp)


def _read(footprint: int, level: Level, patch: int) -> int:
    exact = footprint / level.downsample
    return patch if abs(exact - patch) < 1 else round(exact)


def _available(levels: Sequence[Level]) -> str:
    return "it has " + ", ".join(f"{level.mpp:.4g}" for level in levels)
