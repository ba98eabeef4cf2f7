import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binom

from shared_core import InputError
from smm_dp import SkellamMixture, centre, clip_mixture, second_moment, seeded_source, stochastic_round
from smm_dp.mechanism import _BLOCK, clip_norm, inverse_second_moment
from smm_dp.randomness import CipherSource

vectors = arrays(np.float64, st.integers(1, 40), elements=st.floats(-300, 300, width=64))


def mechanism(**changes):
    settings = {
        "dim": 5, "clip": 50.0, "scale": 4.0, "modulus_bits": 12, "mu_total": 20.0, "participants": 4,
        "coordinate_bound": 6,
    }  # fmt: skip
    return SkellamMixture(**(settings | changes))


@given(vectors)
def test_second_moment_interpolates_the_squares_linearly(x):
    grid = np.arange(302.0)
    np.testing.assert_allclose(second_moment(x), np.interp(np.abs(x), grid, grid**2), rtol=1e-13)
    np.testing.assert_array_equal(second_moment(x), second_moment(-x))
    assert (second_moment(x) >= x * x * (1 - 1e-15)).all()


@given(arrays(np.float64, 20, elements=st.floats(0, 1e12)))
def test_inverse_second_moment_inverts(v):
    np.testing.assert_allclose(second_moment(inverse_second_moment(v)), v, rtol=1e-12, atol=1e-300)


def test_inverse_is_exact_at_and_beside_perfect_squares():
    k = np.arange(1.0, 5000)
    np.testing.assert_array_equal(inverse_second_moment(k * k), k)
    below = np.nextafter(k * k, 0)
    assert (inverse_second_moment(below) <= k).all()
    np.testing.assert_allclose(second_moment(inverse_second_moment(below)), below, rtol=1e-15)


@given(vectors, st.floats(0.01, 1e5))
def test_clipping_keeps_signs_bounds_the_moment_and_is_idempotent(x, bound):
    clipped = clip_mixture(x, bound)
    total = math.fsum(second_moment(clipped))
    assert total <= bound
    if math.fsum(second_moment(x)) > bound:
        assert total >= bound * (1 - 1e-9)
    elif math.fsum(second_moment(x)) < bound * (
        1 - 1e-11
    ):  # at the bound, rounding could lie on its far side
        np.testing.assert_array_equal(clipped, x)
    assert ((np.sign(clipped) == np.sign(x)) | (clipped == 0)).all()
    assert (np.abs(clipped) <= np.abs(x)).all()
    np.testing.assert_array_equal(clip_mixture(clipped, bound), clipped)


def test_plain_norm_clipping_would_not_bound_the_moment():
    """Toy trap 1: at the same c an L2-clipped vector of small entries has a far larger Σφ."""
    x = np.full(4096, 0.1)
    assert math.fsum(second_moment(clip_norm(x, 10.0))) > 3 * 10.0
    assert math.fsum(second_moment(clip_mixture(x, 10.0))) <= 10.0


@given(vectors, st.floats(0.01, 1e5))
def test_norm_clipping_bounds_the_norm(x, bound):
    clipped = clip_norm(x, bound)
    assert math.fsum(clipped * clipped) <= bound
    np.testing.assert_allclose(clipped * np.linalg.norm(x), x * np.linalg.norm(clipped), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1.0, -2.5, 4.73, -7.999, 1e-9])
def test_rounding_has_mean_x_and_second_moment_phi(value):
    n = 200_000
    y = stochastic_round(np.full(n, value), seeded_source(1))
    up = int((np.abs(y) > math.floor(abs(value))).sum())
    assert set(np.unique(np.abs(y))) <= {math.floor(abs(value)), math.floor(abs(value)) + 1}
    assert ((np.sign(y) == np.sign(value)) | (y == 0)).all()
    p = abs(value) - math.floor(abs(value))
    assert binom.cdf(up, n, p) > 1e-6
    assert binom.sf(up - 1, n, p) > 1e-6
    spread = math.sqrt(max(p * (1 - p), 1e-12) / n)
    assert abs(y.mean() - value) < 6 * spread
    assert abs((y.astype(float) ** 2).mean() - second_moment(np.array([value]))[0]) < 6 * spread * (
        2 * abs(value) + 1
    )


class _Fixed:
    label, secure = "fixed bytes", False

    def __init__(self, data):
        self.data = data

    def octets(self, count):
        out, self.data = self.data[:count], self.data[count:]
        return np.array(list(out), np.uint8)


def test_rounding_decides_ties_by_further_bits():
    """p = 0x8000.4000 0000 0000 in units of 2^-16: a draw of 0x8000 needs the next 48 bits."""
    p = (0x8000 + 0.25) / 65536
    tail = (int(0.25 * 2**48) - 1).to_bytes(6, "little")
    assert stochastic_round(np.array([p]), _Fixed(b"\x00\x80" + tail)).tolist() == [1]
    tail = int(0.25 * 2**48).to_bytes(6, "little")
    assert stochastic_round(np.array([p]), _Fixed(b"\x00\x80" + tail)).tolist() == [0]


