"""Predictions as COCO's run-length JSON and as pictures; scores of predictions by faster-coco-eval."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from asymaffinity.checkpoints import LoadedModel
from asymaffinity.datasets import BoxImages, cityscapes_instances, read_ids, read_image
from asymaffinity.edges import EdgeBits, bit
from asymaffinity.metrics import MaskHealth, mask_health
from shared_core import InputError
from shared_core.datasets.folders import IMAGE_SUFFIXES
from shared_core.errors import needs_extra
from shared_core.files import atomic_path

Array = np.ndarray
# Okabe and Ito's palette, brightened for masks over photographs.
COLOURS = ((0, 158, 255), (255, 130, 30), (0, 220, 150), (230, 130, 190), (255, 200, 40), (120, 200, 255))


def encode(mask: Array) -> dict[str, Any]:
    """A mask [H, W] as COCO's run lengths, as text."""
    with needs_extra("coco", "asymaffinity"):
        from faster_coco_eval.core import mask as coco_mask
    found = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = found["counts"]
    return {"size": list(found["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def decode(segmentation: dict[str, Any]) -> Array:
    """Run lengths as a mask."""
    with needs_extra("coco", "asymaffinity"):
        from faster_coco_eval.core import mask as coco_mask
    return np.asarray(coco_mask.decode(segmentation)).astype(bool)


@torch.no_grad()
def detect(model: nn.Module, images: Sequence[Tensor], device: str = "cpu") -> list[dict[str, Tensor]]:
    """Detections of images, on the CPU, with ``masks`` as booleans [n, H, W] (threshold 0.5)."""
    model.eval()
    found = []
    for each in model([image.to(device) for image in images]):
        masks = each["masks"][:, 0] > 0.5
        found.append({**{k: v.cpu() for k, v in each.items() if k != "masks"}, "masks": masks.cpu()})
    return found


def rows(
    found: dict[str, Tensor], image_id: int, category_ids: Sequence[int], score: float = 0.0
) -> list[dict[str, Any]]:
    """Detections of an image as COCO's result rows."""
    made = []
    for box, label, value, mask in zip(
        found["boxes"].tolist(),
        found["labels"].tolist(),
        found["scores"].tolist(),
        found["masks"],
        strict=True,
    ):
        if value < score or not 1 <= label <= len(category_ids):
            continue
        x0, y0, x1, y1 = box
        made.append(
            {
                "image_id": int(image_id),
                "category_id": int(category_ids[label - 1]),
                "bbox": [round(side, 2) for side in (x0, y0, x1 - x0, y1 - y0)],
                "score": round(value, 5),
                "segmentation": encode(mask.numpy()),
            }
        )
    return made


def box_health(found: Iterable[dict[str, Tensor]]) -> MaskHealth:
    """How predicted masks sit in their own predicted boxes, over images."""
    parts: list[MaskHealth] = []
    for each in found:
        if not len(each["boxes"]):
            continue
        boxes = torch.zeros_like(each["masks"])
        for mask, (x0, y0, x1, y1) in zip(boxes, each["boxes"].round().long().tolist(), strict=True):
            mask[max(0, y0) : max(y1, y0 + 1), max(0, x0) : max(x1, x0 + 1)] = True
        parts.append(mask_health(each["masks"], boxes))
    count = sum(part.instances for part in parts)
    if not count:
        return mask_health(torch.zeros(0, 1, 1, dtype=torch.bool), torch.zeros(0, 1, 1, dtype=torch.bool))
    means = [
        sum(getattr(part, name) * part.instances for part in parts) / count
        for name in ("fill", "full", "empty", "leaking", "trivial")
    ]
    return MaskHealth(count, *means)


def evaluate(
    loaded: LoadedModel,
    data: BoxImages,
    truth: dict[str, Any],
    *,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Detect on images and score.

    Args:
        loaded: The model.
        data: Images.
        truth: COCO's content for them; masks are scored where its annotations have them.
        device: Where to run.
        progress: Called with the images done.

    Returns:
        ``mask_ap``, ``mask_ap50``, ``mask_ap75`` (where there are true masks), ``box_ap``, ``box_ap50``, and
        how the masks sit in their boxes; and COCO's result rows.
    """
    model = loaded.model.to(device)
    made: list[dict[str, Any]] = []
    healths: list[dict[str, Tensor]] = []
    for n in range(len(data)):
        image = read_image(data.records[n].image)
        found = detect(model, [image], device)[0]
        made += rows(found, data.records[n].image_id, data.category_ids)
        sure = found["scores"] >= 0.3
        part = {k: v[sure] for k, v in found.items()}
        healths.append({"boxes": part["boxes"], "masks": part["masks"]})
        if progress is not None:
            progress(n + 1)
        if n % 32 == 31:  # masks of many large images do not fit into memory
            healths = [_packed(healths)]
    scores = score(truth, made)
    summary = _summary(healths)
    return scores | summary.scalars(""), made


def _packed(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several images' masks as one entry that `box_health` weighs the same: their health alone is kept."""
    summary = _summary(parts)
    return {"summary": torch.tensor([summary.instances, *summary.scalars("").values()], dtype=torch.float64)}


def _summary(parts: list[dict[str, Tensor]]) -> MaskHealth:
    kept = [part["summary"] for part in parts if "summary" in part]
    fresh = box_health(part for part in parts if "summary" not in part)
    rows_ = [*kept, torch.tensor([fresh.instances, *fresh.scalars("").values()], dtype=torch.float64)]
    count = sum(float(row[0]) for row in rows_)
    if not count:
        return fresh
    means = [sum(float(row[0] * row[i]) for row in rows_) / count for i in range(1, 6)]
    return MaskHealth(int(count), *means)


def score(truth: dict[str, Any], made: list[dict[str, Any]]) -> dict[str, float]:
    """COCO's average precision of result rows, by faster-coco-eval."""
    with needs_extra("coco", "asymaffinity"):
        from faster_coco_eval import COCO, COCOeval_faster
    kinds: list[Literal["bbox", "segm"]] = ["bbox"]
    if truth["annotations"] and all(a.get("segmentation") for a in truth["annotations"]):
        kinds.append("segm")
    found: dict[str, float] = {}
    for kind in kinds:
        name = "mask" if kind == "segm" else "box"
        if not made:
            found |= {f"{name}_ap": 0.0, f"{name}_ap50": 0.0, f"{name}_ap75": 0.0}
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            gold = COCO(_complete(truth))
            run = COCOeval_faster(gold, gold.loadRes([dict(row) for row in made]), kind)
            run.evaluate()
            run.accumulate()
            run.summarize()
        stats = [max(0.0, float(value)) for value in run.stats[:3]]
        found |= {f"{name}_ap": stats[0], f"{name}_ap50": stats[1], f"{name}_ap75": stats[2]}
    return found


def _complete(truth: dict[str, Any]) -> dict[str, Any]:
    """With the fields that scoring asks for and box files often lack."""
    annotations = []
    for n, annotation in enumerate(truth["annotations"]):
        _, _, width, height = annotation["bbox"]
        annotations.append({"id": n + 1, "area": width * height, "iscrowd": 0, **annotation})
    return {**truth, "annotations": annotations, "info": truth.get("info", {})}


def cityscapes_truth(data: BoxImages, root: Path, split: str = "val") -> dict[str, Any]:
    """Cityscapes' instances in COCO's form, for scoring alone."""
    images, annotations = [], []
    for record in data.records:
        stem = record.image.name.removesuffix("_leftImg8bit.png")
        path = root / "gtFine" / split / record.image.parent.name / f"{stem}_gtFine_instanceIds.png"
        ids = read_ids(path)
        images.append(
            {
                "id": record.image_id,
                "file_name": record.image.name,
                "height": ids.shape[0],
                "width": ids.shape[1],
            }
        )
        values = [v for v in np.unique(ids) if v >= 1000]
        boxes = dict(
            zip(
                [v for v in values if v // 1000 in data.category_ids], cityscapes_instances(path), strict=True
            )
        )
        for value, (thing, (x0, y0, x1, y1)) in boxes.items():
            mask = ids == value
            annotations.append(
                {
                    "image_id": record.image_id,
                    "category_id": thing,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(mask.sum()),
                    "segmentation": encode(mask),
                }
            )
    categories = [{"id": i, "name": name} for i, name in zip(data.category_ids, data.classes, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def pseudo_masks(
    loaded: LoadedModel, data: BoxImages, *, least_iou: float = 0.5, device: str = "cpu"
) -> tuple[list[dict[str, Any]], int]:
    """COCO annotations with masks for boxed images: of each box the detection of its class that fits it best.

    Returns:
        Annotations with ``segmentation``, cut to the box; and how many boxes no detection fitted.
    """
    from torchvision.ops import box_iou

    model = loaded.model.to(device)
    made: list[dict[str, Any]] = []
    without = 0
    for n in range(len(data)):
        image, target = data[n]
        found = detect(model, [image], device)[0]
        overlap = box_iou(target["boxes"], found["boxes"])
        overlap = torch.where(target["labels"][:, None] == found["labels"], overlap, 0)
        for box, label, row in zip(target["boxes"].tolist(), target["labels"].tolist(), overlap, strict=True):
            if not len(row) or float(row.max()) < least_iou:
                without += 1
                continue
            x0, y0, x1, y1 = box
            mask = found["masks"][int(row.argmax())].clone()
            inside = torch.zeros_like(mask)
            inside[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
            mask &= inside
            made.append(
                {
                    "id": len(made) + 1,
                    "image_id": int(target["image_id"]),
                    "category_id": data.category_ids[label - 1],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": encode(mask.numpy()),
                }
            )
    return made, without


def image_files(path: Path) -> list[Path]:
    """An image, or the images in a folder.

    Raises:
        InputError: There is none.
    """
    if path.is_file():
        return [path]
    found = sorted(file for file in path.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise InputError(f"expected an image or a folder with {', '.join(sorted(IMAGE_SUFFIXES))}", file=path)
    return found


def overlay(
    image: Array, masks: Sequence[Array], boxes: Sequence[Sequence[float]] = (), names: Sequence[str] = ()
) -> Image.Image:
    """The image with masks in colours, their boxes and names over it.

    Args:
        image: Bytes [H, W, 3].
        masks: Booleans [H, W].
        boxes: x0, y0, x1, y1 of each.
        names: Of each.
    """
    mixed = image.astype(np.float64)
    for n, mask in enumerate(masks):
        colour = np.array(COLOURS[n % len(COLOURS)], dtype=np.float64)
        mixed[mask] = 0.45 * mixed[mask] + 0.55 * colour
    made = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(made)
    width = max(1, round(min(made.size) / 250))
    for n, (x0, y0, x1, y1) in enumerate(boxes):
        if x1 > x0 and y1 > y0:
            last = (max(x0, x1 - 1), max(y0, y1 - 1))  # a box may be narrower than a pixel
            draw.rectangle((x0, y0, *last), outline=COLOURS[n % len(COLOURS)], width=width)
            if n < len(names):
                draw.text(
                    (x0 + width + 1, y0 + width),
                    names[n],
                    fill=(255, 255, 255),
                    stroke_width=1,
                    stroke_fill=(0, 0, 0),
                )
    return made


def edge_picture(image: Array, edges: EdgeBits, stride: int = 4) -> Image.Image:
    """The image with its broken edges: the redder a cell, the more of its edges are not kept.

    Args:
        image: Bytes [H, W, 3].
        edges: Of this one image.
        stride: Pixels a cell.
    """
    bits = edges.bits[0]
    count = torch.zeros(bits.shape)
    possible = torch.zeros(bits.shape)
    h, w = bits.shape
    for n, (dy, dx) in enumerate(edges.offsets):
        count += (bits & bit(n) != 0).float()
        possible[max(0, -dy) : h - max(0, dy), max(0, -dx) : w - max(0, dx)] += 1
    broken = 1 - (count / possible.clamp(min=1)).numpy()
    grey = image.astype(np.float64).mean(2, keepdims=True) * 0.5 + 60
    wide = np.kron(broken, np.ones((stride, stride)))[: image.shape[0], : image.shape[1], None]
    full = np.zeros((*image.shape[:2], 1))
    full[: wide.shape[0], : wide.shape[1]] = wide
    mixed = (1 - full) * grey + full * np.array([230.0, 60.0, 20.0])
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture, whole or not at all."""
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def bytes_of(image: Tensor) -> Array:
    """A tensor [3, H, W] from 0 to 1 as bytes [H, W, 3]."""
    return (image.permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that was checked before."""
    return json.loads(path.read_text(encoding="utf-8"))
