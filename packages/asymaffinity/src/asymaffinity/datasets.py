"""Images with boxes, and a depth map beside each where there is one: COCO's and Cityscapes' layouts.

A sample is what torchvision's detectors take: an image [3, H, W] from 0 to 1, and a target with ``boxes``
[N, 4], ``labels`` [N] from 1, ``image_id``, and ``depth`` [H, W] (NaN where unknown) if asked for. No mask
reaches it, unless `coco_boxes` is asked for those that there are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from asymaffinity import depth as depth_maps
from shared_core import InputError
from shared_core.boxes import clip_boxes, xywh_to_xyxy
from shared_core.errors import needs_extra

CITYSCAPES_THINGS = {
    24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
MIN_SIDE = 1.0
"""Boxes narrower than this many pixels, after cutting at the image, are left out and counted."""


@dataclass(frozen=True)
class Record:
    """An image and its boxes."""

    image_id: int
    image: Path
    boxes: np.ndarray
    """[N, 4], x0, y0, x1, y1 in pixels."""
    labels: np.ndarray
    """[N], from 1."""
    depth: Path | None = None
    segmentations: tuple[Any, ...] | None = None
    """Of each box, as COCO has it, None where there is none; None as a whole where no masks are wanted."""


class BoxImages(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images and boxes.

    Args:
        records: Of each image.
        classes: Names of labels 1, 2, ...
        category_ids: COCO category id of each class.
        meaning: Of the depth maps; None where none are wanted.
        field: What is made of the depth maps, as `DepthGradAffinity.field`.
        flip: Mirror a sample if its random number says so; keys are then (epoch, index).
        seed: Of the flips.
        skipped: What was left out while reading, in words -> how often.
    """

    def __init__(
        self,
        records: Sequence[Record],
        classes: Sequence[str],
        category_ids: Sequence[int] | None = None,
        *,
        meaning: depth_maps.Convention | None = None,
        field: str = "disparity",
        flip: bool = False,
        seed: int = 0,
        skipped: dict[str, int] | None = None,
    ) -> None:
        self.records, self.classes = list(records), tuple(classes)
        self.category_ids = tuple(category_ids or range(1, len(classes) + 1))
        self.meaning, self.field, self.flip, self.seed = meaning, field, flip, seed
        self.skipped = skipped or {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        record = self.records[index]
        image = read_image(record.image)
        target = {
            "boxes": torch.from_numpy(record.boxes.astype(np.float32)),
            "labels": torch.from_numpy(record.labels.astype(np.int64)),
            "image_id": torch.tensor(record.image_id),
        }
        if self.meaning is not None and record.depth is not None:
            target["depth"] = torch.from_numpy(depth_maps.read_field(record.depth, self.meaning, self.field))
        if record.segmentations is not None:
            size = (image.shape[1], image.shape[2])
            masks = [segmentation_mask(each, size, record.image) for each in record.segmentations]
            target["masks"] = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, *size).bool()
        if self.flip and np.random.default_rng([self.seed, epoch, index]).random() < 0.5:
            image, target = mirrored(image, target)
        return image, target


def first_depth(data: BoxImages) -> str | None:
    """What the first image's depth map holds, for a user to see whether its kind is right; None without any.

    Raises:
        InputError: It cannot be read, or no pixel of it is known.
    """
    record = next((record for record in data.records if record.depth is not None), None)
    if record is None or record.depth is None or data.meaning is None:
        return None
    depth_maps.read_field(record.depth, data.meaning, data.field)
    numbers = depth_maps.read_numbers(record.depth)
    height, width = read_image(record.image).shape[1:]
    words = f"{record.depth.name}: {data.meaning.kind}, {depth_maps.describe(numbers, data.meaning)}"
    if numbers.shape != (height, width):
        words += f"; {numbers.shape[0]}x{numbers.shape[1]} is resized to its image's {height}x{width}"
    return words


