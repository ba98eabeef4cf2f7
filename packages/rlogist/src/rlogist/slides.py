"""A whole-slide image, read lazily, with a ledger of every read."""

import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
from jaxtyping import UInt8
from openslide import OpenSlideError, OpenSlideUnsupportedFormatError

from rlogist.grid import Regions, region_grid
from rlogist.ledger import Purpose, ReadLedger
from rlogist.pyramid import Geometry, Level, geometry, levels_of
from rlogist.tiff_look import describe_file
from rlogist.tissue import MAX_PIXELS, Segmentation, Tissue, segment
from shared_core import InputError

Pixels = UInt8[np.ndarray, "_ _ 3"]
Patches = UInt8[np.ndarray, "_ _ _ 3"]


class UnreadableRegion(OSError):
    """The pixels of a region are damaged. The slide stays usable; the region is in `Slide.unreadable`."""


class OneLevelWarning(UserWarning):
    """The slide has no reduced level, so a cheap scan of it is not possible."""


class Slide:
    """A whole-slide image at two magnifications: regions of the scan, and the deep patches inside each.

    Nothing is read before it is asked for, each region's pixels are read once while they stay in the cache,
    and `ledger` says what was read. Transparent pixels (outside the scanned area) are white.

    Args:
        path: Any file that OpenSlide reads.
        scan_mpp: Microns per pixel of the scan, 2.0 for 5x.
        deep_mpp: Microns per pixel of the deep look, 0.5 for 20x.
        patch: Side of a patch in pixels, at both magnifications.
        mpp: Microns per pixel of level 0, for files that do not state it.
        segmentation: How tissue is found.
        cache_bytes: Memory for blocks and patches that were read.
        ledger: A ledger to go on with; a new one where None.

    Raises:
        InputError: Not a slide, no microns per pixel, or resolutions that the slide does not have.

    A slide can be sent to another process; it opens the file there anew, with an empty cache.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        scan_mpp: float = 2.0,
        deep_mpp: float = 0.5,
        patch: int = 256,
        mpp: float | None = None,
        segmentation: Segmentation | None = None,
        cache_bytes: int = 256 * 2**20,
        ledger: ReadLedger | None = None,
    ) -> None:
        self.path = Path(path)
        self.segmentation = segmentation or Segmentation()
        self.ledger = ledger if ledger is not None else ReadLedger()
        self.unreadable: dict[int, str] = {}
        self.messages: list[str] = []
        """What a user should know about this file: one level only, levels that cannot be seen."""
        self._cache = _PixelCache(cache_bytes)
        self._handle = _open(self.path)
        self.mpp = self._mpp(mpp)
        sizes, downsamples = self._handle.level_dimensions, self._handle.level_downsamples
        self.scan_mpp, self.deep_mpp = scan_mpp, deep_mpp
        self.levels: list[Level] = levels_of(sizes, downsamples, self.mpp)
        try:
            self.geometry: Geometry = geometry(self.levels, scan_mpp, deep_mpp, patch)
        except InputError as error:
            raise InputError(error.message, file=self.path, field=error.field, value=error.value) from None
        if self.geometry.scan_from_deep:
            self._say_that_nothing_is_saved()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of level 0 in pixels."""
        return self.levels[0].width, self.levels[0].height

    @property
    def stats(self) -> dict[str, object]:
        """The ledger as plain data: reads, pixels and seconds by purpose and level."""
        return self.ledger.to_dict()

    @cached_property
    def tissue(self) -> Tissue:
        """Outlines of tissue; falsy where there is none.

        Raises:
            InputError: The level to segment has more than 1e8 pixels.
        """
        level = self.levels[self._handle.get_best_level_for_downsample(self.segmentation.downsample)]
        if level.width * level.height > MAX_PIXELS:
            raise InputError(
                f"the level to find tissue on has {level.width} x {level.height} pixels, expected at most "
                f"{MAX_PIXELS:,}: make a pyramid with more levels (vips tiffsave --pyramid --tile)",
                file=self.path,
            )
        try:
            image = self._read("segment", (0, 0), level.index, (level.width, level.height))
        except OpenSlideError as error:
            raise InputError(
                f"damaged: level {level.index} cannot be read: {error}", file=self.path
            ) from error
        width, height = self.size
        return segment(image, level.downsample, self.segmentation, width * height)

    @cached_property
    def regions(self) -> Regions:
        """The N regions over tissue."""
        return region_grid(self.tissue.contours, self.geometry.scan.footprint, self.geometry.side)

    def scan_patch(self, region: int) -> Pixels:
        """A region at scan magnification, `patch` x `patch` pixels.

        Raises:
            UnreadableRegion: Its pixels are damaged.
            IndexError: There is no such region.
        """
        self._check(region)
        patch = self.geometry.patch

        def read() -> Pixels:
            if self.geometry.scan_from_deep:
                block = self._block(region, "scan")
                return _resized(block, patch)
            plane = self.geometry.scan
            return _resized(self._read_region(region, "scan", plane.level, plane.read), patch)

        return self._cache.get(("scan", region), read)

    def scan_patches(self, batch: int = 64) -> Iterator[tuple[list[int], Patches]]:
        """All readable regions at scan magnification, as (indices, patches), without damaged ones."""
        indices: list[int] = []
        patches: list[Pixels] = []
        for region in range(len(self.regions)):
            try:
                patches.append(self.scan_patch(region))
            except UnreadableRegion:
                continue
            indices.append(region)
            if len(indices) == batch:
                yield indices, np.stack(patches)
                indices, patches = [], []
        if indices:
            yield indices, np.stack(patches)

    def read_region_block(self, region: int, purpose: Purpose = "deep") -> Patches:
        """The K deep patches of a region, from one read; in the order of `Regions.deep_xy`.

        Args:
            region: Index into `regions`.
            purpose: What the ledger says it was for, `prefetch` where it may not be needed.

        Raises:
            UnreadableRegion: Its pixels are damaged. Noted in the ledger; the slide stays usable.
            IndexError: There is no such region.
        """
        self._check(region)
        side, patch = self.geometry.side, self.geometry.patch
        block = self._block(region, purpose)
        grid = block.reshape(side, patch, side, patch, 3).transpose(0, 2, 1, 3, 4)
        return np.ascontiguousarray(grid.reshape(side * side, patch, patch, 3))

    def deep_share(self, ledger: ReadLedger) -> float:
        """Share of all regions' pixels at depth that a ledger says were read, 0 without regions.

        Where the scan is made from deep pixels (one level only), those count: nothing was saved.
        """
        if not len(self.regions):
            return 0.0
        kinds: tuple[Purpose, ...] = ("scan", "deep", "prefetch")
        at_depth = [
            tally.pixels
            for (purpose, level), tally in ledger.entries().items()
            if purpose in kinds and level == self.geometry.deep.level
        ]
        return sum(at_depth) / (len(self.regions) * self._block_pixels() ** 2)

    def thumbnail(self, longest: int = 1024) -> Pixels:
        """The whole slide, its longer side about `longest` pixels, from the nearest finer level.

        Where that level is damaged, a coarser one gives the picture, with a note in the ledger.

        Raises:
            InputError: All these levels are damaged.
        """
        width, height = self.size
        factor = max(max(width, height) / longest, 1.0)
        target = (max(1, round(width / factor)), max(1, round(height / factor)))
        first = self._handle.get_best_level_for_downsample(factor)
        for level in self.levels[first:]:
            try:
                image = self._read("picture", (0, 0), level.index, (level.width, level.height))
            except OpenSlideError as error:
                self.ledger.note(f"{self.path.name}: level {level.index} is damaged: {error}")
                continue
            how = cv2.INTER_AREA if level.width >= target[0] else cv2.INTER_LINEAR
            return cv2.resize(image, target, interpolation=how)  # pyright: ignore[reportReturnType]
        raise InputError(f"damaged: no level from {first} on gives a whole picture", file=self.path)

    def close(self) -> None:
        """Close the file and drop what was cached."""
        self._handle.close()
        self._cache.clear()

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_handle",)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handle = _open(self.path)

    def __repr__(self) -> str:
        width, height = self.size
        return f"Slide({str(self.path)!r}, {width} x {height}, {self.mpp:.4g} microns per pixel)"

    def _check(self, region: int) -> None:
        if not 0 <= region < len(self.regions):
            raise IndexError(f"expected a region from 0 to {len(self.regions) - 1}, got {region}")

    def _block(self, region: int, purpose: Purpose) -> Pixels:
        """A region at deep magnification, `side * patch` pixels wide."""
        plane, side, patch = self.geometry.deep, self.geometry.side, self.geometry.patch

        def read() -> Pixels:
            pixels = self._read_region(region, purpose, plane.level, self._block_pixels())
            return _resized(pixels, patch * side)

        return self._cache.get(("deep", region), read)

    def _block_pixels(self) -> int:
        """Side of a region in pixels of the level that deep looks read."""
        plane, side, patch = self.geometry.deep, self.geometry.side, self.geometry.patch
        if plane.read == patch:
            return patch * side
        return round(self.regions.footprint / self.levels[plane.level].downsample)

    def _read_region(self, region: int, purpose: Purpose, level: int, pixels: int) -> Pixels:
        if region in self.unreadable:
            raise UnreadableRegion(self.unreadable[region])
        x, y = (int(value) for value in self.regions.xy[region])
        try:
            return self._read(purpose, (x, y), level, (pixels, pixels))
        except OpenSlideError as error:
            message = f"{self.path.name}: region {region} at ({x}, {y}), level {level}, is damaged: {error}"
            self.unreadable[region] = message
            self.ledger.note(message)
            raise UnreadableRegion(message) from error

    def _read(self, purpose: Purpose, xy: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        with self.ledger.reading(purpose, level, *size):
            try:
                return _on_white(np.asarray(self._handle.read_region(xy, level, size)))
            except OpenSlideError:
                # An error is latching: this handle answers nothing any more.
                self._handle.close()
                self._handle = _open(self.path)
                raise

    def _mpp(self, given: float | None) -> float:
        if given is not None:
            if not 0 < given < float("inf"):
                raise InputError("expected microns per pixel above 0", field="mpp", value=given)
            return float(given)
        x, y = (
            _positive(self._handle.properties.get(name))
            for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
        )
        if x is None or y is None:
            raise InputError(
                "the file does not state its microns per pixel, and they are never guessed: "
                "give mpp (--mpp), 0.25 for most 40x scans, 0.5 for 20x",
                file=self.path,
            )
        if abs(x - y) > 0.02 * x:
            raise InputError(
                f"pixels are not square: {x:g} x {y:g} microns; give mpp (--mpp)", file=self.path
            )
        return x

    def _say_that_nothing_is_saved(self) -> None:
        text = (
            f"{self.path.name}: no level is coarser than {self.geometry.deep.mpp:.3g} and as fine as "
            f"{self.geometry.scan.mpp:.3g} microns per pixel, so the scan is made from deep pixels and "
            "nothing is saved."
        )
        hidden = describe_file(self.path).reduced_hidden
        if hidden:
            text += (
                f" The file has {hidden} reduced pictures in SubIFDs, which OpenSlide does not look at: "
                "make a pyramid of top-level pages of it (vips tiffsave --pyramid --tile, no --subifd)."
            )
        self.messages.append(text)
        self.ledger.note(text)
        warnings.warn(text, OneLevelWarning, stacklevel=3)


class _PixelCache:
    """The pixels read last, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[tuple[str, int], Pixels] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[str, int], read: Any) -> Pixels:
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        pixels = read()
        pixels.setflags(write=False)  # many callers share it
        self._held[key] = pixels
        self._bytes += pixels.nbytes
        while self._bytes > self._limit and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return pixels

    def clear(self) -> None:
        self._held.clear()
        self._bytes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _PixelCache, (self._limit,)


def _open(path: Path) -> openslide.OpenSlide:
    if not path.exists():
        raise InputError("there is no such file", file=path)
    try:
        return openslide.OpenSlide(path)
    except (OpenSlideUnsupportedFormatError, OpenSlideError) as error:
        found = describe_file(path)
        raise InputError(f"not a slide that OpenSlide reads: {found.text} ({error})", file=path) from error


def _positive(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _on_white(rgba: UInt8[np.ndarray, "height width 4"]) -> Pixels:
    """Paint RGBA with straight alpha on white. OpenSlide gives (0, 0, 0, 0) where nothing was scanned."""
    alpha = rgba[:, :, 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[:, :, :3])
    weight = alpha.astype(np.uint16)
    return ((rgba[:, :, :3] * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)


def _resized(image: Pixels, size: int) -> Pixels:
    if image.shape[0] == size:
        return image
    how = cv2.INTER_AREA if image.shape[0] > size else cv2.INTER_LINEAR
    return cv2.resize(image, (size, size), interpolation=how)  # pyright: ignore[reportReturnType]
