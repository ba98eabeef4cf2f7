"""Boxes of a user's own images, in their own pixels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcicam.annotations import scale_boxes
from kdcicam.baselines import BASELINES
from kdcicam.boxes import boxes_from_map
from kdcicam.checkpoints import read_config
from kdcicam.images import for_evaluation, readable
from kdcicam.model import CICAM
from kdcicam.overlays import overlay
from kdcicam.settings import map_of
from shared_core import InputError
from shared_core.datasets.folders import IMAGE_SUFFIXES
from shared_core.files import atomic_path


def listed(paths: list[Path]) -> list[Path]:
    """Files as they are; of folders, all images in and below them.

    Raises:
        InputError: A path is not there, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
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
        folder: Of the model, for the names of the classes and the role, which says what map is boxed.
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
    map_maker = BASELINES[map_of(config["notes"].get("role", ""))]
    for number, image in readable(images, skip):
        path = images[number]
        if isinstance(image, InputError):
            yield {"file": str(path), "error": str(image)}
            continue
        tensor, _ = for_evaluation(image, np.empty((0, 4)), "full", model.image_size)
        batch = tensor[None].to(device)
        with torch.no_grad():
            maps, logits = map_maker(model, model(batch), batch, None)
        values = maps[0].cpu().numpy()
        found = boxes_from_map(values, threshold, mode)  # type: ignore[arg-type] checked by its option
        side = (model.image_size, model.image_size)
        box = scale_boxes(np.array([found.box]), side, image.size)[0]
        if out is not None:
            drawn = overlay(image, values, [box] if found.found else [])
            with atomic_path(out / f"{number:05d}-{path.stem}.png") as temporary:
                drawn.save(temporary)
        scores, top = logits[0].float().softmax(0).topk(min(topk, model.num_classes))
        classes = [
            {"class": names[k], "score": score}
            for k, score in zip(top.tolist(), scores.tolist(), strict=True)
        ]
        yield {
            "file": str(path),
            "width": image.width,
            "height": image.height,
            "classes": classes,
            "box": box.round(2).tolist(),
            "found": found.found,
        }
