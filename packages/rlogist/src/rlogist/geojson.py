"""GeoJSON that QuPath opens (File, Import objects): outlines and regions in level-0 pixels."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlogist.grid import Regions
from rlogist.tissue import Contour
from shared_core import InputError, files


def tissue_features(contours: Sequence[Contour]) -> list[dict[str, Any]]:
    """One annotation a piece of tissue, with its holes."""
    return [
        _feature(
            [_ring(contour.outline), *(_ring(hole) for hole in contour.holes)],
            "annotation",
            "Tissue",
            0x0072B2,
            {},
        )
        for contour in contours
    ]


def region_features(
    regions: Regions,
    chosen: Sequence[int] | None = None,
    measurements: Mapping[str, Sequence[float]] | None = None,
    name: str = "Region",
    kind: str = "tile",
) -> list[dict[str, Any]]:
    """One square object a region.

    Args:
        regions: The grid.
        chosen: Indices of regions, in the order wanted; all where None.
        measurements: Name to one number for each chosen region; QuPath colours regions by them.
        name: The objects' class.
        kind: QuPath's object type: tile, annotation, detection.

    Raises:
        InputError: A measurement has another number of values.
    """
    indices = range(len(regions)) if chosen is None else chosen
    for key, values in (measurements or {}).items():
        if len(values) != len(indices):
            raise InputError(f"expected {len(indices)} values", field=key, value=len(values))
    boxes = regions.boxes()
    found = []
    for place, index in enumerate(indices):
        left, top, right, bottom = boxes[index].astype(float)
        square = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
        numbers = {key: float(values[place]) for key, values in (measurements or {}).items()}
        found.append(_feature([_ring(square)], kind, name, 0xD55E00, numbers))
    return found


def write_geojson(path: str | os.PathLike[str], features: Sequence[Mapping[str, Any]]) -> None:
    """Write features as a FeatureCollection, atomically."""
    files.write_json(path, {"type": "FeatureCollection", "features": list(features)})


def _feature(
    rings: list[list[list[float]]], kind: str, name: str, rgb: int, measurements: Mapping[str, float]
) -> dict[str, Any]:
    colour = [rgb >> 16 & 255, rgb >> 8 & 255, rgb & 255]
    properties: dict[str, Any] = {"objectType": kind, "classification": {"name": name, "color": colour}}
    if measurements:
        properties["measurements"] = dict(measurements)
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": rings},
        "properties": properties,
    }


def _ring(outline: np.ndarray) -> list[list[float]]:
    return [*outline.tolist(), outline[0].tolist()]
