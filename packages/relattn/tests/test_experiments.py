"""The proof's experiment keeps to its protocol."""

import doctest
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch

from relattn import experiments, topic_scores
from relattn import papers as papers_module
from relattn.experiment_plan import ARMS, HARD_ARMS, QUICK
from relattn.experiments import _documents, _oracle, run_seed
from relattn.papers import LEAD_WORDS, UNKNOWN, TopicDocument, control_words, load_papers, topic_documents
from relattn.seed_workers import run_seeds
from relattn.small_summarizer import TrainingPlan, _Batches, train_summarizer, word_tokenizer
from relattn.steerer import Steerer
from relattn.topic_scores import choose, known_rouge1, score


@pytest.fixture(scope="module")
def papers():
    return load_papers()


@pytest.fixture(scope="module")
def quick():
    events = []
    return run_seed(0, QUICK, lambda *event: events.append(event)), events


PASSAGES = tuple(tuple(letters) for letters in ("abcdefxy", "ghijklzz", "mnopqrst"))
DOCUMENT = TopicDocument("d", PASSAGES, target=0, control=("c", "x"))


def test_papers_of_training_validation_and_test_do_not_overlap(papers):
    paragraphs = [{words for paper in part for words in paper if UNKNOWN not in words[:1]}
                  for part in (papers.train, papers.validation, papers.test)]  # fmt: skip
    assert [len(part) for part in (papers.train, papers.validation, papers.test)] == [175, 25, 50]
    # whole passages may recur only where papers share a phrase; real leakage would be most of them
    assert len(paragraphs[2] & paragraphs[0]) / len(paragraphs[2]) < 0.01
    assert len(paragraphs[2] & paragraphs[1]) / len(paragraphs[2]) < 0.01


def test_the_vocabulary_comes_from_training_papers_only(papers):
    seen = {word for paper in papers.train for words in paper for word in words} - {UNKNOWN}
    assert seen == set(papers.vocabulary)


@pytest.mark.parametrize("where", ["anywhere", "outside the lead"])
def test_control_words_name_one_passage_and_are_known(papers, where):
    rank = {word: n for n, word in enumerate(papers.vocabulary)}
    for document in islice(
        topic_documents(papers.train, papers.vocabulary, np.random.default_rng(0), "x", where), 50
    ):
        target = set(document.passages[document.target])
        others = {w for n, passage in enumerate(document.passages) if n != document.target for w in passage}
        assert set(document.control) <= target - others
        assert all(rank[word] >= 100 for word in document.control)
        if where == "outside the lead":
            assert not set(document.control) & set(document.leads[document.target].split())


def test_the_rarest_words_are_the_control():
    rank = {"often": 200, "rare": 900, "seldom": 500, "the": 3, "shared": 950}
    passages = [("the", "often", "rare", "shared", "seldom", UNKNOWN), ("shared", "the")]
    assert control_words(passages, 0, rank) == ("rare", "seldom")


def test_unknown_words_match_nothing():
    assert known_rouge1(f"{UNKNOWN} {UNKNOWN}", f"{UNKNOWN} {UNKNOWN}") == 0.0
    assert known_rouge1(f"a {UNKNOWN} b", f"{UNKNOWN} a c {UNKNOWN}") == 0.5  # as without them
    assert known_rouge1(f"a {UNKNOWN}", f"a {UNKNOWN}") == 1.0  # a whole copy is a whole copy


def test_success_is_strictly_closest_and_contrast_is_signed():
    right, wrong = score(DOCUMENT, "a b c d e f"), score(DOCUMENT, "g h i j k l")
    assert (right.success, wrong.success) == (True, False)
    assert (right.rouge1, right.contrast, wrong.contrast) == (1.0, 1.0, -0.5)
    assert not score(DOCUMENT, "a g").success  # a tie is no success
    assert not score(DOCUMENT, "").success


def test_echoing_the_control_earns_nothing_without_its_words():
    echoed = score(DOCUMENT, "c x")
    assert echoed.rouge1 > 0
    assert echoed.rouge1_without_control == 0.0


def test_the_rule_prefers_success_only_among_the_best_by_rouge():
    def some(rouge1, success):
        return [topic_scores.Score(rouge1, rouge1, 0.0, n < success) for n in range(10)]

    assert choose({"a": some(0.40, 3), "b": some(0.385, 5), "c": some(0.35, 9)}) == "b"
    assert choose({"a": some(0.40, 5), "b": some(0.395, 5)}) == "a"


