"""Which teacher layer teaches which student layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from shared_core import InputError

Strategy = Literal["random", "last", "skip"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def select_layers(
    n: int,
    m: int,
    k: int,
    strategy: Strategy = "random",
    generator: torch.Generator | None = None,
) -> list[tuple[int, int]]:
    """Pair k of the teacher's n layers with k of the student's m, in order.

    Args:
        n: Layers of the teacher.
        m: Layers of the student.
        k: Pairs, 1 to min(n, m).
        strategy: "random" draws k layers of each side without replacement, sorts both and pairs them in
            order, as published. "last" takes the last k of each. "skip" takes the last k of the student and,
            from the first on, every (n // m)-th of the teacher; both are the paper's ablations.
        generator: Where randomness comes from; needed for "random".

    Returns:
        Pairs (teacher layer, student layer), indices from 0.

    Raises:
        InputError: k is out of range, the strategy is unknown, or "skip" has too few teacher layers.

    >>> select_layers(12, 6, 5, "last")
    [(7, 1), (8, 2), (9, 3), (10, 4), (11, 5)]
    >>> select_layers(12, 6, 5, "skip")
    [(0, 1), (2, 2), (4, 3), (6, 4), (8, 5)]
    """
    if not 1 <= k <= min(n, m):
        raise InputError(
            f"expected 1 to {min(n, m)}: the teacher has {n} layers and the student {m}",
            field="pairs of layers",
            value=k,
        )
    student = list(range(m - k, m))
    match strategy:
        case "random":
            if generator is None:
                raise InputError("a random selection needs a generator", field="generator")
            draws = (torch.randperm(size, generator=generator)[:k].sort().values for size in (n, m))
            return [(int(a), int(b)) for a, b in zip(*draws, strict=True)]
        case "last":
            return list(zip(range(n - k, n), student, strict=True))
        case "skip":
            step = n // m
            if step < 1 or (k - 1) * step >= n:
                raise InputError(
                    "expected a teacher with at least as many layers as the student", field="skip", value=n
                )
            return [(number * step, layer) for number, layer in enumerate(student)]
    raise InputError(f"expected one of {', '.join(STRATEGIES)}", field="strategy", value=strategy)


@dataclass(frozen=True)
class LayerSchedule:
    """The pairs of each step: drawn anew every so many steps, from seed and step alone.

    Every process and every resumed run therefore has the same pairs, without anything to broadcast or save.

    Args:
        teacher_layers: Layers of the teacher.
        student_layers: Layers of the student.
        count: Pairs, K. The official scripts have 5.
        strategy: See `select_layers`; or `fixed` names the pairs.
        every: Steps between draws. The official code draws when it saves, every 10 steps in its scripts.
        seed: Of the draws.
        fixed: Pairs of the user's own, for all steps.
    """

    teacher_layers: int
    student_layers: int
    count: int = 5
    strategy: Strategy = "random"
    every: int = 10
    seed: int = 0
    fixed: Sequence[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError("expected at least 1", field="every", value=self.every)
        self.pairs(0)  # what cannot be drawn shows here and not after the models are loaded

    def pairs(self, step: int) -> list[tuple[int, int]]:
        """Return the pairs of a step, counted from 0."""
        if self.fixed is not None:
            return _checked(self.fixed, self.teacher_layers, self.student_layers)
        words = np.random.SeedSequence([self.seed, step // self.every]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0] >> 1))
        return select_layers(self.teacher_layers, self.student_layers, self.count, self.strategy, generator)


def _checked(pairs: Sequence[tuple[int, int]], n: int, m: int) -> list[tuple[int, int]]:
    for pair in pairs:
        if not (0 <= pair[0] < n and 0 <= pair[1] < m):
            raise InputError(
                f"expected a teacher layer 0 to {n - 1} and a student layer 0 to {m - 1}",
                field="pairs",
                value=tuple(pair),
            )
    if not pairs:
        raise InputError("expected at least one pair", field="pairs", value=list(pairs))
    return [(int(a), int(b)) for a, b in pairs]
