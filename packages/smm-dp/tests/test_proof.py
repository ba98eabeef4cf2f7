"""The shortened proof runs, records what it measured, and its verdicts follow from its numbers."""

import json

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib and pyparsing among themselves
def test_quick_proof(tmp_path):
    from smm_dp.proof import run_proof

    code = run_proof(tmp_path, [0], quick=True)
    record = json.loads((tmp_path / "proof.json").read_text())
    assert code == (0 if record["holds"] else 1)
    assert {
        "smm-dp",
        "smm-dp-numeric",
        "skellam",
        "ddgauss",
        "cpsgd",
        "gaussian",
        "answer-zero",
        "none",
    } <= set(record["methods"])
    assert sorted(record["pictures"]) == ["sum-bits.png", "sum-epsilon.png", "training.png"]
    assert record["claims"][0]["holds"]
    sums = {
        name: np.mean(values["sum_nmse"])
        for name, values in record["methods"].items()
        if "sum_nmse" in values
    }
    assert record["claims"][1]["holds"] == (sums["smm-dp"] < min(sums["skellam"], sums["ddgauss"]))
    scores = {n: np.mean(v["accuracy"]) for n, v in record["methods"].items() if "accuracy" in v}
    assert record["claims"][2]["holds"] == (scores["smm-dp"] > max(scores["skellam"], scores["ddgauss"]))
    assert any("not peer-reviewed" in note for note in record["notes"])
    assert any("protects anybody" in note for note in record["notes"])
