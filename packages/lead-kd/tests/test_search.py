"""Search against a full sort, measures against their definitions, mining against what is relevant."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import permutation_test

from lead_kd.corpus import Corpus, RetrievalData
from lead_kd.embeddings import Embeddings
from lead_kd.evaluation import compare, measure
from lead_kd.mining import bm25, hard_negatives, write_negatives
from lead_kd.readers import read_negatives
from lead_kd.search import Found, read_run, search, search_faiss, write_run
from shared_core import InputError


def vectors(count, seed, width=6):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@given(st.integers(1, 9), st.integers(1, 50), st.integers(1, 60), st.integers(1, 20), st.integers(1, 5))
def test_search_in_blocks_is_a_full_sort(queries, passages, k, block, query_block):
    q, p = vectors(queries, 1), vectors(passages, 2)
    found = search(q, p, k, block=block, query_block=query_block)
    scores = q @ p.T
    order = np.argsort(-scores, 1)[:, : min(k, passages)]
    np.testing.assert_array_equal(found.rows, order)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, order, 1), rtol=1e-5, atol=1e-5)


def test_shards_are_searched_as_one():
    p = vectors(23, 0)
    p /= np.linalg.norm(p, axis=1, keepdims=True)  # each is then most like itself
    shards = Embeddings([str(n) for n in range(23)], [p[:9].astype(np.float16), p[9:].astype(np.float16)])
    np.testing.assert_array_equal(search(p[:4], shards, 5, block=4).rows[:, 0], [0, 1, 2, 3])
    run = search(p[:1], shards, 2).as_run(["q"], shards.ids)
    assert next(iter(run["q"])) == "0"


def test_faiss_finds_the_same():
    p = vectors(50, 3)
    shards = Embeddings([str(n) for n in range(50)], [p])
    exact = search(p[:6], shards, 10)
    np.testing.assert_array_equal(search_faiss(p[:6], shards, 10).rows, exact.rows)
    with pytest.raises(InputError, match="factory: faiss refuses this index"):
        search_faiss(p[:6], shards, 10, "NoSuchIndex")
    with pytest.raises(InputError, match="factory: faiss refuses this index"):
        search_faiss(p[:6], shards, 10, "Flat", nprobe=3)  # has no lists


def test_an_ivf_index_is_trained_on_all_shards_and_searches_as_many_lists_as_asked():
    p = np.concatenate([vectors(600, 3) + 5, vectors(600, 4) - 5])  # sorted: the first block is one half
    shards = Embeddings([str(n) for n in range(1200)], [p[:600], p[600:]])
    np.testing.assert_array_equal(shards.rows(np.array([1, 599, 600, 1199])), p[[1, 599, 600, 1199]])
    exact = search(p[:40], shards, 5).rows
    few, all_lists = (
        search_faiss(p[:40], shards, 5, "IVF16,Flat", block=300, nprobe=lists, train_on=900).rows
        for lists in (1, 16)
    )
    np.testing.assert_array_equal(all_lists, exact)
    assert not np.array_equal(few, exact)
    with pytest.raises(InputError, match="search more lists"):
        search_faiss(p[:2], shards, 1000, "IVF16,Flat", nprobe=1)


@pytest.mark.parametrize(
    ("q", "p", "k", "message"),
    [
        (
            vectors(2, 0),
            vectors(3, 0, 5),
            1,
            r"passages: expected vectors of width 6, the queries' \(got 5\)",
        ),
        (vectors(2, 0), vectors(3, 0), 0, "k: expected at least 1"),
        (vectors(2, 0), vectors(0, 0), 1, "at least one query and one passage"),
        (np.full((1, 6), np.nan, np.float32), vectors(3, 0), 1, "expected finite query vectors"),
        (vectors(1, 0), np.full((3, 6), np.inf, np.float32), 1, "a vector from row 0 on is no number"),
    ],
)
def test_what_cannot_be_searched_is_said(q, p, k, message):
    with pytest.raises(InputError, match=message):
        search(q, p, k)


def test_a_run_is_written_in_trec_evals_order_and_read_back(tmp_path):
    run = {"q1": {"a": 1.0, "c": 2.0, "b": 2.0}, "q2": {"a": 0.1}}
    write_run(tmp_path / "run", run)
    lines = (tmp_path / "run").read_text().splitlines()
    assert [line.split()[2] for line in lines] == ["c", "b", "a", "a"]  # equal scores by descending id
    assert [line.split()[3] for line in lines] == ["1", "2", "3", "1"]
    assert read_run(tmp_path / "run") == run
    (tmp_path / "bad").write_text("q1 Q0 a 1 high x\n")
    with pytest.raises(InputError, match="bad: line 1: expected query, Q0, passage, rank, score and tag"):
        read_run(tmp_path / "bad")
    (tmp_path / "bad").write_text("q1 Q0 a 1 2 x\nq1 Q0 a 2 1 x\n")
    with pytest.raises(InputError, match=r"line 2: query q1 has this passage twice \(got 'a'\)"):
        read_run(tmp_path / "bad")


def by_definition(grades, ranked, rel=1):
    gains = [grades.get(name, 0) for name in ranked]
    relevant = sum(grade >= rel for grade in grades.values())
    rr = next((1 / rank for rank, grade in enumerate(gains[:10], 1) if grade >= rel), 0)
    dcg = sum(grade / np.log2(rank + 1) for rank, grade in enumerate(gains[:10], 1))
    ideal = sum(g / np.log2(r + 1) for r, g in enumerate(sorted(grades.values(), reverse=True)[:10], 1))
    recall = sum(grade >= rel for grade in gains[:100]) / relevant
    hits = [rank for rank, grade in enumerate(gains[:1000], 1) if grade >= rel]
    ap = sum(number / rank for number, rank in enumerate(hits, 1)) / relevant
    return {"RR@10": rr, "nDCG@10": dcg / ideal, "R@100": recall, "AP@1000": ap}


@given(st.integers(0, 10_000), st.sampled_from([1, 2]))
def test_measures_are_their_definitions(seed, rel):
    random = np.random.default_rng(seed)
    names = [f"d{n}" for n in range(30)]
    qrels = {
        f"q{n}": {name: int(random.integers(0, 4)) for name in random.choice(names, 6, replace=False)}
        | {"d0": 3}
        for n in range(4)
    }
    run = {
        query: dict(
            zip(random.permutation(names)[:20].tolist(), random.permutation(20).astype(float), strict=True)
        )
        for query in list(qrels)[:3]
    }
    found = measure(qrels, run, rel=rel)
    for query, grades in qrels.items():
        ranked = sorted(run.get(query, {}), key=lambda name: -run[query][name])
        for name, value in by_definition(grades, ranked, rel).items():
            assert found.per_query[name][query] == pytest.approx(value), name
    assert found.mean["RR@10"] == pytest.approx(np.mean(list(found.per_query["RR@10"].values())))


def test_a_query_without_results_counts_as_nothing():
    found = measure({"q1": {"a": 1}, "q2": {"a": 1}}, {"q1": {"a": 1.0}}, ["RR@10"])
    assert found.mean == {"RR@10": 0.5}


def test_unknown_measures_and_unjudged_queries_are_said():
    with pytest.raises(
        InputError, match=r"measure: expected a name that ir-measures knows, such as nDCG@10 .got 'no'"
    ):
        measure({"q": {"a": 1}}, {}, ["no"])
    with pytest.raises(InputError, match="qrels: no query has a passage of grade 2 or more"):
        measure({"q": {"a": 1}}, {}, rel=2)


def test_the_paired_test_is_scipys():
    random = np.random.default_rng(0)
    a, b = random.random(12), random.random(12) + 0.15
    first = {str(n): float(v) for n, v in enumerate(a)}
    second = {str(n): float(v) for n, v in enumerate(b)}
    ours = compare(first, second, resamples=20_000)
    exact = permutation_test(
        (b - a,), lambda x, axis: x.mean(axis), permutation_type="samples", n_resamples=10**6, vectorized=True
    )
    assert ours.p_value == pytest.approx(exact.pvalue, abs=0.01)
    assert ours.difference == pytest.approx((b - a).mean())
    assert ours.low < ours.difference < ours.high
    assert ours.wins == (b > a).sum()
    same = compare(first, first)
    assert (same.difference, same.p_value) == (0.0, 1.0)
    with pytest.raises(InputError, match="two runs over the same two or more queries"):
        compare(first, {"0": 1.0})


def test_hard_negatives_are_the_best_that_are_not_relevant(tmp_path):
    corpus = Corpus(["a", "b", "c", "d"], ["x"] * 4)
    data = RetrievalData(corpus, {"q": "?"}, {"q": {"b": 1, "d": 0}})
    found = Found(np.array([[1, 3, 0, 2]]), np.zeros((1, 4), np.float32))
    assert hard_negatives(data, ["q"], found, corpus.ids, 2) == {"q": ["d", "a"]}
    assert hard_negatives(data, ["q"], found, corpus.ids, 2, skip=2) == {"q": ["a", "c"]}
    write_negatives(tmp_path / "n.jsonl", {"q": ["d", "a"], "r": []})
    assert read_negatives(tmp_path / "n.jsonl") == {"q": ["d", "a"]}
    with pytest.raises(InputError, match="no query has a negative"):
        write_negatives(tmp_path / "n.jsonl", {"q": []})


def test_bm25_puts_the_passage_with_the_rare_word_first():
    corpus = Corpus(["a", "b", "c"], ["the moon shines brightly", "the river flows", "moon and moon river"])
    assert bm25(corpus, ["river flows"], 2).rows[0, 0] == 1
    assert bm25(corpus, ["shines"], 3).rows[0, 0] == 0