@pytest.mark.parametrize("accounting", ["paper", "numeric"])
@pytest.mark.parametrize("dim", [1, 5, 64, 1000, 40_000])
def test_without_noise_decoding_returns_the_vector_up_to_rounding(dim, accounting, rng):
    """Toy trap 16: padding, order of rotation and scaling match between participant and server."""
    x = rng.standard_normal(dim)
    scale = 2.0**12
    m = mechanism(dim=dim, scale=scale, clip=1e14, coordinate_bound=2**24, modulus_bits=32, mu_total=0,
                  participants=1, accounting=accounting, rotation_seed=7)  # fmt: skip
    out = m.decode(m.encode(x, seeded_source(2), secure=False))
    assert out.shape == (dim,)
    assert np.linalg.norm(out - x) <= math.sqrt(m.padded_dim) / scale
    np.testing.assert_allclose(m.decode(m.encode(x, seeded_source(2), secure=False), count=4.0) * 4, out)


@pytest.mark.parametrize("accounting", ["paper", "numeric"])
def test_clipped_vector_satisfies_what_the_accountant_assumes(accounting, rng):
    for norm in (0.1, 1.0, 100.0):
        x = rng.standard_normal(3000) * norm
        m = mechanism(dim=3000, clip=700.0, scale=16.0, coordinate_bound=2, accounting=accounting)
        y = m.clipped(x)
        moment = second_moment(y) if accounting == "paper" else y * y
        assert math.fsum(moment) <= 700.0
        assert np.abs(y).max() <= 2


@pytest.mark.parametrize("accounting", ["paper", "numeric"])
@pytest.mark.parametrize(("dim", "norm"), [(3000, 3.0), (100_000, 3.0), (100_000, 3000.0)])
def test_a_vector_that_is_clipped_reaches_its_bound(accounting, dim, norm, rng):
    """What clipping takes beyond the bound is signal lost for nothing; 100000 entries span several blocks."""
    x = rng.standard_normal(dim)
    x *= norm / np.linalg.norm(x)
    m = mechanism(dim=dim, clip=1500.0, scale=16.0, coordinate_bound=1000, accounting=accounting)
    y = m.clipped(x)
    moment = math.fsum(second_moment(y) if accounting == "paper" else y * y)
    assert 1500.0 * (1 - 1e-9) <= moment <= 1500.0


@pytest.mark.parametrize("accounting", ["paper", "numeric"])
def test_a_coordinate_beyond_its_bound_is_cut_to_it_and_the_others_stay(accounting):
    from smm_dp.rotation import unrotate

    turned = np.array([0.0, 9.0, 1.25, -7.5, 5.75, -0.5, 0.0, 6.0])
    m = mechanism(dim=8, clip=1e6, scale=4.0, coordinate_bound=6, accounting=accounting, rotation_seed=3)
    y = m.clipped(unrotate(turned / 4.0, 3, 8))
    np.testing.assert_allclose(y, [0.0, 6.0, 1.25, -6.0, 5.75, -0.5, 0.0, 6.0], atol=1e-12)
    assert np.abs(y).max() <= 6


def test_blocked_clipping_equals_the_whole_vector_function(rng):
    """d = 131072 spans several blocks."""
    x = rng.standard_normal(100_000)
    m = mechanism(dim=100_000, clip=5e4, scale=3.0, coordinate_bound=1000)
    from smm_dp.rotation import rotate

    np.testing.assert_allclose(m.clipped(x), clip_mixture(rotate(x, 0) * 3.0, 5e4), rtol=1e-9, atol=1e-12)
    small = mechanism(dim=100_000, clip=5e2, scale=0.1, coordinate_bound=1000)  # all coordinates below 1
    np.testing.assert_allclose(small.clipped(x), clip_mixture(rotate(x, 0) * 0.1, 5e2), rtol=1e-9, atol=1e-12)


def test_every_payload_has_its_own_noise_of_variance_two_mu_plus_rounding():
    """Toy traps 4 and 5: noise is added by each participant, 2·mu_each, and so do sums of fewer than all."""
    d, n = 1 << 14, 6
    m = mechanism(
        dim=d, mu_total=30.0, participants=n, clip=1e9, scale=1.0, coordinate_bound=50, modulus_bits=16
    )
    source = seeded_source(3)
    x = np.random.default_rng(0).standard_normal(d) * 2
    y = m.clipped(x)
    rounding = (second_moment(y) - y * y).mean()
    payloads = [centre(m.encode(x, source, secure=False), 16) - y for _ in range(n)]
    for k in (1, 3, n):
        variance = np.sum(payloads[:k], axis=0).var()
        expected = k * (2 * 30.0 / n + rounding)
        assert abs(variance / expected - 1) < 6 * math.sqrt(2 / d)


