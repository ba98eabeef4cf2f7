"""Each pure measure equals its definition as a loop over pairs, and has the laws that it implies."""

import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from IsoScore import IsoScore as published
from scipy.special import logsumexp

from isocse import cosines, dimensions, isotropy, postprocess
from shared_core import InputError


@st.composite
def vectors(draw, least=3, most=12, widest=6):
    seed = draw(st.integers(0, 10**6))
    n, d = draw(st.integers(least, most)), draw(st.integers(2, widest))
    generator = np.random.default_rng(seed)
    offset = draw(st.sampled_from([0.0, 2.0]))
    return generator.normal(size=(n, d)) * generator.uniform(0.1, 5, size=(n, 1)) + offset


@st.composite
def sentences(draw, least=2):
    """A list of sentences of different length, and the same padded with what must not matter."""
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    lengths = draw(st.lists(st.integers(1, 5), min_size=least, max_size=5))
    d = draw(st.integers(2, 5))
    parts = [generator.normal(size=(n, d)) + draw(st.sampled_from([0.0, 1.0])) for n in lengths]
    width = max(lengths) + draw(st.integers(0, 3))
    h, mask = np.full((len(parts), width, d), 77.0), np.zeros((len(parts), width), dtype=np.int64)
    for row, part in enumerate(parts):
        h[row, : len(part)], mask[row, : len(part)] = part, 1
    return parts, torch.as_tensor(h), torch.as_tensor(mask)


@given(vectors())
def test_mean_cosine_is_the_mean_over_pairs(x):
    assert cosines.mean_cosine(x) == pytest.approx(oracles.mean_cosine(x), abs=1e-12)
    assert cosines.self_similarity(torch.as_tensor(x)) == cosines.mean_cosine(x)


@given(vectors(), st.floats(0.01, 100))
def test_cosines_do_not_depend_on_scale(x, scale):
    assert cosines.mean_cosine(x * scale) == pytest.approx(cosines.mean_cosine(x), abs=1e-9)


def test_orthogonal_vectors_have_mean_cosine_0_and_not_one_over_n():
    assert cosines.mean_cosine(torch.eye(5)) == 0


