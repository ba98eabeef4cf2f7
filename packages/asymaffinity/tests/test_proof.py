"""The proof: its scenes are what they say, and its runs are judged by its rules."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from asymaffinity import experiments, proof
from asymaffinity.experiments import Outcome, Run, Way
from asymaffinity.scenes import SPLITS, Materials, make_scenes
from shared_core import proof as records


@pytest.fixture(scope="module")
def materials() -> Materials:
    return Materials()


def test_training_validation_and_test_share_no_pixel_and_no_outline(materials: Materials):
    """Trap 10."""
    photos = {
        split: [photo for (own, _), group in materials.photos.items() if own == split for photo in group]
        for split in SPLITS
    }
    for group in (photos, materials.garments, materials.digits):
        parts = [{part.tobytes() for part in group[split]} for split in SPLITS]
        assert min(len(part) for part in parts) >= 5
        assert len(set.union(*parts)) == sum(len(part) for part in parts)


def test_scenes_are_drawn_from_the_seed_and_boxes_are_tight(materials: Materials):
    scenes = make_scenes(materials, "train", 6, 0)
    again = make_scenes(materials, "train", 6, 0)
    assert torch.equal(scenes.images, again.images)
    assert not torch.equal(scenes.images, make_scenes(materials, "train", 6, 1).images)
    assert scenes.images.shape == (6, 3, 64, 64)
    for mask, (x0, y0, x1, y1) in zip(scenes.masks, scenes.boxes.long().tolist(), strict=True):
        assert mask.any(0).nonzero().flatten()[[0, -1]].tolist() == [x0, x1 - 1]
        assert mask.any(1).nonzero().flatten()[[0, -1]].tolist() == [y0, y1 - 1]
    assert 0.45 < float((scenes.masks.flatten(1).sum(1)).float().mean()) / (64 * 64) * 8 < 2


def test_a_run_trains_from_boxes_alone(monkeypatch: pytest.MonkeyPatch):
    """Trap 2: true masks replaced by garbage change what is judged, never what is learned."""
    monkeypatch.setattr(experiments, "TRAIN_SCENES", 10)
    monkeypatch.setattr(experiments, "TEST_SCENES", 8)
    experiments._cache.clear()
    train, test = experiments.prepared(7)
    garbage = torch.rand_like(train.masks.float()) > 0.5
    ways = [proof.BOTH["asymmetric"], Way("mil")]
    for way in [*ways, Way("masks")]:
        run = Run("x", way, 7, 10)
        experiments._cache[7, "test"] = (train, test)
        first = experiments.execute(run)
        experiments._cache[7, "test"] = (replace(train, masks=garbage), test)
        second = experiments.execute(run)
        assert np.array_equal(first.masks, second.masks) == (way.form != "masks")
        assert [look["step"] for look in first.curve] == list(range(1, 11))
    experiments._cache[7, "test"] = (train, test)
    bases = experiments.references(7)
    assert bases["box"]["fill"] == 1
    assert bases["truth"]["iou"] == 1
    assert 0 < bases["edges depthgrad"]["positive_share"] < 1
    experiments._cache.clear()


def judged(trivial: dict[str, float], ap: dict[str, float], tmp_path) -> list[bool]:
    """Verdicts of two seeds with these numbers of each method."""
    run = records.ProofRun(
        package="asymaffinity", version="0", source="", data="", seeds=[0, 1], out=tmp_path, names=[]
    )
    outcomes = [
        Outcome(
            Run(name, way, seed), 0.5, ap.get(name, 0.5), 0.6, 0.1, 0.0, 0.1,
            [{"step": 1, "trivial": trivial.get(name, 0.5)}], 1.0, np.zeros((1, 32, 32)),
        )
        for seed in (0, 1)
        for name, way in proof.METHODS.items()
    ]  # fmt: skip
    with run:
        proof._judge(run, outcomes)
    return [claim.holds for claim in run.claims]


def test_the_two_findings_are_judged_apart_by_their_numbers(tmp_path):
    trivial = {"symmetric depthgrad": 0.7, "asymmetric depthgrad": 0.4}
    ap = {"symmetric depthgrad": 0.3, "symmetric both": 0.4, "asymaffinity": 0.6}
    assert judged(trivial, ap, tmp_path) == [True, True]
    assert judged({**trivial, "symmetric depthgrad": 0.45}, ap, tmp_path) == [False, True]
    assert judged(trivial, {**ap, "symmetric depthgrad": 0.55}, tmp_path) == [False, False]
    assert judged(trivial, {**ap, "asymaffinity": 0.45}, tmp_path) == [True, False]
    assert judged({**trivial, "asymmetric depthgrad": 0.8}, ap, tmp_path) == [True, False]


def test_every_method_runs_on_every_seed_with_the_same_steps_and_every_setting_was_offered_to_all():
    runs = proof.plan([0, 1, 2])
    main = [run for run in runs if run.name in proof.METHODS]
    assert len(main) == 3 * len(proof.METHODS)
    assert {run.steps for run in main} == {experiments.STEPS}
    assert {run.split for run in runs} == {"test"}
    assert {run.name for run in runs} - set(proof.METHODS) == set(proof.ABLATIONS)
    choices = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "choose_settings.py"))
    assert set(proof.CHOSEN) == set(choices["WAYS"])
    for way in proof.CHOSEN.values():
        ((_, weight, which),) = way.terms
        assert weight in choices["WEIGHTS"]
        assert way.warmup in choices["WARMUPS"]
        assert which in ("usual", *choices["EDGES"])
    for form in ("symmetric", "asymmetric"):
        both, parts = proof.BOTH[form], [proof.CHOSEN[f"{form} {name}"] for name in ("color", "depthgrad")]
        assert [2 * weight for _, weight, _ in both.terms] == [part.terms[0][1] for part in parts]
        assert both.warmup == max(part.warmup for part in parts)
    assert not set(choices["SEEDS"]) & set(range(proof.FIRST_SEED, proof.FIRST_SEED + 100))


def test_both_forms_are_shown_at_the_same_weights_with_and_without_warm_up():
    """Trap 8."""
    shown = {(way.form, way.terms[0][1], way.warmup > 0) for way in proof.ABLATIONS.values()}
    for form in ("symmetric", "asymmetric"):
        assert {(form, weight, warm) for weight in (1.0, 3.0) for warm in (True, False)} <= shown
