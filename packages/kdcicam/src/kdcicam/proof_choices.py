"""The proof's arms, the settings that each may have, and the ones that were chosen.

`benchmarks/choose_settings.py` chooses: it trains every entry of `GRIDS` on the scenes of `DEVELOPMENT` seeds
and takes the one whose validation images score best, on average, by the arm's own measure. Every arm has as
many entries as every other. The judged seeds' scenes have no part in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kdcicam.proof_arms import Arm

TEACHER_C, TEACHER_L, OURS, CONTROL = "teacher C", "teacher L", "kdcicam", "student, no teacher"
ONLY_C, ONLY_L = "student of C only", "student of L only"
DEVELOPMENT = (9000, 9001, 9002)

_JITTER = "crop:0.7,1+jitter:0.4+lighting"
_FORE = {"auxiliary": "fore", "threshold": 0.1}
_DIFF = {"auxiliary": "diff_aux", "threshold": 0.3}
_PLAIN = ({"area": 0.05}, {"area": 0.1}, {"augmentation": _JITTER}, {"area": 0.1, "augmentation": _JITTER})
_TWO = (
    {"alpha": 0.5, "beta": 200.0},
    {"alpha": 0.5, "beta": 1000.0},
    {"alpha": 0.8, "beta": 1000.0},
    {"alpha": 0.8, "beta": 4000.0},
)
STUDENT = {"augmentation_cls": _JITTER, "temperature_cls": 4.0, "temperature_loc": 15.0, "t_squared": True}
GRIDS: dict[str, tuple[dict[str, Any], ...]] = {
    "cam": ({"lr": 1e-3}, {"lr": 2e-3}, {"lr": 4e-3}, {"lr": 2e-3, "augmentation": _JITTER}),
    TEACHER_C: tuple(
        {**_FORE, "eta": eta, "augmentation": crop} for eta in (0.5, 1.0) for crop in ("crop:0.7,1", _JITTER)
    ),
    TEACHER_L: (
        *({**_DIFF, "eta": eta, "area": 0.1} for eta in (0.2, 0.5, 1.0)),
        {**_DIFF, "eta": 0.5, "area": 0.05},
    ),
    "nl-ccam": _PLAIN,
    "ci-cam": _PLAIN,
    OURS: _TWO,
    ONLY_C: ({"alpha": 0.5}, {"alpha": 0.8}, {"alpha": 0.5, "lr": 4e-3}, {"alpha": 0.8, "lr": 4e-3}),
    ONLY_L: _TWO,
    CONTROL: ({"lr": 1e-3}, {"lr": 2e-3}, {"lr": 4e-3}, {"lr": 2e-3, "augmentation_cls": "crop:0.7,1"}),
}
"""What each arm may be set to, over `proof_arms.COMMON`."""
MEASURES = {TEACHER_C: "top1_cls", TEACHER_L: "gt_known"}
"""What a choice is made by: a teacher's own skill, and top-1 localization for all others."""
CHOSEN: dict[str, int] = {
    "cam": 3,
    TEACHER_C: 1,
    TEACHER_L: 2,
    "nl-ccam": 0,
    "ci-cam": 3,
    OURS: 1,
    ONLY_C: 2,
    ONLY_L: 1,
    CONTROL: 2,
}
"""Number of the entry that was chosen."""

ARMS = {
    "cam": Arm("cam", {"cam": "cam"}, backbone="plain"),
    TEACHER_C: Arm("cls", {TEACHER_C: "ci-cam"}),
    TEACHER_L: Arm("loc", {TEACHER_L: "ci-cam"}),
    "nl-ccam": Arm("nl-ccam", {"nl-ccam": "nl-ccam", "grad-cam": "grad-cam"}),
    "ci-cam": Arm("ci-cam", {"ci-cam": "ci-cam"}),
    OURS: Arm("student", {OURS: "ci-cam"}, cls=TEACHER_C, loc=TEACHER_L, settings=STUDENT),
    ONLY_C: Arm("student", {ONLY_C: "ci-cam"}, cls=TEACHER_C, flags=(0, 1), settings=STUDENT),
    ONLY_L: Arm("student", {ONLY_L: "ci-cam"}, loc=TEACHER_L, flags=(0, 2), settings=STUDENT),
    CONTROL: Arm("student", {CONTROL: "ci-cam"}, settings=STUDENT),
}


def arm(name: str, entry: int | None = None) -> Arm:
    """An arm with an entry of its grid, or with the chosen one."""
    chosen = GRIDS[name][CHOSEN[name] if entry is None else entry]
    return replace(ARMS[name], settings={**ARMS[name].settings, **chosen})


def best_entry(scores: Mapping[int, Sequence[float]]) -> int:
    """Of entries with a score for each seed, the one of the highest mean; the first of equals."""
    return max(scores, key=lambda entry: sum(scores[entry]) / len(scores[entry]))
