from __future__ import annotations

import json

import numpy as np
import pytest
import shapely

from rlogist.geojson import region_features, tissue_features, write_geojson
from rlogist.grid import Regions
from rlogist.overlay import HOLE, TISSUE, draw_heat, draw_outlines
from rlogist.tissue import Contour
from shared_core import InputError

REGIONS = Regions(np.array([(0, 0), (200, 100), (400, 300)]), np.zeros(3, np.int64), 100, 4)
SQUARE = np.array([(0, 0), (400, 0), (400, 400), (0, 400)], float)


def test_qupath_gets_rings_in_level_0_pixels_with_class_and_measurements(tmp_path):
    contour = Contour(SQUARE, [SQUARE / 4 + 100])
    features = tissue_features([contour]) + region_features(REGIONS, [2, 0], {"score": [0.5, 1.0]}, "Path")
    write_geojson(tmp_path / "a.geojson", features)
    stored = json.loads((tmp_path / "a.geojson").read_text())
    assert stored["type"] == "FeatureCollection"
    tissue, first, second = stored["features"]
    assert shapely.geometry.shape(tissue["geometry"]).area == 400**2 - 100**2
    assert shapely.geometry.shape(first["geometry"]).bounds == (400, 300, 500, 400)
    assert first["properties"]["classification"]["name"] == "Path"
    assert (first["properties"]["measurements"], second["properties"]["measurements"]) == (
        {"score": 0.5},
        {"score": 1.0},
    )
    for feature in stored["features"]:
        for ring in feature["geometry"]["coordinates"]:
            assert ring[0] == ring[-1]  # GeoJSON wants closed rings


def test_measurements_need_one_value_a_region():
    with pytest.raises(InputError, match=r"score: expected 3 values \(got 2\)"):
        region_features(REGIONS, None, {"score": [1, 2]})


def test_outlines_are_drawn_where_they_are_and_the_picture_is_kept():
    picture = np.full((100, 100, 3), 255, np.uint8)
    drawn = draw_outlines(picture, [Contour(SQUARE + 100, [SQUARE / 4 + 250])], downsample=8.0)
    assert tuple(drawn[12, 30]) == TISSUE
    assert tuple(drawn[31, 36]) == HOLE
    assert (picture == 255).all()


def test_heat_rises_from_dark_to_bright_and_leaves_unknown_regions():
    picture = np.full((50, 50, 3), 128, np.uint8)
    drawn = draw_heat(picture, REGIONS, np.array([0.0, 1.0, np.nan]), downsample=10.0, opacity=1.0)
    cold, hot, unknown = drawn[5, 5].astype(int), drawn[15, 25].astype(int), drawn[35, 45]
    assert cold.sum() < 60
    assert hot.sum() > 500
    assert tuple(unknown) == (128, 128, 128)
    assert tuple(drawn[45, 5]) == (128, 128, 128)
