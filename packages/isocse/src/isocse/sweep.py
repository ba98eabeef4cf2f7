"""A grid of training runs that goes on where it was stopped."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from isocse.dynamics import read_history
from isocse.pairs import Judged, Pairs
from isocse.training import Recipe, train
from shared_core import InputError, files

AXES = ("temperature", "batch_size", "pooling")
CELL_FILE = "cell.json"


@dataclass(frozen=True)
class Cell:
    """A finished run of a sweep.

    Attributes:
        recipe: How it was trained.
        history: Records of the geometry along training.
        losses: Training loss by step.
    """

    recipe: Recipe
    history: list[dict[str, float]]
    losses: list[float]


def grid(
    centre: Recipe, axes: Mapping[str, Sequence[Any]], seeds: Iterable[int], *, full: bool = False
) -> list[Recipe]:
    """Recipes of a sweep.

    Args:
        centre: The recipe that others differ from.
        axes: "temperature", "batch_size" or "pooling" to its values.
        seeds: Of each setting.
        full: All combinations; where false, one axis at a time leaves the centre.

    >>> [r.name for r in grid(Recipe(), {"temperature": [0.05, 1.0], "batch_size": [4]}, [0])]
    ['tau0.05-batch64-mean-seed0', 'tau1-batch64-mean-seed0', 'tau0.05-batch4-mean-seed0']
    """
    unknown = sorted(set(axes) - set(AXES))
    if unknown:
        raise InputError(f"expected {', '.join(AXES)}", field="axes", value=unknown)
    settings: list[dict[str, Any]] = [{}]
    if full:
        settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    else:
        settings += [{name: value} for name, values in axes.items() for value in values]
    recipes = [replace(centre, **setting, seed=seed) for setting in settings for seed in seeds]
    return list(dict.fromkeys(recipes))


def sweep(
    base: str | Path,
    pairs: Pairs,
    corpus: Sequence[str],
    recipes: Sequence[Recipe],
    out: str | Path,
    *,
    judged: Judged | None = None,
    checkpoint_every: int | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> list[Cell]:
    """Run the recipes that have no result yet; each result is on disk at once.

    A cell that was stopped goes on from its last checkpoint, where it has one, or begins anew.

    Args:
        base: A model's folder or name.
        pairs: Training pairs.
        corpus: Held-out sentences to measure on.
        recipes: As of `grid`.
        out: Folder; a folder below it for each recipe.
        judged: Texts with human similarities.
        checkpoint_every: Steps between checkpoints.
        say: Called with a line for people, a cell.
        options: Of `train` and `analyze`.

    Raises:
        InputError: The folder holds a sweep of another model or other data.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, {"base": str(base), "pairs": len(pairs), "sentences": len(corpus)})
    cells = []
    for number, recipe in enumerate(recipes, 1):
        folder = out / recipe.name
        found = read_cell(folder)
        if found is not None and found.recipe != recipe:
            other = [name for name, value in asdict(recipe).items() if value != asdict(found.recipe)[name]]
            raise InputError(f"holds a run with other settings ({', '.join(other)})", file=folder)
        if say is not None:
            say(f"{number}/{len(recipes)} {recipe.name}" + ("" if found is None else ": done before"))
        if found is None:
            done = train(
                base, pairs, corpus, recipe, out=folder, judged=judged, resume=True, save=False,
                checkpoint_every=checkpoint_every, **options,
            )  # fmt: skip
            record = {"recipe": asdict(recipe), "history": done.history, "losses": done.losses}
            files.write_json(folder / CELL_FILE, record)
            found = Cell(recipe, done.history, done.losses)
        cells.append(found)
    return cells


def read_cell(folder: Path) -> Cell | None:
    """The result of a cell, or None where it is not finished."""
    file = folder / CELL_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Cell(Recipe(**content["recipe"]), content["history"], content["losses"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"is damaged: {error}", file=file) from error


def read_sweep(folder: str | os.PathLike[str]) -> list[Cell]:
    """All finished cells below a folder, or the one run that the folder is.

    Raises:
        InputError: There is none.
    """
    folder = Path(folder)
    cells = [cell for file in sorted(folder.glob(f"*/{CELL_FILE}")) if (cell := read_cell(file.parent))]
    if not cells and (folder / "dynamics.jsonl").is_file():
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        known = {name: settings[name] for name in Recipe.__dataclass_fields__}
        cells = [Cell(Recipe(**known), read_history(folder / "dynamics.jsonl"), [])]
    if not cells:
        raise InputError("holds no finished run of `isocse train` or `isocse sweep`", file=folder)
    return cells


def by_axis(cells: Sequence[Cell]) -> dict[str, dict[str, list[list[dict[str, float]]]]]:
    """Axis to setting to its seeds' histories, of cells that differ from the centre in that axis alone."""
    contrastive = [cell for cell in cells if cell.recipe.objective == "contrastive"]
    if not contrastive:
        return {"objective": {"mlm": [cell.history for cell in cells]}}
    keys = [tuple(getattr(cell.recipe, axis) for axis in AXES) for cell in contrastive]
    centre = _centre(keys)
    found: dict[str, dict[str, list[list[dict[str, float]]]]] = {}
    for place, axis in enumerate(AXES):
        runs: dict[Any, list[list[dict[str, float]]]] = {}
        for key, cell in zip(keys, contrastive, strict=True):
            if all(key[n] == centre[n] for n in range(len(AXES)) if n != place):
                runs.setdefault(key[place], []).append(cell.history)
        if len(runs) > 1 or (axis == "temperature" and len(set(keys)) == 1):
            ordered = sorted(runs.items(), key=lambda item: (str(type(item[0])), item[0]))
            found[axis.replace("_", " ")] = {
                f"{axis.replace('_', ' ')} {value}": runs for value, runs in ordered
            }
    return found


def _centre(keys: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The setting that has most others beside it, differing in one axis."""

    def near(key: tuple[Any, ...]) -> int:
        return sum(sum(a != b for a, b in zip(key, other, strict=True)) <= 1 for other in keys)

    return max(dict.fromkeys(keys), key=near)


def _claim(out: Path, facts: dict[str, Any]) -> None:
    file = out / "sweep.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != facts:
            other = ", ".join(name for name in facts if before.get(name) != facts[name])
            raise InputError(f"holds a sweep of another {other}: give another folder", file=out)
    files.write_json(file, facts)
