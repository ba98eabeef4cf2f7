from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import openslide
import pytest

from rlogist.annotations import read_annotations
from rlogist.demo_nuclei import nuclei
from rlogist.demo_slides import (
    DemoWorld,
    _add_group,
    _layout,
    _light,
    _lobes,
    _outline,
    _plan,
    _quilt,
    _window,
    make_demo_slides,
    paint_slide,
)
from rlogist.layouts import patient_of, read_labels
from rlogist.slides import Slide
from rlogist.stain import StainExtractor
from shared_core import InputError

WORLD = DemoWorld(size=2048, groups=2, group_radius=260)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, make_demo_slides(folder, slides=4, slides_per_patient=2, seed=3, world=WORLD)


def test_slides_are_pyramids_that_openslide_opens(made):
    folder, slides = made
    with openslide.OpenSlide(folder / "slides" / f"{slides[0].name}.tif") as handle:
        assert handle.level_dimensions == ((2048, 2048), (512, 512), (128, 128))
        assert float(handle.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        small = np.asarray(handle.read_region((0, 0), 1, (512, 512)).convert("RGB")).astype(float)
        whole = np.asarray(handle.read_region((0, 0), 0, (2048, 2048)).convert("RGB")).astype(float)
    assert abs(whole.reshape(512, 4, 512, 4, 3).mean(axis=(1, 3)) - small).mean() < 6  # JPEG, twice


def test_labels_patients_and_annotations_agree(made):
    folder, slides = made
    records = read_labels(folder / "labels.csv", folder / "slides", known=["0", "1"])
    assert [record.label for record in records] == [str(slide.label) for slide in slides]
    assert [record.patient for record in records] == [patient_of(slide.name) for slide in slides]
    labels = [slide.label for slide in slides]
    assert labels[0] == labels[1] != labels[2] == labels[3]  # a patient's slides are alike; classes are even
    for slide in slides:
        path = folder / "annotations" / f"{slide.name}.xml"
        assert path.exists() == bool(slide.label)
        if slide.label:
            assert len(read_annotations(path)) == WORLD.tumour_groups
    with open(folder / "labels.csv", encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["WSI_path", "label", "patient"]


def test_the_same_seed_paints_the_same_pixels(made):
    _, slides = made
    assert np.array_equal(paint_slide(slides[0], WORLD), paint_slide(slides[0], WORLD))
    assert not np.array_equal(paint_slide(slides[0], WORLD), paint_slide(slides[1], WORLD))


def test_slides_that_are_there_are_kept(made):
    folder, _ = made
    before = {path: os.stat(path).st_mtime_ns for path in (folder / "slides").glob("*.tif")}
    make_demo_slides(folder, slides=4, slides_per_patient=2, seed=3, world=WORLD)
    assert {path: os.stat(path).st_mtime_ns for path in (folder / "slides").glob("*.tif")} == before


def test_most_of_the_slide_is_tissue_and_has_regions(made):
    folder, slides = made
    slide = Slide(folder / "slides" / f"{slides[0].name}.tif", patch=64)
    assert 0.4 < slide.tissue.area() / 2048**2 < 0.95
    assert len(slide.regions) > 25


@pytest.mark.parametrize("world", [WORLD, DemoWorld(), DemoWorld(size=1024, group_radius=90)])
def test_groups_lie_in_tissue(world):
    plan = [_plan(index, slides_per_patient, 5) for slides_per_patient in (1, 3) for index in range(8)]
    for entry in plan:
        tissue = _outline(world.size, _lobes(entry))
        made = _layout(entry, world)[0]
        outlines = made.tumours + made.mimics
        assert len(outlines) == world.groups
        for x, y in np.concatenate(outlines).round().astype(int):
            assert tissue[y, x] == 1


def test_tiles_add_up_to_one_everywhere():
    window = _window()[:, :, 0]
    canvas = np.zeros((192 * 4 + 64, 192 * 4 + 64))
    for row in range(4):
        for column in range(4):
            canvas[row * 192 : row * 192 + 256, column * 192 : column * 192 + 256] += window
    np.testing.assert_allclose(canvas[64:-64, 64:-64], 1, atol=1e-6)


def test_reduced_a_mimic_absorbs_the_same_light_as_a_tumour_nucleus_and_deep_it_does_not():
    stamps = nuclei(WORLD.density)
    light = {kind: 10.0**-stamp for kind, stamp in stamps.items()}
    reduced = {kind: value.reshape(-1, 10, 4, 10, 4, 3).mean(axis=(2, 4)) for kind, value in light.items()}
    contrast = (1 - reduced["tumour"]).max()
    assert abs(reduced["tumour"] - reduced["mimic"]).mean() < 0.04 * contrast
    assert abs(reduced["tumour"] - reduced["mimic"]).max() < 0.35 * contrast
    inside = light["tumour"] < 0.9
    assert abs(light["tumour"] - light["mimic"])[inside].mean() > 0.2 * contrast


def regions_of_group(number: int, share: float) -> np.ndarray:
    """Nine regions of 256 x 256 pixels inside a group of tumour (share of its nuclei) or mimics."""
    rng = np.random.default_rng(number)
    density = _quilt(1024, rng, rng.uniform(0.85, 1.15, 3).astype(np.float32))
    square = np.array([(64, 64), (960, 64), (960, 960), (64, 960)], float)
    _add_group(density, square, share, WORLD, rng)
    block = _light(density)[128:896, 128:896]
    return block.reshape(3, 256, 3, 256, 3).transpose(0, 2, 1, 3, 4).reshape(9, 256, 256, 3)


def held_out_auc(features: np.ndarray, tumour: np.ndarray) -> float:
    """Ridge regression on the first half, area under the curve on the second (Mann-Whitney, pair by pair)."""
    half = len(features) // 2
    centre, spread = features[:half].mean(0), features[:half].std(0) + 1e-6
    x = (features - centre) / spread
    weights = np.linalg.solve(
        x[:half].T @ x[:half] + 10 * np.eye(x.shape[1]), x[:half].T @ (tumour[:half] - 0.5)
    )
    score, truth = x[half:] @ weights, tumour[half:].astype(bool)
    return float((score[truth][:, None] > score[~truth][None]).mean())


def test_a_deep_look_tells_tumour_from_mimic_much_better_than_the_scan():
    extractor = StainExtractor()
    deep, scan, tumour = [], [], []
    for number in range(24):
        for region in regions_of_group(number, 0.8 * (number % 2)):
            tiles = region.reshape(4, 64, 4, 64, 3).transpose(0, 2, 1, 3, 4).reshape(16, 64, 64, 3)
            deep.append(extractor(np.ascontiguousarray(tiles)).mean(0).numpy())
            reduced = np.round(region.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))).astype(np.uint8)
            scan.append(extractor(reduced[None])[0].numpy())
            tumour.append(number % 2)
    deep_auc, scan_auc = (held_out_auc(np.array(x), np.array(tumour)) for x in (deep, scan))
    assert deep_auc > 0.9
    assert scan_auc < 0.8


def test_settings_and_counts_are_checked(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"size: expected a multiple of 256, at least 1024 pixels \(got 1000\)"
    ):
        DemoWorld(size=1000)
    with pytest.raises(InputError, match="tumour_groups: expected 1 to `groups`"):
        DemoWorld(groups=2, tumour_groups=3)
    with pytest.raises(InputError, match="expected at least 1"):
        make_demo_slides(tmp_path, slides=0)
    with pytest.raises(InputError, match="group_radius: 4 groups of this radius do not fit"):
        make_demo_slides(tmp_path, slides=1, world=DemoWorld(size=1024))
