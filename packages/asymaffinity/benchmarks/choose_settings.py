"""Chooses weight, warm-up and thresholds of each of the proof's trainings on validation scenes.

Run `python packages/asymaffinity/benchmarks/choose_settings.py [--out FILE] [WAY ...]`: prints the mean
mask AP of the development seeds for each setting, and the best. The same values are tried for all: first
weight and warm-up at the usual thresholds, then the other thresholds at the best of those. Scenes, pictures
and outlines are others than those that the proof judges by. The best stand in `asymaffinity.proof`. About 10
minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from asymaffinity.experiments import Run, Way, execute_all
from shared_core.files import write_json

SEEDS = (1000,)
WEIGHTS = (0.1, 0.3, 1.0, 3.0)
WARMUPS = (50, 250)
EDGES = ("loose", "tight")
WAYS = {
    f"{form} {modality}": Way(form, ((modality, 1.0, "usual"),))
    for form in ("symmetric", "asymmetric")
    for modality in ("color", "depthgrad")
}


def scored(ways: Sequence[Way], workers: int | None) -> list[dict[str, float]]:
    """Means over the development seeds."""
    # Seed by seed: scenes are made once for all runs that follow one another in a process.
    runs = [Run("choose", way, seed, split="validation") for seed in SEEDS for way in ways]
    outcomes = execute_all(runs, workers)
    return [
        {
            part: float(np.mean([getattr(o, part) for o in outcomes if o.run.way == way]))
            for part in ("ap", "iou", "fill", "trivial")
        }
        for way in ways
    ]


def choose(way: Way, workers: int | None = None) -> tuple[Way, list[dict[str, Any]]]:
    """The setting of the highest validation AP, and all that were tried."""
    tried: list[tuple[Way, dict[str, float]]] = []

    def look(ways: Sequence[Way]) -> None:
        for each, means in zip(ways, scored(ways, workers), strict=True):
            tried.append((each, means))
            shown = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            ((_, weight, which),) = each.terms
            print(f"  weight {weight:g}, warm-up {each.warmup}, {which} edges: {shown}", flush=True)

    def best() -> Way:
        return max(tried, key=lambda pair: pair[1]["ap"])[0]

    ((modality, _, usual),) = way.terms
    look([replace(way, terms=((modality, w, usual),), warmup=warmup) for w in WEIGHTS for warmup in WARMUPS])
    weight = best().terms[0][1]
    look([replace(best(), terms=((modality, weight, edges),)) for edges in EDGES])
    return best(), [asdict(each) | means for each, means in tried]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--out", type=Path, help="Write all that was tried to this file.")
    parser.add_argument("--workers", type=int, help="Processes; where not given, 2.")
    options = parser.parse_args()
    found = {}
    for name in options.ways or WAYS:
        print(name, flush=True)
        way, tried = choose(WAYS[name], options.workers)
        found[name] = {"best": asdict(way), "tried": tried}
        print(f"  best: {way}", flush=True)
    if options.out is not None:
        write_json(options.out, found)


if __name__ == "__main__":
    main()
