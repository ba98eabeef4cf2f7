"""The shortened proof runs from slide files to verdicts, and its verdicts follow from its numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from feature_worlds import bags

from rlogist.demo_slides import DemoWorld, make_demo_slides
from rlogist.experiments import QUICK, Dataset, observe, run_update, split
from rlogist.sources import Bag

pytest.importorskip("matplotlib")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib and pyparsing among themselves
def test_quick_proof(tmp_path):
    from rlogist.proof import MARGIN, RIVALS, TIME_SHARE, run_proof

    code = run_proof(tmp_path, [0], quick=True, jobs=1)
    record = json.loads((tmp_path / "proof.json").read_text())
    assert code == (0 if record["holds"] else 1)
    methods = record["methods"]
    arms = {"full observation", "low-res only", "rlogist", "rlogist @0.1"}
    arms |= {f"{name} @{rho}" for name in RIVALS for rho in (0.1, 0.2)}
    arms |= {f"{name} of all regions" for name in ("mean", "max", "abmil", "dsmil")}
    arms |= {f"rlogist, update {form} @0.2" for form in ("targeted", "none")}
    assert arms <= set(methods)
    auc = {name: np.array(values["auc"]) for name, values in methods.items() if "auc" in values}
    verdicts = [claim["holds"] for claim in record["claims"]]
    assert verdicts[0] == (auc["full observation"].mean() - auc["rlogist"].mean() <= MARGIN)
    assert verdicts[1] == all((auc["rlogist"] > auc[f"{name} @0.2"]).all() for name in RIVALS)
    assert verdicts[3] == (record["details"]["timing"]["ratio"]["rlogist @0.2"] <= TIME_SHARE)
    assert verdicts[4]
    assert (tmp_path / "auc.png").stat().st_size > 5000


def test_test_slides_choose_nothing(tmp_path):
    made = bags(16)
    sizes = replace(
        QUICK,
        architecture=replace(QUICK.architecture, dim=6),
        staged=replace(QUICK.staged, epochs=3, track_from=0, warmup=1, global_epochs=1, mixed_epochs=1),
        ppo=replace(QUICK.ppo, steps=64),
    )
    test, results = split(made, 0).test, []
    for name in ("as they are", "turned over"):
        tumour = [np.ones(len(bag), bool) for bag in made]
        data = Dataset([], made, tumour, [])
        _, state = observe((data, sizes, 0, False))
        folder = tmp_path / name
        run_update((data, sizes, 0, "global", state, folder))
        results.append((folder / "model.safetensors").read_bytes())
        made = [replace(b, deep=-b.deep, scan=-b.scan) if i in test else b for i, b in enumerate(made)]
    assert results[0] == results[1]


def test_no_patient_is_on_two_sides(tmp_path):
    made = make_demo_slides(tmp_path, 12, world=DemoWorld(size=1024, group_radius=90.0))

    made = [Bag(torch.zeros(1, 2), torch.zeros(1, 1, 2), s.label, s.name, s.patient) for s in made]
    for seed in range(3):
        sides = split(made, seed)
        parts = (sides.train, sides.validation, sides.test)
        assert sorted(i for part in parts for i in part) == list(range(12))
        patients = [{made[i].patient for i in part} for part in parts]
        assert sum(map(len, patients)) == len(set().union(*patients))
        assert all({made[i].label for i in part} == {0, 1} for part in parts)
