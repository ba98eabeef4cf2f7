"""Small slides for the tests, written with tifffile and read back through OpenSlide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

from rlogist.demo_slides import write_pyramid

WHITE = 255


def tissue_picture(height: int = 1024, width: int = 1024, margin: int = 128, seed: int = 0) -> np.ndarray:
    """Pink noise in a rectangle on white."""
    rng = np.random.default_rng(seed)
    picture = np.full((height, width, 3), WHITE, np.uint8)
    inside = (height - 2 * margin, width - 2 * margin)
    picture[margin:-margin, margin:-margin] = np.stack(
        [rng.integers(low, low + 40, inside) for low in (190, 70, 150)], axis=-1
    )
    return picture


def tissue_slide(path: Path, **picture) -> Path:
    """A pyramid of 0.5, 2 and 8 microns per pixel over `tissue_picture`."""
    write_pyramid(path, tissue_picture(**picture))
    return path


def lossless(
    path: Path,
    levels: list[np.ndarray],
    mpp: float | None = 0.5,
    tile: tuple[int, int] | None = (256, 256),
    subifds: bool = False,
) -> Path:
    """A slide whose pixels are exact: deflate, tiled (or in strips), levels as pages or as SubIFDs."""
    options = {"photometric": "rgb", "compression": "zlib", "tile": tile}
    if mpp is not None:
        options |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as writer:
        writer.write(levels[0], subifds=len(levels) - 1 if subifds else 0, **options)
        for level in levels[1:]:
            writer.write(level, subfiletype=1, **options)
    return path


def damage(path: Path, page: int, tile: int) -> None:
    """Overwrite one tile's bytes with what is no compressed data."""
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[page].dataoffsets[tile], file.pages[page].databytecounts[tile]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * count)
