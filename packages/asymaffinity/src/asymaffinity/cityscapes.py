"""Cityscapes' own average precision of instances, and its format of results.

The rules of cityscapesscripts (evalInstanceLevelSemanticLabeling), whose own code does not run on today's
numpy: regions of ignored classes and groups that cannot be told apart cost nothing, instances below 100
pixels do not count, and a class's precision is the mean over the thresholds .50 to .95.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from asymaffinity.datasets import CITYSCAPES_THINGS, BoxImages, read_ids
from asymaffinity.predictions import decode
from shared_core.files import atomic_path, write_text

Array = np.ndarray
IGNORED = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
"""Class ids that are left out of the evaluation."""
LEAST_PIXELS = 100
OVERLAPS = np.arange(0.5, 1.0, 0.05)


@dataclass(frozen=True)
class _Matches:
    """True and found instances of a class in an image.

    Attributes:
        pixels: [truths], of the true instances, groups too.
        counted: [truths], neither a group nor small.
        found: [predictions], pixels of the found ones.
        scores: [predictions].
        shared: [predictions, truths], pixels of both.
        ignored: [predictions], pixels on ignored classes, groups and small instances.
    """

    pixels: Array
    counted: Array
    found: Array
    scores: Array
    shared: Array
    ignored: Array


def cityscapes_ap(images: Iterable[tuple[Array, Sequence[tuple[Array, int, float]]]]) -> dict[str, float]:
    """Average precision of found instances.

    Args:
        images: Of each image the map of instanceIds [H, W] and what was found: mask [H, W], class id, score.

    Returns:
        ``ap`` and ``ap50``, means over the classes that occur, and ``ap_<class>`` of each of them.
    """
    of_class: dict[int, list[_Matches]] = {thing: [] for thing in CITYSCAPES_THINGS}
    for ids, found in images:
        values, counts = np.unique(ids, return_counts=True)
        void = np.isin(ids, IGNORED)
        for thing, parts in of_class.items():
            parts.append(_match(thing, ids, values, counts, void, [f for f in found if f[1] == thing]))
    table = np.array([[_precision(parts, over) for over in OVERLAPS] for parts in of_class.values()])
    known = ~np.isnan(table[:, 0])
    if not known.any():
        return {"ap": 0.0, "ap50": 0.0}
    each = {
        f"ap_{name}": float(row.mean())
        for name, row, there in zip(CITYSCAPES_THINGS.values(), table, known, strict=True)
        if there
    }
    return {"ap": float(table[known].mean()), "ap50": float(table[known, 0].mean()), **each}


def _match(
    thing: int,
    ids: Array,
    values: Array,
    counts: Array,
    void: Array,
    found: Sequence[tuple[Array, int, float]],
) -> _Matches:
    own = (values == thing) | (values // 1000 == thing)
    truths, pixels = values[own], counts[own]
    found = [each for each in found if each[0].any()]
    shared = np.zeros((len(found), len(truths)))
    ignored = np.zeros(len(found))
    group, small = truths < 1000, pixels < LEAST_PIXELS
    for n, (mask, _, _) in enumerate(found):
        inner = ids[mask]
        shared[n] = [np.count_nonzero(inner == value) for value in truths]
        ignored[n] = np.count_nonzero(void & mask) + shared[n][group].sum() + shared[n][small].sum()
    return _Matches(
        pixels,
        ~group & ~small,
        np.array([np.count_nonzero(mask) for mask, _, _ in found]),
        np.array([score for _, _, score in found]),
        shared,
        ignored,
    )


def _precision(parts: Sequence[_Matches], overlap: float) -> float:
    """Of a class at one overlap; NaN where it has no true instance, 0 where nothing was found."""
    true, score, missed = [], [], 0
    for part in parts:
        union = part.found[:, None] + part.pixels[None] - part.shared
        hit = part.shared / np.maximum(union, 1) > overlap
        for scores in (part.scores[hit[:, n]] for n in np.flatnonzero(part.counted)):
            missed += not len(scores)
            # The surest of several on one instance is right, the others are wrong.
            true += [1.0, *[0.0] * (len(scores) - 1)][: len(scores)]
            score += sorted(scores, reverse=True)
        wrong = ~hit.any(1) & (part.ignored <= overlap * part.found)
        true += [0.0] * int(wrong.sum())
        score += part.scores[wrong].tolist()
    if not any(part.counted.any() for part in parts):
        return float("nan")
    return _area(np.array(true), np.array(score), missed) if any(len(part.found) for part in parts) else 0.0


def _area(true: Array, score: Array, missed: int) -> float:
    """Under the precision over recall, each step of recall with the precision at its middle."""
    order = np.argsort(score)
    true, score = true[order], score[order]
    _, first = np.unique(score, return_index=True)
    if not len(first):
        return 0.0
    below = np.concatenate([[0.0], np.cumsum(true)])[first]  # right ones of lower score
    hits = true.sum() - below
    recall = np.append(hits / max(true.sum() + missed, 1), 0.0)
    precision = np.append(hits / (len(true) - first), 1.0)
    ends = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ ((ends[:-2] - ends[2:]) / 2))


def score_rows(rows: Sequence[dict[str, Any]], data: BoxImages, root: Path, split: str) -> dict[str, float]:
    """`cityscapes_ap` of COCO's result rows against the gtFine maps of a split."""
    return {f"cityscapes_{k}": v for k, v in cityscapes_ap(_pairs(rows, data, root, split)).items()}


def _pairs(
    rows: Sequence[dict[str, Any]], data: BoxImages, root: Path, split: str
) -> Iterable[tuple[Array, list[tuple[Array, int, float]]]]:
    of_image = _by_image(rows)
    for record in data.records:
        path = (
            root
            / "gtFine"
            / split
            / record.image.parent.name
            / f"{_stem(record.image)}_gtFine_instanceIds.png"
        )
        own = of_image.get(record.image_id, [])
        yield read_ids(path), [(decode(r["segmentation"]), r["category_id"], r["score"]) for r in own]


def write_results(rows: Sequence[dict[str, Any]], data: BoxImages, folder: Path) -> None:
    """Write result rows as Cityscapes' scripts and its server read them: a text an image, a PNG a mask."""
    of_image = _by_image(rows)
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    for record in data.records:
        lines = []
        for n, row in enumerate(of_image.get(record.image_id, [])):
            name = f"masks/{_stem(record.image)}_{n:03d}.png"
            with atomic_path(folder / name) as temporary:
                Image.fromarray(decode(row["segmentation"]).astype(np.uint8) * 255).save(
                    temporary, format="PNG"
                )
            lines.append(f"{name} {row['category_id']} {row['score']}\n")
        write_text(folder / f"{_stem(record.image)}.txt", "".join(lines))


def _by_image(rows: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["image_id"], []).append(row)
    return found


def _stem(image: Path) -> str:
    return image.name.removesuffix("_leftImg8bit.png")
