from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from generated_slides import damage, tissue_slide

from rlogist.features import SlideFeatures, extract_features, read_features, write_features
from rlogist.slides import Slide
from rlogist.stain import StainExtractor
from shared_core import InputError


def opened(path: Path) -> Slide:
    return Slide(path, patch=32)  # 128 level-0 pixels a region


def parts_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tissue_slide(tmp_path / "x.tif", height=1536, width=1536)


def test_features_are_those_of_each_region_and_its_patches(path: Path, tmp_path: Path):
    extractor = StainExtractor()
    slide = opened(path)
    extract_features(slide, extractor, tmp_path / "x.h5", deep=True)
    found = read_features(tmp_path / "x.h5", extractor)
    assert len(found) == len(slide.regions) > 70  # three chunks
    for i in (0, 33, len(found) - 1):
        torch.testing.assert_close(
            torch.from_numpy(found.features[i]), extractor(slide.scan_patch(i)[None])[0], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(found.deep[i], extractor(slide.read_region_block(i)), rtol=1e-5, atol=1e-6)
    assert np.array_equal(found.coords, slide.regions.xy)
    assert found.attributes["patch_size_level0"] == 128
    assert found.ledger.total("deep").pixels == len(found) * 16 * 32**2
    assert found.ledger.total("segment").reads == 1


class DiesAfter(StainExtractor):
    """Kills its process, as a power cut would, after some calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, patches):
        self.left -= 1
        if self.left < 0:
            os._exit(9)
        return super().__call__(patches)


def _extract_and_die(path: Path, out: Path) -> None:
    extract_features(opened(path), DiesAfter(50), out, deep=True)


def test_a_killed_extraction_goes_on_and_ends_with_the_same_bits(path: Path, tmp_path: Path):
    out = tmp_path / "x.h5"
    child = multiprocessing.get_context("fork").Process(target=_extract_and_die, args=(path, out))
    child.start()
    child.join(60)
    assert child.exitcode == 9
    assert not out.exists()
    assert len(list(parts_of(out).glob("*.npz"))) == 1  # a chunk is 32 regions, each and all of them one call
    slide = opened(path)
    resumed = extract_features(slide, StainExtractor(), out, deep=True)
    whole = extract_features(opened(path), StainExtractor(), tmp_path / "whole.h5", deep=True)
    for name in ("coords", "features", "deep", "region_index"):
        assert np.array_equal(getattr(resumed, name), getattr(whole, name))
    assert slide.ledger.total("deep").reads == len(whole) - 32  # what was done is not done again
    assert resumed.ledger.total("deep").pixels == whole.ledger.total("deep").pixels
    assert not parts_of(out).exists()


def test_chunks_of_other_settings_are_dropped(path: Path, tmp_path: Path):
    out = tmp_path / "x.h5"
    child = multiprocessing.get_context("fork").Process(target=_extract_and_die, args=(path, out))
    child.start()
    child.join(60)
    assert parts_of(out).is_dir()
    slide = Slide(path, patch=48)
    found = extract_features(slide, StainExtractor(), out, deep=True)
    assert slide.ledger.total("deep").reads == len(found) == len(slide.regions)


def test_a_damaged_region_is_left_out_and_noted(path: Path, tmp_path: Path):
    damage(path, page=0, tile=7)
    slide = opened(path)
    found = extract_features(slide, StainExtractor(), tmp_path / "x.h5", deep=True)
    assert slide.unreadable
    assert sorted([*found.region_index.tolist(), *slide.unreadable]) == list(range(len(slide.regions)))
    again = read_features(tmp_path / "x.h5")
    assert len(again.ledger.notes) == len(slide.unreadable)
    assert np.array_equal(again.coords, slide.regions.xy[again.region_index])


def test_a_slide_without_tissue_gives_an_empty_file(tmp_path: Path):
    slide = opened(tissue_slide(tmp_path / "x.tif", height=512, width=512, margin=255))
    assert len(extract_features(slide, StainExtractor(), tmp_path / "x.h5", deep=True)) == 0
    found = read_features(tmp_path / "x.h5")
    assert (found.features.shape, found.deep.shape) == ((0, 36), (0, 16, 36))


def test_features_that_are_not_numbers_are_refused_and_nothing_is_written(path: Path, tmp_path: Path):
    class Broken(StainExtractor):
        def __call__(self, patches):
            return super().__call__(patches) * float("nan")

    with pytest.raises(InputError, match="stain gives NaN or infinite scan features"):
        extract_features(opened(path), Broken(), tmp_path / "x.h5")
    assert not (tmp_path / "x.h5").exists()


def test_an_output_folder_that_is_not_there_is_told_before_reading(path: Path, tmp_path: Path):
    slide = opened(path)
    with pytest.raises(InputError, match="cannot be written: there is no folder"):
        extract_features(slide, StainExtractor(), tmp_path / "none" / "x.h5")
    assert slide.ledger.total("scan", "deep").reads == 0


def features(n: int = 4, dim: int = 3) -> np.ndarray:
    return np.arange(n * dim, dtype=np.float32).reshape(n, dim)


def test_clams_files_are_read(tmp_path: Path):
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["features"] = features()
        file["coords"] = np.arange(8).reshape(4, 2).astype(np.int32)
        file["coords"].attrs["patch_size"] = 256
        file["coords"].attrs["patch_level"] = 1
    found = read_features(tmp_path / "c.h5")
    assert np.array_equal(found.features, features())
    assert found.coords.dtype == np.int64
    assert (found.attributes["patch_size"], found.attributes["patch_level"]) == (256, 1)
    assert found.deep is None
    assert found.region_index.tolist() == [0, 1, 2, 3]


def test_tridents_files_are_read(tmp_path: Path):
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["features"] = features()[None].astype(np.float16)
        file["coords"] = np.arange(8).reshape(1, 4, 2)
        file["coords"].attrs["patch_size_level0"] = 512
        file["features"].attrs["encoder"] = "uni"
    found = read_features(tmp_path / "t.h5")
    assert found.features.shape == (4, 3)
    assert found.features.dtype == np.float32
    assert found.attributes["patch_size_level0"] == 512


def test_own_files_are_clam_files_too(tmp_path: Path):
    own = SlideFeatures(
        np.arange(8).reshape(4, 2), features(), None, np.arange(4), {"patch_size": 64, "patch_level": 1}
    )
    write_features(tmp_path / "o.h5", own)
    with h5py.File(tmp_path / "o.h5") as file:
        assert file["features"].shape == (4, 3)
        assert file["coords"].attrs["patch_size"] == 64
        assert file["coords"].attrs["patch_level"] == 1


def test_wrong_files_are_refused_with_the_reason(tmp_path: Path):
    path = tmp_path / "w.h5"
    with pytest.raises(InputError, match="there is no such file"):
        read_features(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="not a whole HDF5 file"):
        read_features(path)
    good = {"features": features(), "coords": np.zeros((4, 2), int)}
    for change, words in [
        ({"coords": None}, "missing: coords"),
        ({"coords": np.zeros((3, 2), int)}, r"expected features \(n, dim\) and coords \(n, 2\)"),
        ({"deep_features": np.zeros((4, 2, 5))}, "deep_features: expected 4 x K x 3"),
        ({"features": np.full((4, 3), np.nan)}, "features: 4 rows have NaN or infinite values"),
    ]:
        with h5py.File(path, "w") as file:
            for name, value in (good | change).items():
                if value is not None:
                    file[name] = value
        with pytest.raises(InputError, match=words):
            read_features(path)


def test_features_of_another_extractor_are_refused(tmp_path: Path):
    path = tmp_path / "x.h5"
    coords = np.zeros((4, 2), np.int64)
    write_features(path, SlideFeatures(coords, features(), None, np.arange(4)))
    with pytest.raises(InputError, match="has 3-d features, expected 36-d ones of stain"):
        read_features(path, StainExtractor())
    write_features(path, SlideFeatures(coords, features(4, 36), None, np.arange(4), {"fingerprint": "else"}))
    with pytest.raises(InputError, match=r"fingerprint: was made by another extractor than stain.*'else'"):
        read_features(path, StainExtractor())


def test_an_interrupted_write_leaves_the_old_file(path: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "x.h5"
    extract_features(opened(path), StainExtractor(), out)
    before = out.read_bytes()
    monkeypatch.setattr(
        h5py.File, "create_dataset", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        extract_features(opened(path), StainExtractor(), out)
    assert out.read_bytes() == before
    shutil.rmtree(parts_of(out))
