"""Data sets on disk: CUB-200-2011, ILSVRC, wsolevaluation metadata, class folders with COCO boxes.

All are read into one shape, `Images`: files, labels, boxes or masks. Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from kdcicam.annotations import check_boxes
from shared_core import InputError
from shared_core.boxes import xywh_to_xyxy
from shared_core.datasets.folders import IMAGE_SUFFIXES

Array = np.ndarray
SPLITS = ("train", "val", "test")
_NO_BOX = np.empty((0, 4))


@dataclass(frozen=True)
class MaskFiles:
    """Where an image's pixels are marked; `kdcicam.masks.read_mask` reads them."""

    objects: tuple[Path, ...]
    """One or several, which are united."""
    ignore: Path | None = None
    """Pixels that do not count, save those of an object."""


@dataclass(frozen=True)
class Images:
    """One split of a data set.

    Boxes are xyxy with exclusive ends in the file's pixels, [n, 4] for each image; n = 0 where none is known.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    files: list[Path]
    labels: list[int]
    boxes: list[Array]
    masks: list[MaskFiles | None] = field(default_factory=list)
    """One for each image, None where it has none; empty where the data set has no masks."""

    def __len__(self) -> int:
        return len(self.files)

    @property
    def boxed(self) -> int:
        """Images with a box."""
        return sum(len(boxes) > 0 for boxes in self.boxes)

    def take(self, indices: list[int]) -> Images:
        """Return some of the images."""
        return replace(
            self,
            files=[self.files[i] for i in indices],
            labels=[self.labels[i] for i in indices],
            boxes=[self.boxes[i] for i in indices],
            masks=[self.masks[i] for i in indices] if self.masks else [],
        )


def load_images(
    root: Path,
    split: str,
    *,
    images: Path | None = None,
    validation: float = 0.1,
    masks: Path | None = None,
) -> Images:
    """Read a split of a data set whose layout is found by its files.

    Args:
        root: CUB's folder (or the one above), ILSVRC's, a wsolevaluation ``metadata/NAME`` folder, or a
            folder of ``train/CLASS``, ``val/CLASS``, ``test/CLASS`` with boxes in ``SPLIT.json`` or
            ``boxes.json``.
        split: ``train``, ``val`` (images that thresholds are chosen on) or ``test``.
        images: For wsolevaluation: the folder that image ids are paths in.
        validation: Share of the training images, every n-th, that ``val`` takes out of ``train`` where the
            data set has no such split of its own. 0 leaves ``val`` empty.
        masks: For wsolevaluation's OpenImages: the folder that masks are paths in; `images` where None.

    Raises:
        InputError: A file is missing, or a line or a box in one is wrong: the error names it.
    """
    if split not in SPLITS:
        raise InputError(f"expected one of {', '.join(SPLITS)}", field="split", value=split)
    if not 0 <= validation < 1:
        raise InputError("expected a share below 1", field="validation", value=validation)
    if not root.is_dir():
        raise InputError("there is no such folder", file=root)
    for folder in (root / "CUB_200_2011", root):
        if (folder / "train_test_split.txt").exists():
            return _held_out(_cub(folder), split, validation)
    if (root / "Data" / "CLS-LOC").is_dir():
        return _ilsvrc(root, split, validation)
    if any((root / part / "image_ids.txt").exists() for part in SPLITS):
        return _wsolevaluation(root, split, images, masks or images)
    if any((root / part).is_dir() for part in SPLITS):
        return _folders(root, split, validation)
    raise InputError(
        "holds none of: train_test_split.txt (CUB), Data/CLS-LOC (ILSVRC), test/image_ids.txt "
        "(wsolevaluation), train/ with class folders",
        file=root,
    )


def _rows(path: Path, separator: str | None, columns: int) -> list[list[str]]:
    if not path.is_file():
        raise InputError("is missing", file=path)
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        row = [part.strip() for part in line.split(separator, columns - 1)]
        if len(row) != columns:
            raise InputError(f"line {number}: expected {columns} columns", file=path, value=line)
        rows.append(row)
    if not rows:
        raise InputError("is empty", file=path)
    return rows


def _numbers(row: list[str], path: Path) -> list[float]:
    try:
        return [float(part) for part in row]
    except ValueError as error:
        raise InputError("expected numbers", file=path, value=" ".join(row)) from error


def _matching(ids: list[str], found: dict[str, Any], has: Path, lacks: Path) -> None:
    missing = [name for name in ids if name not in found]
    if missing:
        raise InputError(
            f"lacks {len(missing)} image ids that {has.name} has, such as {missing[0]}", file=lacks
        )
    known = set(ids)
    extra = [name for name in found if name not in known]
    if extra:
        raise InputError(f"has {len(extra)} image ids that {has.name} lacks, such as {extra[0]}", file=lacks)


def _cub(root: Path) -> dict[str, Images]:
    """Read CUB-200-2011: one box an image as x, y, width, height; labels from 1; split 1 is training."""
    names = dict(_rows(root / "images.txt", None, 2))
    columns: dict[str, dict[str, list[str]]] = {}
    for file, count in (
        ("image_class_labels.txt", 2),
        ("train_test_split.txt", 2),
        ("bounding_boxes.txt", 5),
    ):
        columns[file] = {row[0]: row[1:] for row in _rows(root / file, None, count)}
        _matching(list(names), columns[file], root / "images.txt", root / file)
    classes = tuple(name for _, name in _rows(root / "classes.txt", None, 2))
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for number in names:
        parts["train" if columns["train_test_split.txt"][number][0] == "1" else "test"].append(number)
    made = {}
    for split, numbers in parts.items():
        labels = [_label(columns["image_class_labels.txt"][n][0], len(classes), root) for n in numbers]
        sides = [_numbers(columns["bounding_boxes.txt"][n], root / "bounding_boxes.txt") for n in numbers]
        files = [root / "images" / names[n] for n in numbers]
        boxes = [xywh_to_xyxy(np.array([side])) for side in sides]
        for file, (box,) in zip(files, boxes, strict=True):
            if box[2] <= box[0] or box[3] <= box[1]:
                raise InputError(f"the box of {file.name} is empty", file=root / "bounding_boxes.txt")
        made[split] = Images("CUB-200-2011", split, classes, files, labels, boxes)
    return made


def _label(text: str, classes: int, root: Path) -> int:
    label = int(text) if text.isdigit() else 0
    if not 1 <= label <= classes:
        raise InputError(f"expected 1 to {classes}", file=root / "image_class_labels.txt", value=text)
    return label - 1


def _held_out(parts: dict[str, Images], split: str, validation: float) -> Images:
    """Return a split; ``val`` is every n-th training image, and ``train`` the others."""
    if split == "test":
        if "test" not in parts:
            raise InputError("the data set has no test part", field="split", value=split)
        return parts["test"]
    if "train" not in parts:
        raise InputError("the data set has no training part", field="split", value=split)
    train = parts["train"]
    chosen, others = [], []
    for index in range(len(train)):
        takes = int((index + 1) * validation + 1e-9) > int(index * validation + 1e-9)
        (chosen if takes else others).append(index)
    return replace(train.take(chosen if split == "val" else others), split=split)


def _ilsvrc(root: Path, split: str, validation: float) -> Images:
    """Read ILSVRC CLS-LOC: ``test`` is the official validation set, which is what has boxes for all images.

    ``val`` comes out of the training images that have annotations.
    """
    data, notes = root / "Data" / "CLS-LOC", root / "Annotations" / "CLS-LOC"
    train = data / "train"
    if not train.is_dir():
        raise InputError("is missing", file=train)
    classes = tuple(sorted(folder.name for folder in train.iterdir() if folder.is_dir()))
    number = {name: index for index, name in enumerate(classes)}
    if split == "test":
        listed = _listed(root / "ImageSets" / "CLS-LOC" / "val.txt", data / "val")
        files, labels, boxes = [], [], []
        for name in listed:
            note = notes / "val" / f"{name}.xml"
            wnid, found = _voc(note)
            if wnid not in number:
                raise InputError(f"names the class {wnid}, which {train} has no folder for", file=note)
            files.append(data / "val" / f"{name}.JPEG")
            labels.append(number[wnid])
            boxes.append(found)
        return Images("ILSVRC", split, classes, files, labels, boxes)
    pairs = [(file, number[name]) for name in classes for file in _files(train / name)]
    both = Images(
        "ILSVRC", "train", classes, [f for f, _ in pairs], [k for _, k in pairs], [_NO_BOX for _ in pairs]
    )
    if split == "train" or not (notes / "train").is_dir():
        return _held_out({"train": both}, split, validation if (notes / "train").is_dir() else 0.0)
    held = _held_out({"train": both}, split, validation)
    found = []
    for file in held.files:
        note = notes / "train" / file.parent.name / f"{file.stem}.xml"
        found.append(_voc(note)[1] if note.is_file() else _NO_BOX)
    return replace(held, boxes=found)


def _listed(names: Path, folder: Path) -> list[str]:
    if names.is_file():
        return [row[0].split()[0] for row in _rows(names, None, 1)]
    return [file.stem for file in _files(folder)]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError("is missing", file=folder)
    return sorted(
        f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")
    )


def _voc(path: Path) -> tuple[str, Array]:
    """The class and boxes of an annotation in VOC's XML: pixels from 1, the last one included."""
    if not path.is_file():
        raise InputError("is missing", file=path)
    try:
        tree = ElementTree.parse(path).getroot()
        wnid = ""
        boxes = []
        for entry in tree.iter("object"):
            wnid = entry.findtext("name", "")
            sides = [float(entry.findtext(f"bndbox/{s}", "nan")) for s in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append([sides[0] - 1, sides[1] - 1, sides[2], sides[3]])
        width, height = (float(tree.findtext(f"size/{s}", "nan")) for s in ("width", "height"))
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(f"is no annotation: {error}", file=path) from error
    if not boxes:
        raise InputError("names no object", file=path)
    sized = np.isfinite([width, height]).all() and min(width, height) > 0
    limit = (width, height) if sized else (np.inf, np.inf)
    return wnid, check_boxes(np.array(boxes), *map(float, limit), name=str(path), slack=2)


def _wsolevaluation(root: Path, split: str, images: Path | None, masks: Path | None) -> Images:
    """Read metadata/NAME of wsolevaluation; its val has boxes or masks (train-fullsup)."""
    if images is None or masks is None:
        raise InputError("which folder are the image ids paths in? (the images option)", file=root)
    folder = root / split
    names = [row[0] for row in _rows(folder / "image_ids.txt", None, 1)]
    labels = dict(_rows(folder / "class_labels.txt", ",", 2))
    _matching(names, labels, folder / "image_ids.txt", folder / "class_labels.txt")
    path = folder / "localization.txt"
    boxes: dict[str, Array] = {}
    marked: dict[str, MaskFiles] = {}
    if path.exists() or split != "train":
        if _rows(path, None, 1)[0][0].count(",") == 2:
            marked = _listed_masks(path, masks)
        else:
            boxes = _listed_boxes(path, names)
        stray = next((name for name in (*boxes, *marked) if name not in labels), None)
        if stray is not None:
            raise InputError(f"has image ids that image_ids.txt lacks, such as {stray}", file=path)
    numbers = [int(labels[name]) if labels[name].isdigit() else -1 for name in names]
    if min(numbers) < 0:
        bad = names[numbers.index(-1)]
        raise InputError(f"the label of {bad} is no number", file=folder / "class_labels.txt")
    train = root / "train" / "class_labels.txt"
    known = [int(k) for _, k in _rows(train, ",", 2)] if train.exists() else numbers
    classes = tuple(str(k) for k in range(max(*known, *numbers) + 1))
    return Images(
        root.name,
        split,
        classes,
        [images / name for name in names],
        numbers,
        [boxes.get(name, _NO_BOX) for name in names],
        [marked.get(name) for name in names] if marked else [],
    )


def _listed_boxes(path: Path, names: list[str]) -> dict[str, Array]:
    """Rows id,x0,y0,x1,y1, one or several an image."""
    found: dict[str, list[list[float]]] = {}
    for name, *sides in _rows(path, ",", 5):
        found.setdefault(name, []).append(_numbers(sides, path))
    listed: dict[str, list[float]] = {}
    sizes = path.with_name("image_sizes.txt")
    if sizes.exists():
        listed = {name: _numbers(pair, sizes) for name, *pair in _rows(sizes, ",", 3)}
        _matching(names, listed, path.with_name("image_ids.txt"), sizes)
    made = {}
    for name, sides in found.items():
        width, height = listed.get(name, [np.inf, np.inf])
        made[name] = check_boxes(np.array(sides), width, height, name=f"{path}: {name}")
    return made


def _listed_masks(path: Path, root: Path) -> dict[str, MaskFiles]:
    """Rows id,mask,ignore mask of OpenImages; the ignore mask stands in one of an image's rows, or none."""
    found: dict[str, MaskFiles] = {}
    missing: list[Path] = []
    for name, mask, ignore in _rows(path, ",", 3):
        before = found.get(name, MaskFiles(()))
        if ignore and before.ignore is not None:
            raise InputError(f"names two ignore masks of {name}", file=path, value=ignore)
        found[name] = MaskFiles((*before.objects, root / mask), root / ignore if ignore else before.ignore)
        missing += [root / part for part in (mask, ignore) if part and not (root / part).is_file()]
    if missing:
        raise InputError(
            f"names {len(missing)} masks that are not there, such as {missing[0]}: which folder are masks "
            "paths in? (the masks option)",
            file=path,
        )
    return found


def _folders(root: Path, split: str, validation: float) -> Images:
    """Read class folders as torchvision's ImageFolder does; boxes from COCO's JSON."""
    parts = {part: _class_folders(root, part) for part in SPLITS if (root / part).is_dir()}
    every = {part: read.classes for part, read in parts.items()}
    first = next(iter(every))
    for part, classes in every.items():
        if classes != every[first]:
            odd = sorted(set(classes) ^ set(every[first]))
            raise InputError(
                f"its class folders are not those of {first}: {', '.join(odd[:5])}", file=root / part
            )
    if "test" not in parts and "val" in parts:  # two parts: the second is for the test
        parts["test"] = replace(parts.pop("val"), split="test")
    if split in parts and (split != "train" or "val" in parts):
        return parts[split]
    return _held_out(parts, split, validation)


def _class_folders(root: Path, part: str) -> Images:
    folder = root / part
    classes = tuple(
        sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    )
    if not classes:
        raise InputError("has no class folders: expected one folder a class with its images", file=folder)
    files, labels = [], []
    for number, name in enumerate(classes):
        found = _files(folder / name)
        if not found:
            raise InputError("holds no image", file=folder / name)
        files += found
        labels += [number] * len(found)
    notes = next(
        (n for n in (root / f"{part}.json", folder / "boxes.json", root / "boxes.json") if n.is_file()), None
    )
    boxes = [_NO_BOX for _ in files]
    if notes is not None:
        known = coco_boxes(notes)
        of_all = notes == root / "boxes.json"
        parts = [other for other in SPLITS if (root / other).is_dir()] if of_all else [part]
        answering = Counter(
            key for other in parts for file in _files(root / other) for key in _names(file, root / other)
        )
        used = set()
        for index, file in enumerate(files):
            key = next((key for key in _names(file, folder) if key in known), None)
            if key is None:
                continue
            if answering[key] > 1:
                whole = file.relative_to(root if of_all else folder).as_posix()
                raise InputError(
                    f"{answering[key]} images have this file_name: expected it relative to "
                    f"{root if of_all else folder}, as {whole}",
                    file=notes,
                    value=key,
                )
            boxes[index] = known[key]
            used.add(key)
        stray = sorted(set(known) - used)
        if stray and notes.parent == root and not of_all:
            raise InputError(f"names {len(stray)} images that {folder} lacks, such as {stray[0]}", file=notes)
    return Images(root.name, part, classes, files, labels, boxes)


def _names(file: Path, folder: Path) -> tuple[str, ...]:
    """What COCO's file_name may be for a file of a split's folder, the most exact first."""
    return file.relative_to(folder.parent).as_posix(), file.relative_to(folder).as_posix(), file.name


def coco_boxes(path: Path) -> dict[str, Array]:
    """Boxes xyxy of each file name in COCO's JSON (``images`` and ``annotations`` with ``bbox`` x, y, w, h).

    Raises:
        InputError: It is no such file, or a box is wrong; xyxy in place of xywh is recognized where
            it reaches outside the image.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        images = {entry["id"]: entry for entry in whole["images"]}
        for key in ("id", "file_name"):
            twice = [value for value, n in Counter(entry[key] for entry in whole["images"]).items() if n > 1]
            if twice:
                raise InputError(
                    f"expected each once, found {len(twice)} more than once",
                    file=path,
                    field=key,
                    value=twice[0],
                )
        found: dict[str, list[list[float]]] = {entry["file_name"]: [] for entry in images.values()}
        for note in whole["annotations"]:
            if note["image_id"] not in images:
                raise InputError(
                    "an annotation names an image that is not there", file=path, value=note["image_id"]
                )
            found[images[note["image_id"]]["file_name"]].append([float(side) for side in note["bbox"]])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"is no COCO JSON with images and annotations: {error!r}", file=path) from error
    made = {}
    for entry in images.values():
        name, rows = entry["file_name"], found[entry["file_name"]]
        if not rows:
            continue
        sides = np.array(rows)
        width, height = float(entry.get("width", np.inf)), float(entry.get("height", np.inf))
        converted = xywh_to_xyxy(sides)
        outside = (converted[:, 2] > width + 1) | (converted[:, 3] > height + 1)
        if outside.any() and (sides[:, 2] <= width).all() and (sides[:, 3] <= height).all():
            raise InputError(
                f"the box of {name} reaches outside its {width:g}x{height:g}: COCO's are x, y, width, "
                "height; these look like x0, y0, x1, y1",
                file=path,
                value=sides[outside][0].tolist(),
            )
        made[name] = check_boxes(converted, width, height, name=f"{path}: {name}")
    return made
