"""A look at a file that OpenSlide refuses or sees too little of: what it is, and what hides in it.

Only directory entries are read, by hand, so that no TIFF library is needed for an error message.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

_TILE_WIDTH, _STRIP_OFFSETS, _SUBIFDS = 322, 273, 330
_SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_SIGNATURES = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF",
    b"\x89HDF": "an HDF5 file",
    b"<!DO": "an HTML page, perhaps a failed download",
    b"<htm": "an HTML page, perhaps a failed download",
}


@dataclass(frozen=True)
class FileLook:
    """What a file is, in words for a person, and how many reduced pictures hide in SubIFDs."""

    text: str
    reduced_hidden: int = 0


def describe_file(path: Path) -> FileLook:
    """Say what a file is."""
    if path.is_dir():
        return FileLook("it is a folder")
    size = path.stat().st_size
    if size == 0:
        return FileLook("the file is empty")
    with open(path, "rb") as file:
        head = file.read(16)
    for signature, words in _SIGNATURES.items():
        if head.startswith(signature):
            return FileLook(f"it is {words}")
    if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return FileLook(f"unknown format, {size} bytes that begin with {head[:8]!r}")
    try:
        return _describe_tiff(path, size, head)
    except (struct.error, ValueError):
        return FileLook(f"a TIFF whose directory is missing or damaged after {size} bytes, perhaps truncated")


def _describe_tiff(path: Path, size: int, head: bytes) -> FileLook:
    order = "<" if head[:2] == b"II" else ">"
    big = head[2:4] in (b"+\0", b"\0+")
    (offset,) = struct.unpack(order + ("Q" if big else "I"), head[8:16] if big else head[4:8])
    with open(path, "rb") as file:
        tags = _directory(file, order, big, offset)
    hidden = tags.get(_SUBIFDS, 0)
    if _TILE_WIDTH in tags:
        return FileLook(
            f"a tiled TIFF, {size} bytes, perhaps truncated or compressed in an unknown way", hidden
        )
    if _STRIP_OFFSETS in tags:
        text = "a TIFF of strips, expected a tiled one (vips tiffsave --tile --pyramid makes it)"
        return FileLook(text, hidden)
    return FileLook("a TIFF without pixels in its first directory", hidden)


def _directory(file, order: str, big: bool, offset: int) -> dict[int, int]:
    """Tags of a directory with the count of their values."""
    file.seek(offset)
    (entries,) = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2))
    if not 0 < entries < 4096:
        raise ValueError(f"{entries} entries")
    tags = {}
    for _ in range(entries):
        raw = file.read(20 if big else 12)
        tag, kind, count = struct.unpack(order + ("HHQ" if big else "HHI"), raw[: 12 if big else 8])
        if kind not in _SIZES:
            raise ValueError(f"type {kind}")
        tags[tag] = count
    return tags
