import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared_core import InputError
from smm_dp import RoundPrivacy
from smm_dp.ledger import BudgetExceeded, PrivacyLedger
from smm_dp.runner import aggregate_file, read_vectors, secure_round
from smm_dp.simulation import SimulatedSum
from smm_dp.training import (
    Adam,
    FederatedTraining,
    multilayer_perceptron,
    opacus_per_sample_gradients,
    per_sample_gradients,
)
from smm_dp.training_job import TrainingJob, train


def small():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 6, generator=generator), torch.randint(0, 3, (40,), generator=generator)


def plain(number, rows):
    return SimulatedSum(rows.sum(axis=0).astype(np.float64), 0.0, 0.0, "none")


def test_per_sample_gradients_equal_a_loop():
    model = multilayer_perceptron((6, 5, 3), 1)
    x, y = small()
    rows = per_sample_gradients(model, x, y)
    for index in (0, 7, 39):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x[index : index + 1]), y[index : index + 1]).backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()]).numpy()
        np.testing.assert_allclose(rows[index], expected, atol=1e-6)
    assert per_sample_gradients(model, x[:0], y[:0]).shape == (0, rows.shape[1])


@pytest.mark.filterwarnings("ignore")  # opacus warns about the hooks of the torch release it runs on
def test_opacus_gives_the_same_gradients():
    opacus = pytest.importorskip("opacus")
    model = multilayer_perceptron((6, 5, 3), 1)
    x, y = small()
    expected = per_sample_gradients(model, x, y)
    np.testing.assert_allclose(
        opacus_per_sample_gradients(opacus.GradSampleModule(model), x, y), expected, atol=1e-6
    )


def test_adam_equals_torch(rng):
    ours = Adam(4, 0.01)
    value = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.Adam([value], lr=0.01)
    total = np.zeros(4)
    for _ in range(20):
        gradient = rng.standard_normal(4)
        total += ours.update(gradient)
        value.grad = torch.from_numpy(gradient)
        theirs.step()
    np.testing.assert_allclose(total, value.detach().numpy(), rtol=1e-9)


def test_sampling_is_poisson_and_the_divisor_the_expected_number():
    """Toy trap 12: batch sizes vary like a binomial, and the mean divides by qN."""
    x, y = torch.zeros(500, 2), torch.zeros(500, dtype=torch.long)
    training = FederatedTraining(multilayer_perceptron((2, 2), 0), x, y, 0.1, 0.01, 3)
    sizes = np.array([len(training.participants(number)) for number in range(400)])
    assert abs(sizes.mean() - 50) < 6 * np.sqrt(45 / 400)
    assert 0.7 < sizes.var() / 45 < 1.35
    seen = []
    training.optimizer.update = lambda gradient: seen.append(gradient) or np.zeros_like(gradient)
    for _ in training.rounds(lambda number, rows: SimulatedSum(np.full(6, 50.0), 0.0, 0.0, ""), 1):
        pass
    np.testing.assert_allclose(seen[0], 1.0)


def test_the_budget_stops_training_and_says_so():
    x, y = small()
    kind = RoundPrivacy(100.0, 500.0, 1, sampling_rate=0.5)
    ledger = PrivacyLedger(None, 2.0, 1e-5, kind)
    result = FederatedTraining(multilayer_perceptron((6, 3), 0), x, y, 0.5, 0.01, 0).run(
        plain, 1000, (x, y), ledger
    )
    assert "stopped before release" in result.stopped
    assert 1 <= result.rounds == ledger.rounds < 1000
    assert ledger.spent().epsilon <= 2.0


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    x, y = small()

    def fresh():
        return FederatedTraining(multilayer_perceptron((6, 4, 3), 0), x, y, 0.3, 0.01, 5)

    whole = fresh().run(plain, 9, (x, y))
    first = fresh()
    first.run(plain, 4, (x, y))
    first.save(tmp_path / "c.safetensors")
    second = fresh()
    second.resume(tmp_path / "c.safetensors")
    assert second.round == 4
    assert second.run(plain, 9, (x, y)).accuracy == whole.accuracy
    with pytest.raises(InputError, match="another model or seed"):
        FederatedTraining(multilayer_perceptron((6, 4, 3), 0), x, y, 0.3, 0.01, 6).resume(
            tmp_path / "c.safetensors"
        )


