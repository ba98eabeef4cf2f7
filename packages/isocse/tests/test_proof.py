"""What the proof's verdicts depend on; `make prove` runs the proof itself."""

import numpy as np
import pytest

from isocse import proof as isocse_proof
from isocse.proof import FULL, METRICS, clear
from shared_core.proof import ProofRun

ARMS = ("isocse", "temperature 0.5", "temperature 1", "masked words", "before",
        "packaged, tuned", "packaged, lower layers", "packaged, layer 5")  # fmt: skip

# Differences from the others that each finding wants, in the order of the claims.
GOOD = {
    "anisotropy": -0.1,
    "adjusted_intra_sentence": 0.1,
    "adjusted_self_similarity_semantic": 0.05,
    "adjusted_self_similarity_functional": -0.05,
    "semantic_over_functional": 0.1,
    "norm": -1.0,
}


def verdicts(tmp_path, **changes):
    run = ProofRun(
        package="isocse", version="0", source="s", data="d", seeds=[0, 1, 2], out=tmp_path, names=["numpy"]
    )
    for name in METRICS:
        run.metric(name)
    for arm in ARMS:
        for name in METRICS:
            for seed in range(3):
                value = 0.5 + 0.001 * seed
                if arm in ("isocse", "packaged, tuned"):
                    value += GOOD.get(name, 0.0)
                value += changes.get(name, {}).get((arm, seed), 0.0)
                run.add(arm, name, value)
    isocse_proof._judge(run, FULL)
    return [claim.holds for claim in run.claims]


def test_each_finding_has_its_own_verdict(tmp_path):
    assert verdicts(tmp_path) == [True] * 13
    for number, (name, change) in enumerate(GOOD.items()):
        for offset, arm in ((0, "packaged, tuned"), (6, "isocse")):
            found = verdicts(tmp_path, **{name: {(arm, seed): -1.5 * change for seed in range(3)}})
            assert [n for n, holds in enumerate(found[:12]) if not holds] == [offset + number]


def test_one_seed_of_the_other_sign_is_enough_to_fail(tmp_path):
    assert verdicts(tmp_path, anisotropy={("isocse", 1): 0.2})[6] is False


def test_the_control_must_not_show_the_finding(tmp_path):
    same = {("masked words", seed): GOOD["anisotropy"] for seed in range(3)}
    assert verdicts(tmp_path, anisotropy=same)[6] is False


def test_temperature_modulates_in_either_direction_but_must_do_so_clearly(tmp_path):
    same = {("temperature 1", seed): GOOD["anisotropy"] for seed in range(3)}
    assert verdicts(tmp_path, anisotropy=same)[12] is False


@pytest.mark.parametrize(
    ("values", "sign", "expected"),
    [
        ([0.1, 0.11, 0.12], 1, True),
        ([0.1, 0.11, 0.12], -1, False),
        ([0.1, 0.11, -0.01], 1, False),
        ([0.001, 0.001, 1.0], 1, False),  # all of one sign, but within 2 standard errors of 0
        ([0.0, 0.0, 0.0], 1, False),
    ],
)
def test_clear(values, sign, expected):
    assert clear(np.array(values), sign) is expected


def test_the_proofs_sentences_come_from_different_articles():
    from isocse import embedded

    texts = embedded.texts(50, 60)
    assert len(texts.pairs) == len(texts.single) == 50
    assert len(texts.held_out) == 60
    learned = {*texts.pairs.anchors, *texts.pairs.positives}
    assert not learned & set(texts.held_out)
    assert all(6 <= len(text.split()) <= 30 for text in learned)
    assert embedded.texts(50, 60).held_out == texts.held_out
