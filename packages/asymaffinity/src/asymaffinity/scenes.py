"""Street-like scenes for the proof: real pictures on a made geometry, so that masks and depth are known.

Grounds, facades and the surfaces of objects are crops of photographs; outlines are those of real garments
(Fashion-MNIST) and of handwritten digits (MNIST), drawn thicker. What is made is where they stand: a ground
plane whose disparity grows linearly with the row, a facade of constant disparity, and upright objects that
touch the ground. Pixels and outlines of the test scenes are others than those of the training scenes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from shared_core.datasets import labelled_samples, mnist5k, photographs

Array = np.ndarray
SIDE = 64
SLOPE = 0.03
"""Disparity a row of the ground."""
DEPTH_NOISE, IMAGE_NOISE = 0.01, 0.01
SPLITS = ("train", "validation", "test")
ROLES = ("object", "ground", "facade")
LIKE_GROUND = 0.35
"""Share of objects of which a part has the ground's picture."""


@dataclass(frozen=True)
class Scenes:
    """Scenes as tensors.

    Attributes:
        images: [N, 3, 64, 64], 0 to 1.
        disparity: [N, 64, 64].
        masks: [M, 64, 64], booleans, of all objects of all scenes.
        boxes: [M, 4], x0, y0, x1, y1 in pixels, the tight rectangles of the visible parts.
        owner: [M], the scene of each object.
    """

    images: Tensor
    disparity: Tensor
    masks: Tensor
    boxes: Tensor
    owner: Tensor


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a table of `datasets`, whose types say less than its documentation."""
    yield from table


class Materials:
    """Photographs and outlines, cut into parts for training, validation and testing that share nothing.

    Of each photograph the left half is for training, the upper right quarter for validation and the lower
    one for testing: other pixels of the same things, so that what an object looks like can be learned.
    Objects, grounds and facades have photographs of their own.
    """

    def __init__(self) -> None:
        ours = [(str(row["name"]), np.asarray(row["image"].convert("RGB"))) for row in _rows(photographs())]
        # One of the stereo pair is enough: its halves would show what the other halves of its twin do.
        photos = [image for name, image in sorted(ours, key=lambda pair: pair[0]) if "right" not in name]
        photos += [np.asarray(row["image"].convert("RGB")) for row in _rows(labelled_samples("imagenet"))]
        garments = [np.asarray(row["image"]) > 10 for row in _rows(labelled_samples("fashion_mnist"))]
        digits = [np.asarray(row["image"]) > 100 for row in _rows(mnist5k().select(range(0, 5000, 10)))]
        thick = [cv2.dilate(digit.astype(np.uint8), np.ones((4, 4), np.uint8)) > 0 for digit in digits]
        right = [photo[:, photo.shape[1] // 2 :] for photo in photos]
        pieces = {
            "train": [photo[:, : photo.shape[1] // 2] for photo in photos],
            "validation": [half[: len(half) // 2] for half in right],
            "test": [half[len(half) // 2 :] for half in right],
        }
        self.photos = {
            (split, role): parts[n :: len(ROLES)]
            for split, parts in pieces.items()
            for n, role in enumerate(ROLES)
        }
        self.garments, self.digits = (
            {"train": outlines[::2], "validation": outlines[1::4], "test": outlines[3::4]}
            for outlines in (garments, thick)
        )

    def texture(
        self, split: str, role: str, draw: np.random.Generator, region: tuple[int, int], size: int
    ) -> Array:
        """A square crop of a photograph of `region` pixels a side, as floats [size, size, 3]."""
        group = self.photos[split, role]
        photo = group[draw.integers(len(group))]
        side = min(int(draw.integers(*region)), *photo.shape[:2])
        y, x = (int(draw.integers(0, length - side + 1)) for length in photo.shape[:2])
        crop = photo[y : y + side, x : x + side]
        how = cv2.INTER_LINEAR if side < size else cv2.INTER_AREA
        return cv2.resize(crop, (size, size), interpolation=how).astype(np.float32) / 255

    def outline(self, split: str, draw: np.random.Generator) -> Array:
        """A mask, tight in its array, mirrored half of the time."""
        group = self.garments if draw.random() < 0.5 else self.digits
        mask = group[split][draw.integers(len(group[split]))]
        rows, columns = np.nonzero(mask)
        mask = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        return mask[:, ::-1] if draw.random() < 0.5 else mask


def make_scenes(materials: Materials, split: str, count: int, seed: int) -> Scenes:
    """Make scenes.

    Args:
        materials: What they are made of.
        split: ``train``, ``validation`` or ``test``: whose photographs and outlines.
        count: How many.
        seed: Of everything.
    """
    draw = np.random.default_rng([seed, SPLITS.index(split)])
    images, fields, masks, owner = [], [], [], []
    for n in range(count):
        image, disparity, visible = _scene(materials, split, draw)
        images.append(image)
        fields.append(disparity)
        masks += visible
        owner += [n] * len(visible)
    boxes = [
        (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        for rows, columns in (np.nonzero(mask) for mask in masks)
    ]
    return Scenes(
        torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2)).contiguous(),
        torch.from_numpy(np.stack(fields)),
        torch.from_numpy(np.stack(masks)),
        torch.tensor(np.array(boxes), dtype=torch.float32),
        torch.tensor(owner),
    )


def _scene(materials: Materials, split: str, draw: np.random.Generator) -> tuple[Array, Array, list[Array]]:
    horizon = int(draw.integers(16, 28))
    ground = materials.texture(split, "ground", draw, (96, 256), SIDE)
    image = materials.texture(split, "facade", draw, (96, 256), SIDE).copy()
    image[horizon:] = ground[horizon:]
    rows = np.arange(SIDE, dtype=np.float32)[:, None]
    disparity = np.repeat(0.1 + SLOPE * np.clip(rows - horizon, 0, None), SIDE, 1)
    feet = np.sort(draw.integers(horizon + 10, SIDE - 1, int(draw.integers(1, 4))))
    visible: list[Array] = []
    for foot in feet:  # far ones first: near ones hide them
        mask, texture = _object(materials, split, draw, int(foot), ground)
        if not mask.any():
            continue
        level = 0.1 + SLOPE * (foot - horizon)
        columns = np.nonzero(mask.any(0))[0]
        bulge = 1 - ((np.arange(SIDE) - columns.mean()) / max(1, np.ptp(columns))) ** 2
        image = np.where(mask[..., None], texture, image)
        disparity = np.where(mask, level + 0.05 * bulge.astype(np.float32), disparity)
        visible = [kept & ~mask for kept in visible] + [mask]
    noisy = image + IMAGE_NOISE * draw.standard_normal(image.shape)
    measured = disparity + DEPTH_NOISE * draw.standard_normal(disparity.shape)
    large = [mask for mask in visible if mask.sum() >= 60]
    return noisy.clip(0, 1).astype(np.float32), measured.astype(np.float32), large


def _object(
    materials: Materials, split: str, draw: np.random.Generator, foot: int, ground: Array
) -> tuple[Array, Array]:
    outline = materials.outline(split, draw)
    height = int(draw.integers(20, 38))
    width = int(np.clip(height * outline.shape[1] / outline.shape[0] * draw.uniform(0.8, 1.25), 10, 34))
    shape = cv2.resize(outline.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_LINEAR) > 127
    left = int(draw.integers(0, SIDE - width + 1))
    top = foot + 1 - height
    mask = np.zeros((SIDE, SIDE), bool)
    cut = max(0, -top)
    mask[top + cut : foot + 1, left : left + width] = shape[cut:]
    texture = np.zeros((SIDE, SIDE, 3), np.float32)
    upper, lower = (materials.texture(split, "object", draw, (6, 20), SIDE) for _ in range(2))
    waist = top + int(height * draw.uniform(0.35, 0.65))
    texture[:] = upper
    texture[max(0, waist) :] = lower[max(0, waist) :]
    if draw.random() < LIKE_GROUND:
        low = max(0, top + int(height * draw.uniform(0.0, 0.7)))
        high = low + max(3, height // 4)
        texture[low:high] = (
            ground[low:high] if low > SIDE // 3 else ground[SIDE - (high - low) :][: high - low]
        )
    return mask, texture
