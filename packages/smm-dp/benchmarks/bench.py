"""Throughput at d = 2^20 against what a user would write or pick instead; writes bench.json.

    python packages/smm-dp/benchmarks/bench.py --out runs/bench/smm-dp

Each pair is timed in turns in one process, the best of several; ratios above 1 mean that this package is
faster.
"""

import argparse
import os
import sys
import time
from fractions import Fraction
from importlib import metadata
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from shared_core.bench import finish, in_turns, row
from smm_dp import SkellamMixture, calibrate, pack_bits, sample_skellam, secure_source
from smm_dp.mechanism import clip_mixture
from smm_dp.numeric import certified_rates
from smm_dp.rdp import paper_rdp, poisson_sampled, to_epsilon
from smm_dp.rotation import rotation_signs
from smm_dp.samplers import sample_skellam_exact

DIM = 1 << 20


def plain_hadamard(x):
    """The butterfly as one writes it in NumPy."""
    y, half = x.copy(), 1
    while half < y.size:
        pairs = y.reshape(-1, 2, half)
        low, high = pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]
        y = np.stack([low, high], axis=1).reshape(-1)
        half *= 2
    return y


def plain_encode(x, signs, generator, scale, clip, bound, mu, bits):
    """The mechanism written straightforwardly: whole arrays, floating Poisson noise from PCG64."""
    y = plain_hadamard(x * signs) / np.sqrt(x.size) * scale
    y = np.clip(clip_mixture(y, clip), -bound, bound)
    low = np.floor(y)
    y = low + (generator.random(y.size) < y - low)
    y = y.astype(np.int64) + generator.poisson(mu, y.size) - generator.poisson(mu, y.size)
    return np.mod(y, 1 << bits)


def plain_decode(total, signs, scale, bits):
    m = 1 << bits
    y = np.where(total > m // 2, total.astype(np.int64) - m, total) / scale
    return signs * plain_hadamard(y) / np.sqrt(y.size)


def best_of(*functions, repeats=7):
    return in_turns(functions, repeats, clock=time.perf_counter).min(0).tolist()


def rows(quick):
    repeats = 3 if quick else 7
    x = np.random.default_rng(0).standard_normal(DIM)
    x /= np.linalg.norm(x)
    mu, n = 1428.0, 240
    mechanism = SkellamMixture(DIM, 4096.0, 64.0, 8, mu, n, 4)
    signs = rotation_signs(0, DIM).astype(np.float64)
    generator, source = np.random.default_rng(0), secure_source()
    numpy_version = metadata.version("numpy")

    def rate(what, ours, theirs, peer, version):
        count = DIM / 1e6
        return row(what, count / ours, count / theirs, peer, version, "Mcoord/s", more_is_better=True)

    ours, theirs = best_of(
        lambda: mechanism.encode(x, source),
        lambda: plain_encode(x, signs, generator, 64.0, 4096.0, 4, mu / n, 8),
        repeats=repeats,
    )
    yield rate(
        "encode, exact noise from AES against floating noise from PCG64",
        ours,
        theirs,
        "NumPy as one writes it",
        numpy_version,
    )
    payload = mechanism.encode(x, source)
    ours, theirs = best_of(
        lambda: mechanism.decode(payload), lambda: plain_decode(payload, signs, 64.0, 8), repeats=repeats
    )
    yield rate("decode", ours, theirs, "NumPy as one writes it", numpy_version)
    each = Fraction(mu) / n
    ours, theirs = best_of(
        lambda: sample_skellam(each, DIM, source),
        lambda: generator.poisson(float(each), DIM) - generator.poisson(float(each), DIM),
        repeats=repeats,
    )
    yield rate(
        "Skellam noise, exact and cryptographic", ours, theirs, "difference of NumPy Poissons", numpy_version
    )
    start = time.perf_counter()
    sample_skellam_exact(each, 2000, source)
    official = (time.perf_counter() - start) / 2000 * DIM
    yield rate(
        "Skellam noise, exact and cryptographic", ours, official, "official construction", "in this package"
    )
    yield from opacus_rows(rate, mechanism, x, source, repeats)
    yield row(
        "bytes of a payload at 8 bits", float(pack_bits(payload, 8).size), 8.0 * DIM,
        "int64 arrays, as Flower's SecAgg+ sends", "1.41", "bytes",
    )  # fmt: skip
    yield from accounting_rows(repeats)


def opacus_rows(rate, mechanism, x, source, repeats):
    try:
        import torch
        from opacus.optimizers.optimizer import _generate_noise
    except ImportError:
        return
    torch.set_num_threads(1)
    gradient = torch.from_numpy(x.astype(np.float32))

    def gaussian():
        norm = gradient.norm(2)
        return gradient * (1.0 / (norm + 1e-6)).clamp(max=1.0) + _generate_noise(1.0, gradient)

    ours, theirs = best_of(lambda: mechanism.encode(x, source), gaussian, repeats=repeats)
    version = metadata.version("opacus")
    yield rate(
        "encode against clipping and Gaussian noise in the clear",
        ours,
        theirs,
        "Opacus (float32, not cryptographic)",
        version,
    )


def accounting_rows(repeats):
    orders = range(2, 1002)
    curve = np.array([paper_rdp(order, 4096, 1428.0) for order in orders])

    def ours():
        return to_epsilon(orders, 1000 * poisson_sampled(curve, 0.004), 1e-5)

    seconds = {"ours": best_of(ours, repeats=repeats)[0], "theirs": float("nan")}
    try:
        import dp_accounting

        def theirs():
            accountant = dp_accounting.rdp.RdpAccountant(list(orders))
            event = dp_accounting.PoissonSampledDpEvent(0.004, dp_accounting.GaussianDpEvent(0.8))
            accountant.compose(event, 1000)
            return accountant.get_epsilon(1e-5)

        seconds["theirs"] = best_of(theirs, repeats=1)[0]
        yield _seconds(
            "epsilon of 1000 sampled rounds, 1000 orders",
            seconds["ours"],
            seconds["theirs"],
            "dp-accounting (Gaussian)",
            metadata.version("dp-accounting"),
        )
    except ImportError:
        print("dp-accounting is not installed: its row is left out", file=sys.stderr)

    def table():
        certified_rates.cache_clear()
        certified_rates(1428.0, 4.0, 99)

    yield _seconds(
        "certified K table, 98 orders (target 1 s)", best_of(table, repeats=repeats)[0], 1.0, "target", ""
    )

    def calibration():
        certified_rates.cache_clear()
        calibrate(3.0, 1e-5, 256.0, 16.0, 0.004, 1000, "numeric", dim=63610, participants=240)

    yield _seconds(
        "numeric calibration (target 1 s)", best_of(calibration, repeats=repeats)[0], 1.0, "target", ""
    )


def _seconds(what, ours, theirs, peer, version):
    return row(what, ours, theirs, peer, version, "s")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    finish("smm-dp", list(rows(arguments.quick)), arguments.out, threads=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
