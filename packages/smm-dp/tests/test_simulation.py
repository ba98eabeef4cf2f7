import math

import numpy as np
import pytest

from smm_dp import SkellamMixture, seeded_source
from smm_dp.baselines import RoundedMechanism
from smm_dp.experiments import (
    Setting,
    SumPoint,
    best_scale,
    build,
    deciding_bits,
    fitting_scale,
    measure_sums,
    noise_sd,
)
from smm_dp.packing import add_residues
from smm_dp.simulation import (
    coherent_vectors,
    gaussian_sum,
    noisy_total,
    simulate_sum,
    sphere_vectors,
    sum_errors,
)


def mechanism(accounting="paper", **changes):
    settings = {
        "dim": 600,
        "clip": 900.0,
        "scale": 30.0,
        "modulus_bits": 20,
        "mu_total": 40.0,
        "participants": 8,
        "coordinate_bound": 9,
        "accounting": accounting,
        "rotation_seed": 5,
    }
    return SkellamMixture(**(settings | changes))


@pytest.mark.parametrize("accounting", ["paper", "numeric"])
def test_the_simulation_has_the_law_of_the_protocol(accounting, rng):
    """Mean and variance of the error against encoding each participant and adding residues."""
    x = rng.standard_normal((8, 600)) * 0.1
    m = mechanism(accounting)
    truth = sum(m.clipped(row) for row in x)
    errors = {"protocol": [], "simulation": []}
    for seed in range(12):
        source = seeded_source(seed)
        residues = add_residues((m.encode(row, source, secure=False) for row in x), m.padded_dim, 20)
        centred = residues.astype(np.int64)
        centred[centred > 2**19] -= 2**20
        errors["protocol"].append(centred - truth)
        errors["simulation"].append(noisy_total(m, x, seeded_source(1000 + seed))[0] - truth)
    for kind in errors.values():
        flat = np.concatenate(kind)
        rounding = sum(float(np.mean((lambda p: p * (1 - p))(np.abs(m.clipped(row)) % 1))) for row in x)
        assert abs(flat.mean()) < 6 * math.sqrt(80 / flat.size)
        assert flat.var() == pytest.approx(80 + rounding, rel=8 * math.sqrt(2 / flat.size))


def test_simulated_estimate_equals_decoding(rng):
    x = rng.standard_normal((8, 600)) * 0.1
    m = mechanism(mu_total=0, modulus_bits=20)
    total, clip_rate = noisy_total(m, x, seeded_source(1))
    result = simulate_sum(m, x, seeded_source(1))
    np.testing.assert_allclose(result.estimate, m.decode((total % 2**20).astype(np.uint32)))
    assert clip_rate == result.clip_rate == 1.0
    assert result.wrap_rate == 0
    assert "simulation only" in result.sampler


def test_a_forced_wrap_is_counted_and_congruent(rng):
    m = mechanism(mu_total=500.0, modulus_bits=4)
    assert simulate_sum(m, rng.standard_normal((4, 600)), seeded_source(2)).wrap_rate > 0.3


def test_an_empty_poisson_sample_is_pure_noise():
    result = simulate_sum(mechanism(), np.zeros((0, 600)), seeded_source(3))
    assert result.clip_rate == 0
    assert result.estimate.std() * 30 == pytest.approx(math.sqrt(80), rel=0.15)
    assert gaussian_sum(
        np.zeros((0, 600)), 1.0, 2.0, np.random.default_rng(0)
    ).estimate.std() == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("kind", ["skellam", "ddgauss", "cpsgd"])
def test_simulated_baselines_have_their_variance(kind, rng):
    m = RoundedMechanism(kind, 600, 1.0, 30.0, 20, 300.0, 5, rotation_seed=1)
    x = rng.standard_normal((5, 600)) / 100
    error = (
        np.concatenate([simulate_sum(m, x, seeded_source(s)).estimate - x.sum(axis=0) for s in range(6)]) * 30
    )
    assert error.var() == pytest.approx(300 + 5 * 0.16, rel=0.15)


def test_error_measures_expose_shrinkage_and_zero():
    """Toy trap 14: half the truth has a smaller MSE than noise, but slope ½; zero has NMSE 1."""
    truth = coherent_vectors(50, 256, 1).sum(axis=0)
    half = sum_errors(truth / 2, truth)
    assert (half["slope"], round(half["cosine"], 9), half["nmse"]) == (0.5, 1.0, 0.25)
    zero = sum_errors(np.zeros(256), truth)
    assert (zero["nmse"], zero["cosine"], zero["slope"]) == (1.0, 0.0, 0.0)


def test_data_of_the_proof():
    vectors = coherent_vectors(200, 1024, 3)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1)
    assert np.linalg.norm(vectors.sum(axis=0)) > 100  # far from cancelling
    sphere = sphere_vectors(100, 1024, 3)
    np.testing.assert_allclose(np.linalg.norm(sphere, axis=1), 1)
    assert np.mean(sphere.sum(axis=0) ** 2) == pytest.approx(100 / 1024, rel=0.3)


def test_the_deciding_bits_are_where_the_best_baselines_noise_does_not_fit():
    setting = Setting(8.0, 1e-5, 4096, 200)
    scales = (1.0, 4.0, 16.0)
    bits = deciding_bits(setting, scales)
    smallest = min(noise_sd(build("skellam", scale, 16, setting)) for scale in scales)
    assert 3 * smallest > 2 ** (bits - 1)
    assert 3 * smallest <= 2**bits
    assert bits == 6


def test_every_method_gets_its_own_best_scale():
    setting = Setting(8.0, 1e-5, 256, 20)
    points = measure_sums(
        setting,
        lambda seed: coherent_vectors(20, 256, seed),
        methods=("smm-dp", "skellam"),
        scales=(4.0, 64.0),
        bits=(6, 16),
        seeds=(0, 1),
    )
    assert len(points) == 2 * 2 * 2 * 2
    for method in ("smm-dp", "skellam"):
        best = best_scale(points, method, 16)
        assert len(best) == 2
        mean = np.mean([p.errors["nmse"] for p in best])
        others = [
            p.errors["nmse"]
            for p in points
            if (p.method, p.bits) == (method, 16) and p.scale != best[0].scale
        ]
        assert mean <= np.mean(others)


def test_sums_that_wrap_do_not_win_by_their_small_error():
    def point(scale, mse, wrap_rate):
        return SumPoint("skellam", 8, scale, 0, {"mse": mse}, wrap_rate)

    points = [point(16.0, 5.0, 0.001), point(64.0, 2.0, 0.004), point(256.0, 0.1, 0.9)]
    assert fitting_scale(points, "skellam", 8)[0].scale == 64.0
    assert fitting_scale([*points[2:], point(4.0, 9.0, 0.5)], "skellam", 8)[0].scale == 4.0