def job(out, **changes):
    settings = {
        "out": out,
        "data": None,
        "method": "smm-dp-numeric",
        "epsilon": 3.0,
        "delta": 1e-4,
        "scale": 16.0,
        "bits": 8,
        "sampling_rate": 0.06,
        "rounds": 6,
        "hidden": 8,
        "learning_rate": 0.01,
        "seed": 1,
    }
    return TrainingJob(**(settings | changes))


def test_a_killed_run_resumes_to_the_same_model_and_never_forgets_a_release(tmp_path):
    """A process is killed between charging and finishing; the rest equals an uninterrupted run."""
    x, y = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 3
    data = tmp_path / "d.npz"
    np.savez(data, x_train=x.numpy(), y_train=y.numpy(), x_test=x.numpy(), y_test=y.numpy())
    whole = list(train(job(tmp_path / "whole", data=data), resume=False))[-1]
    code = f"""
import os, sys
from pathlib import Path
from smm_dp import training_job as runner
release = runner.training_release
def killing(*args, **kwargs):
    inner = release(*args, **kwargs)
    return lambda number, rows: os._exit(9) if number == 4 else inner(number, rows)
runner.training_release = killing
out = Path({str(tmp_path / "killed")!r})
job = runner.TrainingJob(out, Path({str(data)!r}), "smm-dp-numeric", 3.0, 1e-4, 16.0, 8, 0.06, 6, 8, 0.01, 1)
list(runner.train(job, resume=False))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    history = json.loads((tmp_path / "killed" / "ledger.json").read_text())["history"]
    assert history[0]["rounds"] == 5  # the fifth was charged, and its result never seen
    lines = list(train(job(tmp_path / "killed", data=data), resume=True))
    assert lines[0] == "resumed after round 4"
    kept = json.loads((tmp_path / "killed" / "ledger.json").read_text())["history"]
    assert kept[0]["rounds"] == 6  # the fifth was paid for, and its noise depends on seed and round only
    assert lines[-1] == whole.replace("whole", "killed")
    files = [(tmp_path / name / "checkpoint.safetensors").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_a_resumed_run_has_the_settings_and_the_ledger_that_it_began_with(tmp_path):
    """Rounds without noise, or rounds that another ledger counts, never end under a stated epsilon."""
    list(train(job(tmp_path / "a", rounds=2, method="none"), resume=False))
    with pytest.raises(InputError, match="method: the run was begun with none"):
        list(train(job(tmp_path / "a", rounds=2), resume=True))
    list(train(job(tmp_path / "b", rounds=2), resume=False))
    (tmp_path / "b" / "ledger.json").unlink()
    with pytest.raises(InputError, match="counts 0 releases, the checkpoint beside it has 2 rounds"):
        list(train(job(tmp_path / "b", rounds=2), resume=True))
    (tmp_path / "b" / "checkpoint.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="is not a checkpoint"):
        list(train(job(tmp_path / "b", rounds=2), resume=True))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    list(train(job(tmp_path, rounds=1), resume=False))
    with pytest.raises(InputError, match="holds a run already"):
        list(train(job(tmp_path, rounds=1), resume=False))
    with pytest.raises(InputError, match=r"scale: the run was begun with 16\.0"):
        list(train(job(tmp_path, rounds=1, scale=8.0), resume=True))
    report = json.loads((tmp_path / "privacy.json").read_text())
    assert report["protects"] is False
    assert "simulation" in (tmp_path / "privacy.html").read_text()


def test_own_data_and_bad_settings(tmp_path):
    x, y = small()
    np.savez(tmp_path / "d.npz", x_train=x.numpy(), y_train=y.numpy(), x_test=x.numpy(), y_test=y.numpy())
    lines = list(
        train(job(tmp_path / "a", data=tmp_path / "d.npz", method="none", sampling_rate=0.5), resume=False)
    )
    assert lines[-1].startswith("accuracy")
    np.savez(tmp_path / "bad.npz", x_train=x.numpy())
    with pytest.raises(InputError, match="lacks y_train, x_test, y_test"):
        list(train(job(tmp_path / "b", data=tmp_path / "bad.npz"), resume=False))
    with pytest.raises(InputError, match="expected smm-dp"):
        list(train(job(tmp_path / "c", method="magic"), resume=False))
    with pytest.raises(InputError, match="bits are enough"):
        list(train(job(tmp_path / "d", bits=3, scale=64.0), resume=False))


def test_a_file_of_vectors_is_released_once_per_budget(tmp_path, rng):
    rows = rng.standard_normal((12, 30)) * 0.02 + 0.1
    path = tmp_path / "v.csv"
    np.savetxt(path, rows, delimiter=",")
    arguments = {"bits": None, "accounting": "numeric", "ledger": tmp_path / "ledger.json", "mean": True}
    written = aggregate_file(path, 30.0, 1e-5, 64.0, 1.0, tmp_path / "out", **arguments)
    assert [p.name for p in written] == ["result.npy", "privacy.json", "privacy.html"]
    report = json.loads(written[1].read_text())
    assert report["protects"] is True
    assert report["epsilon"] <= 30
    result = np.load(written[0])
    assert np.abs(result - rows.mean(axis=0)).max() < 6 * report["noise_sd_of_the_sum"] / 12 + 0.02
    with pytest.raises(BudgetExceeded, match="stopped before release 2"):
        aggregate_file(path, 30.0, 1e-5, 64.0, 1.0, tmp_path / "out", **arguments)


def test_a_release_that_was_killed_while_it_was_made_stays_paid_for(tmp_path):
    """SIGKILL after the charge, while participants encode: nothing was written, nothing more is released."""
    np.save(tmp_path / "v.npy", np.full((12, 30), 0.1))
    code = f"""
