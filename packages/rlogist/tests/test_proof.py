"""The shortened proof runs from slide files to verdicts, and its verdicts follow from its numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rlogist.demo_slides import DemoWorld, make_demo_slides
from rlogist.experiments import split
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
    arms |= {f"rlogist, update {form} @0.2" for form in ("targeted", "none")}
    assert arms <= set(methods)
    auc = {name: np.array(values["auc"]) for name, values in methods.items() if "auc" in values}
    verdicts = [claim["holds"] for claim in record["claims"]]
    assert verdicts[0] == (auc["full observation"].mean() - auc["rlogist"].mean() <= MARGIN)
    assert verdicts[1] == all((auc["rlogist"] > auc[f"{name} @0.2"]).all() for name in RIVALS)
    assert verdicts[3] == (record["details"]["timing"]["ratio"]["rlogist @0.2"] <= TIME_SHARE)
    assert verdicts[4]
    assert (tmp_path / "auc.png").stat().st_size > 5000


def test_no_patient_is_on_both_sides(tmp_path):
    made = make_demo_slides(tmp_path, 12, world=DemoWorld(size=1024, group_radius=90.0))

    bags = [Bag(torch.zeros(1, 2), torch.zeros(1, 1, 2), s.label, s.name, s.patient) for s in made]
    for seed in range(3):
        train, test = split(bags, seed)
        assert sorted(train + test) == list(range(12))
        assert not {bags[i].patient for i in train} & {bags[i].patient for i in test}
        assert {bags[i].label for i in test} == {0, 1}
