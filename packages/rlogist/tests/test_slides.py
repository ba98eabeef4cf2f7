from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import openslide
import pytest
from generated_slides import damage, lossless, tissue_picture, tissue_slide
from PIL import Image

from rlogist.demo_slides import real_slide_bytes
from rlogist.slides import OneLevelWarning, Slide, UnreadableRegion, _on_white
from shared_core import InputError


def coded(size: int, step: int, margin: int = 96) -> np.ndarray:
    """Every pixel says where it is: red and green hold its x and y in steps of 16; white at the rim."""
    y, x = np.mgrid[:size, :size] * step
    picture = np.stack([x // 16, y // 16, np.full_like(x, 200)], axis=-1).astype(np.uint8)
    rim = (np.minimum(x, y) < margin) | (np.maximum(x, y) >= size * step - margin)
    picture[rim] = 255
    return picture


@pytest.fixture
def coded_slide(tmp_path: Path) -> Slide:
    levels = [coded(2048, 1), coded(512, 4), coded(128, 16)]
    return Slide(lossless(tmp_path / "coded.tif", levels), patch=64)


class Spy:
    """Stands for an OpenSlide handle and notes what is asked of it."""

    def __init__(self, handle: openslide.OpenSlide) -> None:
        self._handle, self.asked = handle, []

    def read_region(self, location, level, size):
        self.asked.append((level, size[0] * size[1]))
        return self._handle.read_region(location, level, size)

    def __getattr__(self, name):
        return getattr(self._handle, name)


def test_coordinates_are_level_0_pixels_at_every_magnification(coded_slide: Slide):
    regions = coded_slide.regions
    assert len(regions) > 20
    assert regions.xy.min() >= 64  # the grid starts at the outline, not at the corner
    interior = [i for i, (x, y) in enumerate(regions.xy) if max(x, y) + 256 < 2048 - 112 and min(x, y) >= 112]
    assert len(interior) > 10
    for i in interior:
        block = coded_slide.read_region_block(i)
        for patch, (x, y) in zip(block, regions.deep_xy(i), strict=True):
            for dx, dy in ((0, 0), (63, 0), (0, 63), (40, 20)):
                assert tuple(patch[dy, dx]) == ((x + dx) // 16, (y + dy) // 16, 200)
        scan, (x, y) = coded_slide.scan_patch(i), regions.xy[i]
        for dx, dy in ((1, 1), (62, 1), (1, 62), (33, 17)):
            got = scan[dy, dx].astype(int)
            # a read that is not aligned to the level may lie up to one of its pixels beside
            assert abs(got - ((x + 4 * dx) // 16, (y + 4 * dy) // 16, 200)).max() <= 1


def test_the_k_patches_of_a_region_come_from_one_read(coded_slide: Slide):
    assert len(coded_slide.regions)
    coded_slide._handle = spy = Spy(coded_slide._handle)
    patches = coded_slide.read_region_block(3)
    assert patches.shape == (16, 64, 64, 3)
    assert spy.asked == [(0, 256 * 256)]


def test_the_ledger_holds_exactly_the_pixels_that_were_read(coded_slide: Slide):
    coded_slide._handle = spy = Spy(coded_slide._handle)
    for _ in coded_slide.scan_patches():
        pass
    for region in (0, 5, 7, 5, 0):
        coded_slide.read_region_block(region)
    coded_slide.thumbnail(256)
    levels = coded_slide.ledger.levels()
    for level in {level for level, _ in spy.asked}:
        sizes = [pixels for at, pixels in spy.asked if at == level]
        assert (levels[level].reads, levels[level].pixels) == (len(sizes), sum(sizes))
    assert sum(tally.reads for tally in levels.values()) == len(spy.asked)
    assert (
        coded_slide.ledger.total("deep").pixels == 3 * 16 * 64**2
    )  # T regions, K patches; repeats are cached
    assert coded_slide.ledger.total("scan").reads == len(coded_slide.regions)
    assert coded_slide.stats["reads"]


def test_deep_pixels_are_not_read_before_they_are_asked_for(coded_slide: Slide):
    for _ in coded_slide.scan_patches():
        pass
    assert coded_slide.ledger.total("deep", "prefetch").reads == 0
    assert 0 not in coded_slide.ledger.levels()


def test_a_full_cache_forgets_and_reads_again(tmp_path: Path):
    slide = Slide(tissue_slide(tmp_path / "a.tif"), patch=64, cache_bytes=1)
    first = slide.read_region_block(0)
    slide.read_region_block(1)
    assert np.array_equal(slide.read_region_block(0), first)
    assert slide.ledger.total("deep").reads == 3


def test_pixels_outside_the_slide_are_white(tmp_path: Path):
    picture = np.full((512, 512, 3), (180, 60, 150), np.uint8)  # tissue up to the edge
    small = picture[::4, ::4], picture[::16, ::16]
    slide = Slide(lossless(tmp_path / "edge.tif", [picture, *map(np.ascontiguousarray, small)]), patch=48)
    over = [i for i, (x, y) in enumerate(slide.regions.xy) if x + 192 > 512 and y + 192 > 512]
    assert over
    corner = slide.read_region_block(over[0])[-1]
    assert (corner == 255).all()
    assert (slide.scan_patch(over[0])[-8:, -8:] == 255).all()


def test_transparent_pixels_are_painted_on_white_as_pillow_does():
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (40, 40, 4)).astype(np.uint8)
    rgba[:10] = 0  # what OpenSlide gives where nothing was scanned
    canvas = Image.new("RGBA", (40, 40), "white")
    canvas.alpha_composite(Image.fromarray(rgba))
    painted = _on_white(rgba)
    assert (painted[:10] == 255).all()
    assert abs(painted.astype(int) - np.asarray(canvas)[:, :, :3]).max() <= 1


def test_a_path_may_have_any_letters(tmp_path: Path):
    folder = tmp_path / "Gewebe 組織 é"
    folder.mkdir()
    assert len(Slide(tissue_slide(folder / "größe ½.tif"), patch=64).regions)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * 64, "a PNG picture"),
        (b"hello, slide" * 9, "unknown format"),
    ],
)
def test_a_file_that_is_no_slide_is_named_with_what_it_is(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "x.tif"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        Slide(path)
    assert str(path) in str(caught.value)


def test_a_truncated_slide_is_told(tmp_path: Path):
    path = tissue_slide(tmp_path / "whole.tif")
    (tmp_path / "cut.tif").write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="truncated"):
        Slide(tmp_path / "cut.tif")


def test_a_tiff_of_strips_is_told(tmp_path: Path):
    path = lossless(tmp_path / "strips.tif", [tissue_picture(256, 256, 32)], tile=None)
    with pytest.raises(InputError, match="TIFF of strips, expected a tiled one"):
        Slide(path)


def test_a_missing_file_is_told(tmp_path: Path):
    with pytest.raises(InputError, match="there is no such file"):
        Slide(tmp_path / "none.svs")


def test_resolution_is_never_guessed(tmp_path: Path):
    levels = [coded(1024, 1), coded(256, 4)]
    path = lossless(tmp_path / "x.tif", levels, mpp=None)
    with pytest.raises(InputError, match=r"does not state its microns per pixel.*--mpp"):
        Slide(path, patch=64)
    assert Slide(path, patch=64, mpp=0.5).levels[1].mpp == 2.0
    with pytest.raises(InputError, match="mpp: expected microns per pixel above 0"):
        Slide(path, mpp=-1.0)


def test_resolutions_that_the_slide_lacks_are_answered_with_those_it_has(tmp_path: Path):
    path = tissue_slide(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"deep_mpp: the slide's finest.*it has 0\.5, 2, 8.*got 0\.25"):
        Slide(path, deep_mpp=0.25, scan_mpp=1.0)
    with pytest.raises(InputError, match=r"scan_mpp: the slide's coarsest.*it has 0\.5, 2, 8.*got 16"):
        Slide(path, deep_mpp=0.5, scan_mpp=16.0)


def test_one_level_is_scanned_from_deep_pixels_once_with_a_warning(tmp_path: Path):
    path = lossless(tmp_path / "one.tif", [tissue_picture()])
    with pytest.warns(OneLevelWarning, match=r"one\.tif: no level is coarser.*nothing is saved"):
        slide = Slide(path, patch=64)
    scan = slide.scan_patch(2)
    block = slide.read_region_block(2)
    assert slide.ledger.total("scan", "deep").reads == 1  # the same pixels are not read twice
    assert slide.deep_share(slide.ledger) == 1 / len(slide.regions)  # the scan's pixels are deep ones
    whole = block.reshape(4, 4, 64, 64, 3).transpose(0, 2, 1, 3, 4).reshape(256, 256, 3)
    means = whole.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert abs(scan - means).max() <= 0.51
    assert "nothing is saved" in slide.ledger.notes[0]


def test_levels_in_subifds_are_told_of(tmp_path: Path):
    levels = [coded(1024, 1), coded(256, 4), coded(64, 16)]
    path = lossless(tmp_path / "sub.tif", levels, subifds=True)
    with pytest.warns(OneLevelWarning, match="2 reduced pictures in SubIFDs"):
        Slide(path, patch=64)


def test_a_damaged_tile_costs_its_region_and_not_the_slide(tmp_path: Path):
    path = tissue_slide(tmp_path / "x.tif", height=2048, width=2048)
    damage(path, page=0, tile=2 * 8 + 2)  # level-0 pixels 512..767 in x and y
    slide = Slide(path, patch=64)
    boxes = slide.regions.boxes()
    touches = (boxes[:, :2] < 768).all(1) & (boxes[:, 2:] > 512).all(1)
    assert 0 < touches.sum() < len(boxes)
    bad = set()
    for region in range(len(boxes)):
        try:
            slide.read_region_block(region)
        except UnreadableRegion:
            bad.add(region)
    assert bad == set(np.flatnonzero(touches)) == set(slide.unreadable)
    assert len(slide.ledger.notes) == len(bad)
    reads = slide.ledger.total("deep").reads
    with pytest.raises(UnreadableRegion, match="damaged"):
        slide.read_region_block(min(bad))
    assert slide.ledger.total("deep").reads == reads  # what is known to be damaged is not read again


def test_damaged_scan_regions_are_left_out(tmp_path: Path):
    path = tissue_slide(tmp_path / "x.tif", height=2048, width=2048)
    damage(path, page=1, tile=0)
    slide = Slide(path, patch=64)
    kept = [i for indices, _ in slide.scan_patches(batch=7) for i in indices]
    assert set(kept) | set(slide.unreadable) == set(range(len(slide.regions)))
    assert slide.unreadable
    assert kept


def test_a_damaged_level_costs_the_picture_its_sharpness_only(tmp_path: Path):
    path = tissue_slide(tmp_path / "x.tif")
    whole = Slide(path).thumbnail(256)
    damage(path, page=1, tile=0)
    slide = Slide(path)
    picture = slide.thumbnail(256)
    assert picture.shape == whole.shape
    assert abs(picture.astype(int) - whole).mean() < 12
    assert "level 1 is damaged" in slide.ledger.notes[0]
    damage(path, page=2, tile=0)
    with pytest.raises(InputError, match="no level from 1 on gives a whole picture"):
        Slide(path).thumbnail(256)


def test_a_slide_without_tissue_has_no_regions(tmp_path: Path):
    white = np.full((1024, 1024, 3), 244, np.uint8)
    slide = Slide(lossless(tmp_path / "x.tif", [white, white[::4, ::4].copy(), white[::16, ::16].copy()]))
    assert not slide.tissue
    assert len(slide.regions) == 0
    assert list(slide.scan_patches()) == []


def test_a_slide_too_large_to_segment_is_refused_before_reading(tmp_path: Path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OneLevelWarning)
        slide = Slide(lossless(tmp_path / "x.tif", [tissue_picture()]), patch=64)
    monkeypatch.setattr("rlogist.slides.MAX_PIXELS", 10**6)
    with pytest.raises(InputError, match=r"1024 x 1024 pixels, expected at most 1,000,000.*more levels"):
        _ = slide.regions
    assert slide.ledger.total().reads == 0


def test_a_region_that_is_not_there_is_an_index_error(coded_slide: Slide):
    with pytest.raises(IndexError, match="expected a region from 0 to"):
        coded_slide.read_region_block(len(coded_slide.regions))


def test_a_slide_goes_to_another_process(coded_slide: Slide):
    expected = coded_slide.read_region_block(1)
    other = pickle.loads(pickle.dumps(coded_slide))
    assert np.array_equal(other.read_region_block(1), expected)
    assert other.ledger.total("deep").reads == 2


def test_the_same_slide_gives_the_same_pixels_whichever_levels_it_has(tmp_path: Path):
    """At 1.0 over levels of 0.5 and 2.0 microns per pixel, patches are made from the finer one."""
    path = tissue_slide(tmp_path / "x.tif")
    slide = Slide(path, scan_mpp=2.0, deep_mpp=1.0, patch=64)
    assert (slide.geometry.deep.level, slide.geometry.deep.read, slide.geometry.patches_per_region) == (
        0,
        128,
        4,
    )
    block = slide.read_region_block(0)
    x, y = (int(v) for v in slide.regions.xy[0])
    with openslide.OpenSlide(path) as handle:
        pixels = np.asarray(handle.read_region((x, y), 0, (256, 256)))[:, :, :3].astype(float)
    means = pixels.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    whole = block.reshape(2, 2, 64, 64, 3).transpose(0, 2, 1, 3, 4).reshape(128, 128, 3)
    assert abs(whole - means).max() <= 0.76
    assert slide.ledger.total("deep").pixels == 256**2  # what was read, not what came of it


def test_the_real_slide_goes_the_whole_way(tmp_path: Path):
    path = tmp_path / "cmu.svs"
    path.write_bytes(real_slide_bytes())
    with pytest.warns(OneLevelWarning, match="nothing is saved"):
        slide = Slide(path, scan_mpp=1.996, deep_mpp=0.499, patch=64)
    assert slide.size == (2220, 2967)
    assert 0.25 < slide.tissue.area() / (2220 * 2967) < 0.6
    patches = np.stack([slide.scan_patch(i) for i in range(0, len(slide.regions), 6)])
    assert patches.mean() < 235  # stained, not glass
    assert patches[..., 1].mean() < patches[..., 0].mean()  # haematoxylin and eosin absorb green most