import os, signal
from pathlib import Path
from smm_dp import runner
count = []
def kill(self, *args, **kwargs):
    count.append(1)
    if len(count) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(self, *args, **kwargs)
inner, runner.SkellamMixture.encode = runner.SkellamMixture.encode, kill
folder = Path({str(tmp_path)!r})
runner.aggregate_file(folder / "v.npy", 4.0, 1e-3, 64.0, 1.0, folder / "out", bits=None, accounting="paper",
                      ledger=folder / "ledger.json", mean=False)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert not (tmp_path / "out" / "result.npy").exists()
    with pytest.raises(BudgetExceeded, match="stopped before release 2"):
        aggregate_file(
            tmp_path / "v.npy", 4.0, 1e-3, 64.0, 1.0, tmp_path / "out", bits=None, accounting="paper",
            ledger=tmp_path / "ledger.json", mean=False,
        )  # fmt: skip
    assert not (tmp_path / "out" / "result.npy").exists()


def test_secure_round_wants_the_noise_that_the_ledger_states():
    from smm_dp import SkellamMixture

    m = SkellamMixture(4, 100.0, 10.0, 12, 20.0, 5, 1)
    vectors = {f"p{i}": np.zeros(4) for i in range(5)}
    ledger = PrivacyLedger(None, 1000.0, 1e-5, RoundPrivacy(100.0, 20.0, 1))
    with pytest.raises(InputError, match="add noise of mu 16"):
        secure_round(m, vectors, ledger, least=4)
    assert ledger.rounds == 0
    from smm_dp.secure_aggregation import AggregationAborted

    with pytest.raises(AggregationAborted):
        secure_round(m, vectors, ledger, dropped=frozenset({"p1"}))
    assert ledger.rounds == 1  # given up, but the budget stays charged


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"clip": 99.0}, "clip"),
        ({"coordinate_bound": 2}, "coordinate_bound"),
        ({"accounting": "numeric"}, "acc"),
    ],
)
def test_secure_round_refuses_a_mechanism_of_another_ledger(change, field):
    from smm_dp import SkellamMixture

    settings = {"clip": 100.0, "coordinate_bound": 1, "accounting": "paper"} | change
    m = SkellamMixture(4, scale=10.0, modulus_bits=12, mu_total=20.0, participants=3, **settings)
    ledger = PrivacyLedger(None, 1000.0, 1e-5, RoundPrivacy(100.0, 20.0, 1))
    with pytest.raises(InputError, match=f"{field}.*the ledger was opened for"):
        secure_round(m, {f"p{i}": np.zeros(4) for i in range(3)}, ledger)
    assert ledger.rounds == 0


