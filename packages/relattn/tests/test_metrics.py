"""Metrics agree with the libraries that define them, and with small cases worked by hand."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from relattn import metrics
from relattn.examples import Example
from relattn.metrics import (
    bertscore_f1,
    bootstrap_interval,
    control_contrast,
    copied_fragments,
    mention_rate,
    rouge1_without_control,
    rouge_lsum,
    score_summary,
    success_rate,
    summarize_scores,
)
from shared_core import InputError

VOCABULARY = ["the", "cats", "cat", "running", "ran", "jazz", "music", "night", "of", "a"]
WORDS = st.lists(st.sampled_from(VOCABULARY), max_size=12).map(" ".join)


@given(WORDS, WORDS)
def test_rouge_equals_rouge_score(summary, reference):
    found = score_summary(Example("1", "1", "the document", ("jazz",), reference), summary)
    expected = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, summary)
    for kind, score in expected.items():
        assert found[kind] == pytest.approx(score.fmeasure, abs=1e-12)


def test_lsum_puts_each_sentence_on_a_line_of_its_own():
    # As one line the common subsequence would need the same order of the two sentences.
    assert rouge_lsum("The dog ran. The cat sat.", "The cat sat. The dog ran.") == 1.0
    assert (
        RougeScorer(["rougeLsum"])
        .score("The cat sat. The dog ran.", "The dog ran. The cat sat.")["rougeLsum"]
        .fmeasure
        < 0.6
    )


def test_success_counts_letters_and_mentions_count_words():
    assert success_rate("They start with Art", ["art", "music", "Art"]) == pytest.approx(2 / 3)
    assert mention_rate("They start with Art", ["art", "music", "Art"]) == pytest.approx(2 / 3)
    assert (success_rate("start", ["art"]), mention_rate("start", ["art"])) == (1.0, 0.0)
    assert success_rate("anything", []) == mention_rate("anything", []) == 0.0


def test_contrast_is_zero_for_a_summary_that_serves_all_and_signed_otherwise():
    own, other = "jazz band played", "court judge ruled"
    assert control_contrast(own, own, [other]) == 1.0
    assert control_contrast(other, own, [other]) == -1.0
    assert control_contrast(f"{own} {other}", own, [other]) == pytest.approx(0.0)
    assert control_contrast(own, own, [own, other]) == pytest.approx(0.5)
    with pytest.raises(InputError, match="expected a reference of the same document"):
        control_contrast(own, own, [])


def test_bertscore_is_the_pairs_own_entry():
    def lengths(texts):
        return np.array([[len(a) / len(b) for b in texts] for a in texts])

    assert bertscore_f1("abcd", "ab", lengths) == 2.0


def test_echoing_control_words_in_any_form_earns_nothing():
    reference = "dancing bands of jazz met here"
    assert rouge1_without_control("bands band jazz", reference, ["jazz band"]) == 0.0
    assert rouge1_without_control("jazz dance", reference, ["jazz"]) == pytest.approx(2 * 1 / (1 + 5))


def slow_fragments(source, words):
    """Newsroom's F(A, S), as its pseudo-code reads."""
    found, i = [], 0
    while i < len(words):
        best, j = [], 0
        while j < len(source):
            if words[i] == source[j]:
                i2, j2 = i, j
                while i2 < len(words) and j2 < len(source) and words[i2] == source[j2]:
                    i2, j2 = i2 + 1, j2 + 1
                if len(best) < i2 - i:
                    best = words[i:i2]
                j = j2
            else:
                j += 1
        i += max(len(best), 1)
        if best:
            found.append(best)
    return found


@given(
    st.lists(st.sampled_from("abcd"), max_size=14),
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=10),
)
def test_fragments_cover_at_least_as_much_as_the_published_greedy_walk(source, words):
    # The pseudo-code skips overlapping starts in the source (j = j2), so it may miss a longer fragment: ours
    # tries every start. Where no letter repeats in the source both are the same.
    coverage, density = copied_fragments(" ".join(source), " ".join(words))
    published = slow_fragments(source, words)
    if len(set(source)) == len(source):
        assert coverage == pytest.approx(sum(map(len, published)) / len(words))
        assert density == pytest.approx(sum(len(f) ** 2 for f in published) / len(words))
    assert coverage == pytest.approx(sum(w in source for w in words) / len(words))


def test_a_copied_lead_has_full_coverage_and_its_own_length_as_density():
    assert copied_fragments("One two, three. Four.", "one two three") == (1.0, 3.0)
    assert copied_fragments("one two three", "") == (0.0, 0.0)
    assert copied_fragments("", "one") == (0.0, 0.0)


def test_the_interval_draws_documents_and_not_examples():
    generator = np.random.default_rng(0)
    of_document = generator.normal(size=20)
    values, names = np.repeat(of_document, 50), np.repeat([f"d{n}" for n in range(20)], 50).tolist()
    many = bootstrap_interval(values, names)
    few = bootstrap_interval(of_document, [f"d{n}" for n in range(20)])
    assert (many.low, many.high) == pytest.approx((few.low, few.high))  # copies add no information
    assert many.documents == 20
    # the normal interval of a mean of 20 is the yardstick
    half = 1.96 * of_document.std(ddof=1) / np.sqrt(20)
    assert many.high - many.low == pytest.approx(2 * half, rel=0.15)
    assert many.low < many.mean < many.high


def test_a_drawn_document_weighs_as_many_examples_as_it_has():
    # draws of two documents: aa gives 1, ab and ba (3 x 1 + 0) / 4, bb 0. The median is 3/4, not 1/2.
    found = bootstrap_interval([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"], level=0.01)
    assert (found.low, found.mean, found.high) == (0.75, 0.75, 0.75)


def test_the_interval_covers_the_true_mean_about_95_times_in_100():
    generator = np.random.default_rng(1)
    documents = np.repeat(np.arange(40), 3).astype(str).tolist()
    hits = 0
    for trial in range(200):
        values = generator.normal(size=(40, 3)) + generator.normal(size=(40, 1))  # three examples a document
        found = bootstrap_interval(values.ravel(), documents, resamples=400, seed=trial)
        hits += found.low <= 0 <= found.high
    assert 180 <= hits <= 199


def test_intervals_refuse_what_they_cannot_use():
    with pytest.raises(InputError, match="expected a document for each value"):
        bootstrap_interval([], [])
    with pytest.raises(InputError, match="got 1 for 2"):
        bootstrap_interval([1.0, 2.0], ["a"])


def test_a_metric_is_averaged_over_the_examples_that_have_it():
    found = summarize_scores([{"rouge1": 0.5, "words": 3}, {"words": 5}], ["a", "b"])
    assert found["rouge1"].mean == 0.5
    assert found["rouge1"].documents == 1
    assert found["words"].mean == 4
    assert "rouge2" not in found


def test_docstring_examples():
    outcome = doctest.testmod(metrics)
    assert outcome.attempted > 0
    assert outcome.failed == 0
