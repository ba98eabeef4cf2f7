"""Tiny data sets in the layouts that the public ones have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("disc", "square", "stripe")
BOX = (12, 8, 32, 28)


def picture(label: int, seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A coloured shape at BOX on a noisy ground."""
    generator = np.random.default_rng([label, seed])
    pixels = generator.integers(0, 90, (size[1], size[0], 3)).astype(np.uint8)
    x0, y0, x1, y1 = BOX
    pixels[y0:y1, x0:x1, label] = 230
    return Image.fromarray(pixels)


def save(path: Path, label: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(label, seed).save(path)


def class_folders(root: Path, train: int = 8, test: int = 3) -> Path:
    for part, count in (("train", train), ("test", test)):
        entries, notes = [], []
        for label, name in enumerate(CLASSES):
            for index in range(count):
                file = f"{name}/{part}{index}.png"
                save(root / part / file, label, 100 * (part == "test") + index)
                entries.append({"id": len(entries), "file_name": file, "width": 48, "height": 40})
                notes.append({"image_id": len(notes), "bbox": [12, 8, 20, 20]})
        (root / f"{part}.json").write_text(json.dumps({"images": entries, "annotations": notes}))
    return root


def cub(root: Path) -> Path:
    rows = {"images": [], "image_class_labels": [], "train_test_split": [], "bounding_boxes": []}
    number = 0
    for label, name in enumerate(CLASSES):
        for index in range(4):
            number += 1
            file = f"{label + 1:03d}.{name}/{index}.png"
            save(root / "images" / file, label, index)
            rows["images"].append(f"{number} {file}")
            rows["image_class_labels"].append(f"{number} {label + 1}")
            rows["train_test_split"].append(f"{number} {int(index < 2)}")
            rows["bounding_boxes"].append(f"{number} 12.0 8.0 20.0 20.0")
    rows["classes"] = [f"{k + 1} {k + 1:03d}.{name}" for k, name in enumerate(CLASSES)]
    for file, lines in rows.items():
        (root / f"{file}.txt").write_text("\n".join(lines) + "\n")
    return root


def voc(wnid: str, *boxes: tuple[int, int, int, int]) -> str:
    objects = "".join(
        f"<object><name>{wnid}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax>"
        "</bndbox></object>"
        for a, b, c, d in boxes
    )
    return f"<annotation><size><width>48</width><height>40</height></size>{objects}</annotation>"


def ilsvrc(root: Path) -> Path:
    wnids = [f"n0{k}" for k in range(3)]
    notes = root / "Annotations" / "CLS-LOC"
    (notes / "val").mkdir(parents=True)
    for label, wnid in enumerate(wnids):
        (notes / "train" / wnid).mkdir(parents=True)
        for index in range(2):
            save(root / "Data" / "CLS-LOC" / "train" / wnid / f"{wnid}_{index}.JPEG", label, index)
            (notes / "train" / wnid / f"{wnid}_{index}.xml").write_text(voc(wnid, (13, 9, 32, 28)))
        save(root / "Data" / "CLS-LOC" / "val" / f"v{label}.JPEG", label, 9)
        (notes / "val" / f"v{label}.xml").write_text(voc(wnid, (13, 9, 32, 28), (1, 1, 48, 40)))
    sets = root / "ImageSets" / "CLS-LOC"
    sets.mkdir(parents=True)
    (sets / "val.txt").write_text("".join(f"v{k} {k + 1}\n" for k in range(3)))
    return root


def wsolevaluation(root: Path) -> tuple[Path, Path]:
    metadata, images = root / "metadata" / "TOY", root / "images"
    for part in ("train", "val", "test"):
        folder = metadata / part
        folder.mkdir(parents=True)
        ids = [f"{part}/{k}_{i}.png" for k in range(3) for i in range(2)]
        for name in ids:
            save(images / name, int(Path(name).stem[0]), 1)
        (folder / "image_ids.txt").write_text("\n".join(ids))
        (folder / "class_labels.txt").write_text("\n".join(f"{i},{Path(i).stem[0]}" for i in ids))
        (folder / "image_sizes.txt").write_text("\n".join(f"{i},48,40" for i in ids))
        if part != "train":
            rows = [f"{i},12,8,32,28" for i in ids] + [f"{ids[0]},0,0,5,5"]
            (folder / "localization.txt").write_text("\n".join(rows))
    return metadata, images


def openimages(root: Path) -> tuple[Path, Path]:
    """As `wsolevaluation`, with masks: the shape at BOX in two halves, and an ignored frame around it."""
    metadata, images = wsolevaluation(root)
    left, right, frame = (np.zeros((40, 48), dtype=np.uint8) for _ in range(3))
    left[8:28, 12:22] = right[8:28, 22:32] = frame[6:30, 10:34] = 255
    for part in ("val", "test"):
        folder, rows = metadata / part, []
        (folder / "image_sizes.txt").unlink()
        for name in (folder / "image_ids.txt").read_text().split():
            stem = name.removesuffix(".png")
            for mask, kind in ((left, "m0"), (right, "m1"), (frame, "ignore")):
                Image.fromarray(mask).save(images / f"{stem}_{kind}.png")
            rows += [f"{name},{stem}_m0.png,{stem}_ignore.png", f"{name},{stem}_m1.png,"]
        (folder / "localization.txt").write_text("\n".join(rows))
    return metadata, images
