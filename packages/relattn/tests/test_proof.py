"""What the proof's verdicts depend on; `make prove` runs the proof itself."""

import numpy as np
import pytest

from relattn import proof as relattn_proof
from relattn.experiment_plan import ARMS, SeedResult
from relattn.topic_scores import Score
from shared_core.proof import ProofRun


def scores(level, success, seed):
    noise = np.random.default_rng(seed).normal(0, 0.01, 60)
    return [Score(level + float(e), level, 0.0, bool(n < success * 60)) for n, e in enumerate(noise)]


def verdicts(tmp_path, **levels):
    """Holds or not, claim by claim, where arms have the given mean ROUGE-1 and share of success."""
    given = dict.fromkeys(ARMS, (0.37, 0.33)) | levels
    results = [
        SeedResult(
            seed,
            scores={arm: scores(*given[arm], seed) for arm in ARMS},
            hard={arm: scores(0.3, 0.3, seed) for arm in ("plain", "boost", "relattn", "oracle")},
            seconds=dict.fromkeys(ARMS, 1.0),
        )
        for seed in (0, 1)
    ]
    run = ProofRun(
        package="relattn", version="0", source="s", data="d", seeds=[0, 1], out=tmp_path, names=["numpy"]
    )
    relattn_proof._record(run, results)
    relattn_proof._judge(run, results)
    return [claim.holds for claim in run.claims]


def test_each_verdict_follows_its_rule(tmp_path):
    good = {"relattn": (0.45, 0.45), "relattn-online": (0.40, 0.4), "relattn-fewshot": (0.44, 0.45)}
    assert verdicts(tmp_path, **good) == [True, True, True, True, True]
    assert verdicts(tmp_path, **good | {"pplm": (0.51, 0.5)}) == [True, True, False, True, True]
    assert verdicts(tmp_path, **good | {"prefix": (0.45, 0.5)}) == [True, False, True, True, True]
    assert verdicts(tmp_path, **good | {"relattn": (0.45, 0.38)})[0] is False  # too little success
    assert verdicts(tmp_path, **good | {"relattn": (0.39, 0.45)})[0] is False  # too little ROUGE-1
    assert verdicts(tmp_path, **good | {"other-control": (0.41, 0.33)})[0] is False  # any control would do
    assert verdicts(tmp_path) == [False, False, False, False, False]


def test_a_gain_is_paired_and_its_interval_rests_on_documents():
    """Two seeds on the same documents are no twice as many documents."""
    one = SeedResult(0, scores={"plain": scores(0.3, 0, 0), "relattn": scores(0.4, 0, 1)})
    alone = relattn_proof.gain([one], "relattn", "rouge1")
    doubled = relattn_proof.gain([one, one], "relattn", "rouge1")
    assert doubled.documents == alone.documents == 60
    assert (doubled.mean, doubled.low, doubled.high) == pytest.approx((alone.mean, alone.low, alone.high))
    assert alone.mean == pytest.approx(0.1, abs=0.005)