def test_vectors_of_zeros_are_left_out():
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert cosines.mean_cosine(x) == pytest.approx(math.sqrt(0.5))
    with pytest.raises(InputError, match=r"x: expected at least 2 vectors that are not zero \(got 1\)"):
        cosines.mean_cosine(x[:2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(bad):
    x = torch.ones(3, 2)
    x[1, 0] = bad
    with pytest.raises(InputError, match="row 1 has NaN or infinity"):
        cosines.mean_cosine(x)
    with pytest.raises(InputError, match="NaN or infinity at sentence 0, token 1"):
        cosines.intra_sentence_similarity(x[None], torch.ones(1, 3, dtype=torch.int64))


@given(sentences())
def test_intra_sentence_similarity_is_the_cosine_to_the_mean_and_padding_does_not_matter(case):
    parts, h, mask = case
    expected = [oracles.intra(part) for part in parts]
    assert cosines.intra_sentence_similarity(h, mask).tolist() == pytest.approx(expected, abs=1e-10)


def test_two_tokens_at_right_angles_have_intra_similarity_cos_45():
    h = torch.eye(2)[None]
    found = cosines.intra_sentence_similarity(h, torch.ones(1, 2, dtype=torch.bool))
    assert float(found) == pytest.approx(math.cos(math.pi / 4))


@given(sentences())
def test_expected_anisotropy_is_the_mean_over_all_draws_of_two_sentences(case):
    parts, h, mask = case
    assert cosines.expected_anisotropy(h, mask) == pytest.approx(
        oracles.expected_anisotropy(parts), abs=1e-10
    )


def test_the_published_draw_has_the_expected_anisotropy_as_its_mean():
    generator = np.random.default_rng(0)
    h = torch.as_tensor(generator.normal(size=(6, 4, 3)) + 0.5)
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:3, 2:] = False
    draws = [cosines.draw_tokens(mask, 4, generator) for _ in range(4000)]
    values = [cosines.mean_cosine(h[d[:, 0], d[:, 1]]) for d in draws]
    assert all(len(set(d[:, 0])) == 4 and bool(mask[d[:, 0], d[:, 1]].all()) for d in draws)
    expected = cosines.expected_anisotropy(h, mask)
    assert abs(np.mean(values) - expected) < 4 * np.std(values) / math.sqrt(len(values))
    assert len(cosines.draw_tokens(mask, 1000, generator)) == 6  # no more than there are


def test_the_bootstrap_error_is_the_spread_of_repeated_samples():
    generator = np.random.default_rng(1)
    samples = [generator.normal(size=(200, 8)) + 0.7 for _ in range(200)]
    spread = np.std([cosines.mean_cosine(x) for x in samples])
    errors = [cosines.bootstrap_error(x, generator) for x in samples[:10]]
    assert np.mean(errors) == pytest.approx(spread, rel=0.2)


@given(vectors())
def test_contributions_are_sums_over_pairs_and_add_up(x):
    for pairs, diagonal in (("off_diagonal", False), ("all", True)):
        found = dimensions.dimension_contributions(x, pairs=pairs)
        np.testing.assert_allclose(found.absolute, oracles.contributions(x, diagonal), atol=1e-12)
        assert float(found.share.sum()) == pytest.approx(1)
    assert found.mean_cosine != pytest.approx(dimensions.dimension_contributions(x).mean_cosine)


def test_a_rogue_dimension_is_found_and_a_share_of_noise_is_refused():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 10))
    noise = dimensions.dimension_contributions(x, error=cosines.bootstrap_error(x, generator))
    with pytest.raises(InputError, match="within 3 standard errors of 0"):
        _ = noise.share
    x[:, 4] += 5
    found = dimensions.dimension_contributions(x, error=cosines.bootstrap_error(x, generator))
    assert found.top(1).tolist() == [4]
    assert float(found.share[4]) > 0.95
    assert cosines.mean_cosine(dimensions.remove_dimensions(x, [4])) == pytest.approx(0, abs=0.02)
    assert dimensions.informativity(x, [4]) < 0.8
    assert dimensions.informativity(np.c_[x, np.full(300, 1e-9)], [10]) == pytest.approx(1)


@given(vectors(least=4))
def test_informativity_is_the_squared_correlation_of_pair_cosines(x):
    from scipy.stats import pearsonr

    pairs = list(itertools.combinations(range(len(x)), 2))
    if x.shape[1] < 3:
        return
    before = [oracles.cos(x[i], x[j]) for i, j in pairs]
    after = [oracles.cos(x[i, 1:], x[j, 1:]) for i, j in pairs]
    expected = pearsonr(before, after).statistic ** 2
    assert dimensions.informativity(x, [0]) == pytest.approx(expected, abs=1e-9)


def test_dimensions_out_of_range_are_named():
    with pytest.raises(InputError, match=r"dimensions: expected 0 to 1 \(got \[2\]\)"):
        dimensions.remove_dimensions(torch.ones(2, 2), [2])


@given(vectors(least=4))
def test_isoscore_is_the_published_definition_through_eigenvalues(x):
    assert isotropy.isoscore(x, warn=False) == pytest.approx(oracles.isoscore(x), abs=1e-9)


@pytest.mark.parametrize(("n", "k"), [(10, 1), (10, 3), (10, 10), (7, 2)])
def test_k_equal_directions_have_the_closed_form(n, k):
    directions = np.zeros((n, n))
    directions[range(k), range(k)] = 3
    x = np.concatenate([directions[:k], -directions[:k]])  # covariance: identity on k, zero elsewhere
    assert isotropy.isoscore(x, warn=False) == pytest.approx((k - 1) / (n - 1), abs=1e-12)


