"""Small folders in the layouts that the loaders read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tiny
from PIL import Image

from asymaffinity.predictions import encode


def coco(folder: Path, count: int = 4, masks: bool = False, first: int = 0, **more) -> Path:
    """images/, depth/ (16-bit PNG, 1/1000 of disparity) and boxes.json; the classes have ids 3 and 7."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "depth").mkdir(exist_ok=True)
    images, annotations = [], []
    for n in range(count):
        image, target = tiny.scene(first + n)
        name = f"street_{first + n:03d}.png"
        pixels = (image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        numbers = (target["depth"].numpy() * 1000 + 1).astype(np.uint16)
        Image.fromarray(numbers).save(folder / "depth" / name)
        images.append({"id": 10 + n, "file_name": name, "width": 64, "height": 64})
        for (x0, y0, x1, y1), label, mask in zip(
            target["boxes"].tolist(), target["labels"].tolist(), target["true_masks"].numpy(), strict=True
        ):
            row = {"id": len(annotations) + 1, "image_id": 10 + n, "category_id": {1: 3, 2: 7}[label]}
            row |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0, "area": float(mask.sum())}
            if masks:
                row["segmentation"] = encode(mask)
            annotations.append(row)
    (folder / "depth" / "depth.json").write_text('{"kind": "disparity", "scale": 1000, "offset": 1}')
    categories = [{"id": 7, "name": "disc"}, {"id": 3, "name": "square"}]
    content = {"images": images, "annotations": annotations, "categories": categories, **more}
    (folder / "boxes.json").write_text(json.dumps(content))
    return folder / "boxes.json"


def cityscapes(folder: Path, split: str = "train", count: int = 3) -> Path:
    """leftImg8bit, gtFine and disparity of a made city; image 2 has no thing, image 0 a group too."""
    for n in range(count):
        image, target = tiny.scene(n)
        stem = f"aachen_{n:06d}_000019"
        files = {}
        for part, suffix in (
            ("leftImg8bit", "leftImg8bit"),
            ("gtFine", "gtFine_instanceIds"),
            ("disparity", "disparity"),
        ):
            place = folder / part / split / "aachen"
            place.mkdir(parents=True, exist_ok=True)
            files[part] = place / f"{stem}_{suffix}.png"
        Image.fromarray((image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(files["leftImg8bit"])
        ids = np.full((64, 64), 7, np.uint16)
        if n != 2:
            square, disc = target["true_masks"].numpy()
            ids[square], ids[disc] = 26_000, 24_003
        if n == 0:
            ids[:3, :3] = 24  # a group of persons that cannot be told apart
        Image.fromarray(ids).save(files["gtFine"])
        disparity = (target["depth"].numpy() * 10 * 256 + 1).astype(np.uint16)
        disparity[50:, :10] = 0
        Image.fromarray(disparity).save(files["disparity"])
    return folder
