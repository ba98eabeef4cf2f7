"""Feature files: CLAM's and TRIDENT's HDF5 are read, an own layout is written, extraction survives a kill.

The own layout has everything training needs, so that slides are read once:

```
coords (regions, 2) int64     top-left corners, level-0 pixels
features (regions, dim)       scan features Z; NaN-free
deep_features (regions, K, dim)  deep features U, where they were asked for
region_index (regions,)       index in the slide's grid; damaged regions are left out
attributes: patch_size, patch_level, patch_size_level0, deep_side, scan_mpp, deep_mpp, wanted_scan_mpp,
            wanted_deep_mpp, extractor, fingerprint, slide, ledger (JSON)
```

Other software reads it as a CLAM file: `coords`, `features`, `patch_size` and `patch_level` mean the same.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float32, Int64

from rlogist.extractors import Extractor
from rlogist.ledger import ReadLedger
from rlogist.slides import Slide, UnreadableRegion
from shared_core import InputError, files

CHUNK = 32
"""Regions between two checkpoints of an extraction."""


@dataclass(frozen=True)
class SlideFeatures:
    """Features of one slide.

    Attributes:
        coords: Top-left corners of regions, level-0 pixels.
        features: One vector a region, at scan magnification.
        deep: K vectors a region at deep magnification; None where the file has none.
        region_index: Index of each row in the slide's grid; 0, 1, 2, ... where the file does not say.
        attributes: What the file says of itself.
        ledger: The reads that these features cost; empty for files of other software.
    """

    coords: Int64[np.ndarray, "regions 2"]
    features: Float32[np.ndarray, "regions dim"]
    deep: Float32[np.ndarray, "regions patches dim"] | None
    region_index: Int64[np.ndarray, " regions"]
    attributes: dict[str, Any] = field(default_factory=dict)
    ledger: ReadLedger = field(default_factory=ReadLedger)

    def __len__(self) -> int:
        return len(self.coords)


def extract_features(
    slide: Slide,
    extractor: Extractor,
    out: str | os.PathLike[str],
    *,
    deep: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SlideFeatures:
    """Extract a slide's features into an HDF5 file, going on where an earlier call was killed.

    Finished chunks lie in a folder beside `out` until the file is whole; a resumed call gives the same bits
    as an uninterrupted one. Chunks of other settings, another slide or extractor are dropped.

    Args:
        slide: The slide.
        extractor: The encoder.
        out: The .h5 file to write.
        deep: Read every region at depth too, for training. At prediction this is what RLogist saves.
        progress: Called with (regions done, regions in all).

    Raises:
        InputError: The folder cannot be written to, or features have NaN or infinite values.
    """
    target = Path(out)
    parts = target.with_name(f".{target.name}.parts")
    regions = slide.regions
    _prepare(parts, _settings(slide, extractor, deep))
    starts = range(0, len(regions), CHUNK)
    # Parts keep the ledger of their own reads. Reads before the first chunk (segmentation) are this call's.
    ledger = slide.ledger.copy()
    for start in starts:
        part = parts / f"{start:08d}.npz"
        indices = range(start, min(start + CHUNK, len(regions)))
        if not part.exists():
            _extract_part(slide, extractor, indices, deep, part)
        if progress is not None:
            progress(indices.stop, len(regions))
    merged = _merge(parts, starts, extractor.dim, slide.geometry.patches_per_region if deep else None, ledger)
    found = SlideFeatures(
        regions.xy[merged["region"]],
        merged["features"],
        merged["deep"] if deep else None,
        merged["region"],
        _attributes(slide, extractor),
        ledger,
    )
    write_features(target, found)
    shutil.rmtree(parts)
    return found


def write_features(out: str | os.PathLike[str], found: SlideFeatures) -> None:
    """Write a file of the own layout, atomically.

    Raises:
        InputError: The folder is missing or cannot be written to.
    """
    with files.atomic_path(out) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("coords", data=found.coords)
        file.create_dataset("features", data=found.features)
        file.create_dataset("region_index", data=found.region_index)
        if found.deep is not None:
            file.create_dataset("deep_features", data=found.deep)
        for key, value in found.attributes.items():
            file.attrs[key] = value
            file["coords"].attrs[key] = value  # where CLAM looks
        file.attrs["ledger"] = json.dumps(found.ledger.to_dict())


def read_features(path: str | os.PathLike[str], extractor: Extractor | None = None) -> SlideFeatures:
    """Read a feature file of this package, of CLAM (`features`, `coords`) or of TRIDENT (leading axis 1).

    Args:
        path: The .h5 file.
        extractor: Where given, the file's features have to be of its dimension and (if known) fingerprint.

    Raises:
        InputError: Not HDF5, data sets missing or of other shapes, NaN, or another extractor.
    """
    try:
        with h5py.File(path, "r") as file:
            arrays = _arrays(file, path)
            attributes = _read_attributes(file)
    except FileNotFoundError as error:
        raise InputError("there is no such file", file=path) from error
    except OSError as error:
        raise InputError(f"not a whole HDF5 file: {error}", file=path) from error
    coords, features, deep, index = arrays
    for name, values in (("features", features), ("deep_features", deep)):
        bad = 0 if values is None else sum(not np.isfinite(row).all() for row in values)
        if bad:
            raise InputError(f"{bad} rows have NaN or infinite values", file=path, field=name)
    if extractor is not None:
        _check_extractor(path, extractor, features.shape[1], attributes)
    ledger = attributes.pop("ledger", None)
    return SlideFeatures(
        coords,
        features,
        deep,
        index,
        attributes,
        ReadLedger.from_dict(json.loads(ledger)) if ledger else ReadLedger(),
    )


def _check_extractor(path: Any, extractor: Extractor, dim: int, attributes: dict[str, Any]) -> None:
    if dim != extractor.dim:
        raise InputError(
            f"has {dim}-d features, expected {extractor.dim}-d ones of {extractor.name}", file=path
        )
    made_by = attributes.get("fingerprint", extractor.fingerprint)
    if made_by != extractor.fingerprint:
        raise InputError(
            f"was made by another extractor than {extractor.name} ({extractor.fingerprint})",
            file=path,
            field="fingerprint",
            value=made_by,
        )


def _arrays(file: h5py.File, path: Any) -> tuple[Any, Any, Any, Any]:
    absent = [name for name in ("features", "coords") if name not in file]
    if absent:
        raise InputError(
            f"expected data sets features and coords; missing: {', '.join(absent)}",
            file=path,
            value=sorted(file),
        )
    features, coords = np.asarray(file["features"]), np.asarray(file["coords"])
    if features.ndim == 3 and len(features) == 1:  # TRIDENT writes (1, regions, dim)
        features = features[0]
    if coords.ndim == 3 and len(coords) == 1:
        coords = coords[0]
    if features.ndim != 2 or coords.shape != (len(features), 2):
        raise InputError(
            f"expected features (n, dim) and coords (n, 2), got {features.shape} and {coords.shape}",
            file=path,
        )
    deep = np.asarray(file["deep_features"], np.float32) if "deep_features" in file else None
    if deep is not None and (deep.ndim != 3 or deep[:, 0].shape != features.shape):
        raise InputError(
            f"expected {len(features)} x K x {features.shape[1]}",
            file=path,
            field="deep_features",
            value=deep.shape,
        )
    index = np.asarray(file["region_index"]) if "region_index" in file else np.arange(len(features))
    return coords.astype(np.int64), features.astype(np.float32), deep, index.astype(np.int64)


def _read_attributes(file: h5py.File) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for owner in (file["coords"], file):
        for key, value in owner.attrs.items():
            found[key] = value.item() if isinstance(value, np.generic) else value
    return found


def _attributes(slide: Slide, extractor: Extractor) -> dict[str, Any]:
    plane = slide.geometry
    return {
        "slide": slide.path.name,
        "mpp": slide.mpp,
        "patch_size": plane.patch,
        "patch_level": plane.scan.level,
        "patch_size_level0": plane.scan.footprint,
        "deep_side": plane.side,
        "scan_mpp": plane.scan.mpp,
        "deep_mpp": plane.deep.mpp,
        "wanted_scan_mpp": float(slide.scan_mpp),
        "wanted_deep_mpp": float(slide.deep_mpp),
        "grid_regions": len(slide.regions),
        "extractor": extractor.name,
        "fingerprint": extractor.fingerprint,
    }


def _settings(slide: Slide, extractor: Extractor, deep: bool) -> str:
    """Everything that a part depends on, as one line."""
    stat = slide.path.stat()
    grid = hashlib.sha256(slide.regions.xy.tobytes()).hexdigest()[:16]
    return json.dumps(
        {
            **_attributes(slide, extractor),
            "deep": deep,
            "bytes": stat.st_size,
            "mtime": stat.st_mtime_ns,
            "grid": grid,
        }
    )


def _prepare(parts: Path, settings: str) -> None:
    header = parts / "settings.json"
    if parts.is_dir() and not (header.is_file() and header.read_text(encoding="utf-8") == settings):
        shutil.rmtree(parts)
    try:
        parts.mkdir(exist_ok=True)
    except FileNotFoundError as error:
        raise InputError(
            f"cannot be written: there is no folder {parts.parent}", file=parts.parent
        ) from error
    except OSError as error:
        raise InputError(f"cannot be written to: {error.strerror}", file=parts.parent) from error
    if not header.is_file():
        files.write_text(header, settings)


def _extract_part(slide: Slide, extractor: Extractor, indices: Sequence[int], deep: bool, part: Path) -> None:
    before = slide.ledger.copy()
    kept, patches, blocks = [], [], []
    for region in indices:
        try:
            patch = slide.scan_patch(region)
            block = slide.read_region_block(region) if deep else None
        except UnreadableRegion:
            continue
        kept.append(region)
        patches.append(patch)
        if block is not None:
            blocks.append(extractor(block).numpy())
    size, dim = slide.geometry.patch, extractor.dim
    features = extractor(np.stack(patches) if patches else np.empty((0, size, size, 3), np.uint8)).numpy()
    for name, values in (("scan", features), ("deep", np.array(blocks))):
        if not np.isfinite(values).all():
            raise InputError(f"{extractor.name} gives NaN or infinite {name} features", file=slide.path)
    arrays = {"region": np.array(kept, np.int64), "features": features.astype(np.float32)}
    if deep:
        arrays["deep"] = np.array(blocks, np.float32).reshape(
            len(kept), slide.geometry.patches_per_region, dim
        )
    ledger = json.dumps(slide.ledger.since(before).to_dict())
    with files.atomic_path(part) as temporary:
        np.savez(temporary, **arrays, ledger=np.array(ledger))


def _merge(
    parts: Path, starts: Sequence[int], dim: int, patches: int | None, ledger: ReadLedger
) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {
        "region": [np.empty(0, np.int64)],
        "features": [np.empty((0, dim), np.float32)],
    }
    if patches is not None:
        found["deep"] = [np.empty((0, patches, dim), np.float32)]
    for start in starts:
        with np.load(parts / f"{start:08d}.npz") as part:
            for key, listed in found.items():
                listed.append(part[key])
            ledger.add(ReadLedger.from_dict(json.loads(str(part["ledger"]))))
    return {key: np.concatenate(listed) for key, listed in found.items()}
