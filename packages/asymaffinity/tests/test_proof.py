"""The proof: its scenes are what they say, and its runs are judged by its rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from asymaffinity import experiments, proof
from asymaffinity.experiments import Outcome, Run
from asymaffinity.scenes import Materials, make_scenes
from shared_core import proof as records


@pytest.fixture(scope="module")
def materials() -> Materials:
    return Materials()


def test_test_scenes_share_no_pixel_and_no_outline_with_training(materials: Materials):
    """Trap 10."""
    photos = {
        split: [photo for (own, _), group in materials.photos.items() if own == split for photo in group]
        for split in ("train", "test")
    }
    for group in (photos, materials.garments, materials.digits):
        train, test = ({part.tobytes() for part in group[split]} for split in ("train", "test"))
        assert len(train) >= 10
        assert len(test) >= 10
        assert not train & test


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
    run = Run("asymaffinity", "asymmetric", (("color", 0.5), ("depthgrad", 0.5)), 7, 3, 10)
    experiments._cache.clear()
    first = experiments.execute(run)
    train, test = experiments.prepared(7)
    garbage = torch.rand_like(train.masks.float()) > 0.5
    experiments._cache[7] = (replace(train, masks=garbage), test)
    second = experiments.execute(run)
    assert np.array_equal(first.masks, second.masks)
    assert [look["step"] for look in first.curve] == list(range(1, 11))
    ceiling = Run("full masks", "masks", (), 7, 3, 10)
    assert not np.array_equal(experiments.execute(ceiling).masks, first.masks)
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
            Run(name, form, weights, seed), 0.5, ap.get(name, 0.5), 0.6, 0.1, 0.0, 0.1,
            [{"step": 1, "trivial": trivial.get(name, 0.5)}], 1.0, np.zeros((1, 32, 32)),
        )
        for seed in (0, 1)
        for name, (form, weights) in proof.METHODS.items()
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


def test_every_method_runs_on_every_seed_with_the_same_steps_and_weight():
    runs = proof.plan([0, 1, 2])
    main = [run for run in runs if run.name in proof.METHODS]
    assert len(main) == 3 * len(proof.METHODS)
    assert {(run.steps, run.warmup) for run in main} == {(experiments.STEPS, experiments.WARMUP)}
    trained = [run for run in main if run.weights]
    assert {sum(weight for _, weight in run.weights) for run in trained} == {1.0}
    assert {run.name for run in runs} - set(proof.METHODS) == set(proof.ABLATIONS)