@pytest.mark.filterwarnings("ignore")  # of the published package
def test_isoscore_equals_the_published_package_and_takes_points_as_rows():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(500, 8)) * generator.uniform(0.2, 2, size=8)
    theirs = float(published.IsoScore(torch.as_tensor(x)))
    assert isotropy.isoscore(x) == pytest.approx(theirs, abs=1e-6)  # their constants are float32
    reference = torch.eye(8, dtype=torch.float64)
    star = float(published.istar().IsoScore_star(torch.as_tensor(x), reference, 0.3))
    assert isotropy.isoscore_star(x, reference, 0.3) == pytest.approx(star, abs=1e-6)
    cloud = generator.normal(size=(2000, 10))
    assert isotropy.isoscore(cloud) > 0.98
    with pytest.warns(UserWarning, match="10 points in 2000 dimensions is too low: use 20000"):
        assert isotropy.isoscore(cloud.T) < 0.01  # the layout trap


@pytest.mark.parametrize("data", ["spread", "a rogue dimension", "a line", "far from the origin"])
def test_isoscore_of_many_points_in_single_precision_is_that_in_double(data):
    generator = np.random.default_rng(0)
    n = isotropy.BLOCK * isotropy.BLOCKS_IN_FLOAT32 + 100
    x = generator.normal(size=(n, 120))
    x = {
        "spread": x * np.linspace(0.1, 1, 120),
        "a rogue dimension": x * np.where(np.arange(120) == 7, 100, 1),
        "a line": generator.normal(size=(n, 1)) + 1e-3 * x,
        "far from the origin": x + 1e4,
    }[data]
    variances = np.linalg.eigvalsh(np.cov(x.T))
    expected = (variances.sum() ** 2 / np.sum(variances**2) - 1) / 119
    assert isotropy.isoscore(x) == pytest.approx(expected, abs=1e-8)


def test_isoscore_star_moves_from_the_sample_to_the_reference():
    generator = np.random.default_rng(0)
    big, small = generator.normal(size=(5000, 20)), generator.normal(size=(15, 20))
    reference = isotropy.covariance(big)
    ends = [isotropy.isoscore_star(small, reference, zeta) for zeta in (0.0, 0.5, 1.0)]
    assert ends[0] == pytest.approx(isotropy.isoscore(small, warn=False))
    assert ends[2] == pytest.approx(isotropy.isoscore(big))
    assert ends[0] < ends[1] < ends[2]
    with pytest.raises(InputError, match="zeta: expected 0 to 1"):
        isotropy.isoscore_star(small, reference, 2.0)


def test_the_error_of_isoscore_is_the_spread_of_repeated_samples():
    generator = np.random.default_rng(2)
    scales = np.linspace(0.3, 2, 6)
    samples = [generator.normal(size=(400, 6)) * scales for _ in range(300)]
    spread = np.std([isotropy.isoscore(x) for x in samples])
    assert np.mean([isotropy.isoscore_error(x) for x in samples[:20]]) == pytest.approx(spread, rel=0.15)


@given(vectors())
def test_partition_isotropy_is_its_definition_and_does_not_change_with_a_rotation(x):
    x = x / 3
    found = isotropy.partition_isotropy(x)
    assert found == pytest.approx(oracles.partition(x), rel=1e-6)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(x.shape[1],) * 2))[0]
    assert isotropy.partition_isotropy(x @ rotation) == pytest.approx(found, rel=1e-6)


def test_partition_isotropy_survives_long_vectors_and_tells_an_offset():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(50, 3)) * 1e3
    logs = [logsumexp(s * (x @ c)) for c in np.linalg.eigh(x.T @ x)[1].T for s in (1, -1)]
    assert isotropy.partition_isotropy(x) == pytest.approx(math.exp(min(logs) - max(logs)))
    small = generator.normal(size=(500, 3)) * 0.1
    assert isotropy.partition_isotropy(small + 2) < 0.1 < isotropy.partition_isotropy(small)


