"""Readers, sampling and corpora: what is read is what the files say, and what is wrong is named."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from tiny_models import WORDS

from lead_kd.corpus import Corpus, RetrievalData, beir_line, read_lines
from lead_kd.readers import (
    load_data,
    load_dpr,
    load_pairs,
    read_negatives,
    read_qrels,
    with_negatives,
)
from lead_kd.sampling import Sampler
from shared_core import InputError


def write_beir(
    folder, *, header="query-id\tcorpus-id\tscore\n", qrels="q1\td1\t1\nq1\td3\t2\nq2\td2\t1\nq2\td1\t0\n"
):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"_id": "d1", "title": "Moon", "text": "shines"},
        {"_id": "d2", "title": "", "text": "the río flows"},
        {"_id": "d3", "title": "Iron", "text": ""},
        {"_id": "d4", "text": "a cat"},
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    queries = [
        {"_id": "q1", "text": "what shines"},
        {"_id": "q2", "text": "what flows"},
        {"_id": "q3", "text": "x"},
    ]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / "train.tsv").write_text(header + qrels)
    return folder


def test_beir(tmp_path):
    data = load_data(write_beir(tmp_path))
    assert data.corpus.ids == ["d1", "d2", "d3", "d4"]
    assert list(data.corpus) == ["Moon shines", "the río flows", "Iron", "a cat"]
    assert data.corpus.row("d3") == 2
    assert data.queries["q2"] == "what flows"
    assert data.positives("q1") == ["d1", "d3"]
    assert data.positives("q2") == ["d2"]  # grade 0 is judged and not relevant
    assert list(data.judged()) == ["q1", "q2"]


def test_texts_stay_in_their_file_and_go_with_a_copy_into_other_processes(tmp_path):
    data = load_data(write_beir(tmp_path))
    assert pickle.loads(pickle.dumps(data.corpus))[1] == "the río flows"


def test_msmarco_passages_and_documents(tmp_path):
    (tmp_path / "collection.tsv").write_text("0\tthe moon\n1\tthe sun\n")
    (tmp_path / "queries.train.tsv").write_text("9\twhat shines\n8\tunjudged\n")
    (tmp_path / "qrels.train.tsv").write_text("9\t0\t1\t1\n")
    data = load_data(tmp_path)
    assert data.positives("9") == ["1"]
    assert "8" not in data.queries
    assert data.corpus[1] == "the sun"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "msmarco-docs.tsv").write_text("D1\thttp://x\tTitle\tBody text\n")
    (tmp_path / "docs" / "msmarco-doctrain-queries.tsv").write_text("5\tquery\n")
    (tmp_path / "docs" / "msmarco-doctrain-qrels.tsv").write_text("5 0 D1 1\n")
    documents = load_data(tmp_path / "docs")
    assert documents.corpus[0] == "Title Body text"
    assert documents.positives("5") == ["D1"]


def test_dpr_numbers_contexts_from_zero_and_passages_from_one(tmp_path):
    (tmp_path / "psgs_w100.tsv").write_text('id\ttext\ttitle\n1\t"a ""big"" cat"\tCat\n2\tiron\tMetal\n')
    examples = [{"question": "cat?", "positive_ctxs": [0], "hard_negative_ctxs": [1]}]
    (tmp_path / "biencoder-train.json").write_text(json.dumps(examples))
    data = load_data(tmp_path)
    assert data.positives("0") == ["1"]
    assert data.negatives["0"] == ["2"]
    assert data.corpus[0] == 'Cat a "big" cat'
    (tmp_path / "bad.json").write_text(json.dumps([{**examples[0], "positive_ctxs": [2]}]))
    with pytest.raises(
        InputError, match=r"bad.json: example 0: expected the number of one of 2 passages.*got 2"
    ):
        load_dpr(tmp_path / "psgs_w100.tsv", tmp_path / "bad.json")


def test_pairs_of_datasets():
    data = load_pairs(
        Dataset.from_dict(
            {
                "query": ["a", "a", "b"],
                "positive": ["x", "y", "z"],
                "negative_1": ["z", "x", "x"],
            }
        )
    )
    assert [data.corpus[data.corpus.row(name)] for name in data.positives("0")] == ["x", "y"]
    assert [data.corpus[data.corpus.row(name)] for name in data.negatives["0"]] == ["z"]  # x is a positive
    with pytest.raises(InputError, match=r"query: row 1: expected a text \(got None\)"):
        load_pairs(Dataset.from_dict({"query": ["a", None], "positive": ["x", "y"]}))


QRELS_HEADER = "query-id\tcorpus-id\tscore\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", None, r"has none of corpus.jsonl, collection.tsv"),
        ("corpus.jsonl", '{"_id": 7, "text": "x"}\n', 'line 1: "_id" is 7, expected a string'),
        ("corpus.jsonl", '{"_id": "7"}\n', 'line 1: expected an object with "_id" and "text"'),
        ("corpus.jsonl", '{"_id": "7", ', "corpus.jsonl: line 1: "),
        ("corpus.jsonl", '{"_id": "d", "text": "x"}\n' * 2, r"id: two passages have this id \(got 'd'\)"),
        ("corpus.jsonl", "", "corpus.jsonl: holds no passage"),
        ("queries.jsonl", '{"_id": 3, "text": "x"}\n', "line 1: expected id and text to be strings"),
        ("queries.jsonl", "nonsense\n", "queries.jsonl: line 1: expected an object"),
        ("qrels/train.tsv", None, r"train.tsv: there is no such file \(.*has: nothing\)"),
        ("qrels/train.tsv", "q1\td1\t1\n", "line 1: expected BEIR's header"),
        ("qrels/train.tsv", QRELS_HEADER + "q1\td1\tgood\n", r"line 2: expected a whole number \(got 'good'"),
        ("qrels/train.tsv", QRELS_HEADER, "holds no judgement"),
        (
            "qrels/train.tsv",
            QRELS_HEADER + "q1\td9\t1\n",
            "passage 'd9' of query 'q1', which the corpus lacks",
        ),
        ("qrels/train.tsv", QRELS_HEADER + "q9\td1\t1\n", "judges query 'q9', which has no text"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path, file, content, message):
    folder = write_beir(tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(InputError, match=message):
        load_data(folder)


def test_judgements_of_missing_passages_can_be_left_out(tmp_path):
    folder = write_beir(tmp_path, qrels="q1\td9\t1\nq2\td2\t1\nq8\td1\t1\n")
    data = load_data(folder, missing="skip")
    assert list(data.judged()) == ["q2"]
    assert data.notes == ("1 judgements of missing passages and 1 queries without text were left out.",)


def test_trec_judgements_and_grades(tmp_path):
    (tmp_path / "qrels").write_text("1 Q0 d1 3\n1 Q0 d2 0\n")
    assert read_qrels(tmp_path / "qrels") == {"1": {"d1": 3, "d2": 0}}


def test_negatives_of_both_kinds_and_positives_among_them(tmp_path):
    data = load_data(write_beir(tmp_path))
    (tmp_path / "n.jsonl").write_text('{"query_id": "q1", "negatives": ["d2", "d3", "d4"]}\n')
    (tmp_path / "n.tsv").write_text("q1\td1\td2\nq1\td1\td4\n")
    mined = with_negatives(data, read_negatives(tmp_path / "n.jsonl"), "n.jsonl")
    assert mined.negatives == {"q1": ["d2", "d4"]}
    assert mined.notes == ("1 negatives are positives of the same query and were dropped.",)
    assert read_negatives(tmp_path / "n.tsv") == {"q1": ["d2", "d4"]}
    with pytest.raises(InputError, match=r"n.jsonl: query q1 names a passage that .* lacks \(got 'd7'\)"):
        with_negatives(data, {"q1": ["d7"]}, "n.jsonl")


def test_a_packed_corpus_is_refused(tmp_path):
    (tmp_path / "corpus.jsonl.gz").write_bytes(b"")
    with pytest.raises(InputError, match="is compressed; unpack it first"):
        read_lines(tmp_path / "corpus.jsonl.gz", beir_line)


def worded(queries=10, negatives=3):
    """The toy's structure with words that the tiny tokenizers know, so that texts differ for a model."""
    plain = toy(queries, negatives)
    texts = [f"the {WORDS[n % 36]} {WORDS[(7 * n + n // 36 + 3) % 36]}" for n in range(40)]
    asked = {query: f"what {WORDS[n]} {WORDS[n + 9]}" for n, query in enumerate(plain.queries)}
    return RetrievalData(Corpus(plain.corpus.ids, texts), asked, plain.qrels, plain.negatives)


