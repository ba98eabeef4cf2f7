"""Streams equal the definitions on all vectors at once, in any order, in parts, and in half precision."""

import itertools

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isocse import cosines, dimensions, isotropy, streams
from shared_core import InputError


@st.composite
def split_vectors(draw):
    """Vectors, groups, and how they are cut into batches."""
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    n, d = draw(st.integers(4, 40)), draw(st.integers(2, 7))
    x = torch.as_tensor(generator.normal(size=(n, d)) + draw(st.sampled_from([0.0, 3.0])))
    group = torch.as_tensor(generator.integers(0, 3, n))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return x, group, [0, *cuts, n]


def parts(cuts):
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


@given(split_vectors())
def test_mean_cosine_contributions_and_the_mean_vector(case):
    x, group, cuts = case
    stream = streams.MeanCosine(x.shape[1], 3)
    for part in parts(cuts):
        stream.update(x[part].float(), group[part])
    assert stream.mean_cosine() == pytest.approx(oracles.mean_cosine(x), abs=1e-6)
    expected = dimensions.dimension_contributions(x).absolute
    np.testing.assert_allclose(stream.contributions().absolute, expected, atol=1e-6)
    assert stream.common_component() == pytest.approx(cosines.common_component(x), rel=1e-5, abs=1e-6)
    assert stream.cosine_to_mean() == pytest.approx(float(cosines.cosine_to_mean(x).mean()), abs=1e-5)
    for number in range(3):
        chosen = x[group == number]
        if len(chosen) > 1:
            assert stream.mean_cosine(number) == pytest.approx(oracles.mean_cosine(chosen), abs=1e-6)
            np.testing.assert_allclose(stream.mean(number), chosen.mean(0), atol=1e-6)


@given(split_vectors())
def test_self_similarity_by_type_and_of_first_occurrences(case):
    x, kinds, cuts = case
    repeated = torch.zeros(len(x), dtype=torch.bool)
    repeated[1::3] = True
    stream = streams.SelfSimilarity(3, x.shape[1])
    for part in parts(cuts):
        units = (x[part] / x[part].norm(dim=1, keepdim=True)).float()
        stream.update(units, torch.where(kinds[part] == 2, -1, kinds[part]), repeated[part])
    for kind in range(2):
        for chosen, values in (
            (kinds == kind, stream.values()),
            ((kinds == kind) & ~repeated, stream.values(first_only=True)),
        ):
            if int(chosen.sum()) > 1:
                assert float(values[kind]) == pytest.approx(oracles.mean_cosine(x[chosen]), abs=1e-6)
            else:
                assert torch.isnan(values[kind])
    assert torch.isnan(stream.values()[2])  # type -1 is no type
    if int((kinds == 0).sum()) > 1:
        found = stream.contributions(0).absolute
        np.testing.assert_allclose(found, oracles.contributions(x[kinds == 0], diagonal=True), atol=1e-6)


@given(split_vectors())
def test_moments_by_group(case):
    x, group, cuts = case
    stream = streams.Moments(3, shift=1.0)
    for part in parts(cuts):
        stream.update(x[part, 0], group[part])
    whole = stream.all_groups()
    assert float(whole.mean) == pytest.approx(float(x[:, 0].mean()))
    assert float(whole.std) == pytest.approx(float(x[:, 0].std()))
    assert float(whole.error) == pytest.approx(float(x[:, 0].std()) / len(x) ** 0.5)
    for number in range(3):
        if bool((group == number).any()):
            assert float(stream.mean[number]) == pytest.approx(float(x[group == number, 0].mean()))


@given(split_vectors())
def test_covariance_and_isoscore_far_from_the_origin(case):
    x, _, cuts = case
    x = x + 1e4  # where sums of squares would lose all digits
    stream = streams.Covariance(x.shape[1])
    for part in parts(cuts):
        stream.update(x[part])
    np.testing.assert_allclose(stream.matrix, np.cov(x.T.numpy()), rtol=1e-6, atol=1e-8)
    assert stream.isoscore == pytest.approx(isotropy.isoscore(x, warn=False), abs=1e-6)


def test_covariance_of_many_wide_batches():
    generator = np.random.default_rng(0)
    x = torch.as_tensor(generator.normal(size=(1700, 100)) * np.linspace(0.1, 2, 100) + 5).float()
    stream = streams.Covariance(100)
    for part in x.split(170):
        stream.update(part)
        part.zero_()  # a batch belongs to the caller, who may use it again
    x = torch.as_tensor(np.random.default_rng(0).normal(size=(1700, 100)) * np.linspace(0.1, 2, 100) + 5)
    assert stream.count == 1700
    np.testing.assert_allclose(stream.matrix, np.cov(x.T.numpy()), atol=2e-6)
    assert stream.isoscore == pytest.approx(oracles.isoscore(x), abs=1e-6)


def test_self_similarity_of_a_type_with_very_many_occurrences():
    generator = np.random.default_rng(0)
    units = torch.nn.functional.normalize(torch.as_tensor(generator.normal(size=(50_000, 5)) + 0.5), dim=1)
    kinds = torch.as_tensor(generator.integers(0, 2, 50_000))
    stream = streams.SelfSimilarity(2, 5)
    stream.update(units.float(), kinds)
    for kind in range(2):
        expected = cosines.mean_cosine(units[kinds == kind])
        assert float(stream.values()[kind]) == pytest.approx(expected, abs=1e-6)


