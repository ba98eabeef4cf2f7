"""What the command does with a model: train from feature files, read a folder of slides, judge, report."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlogist.annotations import read_annotations
from rlogist.evaluate import accuracy, auc, auc_interval, f1, hit_rate
from rlogist.features import read_features
from rlogist.layouts import SlideRecord, read_labels, split_patients
from rlogist.model import Reading, RLogist
from rlogist.report import write_report
from rlogist.slide_jobs import Encoding, Job
from rlogist.sources import Bag, bag_of
from shared_core import InputError, files
from shared_core.files import make_folder


@dataclass(frozen=True)
class AgentJob(Job):
    """One slide to read with a model."""

    model: Path = Path()
    rho: float | None = None
    strategy: Reading = "policy"
    report: bool = False


_loaded: dict[tuple[Path, Encoding | None], RLogist] = {}


def load_model(folder: Path, encoding: Encoding | None = None) -> RLogist:
    """The model, loaded once in each process.

    Args:
        folder: Where it is.
        encoding: How its encoder is loaded; as its name says where None.

    Raises:
        InputError: As `RLogist.from_pretrained`, or the encoder is not the one of training.
    """
    key = folder, encoding
    if key not in _loaded:
        model = RLogist.from_pretrained(folder, None if encoding is None else encoding.load())
        _loaded[key] = model if encoding is None else model.to(encoding.device)
    return _loaded[key]


def predict_slide(job: AgentJob) -> dict[str, object]:
    """Read one slide and write NAME.json; with `report` NAME.html and NAME.geojson too.

    An answer that is there, of the same file, model and options, is kept: an interrupted folder goes on.
    """
    model = load_model(job.model, job.encoding)
    target, page = (job.out.with_name(job.out.name + suffix) for suffix in (".json", ".html"))
    made_with = _made_with(job)
    kept = _kept(target, made_with) if page.exists() or not job.report else None
    if kept is not None:
        return {"status": f"kept: {_status(kept)}", "regions": kept["regions"], "messages": []}
    with job.opening.open(job.slide) as slide:
        found = model.predict(slide, rho=job.rho, strategy=job.strategy)
        make_folder(job.out.parent)
        if job.report:
            write_report(page, slide, found)
        stored = {**found.to_dict(), "footprint": slide.geometry.scan.footprint, "made_with": made_with}
        files.write_json(target, stored)  # last: where it is, all is there
        return {
            "status": _status(stored),
            "regions": found.regions,
            "messages": [*slide.messages, *slide.unreadable.values()],
        }


def _status(stored: Mapping[str, Any]) -> str:
    if stored["status"] == "no tissue":
        return "no tissue"
    looks, seconds = stored["looks"], stored["seconds"]
    return f"{stored['label']} {max(stored['probability']):.3f}, {looks} looks, {seconds:.2f} s"


def _made_with(job: AgentJob) -> dict[str, Any]:
    """All that an answer depends on; how fast it is found (device, batch) is left out."""
    if job.model not in _digests:
        digest = hashlib.sha256()
        for name in ("config.json", "model.safetensors"):
            digest.update((job.model / name).read_bytes())
        _digests[job.model] = digest.hexdigest()[:16]
    state = job.slide.stat()
    return {
        "model": _digests[job.model],
        "slide": [str(job.slide), state.st_size, state.st_mtime_ns],
        "opening": asdict(job.opening),
        "rho": job.rho,
        "strategy": job.strategy,
    }


_digests: dict[Path, str] = {}


def _kept(target: Path, made_with: Mapping[str, Any]) -> dict[str, Any] | None:
    """The stored answer, if it was made with just this."""
    try:
        stored = json.loads(target.read_text(encoding="utf-8"))
        return stored if stored["made_with"] == made_with else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Labelled:
    """Training material: bags, records in the same order, names of classes, what the files say they are."""

    bags: list[Bag]
    records: list[SlideRecord]
    classes: list[str]
    attributes: dict[str, Any]


def labelled_bags(folder: Path, table: Path) -> Labelled:
    """Feature files and their labels.

    Raises:
        InputError: As `read_labels`; or features without deep ones or of several kinds.
    """
    records = read_labels(table, folder, suffixes=frozenset({".h5"}))
    classes = sorted({record.label or "" for record in records})
    bags, attributes = [], {}
    for record in records:
        features = read_features(record.path)
        own = {key: features.attributes.get(key) for key in _ALIKE}
        attributes = attributes or own
        if own != attributes:
            raise InputError(f"was made with other settings than the rest: {own}", file=record.path)
        label = classes.index(record.label or "")
        bags.append(bag_of(features, label, record.name, record.patient))
    return Labelled(bags, records, classes, attributes)


_ALIKE = ("extractor", "fingerprint", "patch_size", "deep_side", "wanted_scan_mpp", "wanted_deep_mpp")


def opening_of(attributes: dict[str, Any]) -> dict[str, float]:
    """How slides have to be opened that are read by a model of these features; without what is not known."""
    names = {"patch": "patch_size", "scan_mpp": "wanted_scan_mpp", "deep_mpp": "wanted_deep_mpp"}
    return {key: attributes[name] for key, name in names.items() if attributes.get(name) is not None}


def train_split(
    bags: Sequence[Bag], records: Sequence[SlideRecord], validation: float, seed: int
) -> tuple[list[Bag], list[Bag]]:
    """Training and validation slides: by the table's `split` column, or else by patient at random.

    Slides whose split is `test` are in neither.
    """
    if not any(record.split for record in records):
        if validation <= 0:
            return list(bags), []
        records = split_patients(records, {"train": 1 - validation, "validation": validation}, seed)
    unknown = sorted({str(r.split) for r in records} - {"train", "validation", "val", "test"})
    if unknown:
        raise InputError("expected train, validation (val) or test", field="split", value=", ".join(unknown))
    train = [bag for bag, record in zip(bags, records, strict=True) if record.split == "train"]
    held = [b for b, r in zip(bags, records, strict=True) if r.split in ("validation", "val")]
    return train, held


def judge(
    predictions: Path, table: Path, annotations: Path | None = None, splits: Sequence[str] = ()
) -> dict[str, Any]:
    """Compare stored predictions with labels.

    Args:
        predictions: Folder that `predict` wrote.
        table: Label CSV.
        annotations: Folder of ASAP XML files named like slides, for the hit rate.
        splits: Only rows of these splits; all where empty.

    Raises:
        InputError: As `read_labels`, or only one class is there (AUC is not defined).
    """
    records = read_labels(table, predictions, suffixes=frozenset({".json"}))
    if splits:
        records = [record for record in records if record.split in splits]
    stored = [json.loads(record.path.read_text(encoding="utf-8")) for record in records]
    read = [(r, s) for r, s in zip(records, stored, strict=True) if s.get("status") == "read"]
    if not read:
        raise InputError("has no prediction of a slide with tissue", file=predictions)
    classes: list[str] = read[0][1]["classes"]
    for record, _ in read:
        if record.label not in classes:
            raise InputError(
                f"{record.name}: expected one of the model's {', '.join(classes)}", value=record.label
            )
    label = np.array([classes.index(record.label or "") for record, _ in read])
    probability = np.array([own["probability"] for _, own in read])
    low, high = auc_interval(probability, label, groups=[record.patient for record, _ in read])
    found = {
        "slides": len(read),
        "without_tissue": len(stored) - len(read),
        "auc": auc(probability, label),
        "auc_interval": [low, high],
        "accuracy": accuracy(probability, label),
        "f1": f1(probability, label),
        "observation_ratio": float(np.mean([own["observation_ratio"] for _, own in read])),
        "deep_pixel_ratio": float(np.mean([own["deep_pixel_ratio"] for _, own in read])),
        "seconds": float(np.mean([own["seconds"] for _, own in read])),
        "reads": float(np.mean([own["reads"] for _, own in read])),
    }
    if annotations is not None:
        found["hit_rate"] = _hits(read, annotations)
    return found


def _hits(read: Sequence[tuple[SlideRecord, dict[str, Any]]], annotations: Path) -> float | None:
    paths, lesions = [], []
    for record, own in read:
        file = annotations / f"{record.name}.xml"
        if file.is_file():
            xy = np.array([look["xy"] for look in own["path"]], np.int64).reshape(-1, 2)
            on_path = read_annotations(file).hits(xy, int(own["footprint"]))
            # One more place that is always true: the slide has lesions, whether looked at or not.
            lesions.append(np.append(on_path, True))
            paths.append(list(range(len(xy))))
    return hit_rate(paths, lesions)