def test_the_error_of_partition_isotropy_is_near_the_spread_of_repeated_samples():
    generator = np.random.default_rng(3)
    samples = [generator.normal(size=(300, 4)) * [1, 0.5, 0.5, 0.5] + [0.5, 0, 0, 0] for _ in range(150)]
    spread = np.std([isotropy.partition_isotropy(x) for x in samples])
    errors = [isotropy.partition_with_error(x, torch.Generator().manual_seed(0))[1] for x in samples[:10]]
    assert np.mean(errors) == pytest.approx(spread, rel=0.35)


@given(vectors())
def test_uniformity_is_its_definition(x):
    assert isotropy.uniformity(x) == pytest.approx(oracles.uniformity(x), abs=1e-9)
    assert isotropy.uniformity(x, t=0.5) == pytest.approx(oracles.uniformity(x, 0.5), abs=1e-9)


def test_the_error_of_uniformity_is_the_spread_of_repeated_samples():
    generator = np.random.default_rng(4)
    samples = [generator.normal(size=(200, 4)) + 1 for _ in range(200)]
    spread = np.std([isotropy.uniformity(x) for x in samples])
    assert np.mean([isotropy.uniformity_with_error(x)[1] for x in samples[:10]]) == pytest.approx(
        spread, rel=0.2
    )


@given(vectors(), st.sampled_from([1.0, 2.0]))
def test_alignment_is_its_definition(x, alpha):
    positive = x[::-1]
    expected = np.mean(
        [np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** alpha
         for a, b in zip(x, positive, strict=True)]
    )  # fmt: skip
    assert isotropy.alignment(x, positive.copy(), alpha) == pytest.approx(expected)


def test_alignment_of_unequal_numbers_is_refused():
    with pytest.raises(InputError, match=r"positive: expected as many as x, \(2, 2\) \(got \(3, 2\)\)"):
        isotropy.alignment(torch.ones(2, 2), torch.ones(3, 2))


@given(vectors())
def test_the_common_component_and_what_is_left_without_it(x):
    distance, share = cosines.common_component(x)
    assert distance == pytest.approx(np.linalg.norm(x.mean(0)))
    assert share == pytest.approx(distance**2 / np.mean(np.sum(x**2, axis=1)))
    centred = x - x.mean(0)
    if len(x) > 2 and (np.linalg.norm(centred, axis=1) > 1e-9).all():
        assert cosines.residual_anisotropy(x) == pytest.approx(oracles.mean_cosine(centred), abs=1e-9)
    expected = [oracles.cos(row, x.mean(0)) for row in x]
    assert cosines.cosine_to_mean(x).tolist() == pytest.approx(expected)


def test_post_processing_does_what_its_name_says():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 6)) @ generator.normal(size=(6, 6)) + 3
    np.testing.assert_array_equal(postprocess.fit("none", x)(x), x)
    np.testing.assert_allclose(postprocess.fit("center", x)(x).mean(0), 0, atol=1e-12)
    white = postprocess.fit("whiten", x)(x)
    np.testing.assert_allclose(white.T @ white / 400, np.eye(6), atol=1e-9)
    scored = postprocess.fit("standardize", x)(x)
    np.testing.assert_allclose(scored.std(0, correction=0), 1)
    np.testing.assert_allclose(scored, dimensions.standardize(x))
    left = postprocess.fit("all-but-the-top", x, components=2)(x)
    variances = np.linalg.eigvalsh(np.cov(left.T.numpy()))
    original = np.linalg.eigvalsh(np.cov(x.T))
    np.testing.assert_allclose(variances[2:], original[:4], rtol=1e-9)  # the two greatest are gone
    np.testing.assert_allclose(variances[:2], 0, atol=1e-9)
    assert postprocess.fit("whiten", np.c_[x, x[:, 0]])(np.c_[x, x[:, 0]]).shape == (400, 6)
    with pytest.raises(InputError, match="name: expected one of none, center"):
        postprocess.fit("bleach", x)
