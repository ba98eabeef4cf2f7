"""What the proof's verdicts depend on; `make prove` runs the proof itself."""

from __future__ import annotations

import numpy as np
import pytest

from lead_kd import proof
from lead_kd.experiments import ARMS, QUICK, Result, Sizes
from lead_kd.wikipedia_task import wikipedia_task
from shared_core.proof import ProofRun


def results(**levels):
    given = dict.fromkeys(ARMS, (0.30, 0.31)) | {"none": (0.2, 0.21)} | levels
    made = {}
    for name, values in given.items():
        made[name] = [
            Result(
                {"nDCG@10": value, "RR@10": value, "R@10": value},
                {str(query): value + 0.01 * np.sin(query) for query in range(20)},
                [{"step": 1, "pairs": [[0, 0], [5, 1]], "weights": [0.4, 0.6]}],
            )
            for value in values
        ]
    return made


TOLD = {
    "teacher": {"nDCG@10": 0.6},
    "start": {"nDCG@10": 0.1},
    "layers": [{"nDCG@10": 0.1 * n} for n in range(1, 7)],
}  # fmt: skip


def a_run(out):
    return ProofRun(
        package="lead-kd", version="0", source="s", data="d", seeds=[0, 1], out=out, names=["numpy"]
    )


def verdicts(tmp_path, **levels):
    run = ProofRun(
        package="lead-kd", version="0", source="s", data="d", seeds=[0, 1], out=tmp_path, names=["numpy"]
    )
    made = results(**levels)
    proof.add_numbers(run, made, TOLD)
    proof.judge(run, made)
    return [claim.holds for claim in run.claims]


def test_each_verdict_follows_its_rule(tmp_path):
    good = {"lead-kd": [0.33, 0.34]}
    assert verdicts(tmp_path, **good) == [True, True, True]
    assert verdicts(tmp_path, **{"lead-kd": [0.35, 0.305]}) == [False, True, True]  # not for every seed
    assert verdicts(tmp_path, **good, none=[0.32, 0.32]) == [True, False, True]
    assert verdicts(tmp_path, **good, **{"response x2": [0.4, 0.4]}) == [True, True, False]
    assert verdicts(tmp_path, **good, **{"lead, equal weights": [0.4, 0.4]}) == [
        True,
        True,
        True,
    ]  # LEAD as well
    assert verdicts(tmp_path) == [False, True, False]


def test_the_meaning_follows_the_verdicts(tmp_path):
    for good, words in ((0.36, "more than any other way"), (0.305, "cannot be told from nothing")):
        run = a_run(tmp_path)
        proof.judge(run, results(**{"lead-kd": [good, good]}))
        assert words in proof.meaning(run)


def test_pictures_are_drawn(tmp_path):
    run = ProofRun(
        package="lead-kd", version="0", source="s", data="d", seeds=[0, 1], out=tmp_path, names=["numpy"]
    )
    proof.draw(run, results(), TOLD)
    assert {path.name for path in tmp_path.glob("*.png")} == {"ndcg.png", "layers.png"}


def test_the_parts_have_no_article_in_common_and_one_answer_a_query():
    task = wikipedia_task(50, 30, 40, 20)
    asked = [set(part.queries) for part in (task.train, task.dev, task.test)]
    assert not asked[0] & asked[1] | asked[0] & asked[2] | asked[1] & asked[2]
    assert [len(part.corpus) for part in (task.train, task.dev, task.test)] == [50, 50, 60]
    assert not asked[0] & set(task.test.corpus.ids)  # what is trained on is not searched
    texts = [text for part in (task.train, task.dev, task.test) for text in part.queries.values()]
    assert len(set(texts)) == len(texts) == 120
    for part in (task.train, task.dev, task.test):
        assert all(list(part.qrels[query]) == [query] for query in part.queries)


def test_every_method_has_the_same_steps_and_rates_of_the_grid():
    from lead_kd.experiments import RATES

    assert {arm.rate for arm in ARMS.values()} <= set(RATES)
    assert set(QUICK.arms) <= set(Sizes().arms) == set(ARMS)


@pytest.mark.parametrize("part", ["train", "dev", "test"])
def test_the_same_parts_are_drawn_again(part):
    first, again = (getattr(wikipedia_task(20, 10, 10, 5), part) for _ in range(2))
    assert first.queries == again.queries