def toy(queries=10, negatives=3):
    corpus = Corpus([f"d{n}" for n in range(40)], [f"text {n}" for n in range(40)])
    return RetrievalData(
        corpus,
        {f"q{n}": f"query {n}" for n in range(queries)},
        {f"q{n}": {f"d{n}": 1, f"d{n + 10}": 1} for n in range(queries)},
        {f"q{n}": [f"d{20 + (n + k) % 20}" for k in range(negatives)] for n in range(queries)},
    )


def test_each_epoch_sees_every_query_once_with_its_own_positive_and_hard_negatives():
    sampler = Sampler(toy(), batch_size=5, negatives=2, seed=3)
    for epoch in range(4):
        groups = [sampler.group(2 * epoch), sampler.group(2 * epoch + 1)]
        assert sorted(query for group in groups for query in group.queries) == sorted(
            f"query {n}" for n in range(10)
        )
        for group in groups:
            for place, query in enumerate(group.queries):
                number = int(query.split()[1])
                own = group.passage_ids[3 * place : 3 * place + 3]
                assert own[0] == number  # the first listed positive
                assert set(own[1:]) <= {20 + (number + k) % 20 for k in range(3)}
                assert len(set(own[1:])) == 2
                assert group.positive_ids[place].tolist() == [number, number + 10]
                assert group.passages[3 * place] == f"text {number}"
    first, again = sampler.group(0).queries, sampler.group(2).queries
    assert first != again


