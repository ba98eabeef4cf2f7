import math
from bisect import bisect_right
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from scipy.stats import chisquare
from scipy.stats import skellam as skellam_law

from shared_core import InputError
from smm_dp import sample_skellam, secure_source, seeded_source
from smm_dp.randomness import IntegerReader
from smm_dp.samplers import (
    TableSampler,
    binomial_table,
    discrete_gaussian_table,
    sample_discrete_gaussian_exact,
    sample_poisson_exact,
    sample_poisson_one,
    sample_skellam_exact,
    simulate_skellam,
    skellam_table,
)
from smm_dp.skellam import cumulative_thresholds, log_pmf, support_radius, tail_probability

MUS = [Fraction(1, 10), Fraction(119, 20), Fraction(500)]


def bessel_pmf(z, mu):
    return float(mpmath.exp(-2 * mu) * mpmath.besseli(abs(int(z)), 2 * mu))


def assert_law(draws, pmf, low, high, level=1e-5):
    """Chi-square over all values with an expected count of 5 or more, tails pooled at the ends."""
    n = len(draws)
    values = np.arange(low, high + 1)
    p = np.array([pmf(z) for z in values])
    keep = np.flatnonzero(n * p >= 5)
    first, last = keep[0], keep[-1]
    expected = n * p[first : last + 1]
    expected[0] += n * p[:first].sum()
    expected[-1] += n * p[last + 1 :].sum()
    counts = np.bincount(
        np.clip(draws, values[first], values[last]) - values[first], minlength=last - first + 1
    )
    assert chisquare(counts, expected * n / expected.sum()).pvalue > level


@pytest.mark.parametrize("mu", MUS)
def test_table_sampler_follows_the_bessel_law(mu):
    draws = skellam_table(mu).sample(seeded_source(11), 200_000)
    assert np.issubdtype(draws.dtype, np.integer)
    radius = support_radius(float(mu), 30)
    assert_law(draws, lambda z: bessel_pmf(z, float(mu)), -radius, radius)


@pytest.mark.parametrize("mu", MUS)
def test_tails_have_their_mass(mu):
    """A rounded Gaussian of the same variance fails this at small mu: its tails are far too light."""
    n = 1_000_000
    draws = skellam_table(mu).sample(seeded_source(12), n)
    for share in (1e-2, 1e-3, 1e-4):
        z = int(skellam_law.isf(share / 2, float(mu), float(mu)))
        expected = 2 * n * tail_probability(float(mu), z)
        assert abs((np.abs(draws) > z).sum() - expected) < 5 * math.sqrt(expected) + 5


def test_official_construction_and_table_agree():
    mu = Fraction(8, 3)
    draws = sample_skellam_exact(mu, 4000, seeded_source(13))
    assert_law(draws, lambda z: bessel_pmf(z, float(mu)), -40, 40)


def test_floating_simulation_follows_the_law_too(rng):
    assert_law(simulate_skellam(5.95, 200_000, rng), lambda z: bessel_pmf(z, 5.95), -50, 50)


