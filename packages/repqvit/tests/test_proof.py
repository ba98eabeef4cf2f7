"""What the proof's verdict depends on; `make prove` runs the proof itself."""

from __future__ import annotations

import pytest
import torch

import repqvit.proof
from repqvit import proof_swin
from shared_core.proof import ProofRun


def verdict(tmp_path, ours, baseline, error=1e-6, fp32=0.95):
    run = ProofRun(
        package="repqvit", version="0", source="s", data="d", seeds=[0, 1, 2], out=tmp_path, names=["numpy"]
    )
    repqvit.proof._declare(run, {"components": {}})
    for method, values in (("repqvit", ours), ("percentile-mse", baseline)):
        for value in values:
            run.add(method, "components accuracy", value)
    repqvit.proof._judge(run, fp32, 100, error)
    (claim,) = run.claims
    return claim.holds


def test_the_verdict_follows_its_rule(tmp_path):
    good, bad = [0.9, 0.91, 0.92], [0.6, 0.5, 0.7]
    assert verdict(tmp_path, good, bad)
    assert not verdict(tmp_path, [0.9, 0.91, 0.69], bad)  # one seed loses
    assert not verdict(tmp_path, [0.8, 0.8, 0.8], bad)  # below 0.9 of fp32
    assert not verdict(tmp_path, bad, good)
    assert not verdict(tmp_path, good, bad, error=1e-3)  # the algebra fails


def test_no_image_serves_two_purposes():
    data = repqvit.proof.load_data(quick=True)
    sources = data.sources
    assert not set(sources["calibration photographs"]) & set(sources["test photographs"])
    rows = list(sources["digits (row numbers of scikit-learn's set)"].values())
    assert sum(map(len, rows)) == len(set().union(*rows))
    first, again, other = (repqvit.proof.calibration_batch(data, seed) for seed in (0, 0, 1))
    assert first.shape == (32, 3, repqvit.proof.SIZE, repqvit.proof.SIZE)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@torch.no_grad()
def test_the_stress_test_preserves_the_function():
    torch.manual_seed(0)
    model, x = proof_swin.build().eval(), torch.randn(4, 1, 28, 28)
    stressed = proof_swin.stressed(model, x)
    torch.testing.assert_close(stressed(x), model(x), rtol=1e-3, atol=1e-4)
    norms = [m.layers[0].blocks[0].norm1.weight for m in (model, stressed)]
    assert (norms[1] / norms[0]).log().std() == pytest.approx(proof_swin.STRESS, rel=0.4)
