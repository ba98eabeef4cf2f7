"""Boxes of a user's own images, in their own pixels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kdcicam.annotations import scale_boxes
from kdcicam.checkpoints import read_config
from kdcicam.images import for_evaluation, readable
from kdcicam.model import CICAM
from kdcicam.overlays import overlay
from shared_core import InputError
from shared_core.files import atomic_path

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def listed(paths: list[Path]) -> list[Path]:
    """Files as they are; of folders, all images in and below them.

    Raises:
        InputError: A path is not there, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
            if not inside:
                raise InputError("holds no image", file=path)
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise InputError("there is no such image", file=path)
    return found


def localized(
    model: CICAM,
    folder: Path,
    images: list[Path],
    out: Path | None,
    threshold: float,
    topk: int,
    mode: str,
    device: str,
    skip: bool,
) -> Iterator[dict[str, Any]]:
    """Yield a record for each image: file, size, classes with scores, box and whether the map showed one.

    Args:
        model: Moved to the device.
        folder: Of the model, for the names of the classes.
        images: To read.
        out: Where overlays go, as NUMBER-NAME.png; None for none.
        threshold: Of the extractor.
        topk: Classes to name.
        mode: The extractor.
        device: Where.
        skip: Yield an unreadable image's error and go on; else it raises.
    """
    model.eval().to(device)
    config = read_config(folder if folder.is_dir() else folder.parent)
    names = config["notes"].get("classes") or [str(k) for k in range(model.num_classes)]
    for number, image in readable(images, skip):
        path = images[number]
        if isinstance(image, InputError):
            yield {"file": str(path), "error": str(image)}
            continue
        tensor, _ = for_evaluation(image, np.empty((0, 4)), "full", model.image_size)
        found = model.localize(tensor[None].to(device), threshold, topk, mode=mode)
        side = (model.image_size, model.image_size)
        box = scale_boxes(found.boxes.numpy(), side, image.size)[0]
        if out is not None:
            drawn = overlay(image, found.maps[0].cpu().numpy(), [box] if bool(found.found[0]) else [])
            with atomic_path(out / f"{number:05d}-{path.stem}.png") as temporary:
                drawn.save(temporary)
        classes = [
            {"class": names[k], "score": score}
            for k, score in zip(found.classes[0].tolist(), found.scores[0].tolist(), strict=True)
        ]
        yield {
            "file": str(path),
            "width": image.width,
            "height": image.height,
            "classes": classes,
            "box": box.round(2).tolist(),
            "found": bool(found.found[0]),
        }
