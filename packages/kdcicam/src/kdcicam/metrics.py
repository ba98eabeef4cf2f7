"""Localization metrics: top-1 and top-5 localization, GT-known, MaxBoxAcc, MaxBoxAccV2, PxAP.

Overlap is measured with the inclusive-pixel convention of the field (one is added to widths and heights).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from kdcicam.annotations import iou
from kdcicam.boxes import contour_boxes, official_boxes
from shared_core import InputError

Array = np.ndarray
Protocol = Literal["full", "center_crop"]
PROTOCOLS = get_args(Protocol)
CENTER_SHARE = 0.7
"""Side of the centre box, as a share of the image's."""

LOC_IOU = 0.5
_PIXEL = 1  # the inclusive convention


class WSOLEvaluator:
    """Counts hits over a data set; `update` for each batch, then `compute`.

    Only counts are kept, for every threshold, so that one pass over the images serves all of them.

    Args:
        protocol: What was done to images and boxes before: ``full`` (the whole image resized) or
            ``center_crop`` (resized and cropped, boxes clipped to the crop). Reported with the numbers.
        iou_thresholds: delta of MaxBoxAcc and MaxBoxAccV2.
        contour_thresholds: tau of MaxBoxAcc, as shares of the map's range.
        box_thresholds: Thresholds of the official extractor at which localization is counted.
        contours: Whether to count MaxBoxAcc at all: it costs the most.
    """

    def __init__(
        self,
        protocol: Protocol,
        *,
        iou_thresholds: Sequence[float] = (0.3, 0.5, 0.7),
        contour_thresholds: Array | None = None,
        box_thresholds: Array | None = None,
        contours: bool = True,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise InputError(f"expected one of {', '.join(PROTOCOLS)}", field="protocol", value=protocol)
        self.protocol: Protocol = protocol
        self.deltas = np.array(sorted(iou_thresholds), dtype=np.float64)
        self.taus = np.arange(0, 1, 0.01) if contour_thresholds is None else contour_thresholds
        self.thresholds = np.round(np.arange(0, 0.8, 0.01), 2) if box_thresholds is None else box_thresholds
        self.contours = contours
        self.images = self.unboxed = self.no_map = 0
        self.cls_hits = np.zeros(2, dtype=np.int64)  # top-1, top-5
        self.loc_hits = np.zeros((3, len(self.thresholds)), dtype=np.int64)  # top-1, top-5, GT-known
        self.largest_hits = np.zeros((len(self.deltas), len(self.taus)), dtype=np.int64)
        self.best_hits = np.zeros_like(self.largest_hits)
        self.fixed_hits = {name: np.zeros(3, dtype=np.int64) for name in ("whole_crop", "center_box")}

    def update(
        self,
        maps: Float[Tensor, "batch height width"],
        logits: Float[Tensor, "batch classes"],
        labels: Int[Tensor, " batch"],
        boxes: Sequence[Array],
    ) -> None:
        """Count a batch.

        Args:
            maps: At the image's size. A combinational map is label-free: its ranking is the network's own.
            logits: Of the classes.
            labels: The right classes.
            boxes: For each image its boxes xyxy [n, 4] in pixels of the map. An image without any counts for
                classification only, and in ``unboxed``.
        """
        if not len(maps) == len(logits) == len(labels) == len(boxes):
            raise InputError(
                "expected a map, logits, a label and boxes for each image",
                field="batch",
                value=(len(maps), len(logits), len(labels), len(boxes)),
            )
        ranking = logits.float().topk(min(5, logits.shape[1])).indices.cpu().numpy()
        for values, top, label, truth in zip(
            maps.float().cpu().numpy(), ranking, labels.tolist(), boxes, strict=True
        ):
            right = np.array([top[0] == label, label in top])
            self.images += 1
            self.cls_hits += right
            if len(truth) == 0:
                self.unboxed += 1
                continue
            self._count_boxes(values, np.array([*right, True]), np.asarray(truth, dtype=np.float64))

    def _count_boxes(self, values: Array, right: Array, truth: Array) -> None:
        height, width = values.shape
        official = official_boxes(values, self.thresholds)
        self.no_map += int(not official.found.any())
        hit = iou(official.boxes, truth, offset=_PIXEL).max(1) >= LOC_IOU
        self.loc_hits += right[:, None] & hit
        for name, box in fixed_boxes(height, width).items():
            self.fixed_hits[name] += right & (iou(box[None], truth, offset=_PIXEL).max() >= LOC_IOU)
        if not self.contours:
            return
        found = contour_boxes(values, self.taus)
        overlap = iou(found.largest.boxes, truth, offset=_PIXEL).max(1)
        overlap[~found.largest.found] = 0
        self.largest_hits += overlap >= self.deltas[:, None]
        best = np.zeros(found.cuts)
        np.maximum.at(best, found.cut, iou(found.boxes, truth, offset=_PIXEL).max(1, initial=0))
        self.best_hits += best[found.cut_of] >= self.deltas[:, None]

    def best_threshold(self) -> float:
        """The official extractor's threshold with the highest GT-known: for a validation split."""
        if self.images == self.unboxed:
            raise InputError("no image has a box: give a threshold", field="threshold")
        return float(self.thresholds[self.loc_hits[2].argmax()])

    def compute(self, threshold: float | Literal["oracle"]) -> dict[str, Any]:
        """Return shares of 0 to 1 under the names of the field, and the counts behind them.

        Args:
            threshold: Of the official extractor, chosen elsewhere; ``oracle`` takes the best one for these
                very images, which is an upper bound and no result.

        Returns:
            ``top1_cls, top5_cls, top1_loc, top5_loc, gt_known`` at the threshold; ``max_box_acc`` (delta 0.5,
            or the nearest that was asked for; the largest contour, one tau for all images),
            ``max_box_acc_v2`` (mean over deltas, any contour) with ``by_delta`` and ``curves``; the
            ``whole_crop`` and ``center_box`` baselines; counts of ``images``, ``unboxed`` ones and ones with
            ``no_map``.
        """
        if self.images == 0:
            raise InputError("no image was evaluated", field="images")
        oracle = threshold == "oracle"
        chosen = self.best_threshold() if threshold == "oracle" else threshold
        place = int(np.abs(self.thresholds - chosen).argmin())
        if abs(self.thresholds[place] - chosen) > 1e-9:
            raise InputError(
                f"was not counted; those counted are {self.thresholds[0]:g} to {self.thresholds[-1]:g}",
                field="threshold",
                value=threshold,
            )
        boxed = max(1, self.images - self.unboxed)
        top1, top5, known = (self.loc_hits[:, place] / boxed).tolist()
        result: dict[str, Any] = {
            "top1_cls": self.cls_hits[0] / self.images,
            "top5_cls": self.cls_hits[1] / self.images,
            "top1_loc": top1,
            "top5_loc": top5,
            "gt_known": known,
            "threshold": float(chosen),
            "threshold_from": "the test images (oracle)" if oracle else "elsewhere",
        }
        if self.contours:
            result |= self._max_box_acc(boxed)
        for name, hits in self.fixed_hits.items():
            result[name] = dict(
                zip(("top1_loc", "top5_loc", "gt_known"), (hits / boxed).tolist(), strict=True)
            )
        counts = {"images": self.images, "unboxed": self.unboxed, "no_map": self.no_map}
        return result | counts | {"protocol": self.protocol}

    def _max_box_acc(self, boxed: int) -> dict[str, Any]:
        largest, best = self.largest_hits / boxed, self.best_hits / boxed
        by_delta = {f"{d:g}": float(v) for d, v in zip(self.deltas, best.max(1), strict=True)}
        middle = int(np.abs(self.deltas - 0.5).argmin())
        return {
            "max_box_acc": float(largest[middle].max()),
            "max_box_acc_v2": float(best.max(1).mean()),
            "by_delta": by_delta,
            "curves": {"tau": self.taus.tolist(), "largest": largest.tolist(), "any": best.tolist()},
        }


def fixed_boxes(height: int, width: int) -> dict[str, Array]:
    """The boxes that need no map: the whole crop, and one in the centre with `CENTER_SHARE` of the sides."""
    x, y = (1 - CENTER_SHARE) / 2 * width, (1 - CENTER_SHARE) / 2 * height
    return {
        "whole_crop": np.array([0, 0, width - 1, height - 1], dtype=np.float64),
        "center_box": np.array([x, y, width - x, height - y]),
    }


class PixelAveragePrecision:
    """PxAP: average precision of the pixels of all images together, for masks (OpenImages30k).

    Args:
        bins: Into how many equal parts of 0 to 1 scores fall; the reference uses 1000.
    """

    def __init__(self, bins: int = 1000) -> None:
        if bins < 1:
            raise InputError("expected at least 1", field="bins", value=bins)
        self.bins = bins
        self.counts = np.zeros((2, bins), dtype=np.int64)

    def update(
        self, maps: Float[Tensor, "batch height width"], masks: Int[Tensor, "batch height width"]
    ) -> None:
        """Count a batch.

        Args:
            maps: Each is scaled to 0 to 1 by itself. One that is constant or not finite scores 0 everywhere.
            masks: 1 object, 0 ground, 255 not counted.
        """
        for values, mask in zip(maps.double().cpu().numpy(), masks.cpu().numpy(), strict=True):
            if not np.isin(mask, (0, 1, 255)).all():
                raise InputError("expected 0, 1 and 255", field="masks", value=np.unique(mask).tolist())
            finite = np.isfinite(values).all() and values.max() > values.min()
            scaled = (
                (values - values.min()) / (values.max() - values.min()) if finite else np.zeros_like(values)
            )
            place = np.minimum((scaled * self.bins).astype(np.int64), self.bins - 1)
            for kind in (0, 1):
                self.counts[kind] += np.bincount(place[mask == kind], minlength=self.bins)

    def compute(self) -> float:
        """Sum over thresholds of precision times the step in recall, from the highest threshold down.

        Raises:
            InputError: No pixel of an object was seen.
        """
        wrong, right = self.counts[:, ::-1].cumsum(1)
        if right[-1] == 0:
            raise InputError("no pixel belongs to an object", field="masks")
        precision = right / np.maximum(right + wrong, 1)
        return float((precision * np.diff(right, prepend=0)).sum() / right[-1])