@pytest.mark.parametrize(
    ("participants", "vectors", "least", "stated"),
    [(4, 5, 5, 20.0), (5, 6, 6, 20.0), (5, 6, 5, 20.0), (4, 5, 4, 20.0), (5, 5, 4, 16.0)],
)
def test_an_amplified_round_has_one_constant_total_noise(participants, vectors, least, stated):
    """More noise than stated would do without sampling; with it the total would tell who was drawn."""
    from smm_dp import SkellamMixture

    m = SkellamMixture(4, 100.0, 10.0, 12, 20.0, participants, 1)
    rows = {f"p{i}": np.zeros(4) for i in range(vectors)}
    ledger = PrivacyLedger(None, 1000.0, 1e-5, RoundPrivacy(100.0, stated, 1, sampling_rate=0.5))
    absent = PrivacyLedger(None, 1000.0, 1e-5, RoundPrivacy(100.0, stated, 1, adjacency="add-remove"))
    for one in (ledger, absent):
        with pytest.raises(InputError, match="one constant total noise"):
            secure_round(m, rows, one, least=least)
        assert one.rounds == 0
    whole = PrivacyLedger(None, 1000.0, 1e-5, RoundPrivacy(100.0, stated, 1))
    secure_round(m, rows, whole, least=least)
    secure_round(SkellamMixture(4, 100.0, 10.0, 12, 20.0, vectors, 1), rows, ledger)
    assert whole.rounds == ledger.rounds == 1


def test_files_that_are_no_vectors_are_refused(tmp_path):
    for name, content, text in (
        ("a.csv", "1,2\n3", "no table"),
        ("b.csv", "1,nan\n3,4", "row 0, column 1 is not finite"),
        ("c.csv", "1,x\n", "no table"),
        ("e.csv", "", r"found shape \(0, 1\)"),
    ):
        Path(tmp_path, name).write_text(content)
        with pytest.raises(InputError, match=text):
            read_vectors(tmp_path / name)
    for name in ("missing.csv", "missing.npy", "."):
        with pytest.raises(InputError, match="is no file"):
            read_vectors(tmp_path / name)
    np.save(tmp_path / "d.npy", np.zeros(3))
    with pytest.raises(InputError, match="expected a table"):
        read_vectors(tmp_path / "d.npy")


def test_an_archive_or_a_folder_in_the_way_is_found_before_anything_is_charged(tmp_path):
    np.savez(tmp_path / "rows.npz", rows=np.ones((4, 3)))
    archive = (tmp_path / "rows.npz").rename(tmp_path / "rows.npy")
    with pytest.raises(InputError, match="expected one array"):
        read_vectors(archive)
    (tmp_path / "cut.npy").write_bytes(b"PK" + bytes(20))
    with pytest.raises(InputError, match="no table of numbers"):
        read_vectors(tmp_path / "cut.npy")
    np.save(tmp_path / "v.npy", np.ones((40, 3)))
    (tmp_path / "out" / "result.npy").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be written"):
        aggregate_file(
            tmp_path / "v.npy", 8.0, 1e-2, 16.0, 1.0, tmp_path / "out",
            bits=None, accounting="paper", ledger=tmp_path / "ledger.json", mean=False,
        )  # fmt: skip
    assert not (tmp_path / "ledger.json").exists()


@pytest.mark.parametrize(("field", "value"), [("seed", -1), ("hidden", 0)])
def test_impossible_runs_are_refused(tmp_path, field, value):
    with pytest.raises(InputError, match=f"--{field}: expected at least"):
        list(train(replace(job(tmp_path), **{field: value}), resume=False))
