"""Evaluation of models on a split, of one map or of several from the same forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from kdcicam.annotations import check_boxes
from kdcicam.baselines import BASELINES
from kdcicam.data import Images
from kdcicam.images import for_evaluation, readable
from kdcicam.metrics import Protocol, WSOLEvaluator
from kdcicam.model import CICAM
from shared_core import InputError

Threshold = float | Literal["validation", "oracle"]
RESIZE = {299: 500}
"""The authors' side before the crop is 500 for InceptionV3 on CUB; 344/224 of the crop else."""


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
    """Evaluate maps of a model.

    Args:
        model: Moved to the device and into evaluation mode.
        test: Images with boxes.
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
        InputError: A method is none, no image has a box, or the threshold needs validation images that
            are not there.
    """
    for name in methods:
        if name not in BASELINES:
            raise InputError(f"expected one of {', '.join(BASELINES)}", field="method", value=name)
    if test.boxed == 0:
        raise InputError(f"no image of {test.name} {test.split} has a box", field="data")
    if threshold == "validation" and (validation is None or validation.boxed == 0):
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
    if threshold == "validation" and validation is not None:
        seen, _ = _counted(model, validation, methods, contours=False, **options)
        chosen = {name: counted.best_threshold() for name, counted in seen.items()}
    counted, skipped = _counted(model, test, methods, contours=contours, **options)
    made = {}
    for name, counts in counted.items():
        scores = counts.compute(chosen[name])
        if threshold == "validation":
            scores["threshold_from"] = "validation images"
        made[name] = Evaluation(scores, skipped)
    return made


def _counted(
    model: CICAM,
    images: Images,
    methods: Sequence[str],
    *,
    contours: bool,
    protocol: Protocol,
    resize: int | None,
    batch_size: int,
    skip: bool,
    progress: Callable[[int], None] | None,
) -> tuple[dict[str, WSOLEvaluator], int]:
    counted = {name: WSOLEvaluator(protocol, contours=contours) for name in methods}
    device, skipped = next(model.parameters()).device, 0
    for start in range(0, len(images), batch_size):
        tensors, labels, boxes = [], [], []
        for offset, image in readable(images.files[start : start + batch_size], skip):
            if isinstance(image, InputError):
                skipped += 1
                continue
            index = start + offset
            file = str(images.files[index])
            truth = check_boxes(images.boxes[index], *image.size, name=file, slack=2)
            tensor, truth = for_evaluation(image, truth, protocol, model.image_size, resize)
            tensors.append(tensor)
            labels.append(images.labels[index])
            boxes.append(np.asarray(truth))
        if tensors:
            batch, right = torch.stack(tensors).to(device), torch.tensor(labels)
            out = model(batch)
            for name, counts in counted.items():
                maps, logits = BASELINES[name](model, out, batch)
                counts.update(maps, logits, right, boxes)
        if progress is not None:
            progress(min(batch_size, len(images) - start))
    if skipped == len(images):
        raise InputError("no image could be read", field="data", value=images.name)
    return counted, skipped