def test_processes_share_a_step_and_any_step_can_be_drawn_alone():
    both = [Sampler(toy(), 2, 1, seed=1, processes=2) for _ in range(2)]
    one = Sampler(toy(), 4, 1, seed=1)
    joined = both[0].group(7, 0).queries + both[1].group(7, 1).queries
    assert joined == one.group(7).queries
    np.testing.assert_array_equal(both[0].group(7, 0).passage_ids, one.group(7).passage_ids[:4])


def test_too_few_hard_negatives_are_filled_up_at_random_with_no_positive():
    sampler = Sampler(toy(negatives=1), 5, negatives=6, seed=0)
    assert sampler.filled == 10
    for step in range(6):
        group = sampler.group(step)
        for place, query in enumerate(group.queries):
            number = int(query.split()[1])
            own = group.passage_ids[7 * place + 1 : 7 * place + 8 - 1].tolist()
            assert len(set(own)) == 6
            assert not {number, number + 10} & set(own)
            assert 20 + number % 20 in own


def test_positives_are_drawn_where_asked_for():
    sampler = Sampler(toy(), 10, 0, shuffle_positives=True)
    seen = {int(row) for step in range(8) for row in sampler.group(step).passage_ids}
    assert seen == set(range(20))


def test_the_fingerprint_tells_data_apart():
    whole = toy()
    first = Sampler(whole, 2).fingerprint()
    assert Sampler(toy(), 2, seed=5).fingerprint() == first
    texts = list(whole.corpus)
    texts[20] += "!"
    for changed in (
        replace(whole, negatives={**whole.negatives, "q3": ["d30"]}),
        replace(whole, queries={**whole.queries, "q3": "another"}),
        replace(whole, qrels={**whole.qrels, "q3": {"d3": 1}}),
        replace(whole, corpus=Corpus(whole.corpus.ids, texts)),
    ):
        assert Sampler(changed, 2).fingerprint() != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 11}, "expected at least the 11 queries of a step to have a positive .got 10"),
        ({"batch_size": 0}, "batch size: expected at least 1"),
        ({"batch_size": 1, "negatives": 0}, "one query without negatives has nothing to be told from"),
        ({"batch_size": 2, "negatives": 39}, "is too small to draw negatives from"),
    ],
)
def test_what_cannot_be_sampled_is_said(arguments, message):
    with pytest.raises(InputError, match=message):
        Sampler(toy(), **arguments)
