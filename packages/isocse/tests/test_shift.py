"""Two models compared: changes by type, groups, frequency as a confounder, and models that do not fit."""

import json

import numpy as np
import pytest
import tiny_encoders
from scipy import stats
from tiny_encoders import SENTENCES

from isocse.analysis import analyze
from isocse.shift import compare, compare_reports, group_test, same_sense_cosines
from shared_core import InputError


@pytest.fixture(scope="module")
def models():
    return [tiny_encoders.bert(seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def reports(models):
    return [analyze(model, SENTENCES, tokenizer=tokenizer) for model, tokenizer in models]


def test_delta_is_after_less_before_and_adjusted_by_each_models_own_baseline(reports):
    found = compare_reports(*reports)
    before, after = reports
    for n, token in enumerate(found.tokens):
        row = before.types.tokens.index(token)
        delta = after.types.self_similarity[-1, row] - before.types.self_similarity[-1, row]
        assert found.delta[n] == pytest.approx(delta)
        change = after.last("anisotropy") - before.last("anisotropy")
        assert found.adjusted_delta[n] == pytest.approx(delta - change)
    assert "[CLS]" not in found.tokens
    semantic = found.adjusted_delta[np.array(found.classes) == "semantic"]
    assert found.adjusted.semantic == pytest.approx(semantic.mean())
    assert found.adjusted.difference == pytest.approx(found.raw.difference)  # the baseline cancels
    assert found.risers(1)[0][2] == found.adjusted_delta.max()
    assert found.fallers(1)[0][2] == found.adjusted_delta.min()


def test_a_model_against_itself_has_not_moved(models, reports):
    found = compare(reports[0], models[0][0], SENTENCES, tokenizers=(None, models[0][1]))
    np.testing.assert_allclose(found.delta, 0, atol=1e-6)
    assert found.raw.p > 0.05


def groups(difference, slope, n=120, seed=0):
    generator = np.random.default_rng(seed)
    counts = np.exp(generator.uniform(2, 6, n)).astype(int)
    semantic = generator.random(n) < 0.5
    classes = np.where(semantic, "semantic", "functional")
    delta = difference * semantic + slope * np.log(counts) + generator.normal(0, 0.02, n)
    return delta, list(classes), counts


def test_groups_that_differ_and_groups_that_do_not():
    delta, classes, counts = groups(0.05, 0.0)
    found = group_test(delta, classes, counts)
    assert found.p < 0.001
    assert found.matched_p < 0.001
    low, high = found.difference_interval
    assert low < found.difference < high
    assert abs(found.difference - 0.05) < 0.015
    same = group_test(groups(0.0, 0.0)[0], classes, counts)
    assert same.p > 0.05


def test_permutation_p_is_near_the_t_tests():
    delta, classes, counts = groups(0.006, 0.0, seed=4)
    names = np.array(classes)
    expected = stats.ttest_ind(delta[names == "semantic"], delta[names == "functional"]).pvalue
    assert group_test(delta, classes, counts).p == pytest.approx(expected, abs=0.02)


def test_a_difference_that_is_only_frequency_is_told():
    generator = np.random.default_rng(0)
    n = 300
    logs = generator.uniform(2, 7, n)
    classes = np.where(generator.random(n) < 1 / (1 + np.exp(2 * (logs - 4.5))), "semantic", "functional")
    delta = -0.05 * logs + generator.normal(0, 0.01, n)  # semantic types are rarer, and nothing else
    found = group_test(delta, list(classes), np.exp(logs).astype(int))
    assert found.difference > 0.05
    assert abs(found.adjusted_difference) < 3 * found.adjusted_error < 0.02
    assert abs(found.matched_difference) < found.difference / 3
    assert found.slope == pytest.approx(-0.05, abs=0.005)
    assert found.slope_p < 1e-6


def test_too_few_types_for_a_comparison():
    with pytest.raises(InputError, match="types: expected 2 or more semantic and functional types"):
        group_test(np.zeros(3), ["semantic", "functional", "functional"], np.array([5, 5, 5]))


def test_other_tokenizers_are_refused_unless_words_are_compared(models):
    gpt = tiny_encoders.gpt()
    with pytest.raises(
        InputError, match=r"tokenizer: the models' types differ .* compare words, unit='word'"
    ):
        compare(models[0][0], gpt[0], SENTENCES, tokenizers=(models[0][1], gpt[1]))
    found = compare(models[0][0], gpt[0], SENTENCES, tokenizers=(models[0][1], gpt[1]), unit="word")
    assert "river" in found.tokens


def test_reports_that_were_measured_in_other_ways_are_refused(models, reports):
    other = analyze(models[0][0], SENTENCES, tokenizer=models[0][1], min_count=6, detail=False)
    with pytest.raises(InputError, match="was measured with min_count 5, the other with 6"):
        compare_reports(reports[0], other)
    with pytest.raises(InputError, match="sentences: is missing: a model is measured on sentences"):
        compare(models[0][0], reports[1])


def test_words_of_the_same_sense(models):
    model, tokenizer = models[0]
    rows = [("river", SENTENCES[0], SENTENCES[0]), ("river", SENTENCES[0], SENTENCES[12])]
    found = same_sense_cosines(model, rows, tokenizer=tokenizer)
    assert found[0] == pytest.approx(1)
    assert found[1] < 1
    both = compare(*(m for m, _ in models), SENTENCES, same_sense=rows, tokenizers=(tokenizer, tokenizer))
    assert both.same_sense[0] == pytest.approx(found.mean() - both.before.last("anisotropy"))
    with pytest.raises(
        InputError, match=r"same_sense: row 1: the sentence .* has no such word \(got 'xyz'\)"
    ):
        same_sense_cosines(model, [("xyz", SENTENCES[0], SENTENCES[1])], tokenizer=tokenizer)


def test_a_shift_is_written_as_json_and_table(reports, tmp_path):
    found = compare_reports(*reports)
    found.to_json(tmp_path / "shift.json")
    content = json.loads((tmp_path / "shift.json").read_text())
    assert content["adjusted"]["counts"] == list(found.adjusted.counts)
    assert list(found.to_pandas().columns) == ["token", "class", "count", "delta", "adjusted_delta"]