def test_no_two_blocks_of_a_long_vector_share_their_noise():
    m = mechanism(dim=4 * _BLOCK, mu_total=30.0, participants=1, modulus_bits=16)
    noise = centre(m.encode(np.zeros(4 * _BLOCK), seeded_source(4), secure=False), 16).reshape(4, _BLOCK)
    correlation = np.corrcoef(noise) - np.eye(4)
    assert np.abs(correlation).max() < 6 / math.sqrt(_BLOCK)
    np.testing.assert_allclose(noise.var(axis=1), 60.0, rtol=6 * math.sqrt(2 / _BLOCK))


@given(st.integers(2, 32), st.integers(-(2**40), 2**40))
def test_wrap_is_congruent_and_centre_picks_the_half_open_interval(bits, value):
    from smm_dp import wrap

    residue = wrap(np.array([value]), bits)
    back = int(centre(residue, bits)[0])
    modulus = 2**bits
    assert 0 <= int(residue[0]) < modulus
    assert (back - value) % modulus == 0
    assert -modulus // 2 < back <= modulus // 2


def test_sums_at_the_edges_of_the_modulus():
    from smm_dp import wrap

    half = 2**7
    values = np.array([half, -half, half + 1, -half + 1, 2**8 + 1])
    assert centre(wrap(values, 8), 8).tolist() == [half, half, -half + 1, -half + 1, 1]


def test_a_binding_modulus_wraps_the_sum():
    m = mechanism(
        dim=4, clip=1e9, scale=1.0, coordinate_bound=1000, mu_total=0, modulus_bits=4, participants=3
    )
    payload = m.encode(np.array([2.0, 0, 0, 0]), seeded_source(0), secure=False)
    total = (payload.astype(np.uint64) * 9 % 16).astype(
        np.uint32
    )  # the rotated spike ±1 nine times leaves (-8, 8]
    assert not np.allclose(m.decode(total), [18.0, 0, 0, 0])
    assert ((centre(total, 4) - 9 * centre(payload, 4)) % 16 == 0).all()


def test_a_release_refuses_a_source_that_is_not_cryptographic():
    m = mechanism()
    with pytest.raises(InputError, match="cryptographic source"):
        m.encode(np.zeros(5), seeded_source(0))
    assert m.encode(np.zeros(5)).dtype == np.uint32


def test_secure_payloads_differ_each_time():
    m = mechanism(dim=1000, mu_total=400.0)
    assert not np.array_equal(m.encode(np.zeros(1000)), m.encode(np.zeros(1000)))


def test_a_cipher_stream_cannot_be_copied():
    import copy

    with pytest.raises(TypeError, match="same noise"):
        copy.copy(CipherSource(bytes(32), secure=False, label="zeros"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_name_and_index(bad):
    x = np.zeros(5)
    x[3] = bad
    with pytest.raises(InputError, match="client-9 has a value that is not finite at index 3"):
        mechanism().encode(x, participant="client-9")


def test_wrong_length_is_refused():
    with pytest.raises(InputError, match=r"client-9 has a vector of shape \(6,\), expected \(5,\)"):
        mechanism().encode(np.zeros(6), participant="client-9")


def test_float32_beyond_its_integers_is_refused():
    x = np.zeros(5, np.float32)
    x[2] = 2.0**23
    with pytest.raises(InputError, match=r"exceeds 2\^24"):
        mechanism().encode(x)
    mechanism(clip=1e20, coordinate_bound=1e9).encode(x.astype(np.float64))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"modulus_bits": 1}, "2 to 32 bits"),
        ({"modulus_bits": 33}, "2 to 32 bits"),
        ({"scale": 0.0}, "scale"),
        ({"scale": -1.0}, "scale"),
        ({"clip": 0.0}, "clip"),
        ({"mu_total": -1.0}, "mu_total"),
        ({"mu_total": math.nan}, "mu_total"),
        ({"participants": 0}, "participants"),
        ({"dim": 0}, "dim"),
        ({"coordinate_bound": 4.73}, "4.7 may be rounded to 5"),
        ({"coordinate_bound": 0}, "coordinate_bound"),
    ],
)
def test_parameters_out_of_range_are_refused(change, text):
    with pytest.raises(InputError, match=text):
        mechanism(**change)


def test_decoding_refuses_residues_out_of_range_and_bad_counts():
    m = mechanism()
    with pytest.raises(InputError, match="residue outside"):
        m.decode(np.full(8, 2**12, np.uint32))
    with pytest.raises(InputError, match="shape"):
        m.decode(np.zeros(5, np.uint32))
    with pytest.raises(InputError, match="positive"):
        m.decode(np.zeros(8, np.uint32), count=0.0)


def test_participants_with_different_rotation_seeds_are_found():
    from smm_dp.mechanism import check_same_mechanism

    check_same_mechanism({"a": mechanism(), "b": mechanism()})
    with pytest.raises(InputError, match="rotation_seed: c has another value than a, 0"):
        check_same_mechanism({"a": mechanism(), "b": mechanism(), "c": mechanism(rotation_seed=1)})