def test_poisson_one_and_fraction_are_poisson():
    source = IntegerReader(seeded_source(14))
    ones = np.array([sample_poisson_one(source) for _ in range(5000)])
    assert_law(ones, lambda z: math.exp(-1) / math.factorial(z) if z >= 0 else 0.0, 0, 20)
    mixed = np.array([sample_poisson_exact(Fraction(7, 4), source) for _ in range(5000)])
    assert_law(mixed, lambda z: math.exp(-1.75) * 1.75**z / math.factorial(z) if z >= 0 else 0.0, 0, 20)


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("bits", [64, 128])
def test_thresholds_are_the_distribution_function_to_the_last_bit(mu, bits):
    first, table = cumulative_thresholds(mu, bits)
    with mpmath.workprec(bits + 200):
        m = mpmath.mpf(mu.numerator) / mu.denominator
        step = max(1, len(table) // 25)
        mass = [mpmath.exp(-2 * m) * mpmath.besseli(z, 2 * m) for z in range(-first + 1)]
        running = mpmath.mpf(0)
        for index in range(len(table)):
            running += mass[abs(first + index)]
            if index % step == 0 or index == len(table) - 1:
                assert abs(running * 2**bits - table[index]) <= 1.01


@pytest.mark.parametrize("law", ["skellam", "gaussian", "binomial"])
def test_the_rare_path_that_reads_ever_more_bits_has_the_same_law(law):
    """Started at 16 bits, where thresholds are coarse, it has to resolve many draws by finer tables."""
    table, pmf = {
        "skellam": (skellam_table(Fraction(3, 2)), lambda z: bessel_pmf(z, 1.5)),
        "gaussian": (discrete_gaussian_table(Fraction(2)), _discrete_gaussian_pmf(2.0)),
        "binomial": (binomial_table(4), lambda z: math.comb(4, z + 2) / 16 if abs(z) <= 2 else 0.0),
    }[law]
    source = seeded_source(15)
    draws = [table._resolve(source, int(source.octets(1)[0]), 8) for _ in range(4000)]
    assert_law(np.array(draws), pmf, -20, 20)


class _Digits:
    """The binary digits of one number in [0, 1), as many at a time as are asked for."""

    label, secure = "digits of a number", False

    def __init__(self, number, bits):
        self.number, self.left = number, bits

    def octets(self, count):
        self.left -= 8 * count
        part = self.number >> self.left & ((1 << 8 * count) - 1)
        return np.frombuffer(part.to_bytes(count, "little"), np.uint8)


@pytest.mark.parametrize("mu", MUS)
def test_a_draw_beside_a_border_of_the_table_is_decided_by_as_many_bits_as_it_takes(mu):
    """A uniform number U gives the least z with U < P(Z ≤ z), however many digits it shares with a border."""
    bits = 512
    first, table = cumulative_thresholds(mu, bits)
    for value in (-1, 0, 2):
        border = table[value - first]
        for depth in (10, 30, 60, 63, 64, 66, 100, 126, 127, 128, 130, 200, 250):
            for sign in (-1, 1):
                number = border + sign * (1 << bits - depth)
                if 0 < number < 1 << bits:
                    expected = first + bisect_right(table, number)
                    assert skellam_table(mu).sample(_Digits(number, bits), 1).tolist() == [expected]
        deepest = 1 << bits - 250
        pair = [int(skellam_table(mu).sample(_Digits(border + s * deepest, bits), 1)[0]) for s in (-1, 1)]
        assert pair == [value, value + 1]


def _discrete_gaussian_pmf(variance):
    total = sum(math.exp(-z * z / (2 * variance)) for z in range(-200, 201))
    return lambda z: math.exp(-z * z / (2 * variance)) / total


@pytest.mark.parametrize("variance", [Fraction(1, 4), Fraction(7, 2), Fraction(50)])
def test_discrete_gaussian_samplers_follow_their_law(variance):
    pmf = _discrete_gaussian_pmf(float(variance))
    assert_law(discrete_gaussian_table(variance).sample(seeded_source(16), 200_000), pmf, -60, 60)
    assert_law(sample_discrete_gaussian_exact(variance, 1500, seeded_source(17)), pmf, -60, 60)


@pytest.mark.parametrize("trials", [2, 10, 400])
def test_binomial_table_follows_its_law(trials):
    draws = binomial_table(trials).sample(seeded_source(18), 200_000)
    half = trials // 2
    assert_law(
        draws, lambda z: math.comb(trials, z + half) / 2**trials if abs(z) <= half else 0.0, -half, half
    )


def test_sums_of_participants_noise_follow_the_sum_law():
    """Skellam is closed under addition: 10 participants with mu 0.6 give Sk(6)."""
    source = seeded_source(19)
    total = sum(sample_skellam(Fraction(3, 5), 200_000, source) for _ in range(10))
    assert_law(total, lambda z: bessel_pmf(z, 6.0), -60, 60)


def test_large_mu_is_split_and_zero_mu_is_no_noise():
    source = seeded_source(20)
    draws = sample_skellam(Fraction(250_000), 20_000, source)
    assert abs(draws.var() / 500_000 - 1) < 6 * math.sqrt(2 / 20_000)
    assert not sample_skellam(Fraction(0), 5, source).any()


def test_draws_do_not_depend_on_how_many_are_asked_for_at_once():
    table = skellam_table(Fraction(119, 20))
    assert table.sample(seeded_source(1), 0).size == 0
    assert table.total_variation == 0.0


def test_secure_source_gives_uniform_words():
    data = secure_source().octets(1 << 18)
    assert chisquare(np.bincount(data, minlength=256)).pvalue > 1e-6
    assert not np.array_equal(data, secure_source().octets(1 << 18))


def test_secure_source_has_a_fresh_key_of_256_bits_from_the_operating_system(monkeypatch):
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    keys = []

    def urandom(count):
        keys.append(bytes(range(len(keys) + 1, len(keys) + 1 + count)))
        return keys[-1]

    monkeypatch.setattr("smm_dp.randomness.os.urandom", urandom)
    streams = [secure_source().octets(64).tobytes() for _ in range(2)]
    assert [len(key) for key in keys] == [32, 32]
    for key, stream in zip(keys, streams, strict=True):
        assert stream == Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(64))


def test_cipher_stream_is_aes_in_counter_mode_whatever_the_request_sizes():
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    from smm_dp.randomness import CipherSource

    expected = Cipher(algorithms.AES(b"k" * 32), modes.CTR(bytes(16))).encryptor().update(bytes(200_100))
    source = CipherSource(b"k" * 32, secure=False, label="test")
    parts = b"".join(source.octets(size).tobytes() for size in (1, 16, 83, 200_000))
    assert parts == expected


def test_mass_function_by_recurrence_equals_bessel():
    for mu in (0.01, 0.5, 5.95, 1428.0):
        z = np.array([0, 1, 2, 7, 30])
        expected = [float(mpmath.log(mpmath.besseli(int(k), 2 * mu)) - 2 * mu) for k in z]
        np.testing.assert_allclose(log_pmf(mu, 40)[z], expected, rtol=1e-11, atol=1e-12)


def test_bad_parameters_are_refused():
    with pytest.raises(InputError, match="negative"):
        sample_skellam(Fraction(-1), 3, seeded_source(0))
    with pytest.raises(InputError, match="0 < mu"):
        skellam_table(Fraction(0))
    with pytest.raises(InputError, match="positive"):
        sample_discrete_gaussian_exact(Fraction(0), 1, seeded_source(0))
    with pytest.raises(InputError, match="even number"):
        binomial_table(3)
    with pytest.raises(InputError, match="at least 1"):
        IntegerReader(seeded_source(0)).below(0)
    assert isinstance(skellam_table(Fraction(1)), TableSampler)


def test_a_source_does_not_survive_a_fork(monkeypatch):
    """Parent and child would draw the same noise."""
    import os

    source = secure_source()
    source.octets(4)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="fork"):
        source.octets(4)