def mirrored(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Left and right swapped."""
    width = image.shape[2]
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    moved = {**target, "boxes": torch.stack([width - x1, y0, width - x0, y1], 1)}
    for name in ("depth", "masks"):
        if name in target:
            moved[name] = target[name].flip(-1)
    return image.flip(2), moved


def segmentation_mask(segmentation: Any, size: tuple[int, int], file: Path) -> np.ndarray:
    """A COCO segmentation (polygons, or run lengths in either form) as a mask; no pixel where there is none.

    Raises:
        InputError: It is of neither form, or of another size than the image.
    """
    if not segmentation:
        return np.zeros(size, bool)
    with needs_extra("coco", "asymaffinity"):
        from faster_coco_eval.core import mask as coco_mask
    try:
        parts = segmentation
        if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
            parts = coco_mask.frPyObjects(segmentation, *size)
        merged = coco_mask.merge(parts) if isinstance(parts, list) else parts
        mask = np.asarray(coco_mask.decode(merged)).astype(bool)
    except (TypeError, KeyError, ValueError, IndexError, RuntimeError) as error:
        raise InputError(
            f"expected polygons or run lengths: {error}", file=file, field="segmentation"
        ) from error
    if mask.shape != size:
        raise InputError(f"expected {size}", file=file, field="segmentation", value=mask.shape)
    return mask


def read_image(path: Path) -> Tensor:
    """An image as floats from 0 to 1 [3, H, W]: RGB, grey or 16-bit grey.

    Raises:
        InputError: It is missing or damaged.
    """
    if not path.is_file():
        raise InputError("there is no such image", file=path)
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16") or image.mode == "I":
                grey = np.asarray(image).astype(np.float32)
                top = 65535 if grey.max(initial=0) > 255 else 255
                return torch.from_numpy(np.repeat(grey[None] / top, 3, 0)).clamp(0, 1)
            array = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot be read as an image: {error}", file=path) from error
    return torch.from_numpy(array.transpose(2, 0, 1).copy()).float() / 255


def coco_boxes(
    annotations: Path,
    images: Path,
    *,
    depth: Path | None = None,
    depth_kind: str | None = None,
    field: str = "disparity",
    keep_empty: bool = False,
    flip: bool = False,
    seed: int = 0,
    masks: bool = False,
) -> BoxImages:
    """Images and boxes of a COCO file; ``segmentation`` may be missing and is not read.

    Args:
        annotations: JSON with images, categories and annotations with ``bbox`` x, y, width, height.
        images: Folder of the images.
        depth: Folder of depth maps with the images' stems.
        depth_kind: What their numbers mean; where None, depth.json in their folder says it.
        field: What is made of them.
        keep_empty: Keep images without a box.
        flip: Mirror half of the samples.
        seed: Of that.
        masks: Read ``segmentation`` where an annotation has it, for mixed supervision: targets then have
            ``masks`` [N, H, W], without a pixel where there is none.

    Raises:
        InputError: A file is missing or damaged, or a box is inverted or not finite.
    """
    content = _coco(annotations)
    meaning = _meaning(depth, depth_kind)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: n + 1 for n, category in enumerate(categories)}
    boxes_of: dict[int, list[dict[str, Any]]] = {}
    skipped: dict[str, int] = {}
    for n, annotation in enumerate(content["annotations"]):
        if annotation.get("iscrowd"):
            _count(skipped, "crowds")
            continue
        where = f"annotations[{n}]"
        if "bbox" not in annotation or annotation.get("category_id") not in label_of:
            raise InputError("expected bbox and a known category_id", file=annotations, field=where)
        boxes_of.setdefault(annotation["image_id"], []).append(annotation)
    records = []
    for image in content["images"]:
        own = boxes_of.pop(image["id"], [])
        boxes = _checked(own, image, annotations)
        solid = np.asarray((boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(1))
        if not solid.all():
            skipped["boxes smaller than a pixel"] = skipped.get("boxes smaller than a pixel", 0) + int(
                (~solid).sum()
            )
        if not solid.any() and not keep_empty:
            _count(skipped, "images without a box")
            continue
        labels = np.array([label_of[a["category_id"]] for a in own], dtype=np.int64)
        path = images / image["file_name"]
        map_ = depth_maps.find(depth, Path(image["file_name"]).stem) if depth is not None else None
        parts = tuple(a.get("segmentation") for a, kept in zip(own, solid.tolist(), strict=True) if kept)
        records.append(
            Record(int(image["id"]), path, boxes[solid], labels[solid], map_, parts if masks else None)
        )
    if boxes_of:
        raise InputError(
            "is no image of this file", file=annotations, field="image_id", value=next(iter(boxes_of))
        )
    if not records:
        raise InputError("holds no image with a box", file=annotations)
    if not records[0].image.is_file():
        raise InputError("there is no such image", file=records[0].image)
    return BoxImages(
        records,
        [category["name"] for category in categories],
        [category["id"] for category in categories],
        meaning=meaning,
        field=field,
        flip=flip,
        seed=seed,
        skipped=skipped,
    )


def cityscapes_boxes(
    root: Path,
    split: str = "train",
    *,
    depth: bool = True,
    field: str = "disparity",
    keep_empty: bool = False,
    flip: bool = False,
    seed: int = 0,
) -> BoxImages:
    """Cityscapes: boxes are the tight rectangles of its instances; their masks are dropped at once.

    Args:
        root: Folder with leftImg8bit, gtFine and, for depth, disparity.
        split: ``train`` or ``val``.
        depth: Whether to read the disparity maps.
        field: What is made of them.
        keep_empty: Keep images without an instance.
        flip: Mirror half of the samples.
        seed: Of that.

    Raises:
        InputError: A folder or file is missing.
    """
    images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    if not images:
        raise InputError(
            f"expected leftImg8bit/{split}/<city>/<city>_<sequence>_<frame>_leftImg8bit.png", file=root
        )
    label_of = {thing: n + 1 for n, thing in enumerate(CITYSCAPES_THINGS)}
    records, skipped = [], {}
    for n, image in enumerate(images):
        stem, city = image.name.removesuffix("_leftImg8bit.png"), image.parent.name
        instances = root / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png"
        found = cityscapes_instances(instances)
        boxes = np.array([box for _, box in found], dtype=np.float64).reshape(-1, 4)
        labels = np.array([label_of[thing] for thing, _ in found], dtype=np.int64)
        if not len(boxes) and not keep_empty:
            _count(skipped, "images without a box")
            continue
        map_ = root / "disparity" / split / city / f"{stem}_disparity.png" if depth else None
        if map_ is not None and not map_.is_file():
            raise InputError("there is no such disparity map", file=map_)
        records.append(Record(n + 1, image, boxes, labels, map_))
    if not records:
        raise InputError(f"holds no image of {split} with an instance", file=root)
    return BoxImages(
        records,
        list(CITYSCAPES_THINGS.values()),
        list(CITYSCAPES_THINGS),
        meaning=depth_maps.CONVENTIONS["cityscapes"] if depth else None,
        field=field,
        flip=flip,
        seed=seed,
        skipped=skipped,
    )


def cityscapes_instances(path: Path) -> list[tuple[int, tuple[float, float, float, float]]]:
    """Class and tight box of each thing in an instanceIds map; groups (ids below 1000) are left out."""
    ids = read_ids(path)
    found = []
    for value in np.unique(ids):
        if value < 1000 or value // 1000 not in CITYSCAPES_THINGS:
            continue
        rows, columns = np.nonzero(ids == value)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        found.append((int(value // 1000), tuple(float(side) for side in box)))
    return found  # type: ignore[return-value] four sides


def read_ids(path: Path) -> np.ndarray:
    """A map of integers."""
    if not path.is_file():
        raise InputError("there is no such file", file=path)
    try:
        with Image.open(path) as image:
            ids = np.asarray(image)
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"cannot be read as an image: {error}", file=path) from error
    if ids.ndim != 2:
        raise InputError("expected one channel of instance numbers", file=path, value=ids.shape)
    return ids.astype(np.int64)


def collate(
    batch: Sequence[tuple[Tensor, dict[str, Tensor]]],
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Samples side by side, as torchvision's detectors take them."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def _meaning(depth: Path | None, kind: str | None) -> depth_maps.Convention | None:
    if depth is None:
        return None
    if not depth.is_dir():
        raise InputError("there is no such folder", file=depth)
    stated = depth_maps.sidecar(depth) if kind is None else depth_maps.convention(kind)
    if stated is None:
        raise InputError(
            f"what the numbers mean must be stated: --depth-kind with one of "
            f"{', '.join(depth_maps.CONVENTIONS)}, or a file {depth_maps.SIDECAR}",
            file=depth,
        )
    return stated


def _coco(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError("there is no such file", file=file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"is not JSON: {error}", file=file) from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise InputError("expected a list, as COCO has it", file=file, field=name)
    for n, image in enumerate(content["images"]):
        if not {"id", "file_name", "width", "height"} <= image.keys():
            raise InputError("expected id, file_name, width and height", file=file, field=f"images[{n}]")
    return content


def _checked(annotations: list[dict[str, Any]], image: dict[str, Any], file: Path) -> np.ndarray:
    try:
        raw = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    except (ValueError, TypeError) as error:
        raise InputError("expected four numbers", file=file, field=f"bbox of image {image['id']}") from error
    wrong = ~np.isfinite(raw).all(1) | (raw[:, 2:] < 0).any(1)
    if wrong.any():
        raise InputError(
            "expected finite x, y, width, height with a width and height of at least 0",
            file=file,
            field=f"bbox of image {image['id']}",
            value=raw[wrong][0].tolist(),
        )
    return clip_boxes(xywh_to_xyxy(raw), image["width"], image["height"])


def _count(skipped: dict[str, int], what: str) -> None:
    skipped[what] = skipped.get(what, 0) + 1
