"""Chooses the proof's settings: each arm's grid, on the validation images of development seeds only.

    python packages/kdcicam/benchmarks/choose_settings.py --work DIR [ARM ...]

Prints each entry's validation score by seed and the best entry, for `kdcicam.proof_choices.CHOSEN`.
Teachers come first: students follow the teachers that stand there. DIR keeps scenes and models.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from kdcicam.checkpoints import save_model
from kdcicam.data import load_images
from kdcicam.proof_arms import START, START_SETTINGS, Task, make_start, train_arm, validation_scores
from kdcicam.proof_choices import ARMS, DEVELOPMENT, GRIDS, MEASURES, arm, best_entry
from kdcicam.proof_scenes import Sizes, Sources, StartScenes, make_scenes, make_start_scenes, write_scenes


def prepare(work: Path) -> None:
    """Scenes of the development seeds and the common start, once."""
    if (work / "models" / START).exists():
        return
    sources, sizes = Sources(), Sizes()
    for seed in DEVELOPMENT:
        write_scenes(work / f"scenes-{seed}", make_scenes(sources, sizes, seed))
    scenes = StartScenes(make_start_scenes(sources, sizes.start, 0))
    print("start", make_start(scenes, work / "models", START_SETTINGS, lambda *_: None), flush=True)


def score(work: Path, name: str, entry: int | None, seed: int) -> dict[str, float]:
    """Train an arm with an entry, or with the chosen one and keep it; return its validation scores."""
    chosen = arm(name, entry)
    task = Task(name, chosen, seed, work / f"scenes-{seed}", work / "models", {}, ())
    for teacher in (chosen.cls, chosen.loc):
        if teacher is not None and not task.folder(teacher).exists():
            score(work, teacher, None, seed)
    model = train_arm(task)
    if entry is None:
        save_model(model, task.folder())
    kind = next(iter(chosen.maps.values()))
    return validation_scores(model, kind, load_images(task.data, "val"))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("arms", nargs="*", default=list(ARMS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    prepare(asked.work)
    for name in asked.arms:
        measure, table = MEASURES.get(name, "top1_loc"), dict[int, list[float]]()
        for entry, settings in enumerate(GRIDS[name]):
            found: list[dict[str, Any]] = [score(asked.work, name, entry, seed) for seed in DEVELOPMENT]
            table[entry] = [one[f"{measure} validation"] for one in found]
            means = {key: round(sum(one[key] for one in found) / len(found), 3) for key in found[0]}
            print(f"{name} {entry} {settings}: {[round(v, 3) for v in table[entry]]} {means}", flush=True)
        print(f"{name}: {best_entry(table)} by {measure}", flush=True)


if __name__ == "__main__":
    main()
