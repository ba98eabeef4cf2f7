"""Evaluation of models on a split, of one map or of several from the same forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from kdcicam.annotations import check_boxes
from kdcicam.baselines import BASELINES
from kdcicam.data import Images
from kdcicam.images import for_evaluation, readable
from kdcicam.masks import read_mask
from kdcicam.metrics import PixelAveragePrecision, Protocol, WSOLEvaluator
from kdcicam.model import CICAM
from shared_core import InputError

Array = np.ndarray
Threshold = float | Literal["validation", "oracle"]
RESIZE = {299: 500}
"""The authors' side before the crop is 500 for InceptionV3 on CUB; 344/224 of the crop else."""

_WITHOUT_BOXES = ("top1_cls", "top5_cls", "images", "unboxed", "no_map", "protocol")


@dataclass(frozen=True)
class Evaluation:
    """Numbers of one kind of map, and how many images could not be read."""

    scores: dict[str, Any]
    skipped: int


@torch.no_grad()
def evaluate(
    model: CICAM,
    test: Images,
    validation: Images | None = None,
    *,
    protocol: Protocol = "full",
    threshold: Threshold = "validation",
    methods: Sequence[str] = ("ci-cam",),
    resize: int | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    skip: bool = False,
    progress: Callable[[int], None] | None = None,
    contours: bool = True,
) -> dict[str, Evaluation]:
    """Evaluate maps of a model: by boxes, and by masks (``pxap``) where images have any.

    Args:
        model: Moved to the device and into evaluation mode.
        test: Images with boxes or masks.
        validation: Other images with boxes, on which thresholds of the official extractor are chosen.
        protocol: See `kdcicam.images.for_evaluation`.
        threshold: A number, ``validation``, or ``oracle`` (on the test images: an upper bound).
        methods: Of `kdcicam.baselines.BASELINES`.
        resize: Of the centre-crop protocol.
        batch_size: Images at once.
        device: Where.
        skip: Name unreadable images in a warning, count them and go on; else they raise.
        progress: Called after each batch with its images.
        contours: Whether to count MaxBoxAcc.

    Raises:
        InputError: A method is none, no image has a box or a mask, or the threshold needs validation images
            that are not there.
    """
    for name in methods:
        if name not in BASELINES:
            raise InputError(f"expected one of {', '.join(BASELINES)}", field="method", value=name)
    if test.boxed == 0 and not any(test.masks):
        raise InputError(f"no image of {test.name} {test.split} has a box or a mask", field="data")
    if test.boxed and threshold == "validation" and (validation is None or validation.boxed == 0):
        raise InputError(
            "no validation image has a box to choose it on: give a number, or oracle", field="threshold"
        )
    model.eval().to(device)
    options: dict[str, Any] = {
        "protocol": protocol,
        "resize": resize or RESIZE.get(model.image_size),
        "batch_size": batch_size,
        "skip": skip,
        "progress": progress,
    }
    chosen: dict[str, Any] = dict.fromkeys(methods, threshold)
    if not test.boxed:  # masks alone: no threshold has a part
        chosen = dict.fromkeys(methods, 0.0)
    elif threshold == "validation" and validation is not None:
        seen, *_ = _counted(model, replace(validation, masks=[]), methods, contours=False, **options)
        chosen = {name: counted.best_threshold() for name, counted in seen.items()}
    asked = None if isinstance(threshold, str) or not test.boxed else np.array([threshold])
    counted, pixels, skipped = _counted(model, test, methods, contours=contours, thresholds=asked, **options)
    made = {}
    for name, counts in counted.items():
        scores = counts.compute(chosen[name])
        if not test.boxed:
            scores = {key: scores[key] for key in _WITHOUT_BOXES}
        elif threshold == "validation":
            scores["threshold_from"] = "validation images"
        if name in pixels:
            scores["pxap"] = pixels[name].compute()
        made[name] = Evaluation(scores, skipped)
    return made


def _counted(
    model: CICAM,
    images: Images,
    methods: Sequence[str],
    *,
    contours: bool,
    thresholds: Array | None = None,
    protocol: Protocol,
    resize: int | None,
    batch_size: int,
    skip: bool,
    progress: Callable[[int], None] | None,
) -> tuple[dict[str, WSOLEvaluator], dict[str, PixelAveragePrecision], int]:
    counted = {
        name: WSOLEvaluator(protocol, contours=contours, box_thresholds=thresholds) for name in methods
    }
    pixels = {name: PixelAveragePrecision() for name in methods} if any(images.masks) else {}
    device, skipped = next(model.parameters()).device, 0
    for start in range(0, len(images), batch_size):
        tensors, labels, boxes = [], [], []
        masked, masks = [], []  # which of the batch have a mask, and the masks
        for offset, image in readable(images.files[start : start + batch_size], skip):
            if isinstance(image, InputError):
                skipped += 1
                continue
            index = start + offset
            file = str(images.files[index])
            truth = check_boxes(images.boxes[index], *image.size, name=file, slack=2)
            tensor, truth = for_evaluation(image, truth, protocol, model.image_size, resize)
            if images.masks and (marked := images.masks[index]) is not None:
                masked.append(len(tensors))
                masks.append(read_mask(marked, protocol, model.image_size, resize))
            tensors.append(tensor)
            labels.append(images.labels[index])
            boxes.append(np.asarray(truth))
        if tensors:
            batch, right = torch.stack(tensors).to(device), torch.tensor(labels, device=device)
            out = model(batch)
            for name, counts in counted.items():
                maps, logits = BASELINES[name](model, out, batch, right)
                counts.update(maps, logits, right, boxes)
                if masked:
                    pixels[name].update(maps[masked], torch.stack(masks))
        if progress is not None:
            progress(min(batch_size, len(images) - start))
    if skipped == len(images):
        raise InputError("no image could be read", field="data", value=images.name)
    return counted, pixels, skipped
