"""What the command does with each slide of a folder, as functions that processes and clusters can run."""

import csv
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from rlogist.extractors import Extractor, load_extractor
from rlogist.features import extract_features, read_features
from rlogist.geojson import region_features, tissue_features, write_geojson
from rlogist.layouts import find_slides
from rlogist.overlay import draw_outlines
from rlogist.parallel import Done, run_all
from rlogist.slides import OneLevelWarning, Slide
from rlogist.tissue import Segmentation
from shared_core import InputError, files
from shared_core.files import make_folder


@dataclass(frozen=True)
class Opening:
    """How slides are opened; as the arguments of `Slide`."""

    scan_mpp: float = 2.0
    deep_mpp: float = 0.5
    patch: int = 256
    mpp: float | None = None
    segmentation: Segmentation = field(default_factory=Segmentation)

    def open(self, path: Path) -> Slide:
        """The slide. Its one-level warning is in `Slide.messages`, and not said once more."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OneLevelWarning)
            return Slide(
                path,
                scan_mpp=self.scan_mpp,
                deep_mpp=self.deep_mpp,
                patch=self.patch,
                mpp=self.mpp,
                segmentation=self.segmentation,
            )


@dataclass(frozen=True)
class Encoding:
    """How patches are encoded: arguments of `load_extractor`, and whether regions are read at depth."""

    extractor: str = "resnet50"
    pretrained: bool = True
    weights: Path | None = None
    device: str = "cpu"
    batch_size: int = 32
    deep: bool = False

    @property
    def gpus(self) -> int:
        """How many GPUs a job needs."""
        return int(self.device.startswith("cuda"))

    def load(self) -> Extractor:
        """The extractor; made once in each process."""
        key = (self.extractor, self.pretrained, self.weights, self.device, self.batch_size)
        if key not in _loaded:
            _loaded[key] = load_extractor(
                self.extractor,
                pretrained=self.pretrained,
                weights=self.weights,
                device=self.device,
                batch_size=self.batch_size,
            )
        return _loaded[key]


_loaded: dict[Any, Extractor] = {}


@dataclass(frozen=True)
class Job:
    """One slide: where it is, and the path of its results without a suffix."""

    slide: Path
    out: Path
    opening: Opening
    encoding: Encoding | None = None


def segment_slide(job: Job) -> dict[str, object]:
    """Write outlines and grid of one slide: NAME.json, NAME.geojson for QuPath, NAME.png to look at."""
    with job.opening.open(job.slide) as slide:
        tissue, regions = slide.tissue, slide.regions
        picture = slide.thumbnail()
        scale = slide.size[0] / picture.shape[1]
        report: dict[str, object] = {
            "slide": str(job.slide),
            "status": "done" if tissue else "no tissue",
            "width": slide.size[0],
            "height": slide.size[1],
            "mpp": slide.mpp,
            "contours": len(tissue.contours),
            "tissue_share": tissue.area() / (slide.size[0] * slide.size[1]),
            "regions": len(regions),
            "patches_per_region": slide.geometry.patches_per_region,
            "region_size_level0": slide.geometry.scan.footprint,
            "coords": regions.xy,
            "messages": slide.messages,
            "ledger": slide.ledger.to_dict(),
        }
    make_folder(job.out.parent)
    features = tissue_features(tissue.contours) + region_features(regions)
    write_geojson(job.out.with_name(job.out.name + ".geojson"), features)
    with files.atomic_path(job.out.with_name(job.out.name + ".png")) as temporary:
        Image.fromarray(draw_outlines(picture, tissue.contours, scale)).save(temporary)
    files.write_json(job.out.with_name(job.out.name + ".json"), report)
    return {key: report[key] for key in ("status", "regions", "messages")}


def extract_slide(job: Job) -> dict[str, object]:
    """Write the features of one slide to NAME.h5. A file that is there and was made alike is kept."""
    if job.encoding is None:
        raise ValueError("extract_slide needs an encoding")
    target = job.out.with_name(job.out.name + ".h5")
    extractor = job.encoding.load()
    with job.opening.open(job.slide) as slide:
        if target.exists() and _made_alike(target, slide, extractor, job.encoding.deep):
            return {"status": "kept", "regions": len(slide.regions), "messages": []}
        make_folder(job.out.parent)
        found = extract_features(slide, extractor, target, deep=job.encoding.deep)
        return {
            "status": "done" if slide.tissue else "no tissue",
            "regions": len(found),
            "messages": [*slide.messages, *slide.unreadable.values()],
        }


def _made_alike(target: Path, slide: Slide, extractor: Extractor, deep: bool) -> bool:
    found = read_features(target)
    wanted = {
        "fingerprint": extractor.fingerprint,
        "patch_size": slide.geometry.patch,
        "patch_size_level0": slide.geometry.scan.footprint,
        "patch_level": slide.geometry.scan.level,
        "deep_side": slide.geometry.side,
        "grid_regions": len(slide.regions),
    }
    if any(found.attributes.get(key) != value for key, value in wanted.items()) or (
        deep and found.deep is None
    ):
        raise InputError("was made with other settings: delete it, or write to another folder", file=target)
    return True


def run_folder(
    work: Callable[[Any], dict[str, object]],
    slides: Path,
    out: Path,
    job: Callable[[Path, Path], Job],
    jobs: int = 1,
    backend: Literal["process", "ray"] = "process",
    progress: Callable[[int, int], None] | None = None,
    gpus: float = 0,
) -> tuple[list[Path], list[Done]]:
    """Do the same with a slide or all slides under a folder; results mirror the folder's structure in `out`.

    `out/slides.csv` lists slide, status, regions and error of each.

    Args:
        work: What is done with one job.
        slides: A slide or a folder.
        out: Folder for results.
        job: Makes a job of a slide and the path of its results without a suffix.
        jobs: Processes.
        backend: As in `run_all`.
        progress: Called with (slides done, slides in all).
        gpus: As in `run_all`.

    Returns:
        The slides, and what became of each.

    Raises:
        InputError: No slides, or `out` cannot be written to. Faults of single slides are in the result.
    """
    paths = find_slides(slides)
    make_folder(out)
    root = slides if slides.is_dir() else slides.parent
    names = [path.relative_to(root).with_suffix("") for path in paths]
    if len(set(names)) < len(names):  # a.svs beside a.tif
        names = [path.relative_to(root) for path in paths]
    # Whole paths: processes of a cluster were started elsewhere.
    tasks = [job(path.absolute(), out.absolute() / name) for path, name in zip(paths, names, strict=True)]
    done = run_all(work, tasks, jobs=jobs, backend=backend, progress=progress, gpus=gpus)
    files.write_text(out / "slides.csv", _table(paths, done))
    return paths, done


def _table(paths: Sequence[Path], done: Sequence[Done]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slide", "status", "regions", "error"])
    for path, one in zip(paths, done, strict=True):
        result = one.result or {}
        writer.writerow(
            [path, "failed" if one.error else result["status"], result.get("regions", ""), one.error or ""]
        )
    return text.getvalue()