def test_a_prefix_in_training_says_nothing_about_the_summary(papers):
    plan = TrainingPlan(batch=400, prefix_share=1.0)
    tokenizer = word_tokenizer(papers.vocabulary)
    ids, _, labels = _Batches(papers, tokenizer, plan, np.random.default_rng(0)).draw()
    arrow, bar = (tokenizer.get_vocab()[word] for word in ("=>", "|"))
    unknown = tokenizer.get_vocab()[UNKNOWN]
    about = []
    for row, target in zip(ids.tolist(), labels.tolist(), strict=True):
        if arrow not in row:
            continue
        at = row.index(arrow)
        assert unknown not in row[:at]
        passages = [[]]
        for token in row[at + 1 :]:
            passages.append([]) if token == bar else passages[-1].append(token)
        named = [n for n, passage in enumerate(passages) if row[1] in passage]
        summarized = [n for n, passage in enumerate(passages) if passage[:LEAD_WORDS] == target[:LEAD_WORDS]]
        assert len(named) == 1
        about.append(named[0] in summarized)
    assert about
    assert abs(np.mean(about) - 1 / 3) < 0.08  # chance


def test_training_is_repeatable_and_leaves_the_global_random_state(papers):
    plan = TrainingPlan(steps=3, batch=4)
    state = torch.get_rng_state()
    first, second = (train_summarizer(papers, plan, 5)[0].state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_seeds_share_test_documents_and_nothing_else(papers):
    def text(part, seed, **more):
        return [d.text for d in _documents(papers, part, 20, seed, **more)]

    assert text("test", 0) == text("test", 1)
    assert text("validation", 0) != text("validation", 1)
    assert not set(text("validation", 0)) & set(text("validation", 0, name="shots"))


def test_oracle_relevance_is_uniform_on_the_right_passage(papers):
    model, tokenizer = train_summarizer(papers, TrainingPlan(steps=1, batch=2), 0)
    (document,) = _documents(papers, "validation", 1, 0)
    (found,) = Steerer(model, tokenizer, _oracle([document])).relevance([document.text], [document.control])
    words = ["", *document.text.split(), ""]
    passage, expected = 0, []
    for word in words:
        passage += word == "|"
        expected.append(1 / 12 if word not in ("", "|") and passage == document.target else 0.0)
    assert found.a_rel.tolist() == pytest.approx(expected, abs=1e-6)


def test_every_arm_scores_every_test_document(quick):
    result, events = quick
    assert set(result.scores) == set(ARMS)
    assert set(result.hard) == set(HARD_ARMS)
    assert all(
        len(found) == QUICK.test_documents for found in [*result.scores.values(), *result.hard.values()]
    )
    assert len(result.online_weights) == QUICK.test_documents
    assert set(result.online_weights) <= set(QUICK.grid)
    assert sum(result.relevance[1]) == pytest.approx(1.0, abs=1e-5)
    assert result.pplm_cost.backward_passes == 3 * result.pplm_cost.steps > 0
    shares = [share for _, _, share in events]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_settings_come_from_validation_documents(quick):
    result, _ = quick
    assert result.chosen["relattn"] in result.curve
    assert set(result.curve) == {(t, w) for t in QUICK.temperatures for w in QUICK.weights}
    assert result.chosen["relattn-paper"] in QUICK.weights


def test_settings_do_not_depend_on_test_documents(quick, monkeypatch):
    """Other test documents, the same settings: of the claims, of the rivals, and for the hard words."""

    def other_test_documents(papers, part, count, seed, hard=False, name="documents"):
        return _documents(papers, part, count, seed, hard, "shots" if part == "test" else name)

    monkeypatch.setattr(experiments, "_documents", other_test_documents)
    again = run_seed(0, QUICK)
    assert again.documents != quick[0].documents
    assert again.chosen == quick[0].chosen
    assert again.curve == quick[0].curve
    assert set(again.chosen) > {"relattn", "pplm", "boost", "oracle", "relattn-hard", "boost-hard"}


def test_workers_give_what_one_process_gives(quick):
    result, _ = quick
    events = []
    first, second = run_seeds([0, 1], QUICK, lambda *event: events.append(event), workers=2)
    assert (first.seed, second.seed) == (0, 1)
    assert first.loss == result.loss != second.loss
    assert first.scores == result.scores
    assert first.texts == result.texts
    assert {seed for seed, _, _ in events} == {0, 1}


def test_papers_are_read_without_importing_their_package():
    code = "import sys; from relattn.papers import load_papers; load_papers(); print('aclsum' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("module", [papers_module, topic_scores])
def test_docstring_examples(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0
