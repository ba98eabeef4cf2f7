"""The losses as plain loops over Python numbers: slow, and written without the code that they judge."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def ordered_edges(
    features: Any, box: Any, theta: float, thresh: float, valid: Any, kernel: int, dilation: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Cell and alike neighbour for each cell in the box; features [c][h][w], box and valid [h][w]."""
    h, w = len(box), len(box[0])
    reach = kernel // 2
    for y in range(h):
        for x in range(w):
            if not box[y][x]:
                continue
            for ky in range(-reach, reach + 1):
                for kx in range(-reach, reach + 1):
                    v, u = y + dilation * ky, x + dilation * kx
                    if (ky, kx) == (0, 0) or not (0 <= v < h and 0 <= u < w) or not valid[v][u]:
                        continue
                    gap = math.sqrt(sum((float(f[y][x]) - float(f[v][u])) ** 2 for f in features))
                    if math.exp(-gap / theta) >= thresh:
                        yield (y, x), (v, u)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def affinity(logits: Any, edges_of: Any, boxes: Any, cost: Any, known: bool) -> tuple[float, int]:
    """Sum of costs and number of edges: cost(p_i, p_j) inside, -log(1 - p_i) across the known border."""
    total, count = 0.0, 0
    for x, edges, box in zip(logits, edges_of, boxes, strict=True):
        for (y, a), (v, b) in edges:
            p, q = sigmoid(float(x[y][a])), sigmoid(float(x[v][b]))
            total += -math.log(1 - p) if known and not box[v][b] else cost(p, q)
            count += 1
    return total, count


def symmetric(p: float, q: float) -> float:
    return -math.log(p * q + (1 - p) * (1 - q))


def implication(p: float, q: float) -> float:
    return -math.log(1 - p * (1 - q))


def projection(logits: Any, boxes: Any) -> float:
    total = 0.0
    for x, box in zip(logits, boxes, strict=True):
        p = [[sigmoid(float(value)) for value in row] for row in x]
        for turned in (lambda m: m, lambda m: list(zip(*m, strict=True))):
            u = [max(row) for row in turned(p)]
            v = [max(float(value) for value in row) for row in turned(box)]
            top = 2 * sum(a * b for a, b in zip(u, v, strict=True))
            total += 1 - top / (sum(a * a for a in u) + sum(b * b for b in v) + 1e-5)
    return total / len(logits)