@given(split_vectors())
def test_parts_that_were_seen_apart_merge(case):
    x, group, cuts = case
    numbers = np.arange(len(x))
    units = (x / x.norm(dim=1, keepdim=True)).float()
    made = {
        "MeanCosine": (lambda: streams.MeanCosine(x.shape[1], 3), lambda s, p: s.update(x[p], group[p])),
        "SelfSimilarity": (
            lambda: streams.SelfSimilarity(3, x.shape[1]),
            lambda s, p: s.update(units[p], group[p], torch.zeros_like(group[p], dtype=torch.bool)),
        ),
        "Moments": (lambda: streams.Moments(3), lambda s, p: s.update(x[p, 0], group[p])),
        "Covariance": (lambda: streams.Covariance(x.shape[1]), lambda s, p: s.update(x[p])),
        "SentenceCosine": (
            lambda: streams.SentenceCosine(x.shape[1], replicates=4),
            lambda s, p: s.update(units[p], numbers[p]),
        ),
        "Sample": (lambda: streams.Sample(5, 1), lambda s, p: s.update(x[p], numbers[p])),
    }
    for make, update in made.values():
        whole, merged = make(), make()
        update(whole, slice(0, len(x)))
        for part in reversed(parts(cuts)):
            other = make()
            update(other, part)
            merged.merge(other)
        names = vars(whole) if "matrix" not in dir(whole) else ("count", "matrix", "isoscore")
        for name in names:
            np.testing.assert_allclose(
                np.asarray(getattr(merged, name)),
                np.asarray(getattr(whole, name)),
                rtol=1e-5,
                atol=1e-5,
                err_msg=name,
            )


@given(split_vectors(), st.integers(0, 5))
def test_a_sample_does_not_depend_on_order_and_holds_its_rows(case, seed):
    x, _, cuts = case
    numbers = np.arange(len(x))
    straight, shuffled = streams.Sample(6, seed), streams.Sample(6, seed)
    straight.update(x, numbers)
    order = np.random.default_rng(seed).permutation(len(x))
    for part in parts(cuts):
        shuffled.update(x[order[part]], numbers[order[part]])
    assert straight.seen == shuffled.seen == len(x)
    assert straight.numbers.tolist() == shuffled.numbers.tolist()
    assert torch.equal(straight.rows, shuffled.rows)
    assert torch.equal(straight.rows, x[torch.as_tensor(straight.numbers)])
    assert len(straight.rows) == min(6, len(x))


def test_a_sample_is_uniform():
    counts = np.zeros(20)
    for seed in range(2000):
        sample = streams.Sample(5, seed)
        sample.update(torch.zeros(20, 1), np.arange(20))
        counts[sample.numbers] += 1
    assert np.abs(counts - 500).max() < 4.5 * np.sqrt(2000 * 0.25 * 0.75)


def test_poisson_weights_have_the_moments_of_poisson_1_and_are_fixed_by_number():
    weights = streams.poisson_weights(np.arange(20000), 3, 4)
    assert weights.shape == (4, 20000)
    assert weights.mean(1) == pytest.approx([1] * 4, abs=0.03)
    assert weights.var(1) == pytest.approx([1] * 4, abs=0.06)
    assert np.abs(np.corrcoef(weights) - np.eye(4)).max() < 0.03
    np.testing.assert_array_equal(streams.poisson_weights(np.array([7, 3]), 3, 4), weights[:, [7, 3]])


def test_expected_anisotropy_streams_and_its_error_is_the_spread_of_corpora():
    generator = np.random.default_rng(0)

    def corpus():
        return torch.as_tensor(generator.normal(size=(150, 3, 6)) + 0.6)

    mask = torch.ones(150, 3, dtype=torch.bool)
    values, errors = [], []
    for number in range(150):
        h = corpus()
        stream = streams.SentenceCosine(6, seed=number)
        _, unit_sums, counts = cosines.sentence_sums(h, mask)
        for part in (slice(0, 70), slice(70, 150)):
            stream.update((unit_sums / counts[:, None])[part].float(), np.arange(150)[part])
        values.append(stream.value)
        errors.append(stream.error)
        assert stream.value == pytest.approx(cosines.expected_anisotropy(h, mask), abs=1e-6)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)
    assert stream.contributions().mean_cosine == pytest.approx(stream.value)


def test_half_precision_is_summed_in_full():
    x = (torch.randn(3000, 8) + 1).half()
    stream = streams.MeanCosine(8)
    for part in x.split(100):
        stream.update(part)
    assert stream.mean_cosine() == pytest.approx(cosines.mean_cosine(x.double()), abs=1e-6)


def test_vectors_of_zeros_are_counted_and_not_averaged():
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    stream = streams.MeanCosine(2)
    stream.update(x)
    assert (stream.zeros, stream.mean_cosine()) == (1, pytest.approx(0.5**0.5))
    types = streams.SelfSimilarity(1, 2)
    types.update(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]), torch.zeros(3, dtype=torch.int64))
    assert types.values().tolist() == pytest.approx([0])


def test_alignment_streams():
    x, positive = torch.randn(30, 4), torch.randn(30, 4)
    stream = streams.Alignment()
    for part in (slice(0, 7), slice(7, 30)):
        stream.update_pairs(x[part], positive[part])
    assert float(stream.mean) == pytest.approx(isotropy.alignment(x, positive), abs=1e-6)


def test_too_few_vectors():
    with pytest.raises(InputError, match=r"expected at least 2 vectors \(got 0\)"):
        _ = streams.Covariance(3).matrix
    assert np.isnan(streams.MeanCosine(2).mean_cosine())
    assert np.isnan(streams.SentenceCosine(2).value)
