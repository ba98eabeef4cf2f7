"""Two kinds of nuclei for demonstration slides, alike at scan magnification and unlike in a deep look."""

import math
from functools import lru_cache

import cv2
import numpy as np
from jaxtyping import Float32

from rlogist.stain import HAEMATOXYLIN

NUCLEUS_STAIN = np.array(HAEMATOXYLIN, np.float32) / np.mean(HAEMATOXYLIN).astype(np.float32)
"""Optical density of red, green and blue for one unit on average."""


@lru_cache(maxsize=4)
def nuclei(density: float) -> dict[str, Float32[np.ndarray, "stamps 40 40 3"]]:
    """Nuclei: one large and smooth (tumour), or about nine small dark ones in the same outline (mimic)."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[-20:20, -20:20] + 0.5
    tumours, mimics = [], []
    for _ in range(48):
        turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.35)
        u = (x * np.cos(turn) + y * np.sin(turn)) / stretch
        v = (-x * np.sin(turn) + y * np.cos(turn)) * stretch
        outline = np.clip(8.5 - np.hypot(u, v), 0, 1).astype(np.float32)
        stain = NUCLEUS_STAIN * (density * rng.uniform(0.8, 1.2))
        tumours.append(outline[:, :, None] * stain)
        dots = (outline * _dots(x, y, rng))[:, :, None] * stain
        mimics.append(_alike_when_reduced(dots, tumours[-1]))
    return {"tumour": np.stack(tumours), "mimic": np.stack(mimics)}


def _dots(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Small discs on a triangular grid of 5 pixels, turned and moved, each a little off its place."""
    turn, (left, top) = rng.uniform(0, np.pi), rng.uniform(-2.5, 2.5, 2)
    found = np.zeros(x.shape, np.float32)
    for row in range(-5, 6):
        for column in range(-5, 6):
            a, b = 5 * (column + row / 2) + left, 5 * math.sqrt(0.75) * row + top
            cx, cy = a * np.cos(turn) - b * np.sin(turn), a * np.sin(turn) + b * np.cos(turn)
            cx, cy = cx + rng.normal() * 0.3, cy + rng.normal() * 0.3
            found = np.maximum(found, np.clip(2.6 - np.hypot(x - cx, y - cy), 0, 1))
    return found.astype(np.float32)


def _alike_when_reduced(dots: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Darken or lighten dots until both absorb the same light of each colour around each scan pixel."""

    def absorbed(stamp: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(1 - 10.0**-stamp, (0, 0), 2.0)

    goal = absorbed(target)
    for _ in range(12):
        dots = np.clip(dots * goal / (absorbed(dots) + 1e-4), 0, 2)
    return dots.astype(np.float32)
