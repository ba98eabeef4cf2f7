"""Training with per-sample gradients: the wrapper gives what the reference runner gives."""

import numpy as np
import pytest
import torch

from shared_core import InputError
from smm_dp import RoundPrivacy, SkellamMixture, training
from smm_dp.ledger import BudgetExceeded, PrivacyLedger
from smm_dp.optimizer import SMMOptimizer
from smm_dp.training import (
    FederatedTraining,
    multilayer_perceptron,
    opacus_per_sample_gradients,
    per_sample_gradients,
    seeded_release,
)

opacus = pytest.importorskip("opacus")
pytestmark = pytest.mark.filterwarnings("ignore")  # opacus warns about the hooks of the torch that it runs on

SIZES = (6, 4, 3)
DIM = 6 * 4 + 4 + 4 * 3 + 3
RATE = 0.5


def records():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 6, generator=generator), torch.randint(0, 3, (40,), generator=generator)


def mechanism(**changes):
    settings = {
        "dim": DIM, "clip": 256.0, "scale": 16.0, "modulus_bits": 16, "mu_total": 900.0, "participants": 20,
        "coordinate_bound": 8, "accounting": "numeric",
    }  # fmt: skip
    return SkellamMixture(**(settings | changes))


def ledger(m, epsilon=50.0):
    return PrivacyLedger(
        None, epsilon, 1e-5, RoundPrivacy(m.clip, m.mu_total, m.coordinate_bound, m.accounting, RATE)
    )


def wrapped(m, seed=None, learning_rate=0.01, epsilon=50.0):
    model = opacus.GradSampleModule(multilayer_perceptron(SIZES, 1))
    inner = torch.optim.Adam(model.parameters(), lr=learning_rate)
    return model, SMMOptimizer(inner, m, ledger(m, epsilon), expected_batch_size=20.0, seed=seed)


def backward(model, x, y):
    torch.nn.functional.cross_entropy(model(x), y).backward()


def flat(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy()


def test_the_same_seed_gives_the_runners_training():
    """Same samples, same rotation, same noise: four rounds of Adam end at the same parameters."""
    x, y = records()
    m = mechanism()
    reference = FederatedTraining(multilayer_perceptron(SIZES, 1), x, y, RATE, 0.01, 7)
    model, optimizer = wrapped(m, seed=7)
    for number in range(4):
        chosen = reference.participants(number)
        optimizer.zero_grad()
        backward(model, x[chosen], y[chosen])
        optimizer.step()
    for _ in reference.rounds(seeded_release(m, 7, "optimizer"), 4, ledger(m)):
        pass
    np.testing.assert_allclose(flat(model), flat(reference.model), atol=1e-5)
    assert np.abs(flat(model) - flat(multilayer_perceptron(SIZES, 1))).max() > 1e-2
    assert optimizer.ledger.rounds == 4


def test_secure_noise_has_the_total_variance_whatever_the_batch_and_divides_by_the_expected_size():
    """Toy trap 12: 3, 20 or no records share the same total noise, and the divisor is the constant qN."""
    x, y = records()
    m = mechanism(mu_total=4000.0, modulus_bits=20)
    for size in (0, 3, 20):
        errors = []
        for _ in range(12):
            model, optimizer = wrapped(m, learning_rate=0.0)
            backward(model, x[:size], y[:size])
            rows = per_sample_gradients(multilayer_perceptron(SIZES, 1), x[:size], y[:size])
            clipped = rows / np.maximum(1, np.linalg.norm(rows, axis=1, keepdims=True))
            optimizer.step()
            released = np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])
            errors.append((released * 20 - clipped.sum(axis=0)) * 16)
        flat_errors = np.concatenate(errors)
        assert flat_errors.var() == pytest.approx(8000, rel=0.3)
        assert abs(flat_errors.mean()) < 6 * np.sqrt(8000 / flat_errors.size)


def test_two_secure_steps_differ_and_two_seeded_ones_do_not():
    x, y = records()

    def released(seed):
        model, optimizer = wrapped(mechanism(), seed)
        backward(model, x, y)
        optimizer.step()
        return flat(model)

    assert not np.array_equal(released(None), released(None))
    np.testing.assert_array_equal(released(3), released(3))


def test_the_budget_stops_before_the_step():
    x, y = records()
    m = mechanism()
    model, optimizer = wrapped(m, epsilon=4.0)
    seen = [flat(model)]

    def train():
        for _ in range(1000):
            optimizer.zero_grad()
            backward(model, x, y)
            optimizer.step()
            seen.append(flat(model))

    with pytest.raises(BudgetExceeded, match="stopped before release"):
        train()
    np.testing.assert_array_equal(flat(model), seen[-1])
    assert optimizer.ledger.rounds == len(seen) - 1
    assert 1 <= optimizer.ledger.rounds < 1000
    assert optimizer.ledger.spent().epsilon <= 4.0


def watch_releases(monkeypatch, look):
    """Call `look` with the mechanism whenever a record is encoded or a sum is simulated."""
    encode, simulate = SkellamMixture.encode, training.simulate_sum

    def watched_encode(self, *arguments, **options):
        look(self)
        return encode(self, *arguments, **options)

    def watched_simulation(m, *arguments):
        look(m)
        return simulate(m, *arguments)

    monkeypatch.setattr(SkellamMixture, "encode", watched_encode)
    monkeypatch.setattr(training, "simulate_sum", watched_simulation)


@pytest.mark.parametrize("seed", [None, 3])
def test_the_ledger_is_charged_before_anything_is_encoded(seed, monkeypatch):
    x, y = records()
    model, optimizer = wrapped(mechanism(), seed)
    charged = []
    watch_releases(monkeypatch, lambda _: charged.append(optimizer.ledger.rounds))
    backward(model, x[:3], y[:3])
    optimizer.step()
    assert charged == ([1] * 3 if seed is None else [1])
    _, poor = wrapped(mechanism(), seed, epsilon=0.01)
    optimizer.ledger = poor.ledger
    backward(model, x[:3], y[:3])
    with pytest.raises(BudgetExceeded):
        optimizer.step()
    assert len(charged) == (3 if seed is None else 1)


@pytest.mark.parametrize("seed", [None, 3])
def test_records_of_a_step_share_one_rotation_and_every_step_has_its_own(seed, monkeypatch):
    x, y = records()
    model, optimizer = wrapped(mechanism(), seed)
    steps = []
    watch_releases(monkeypatch, lambda m: steps[-1].append(m.rotation_seed))
    for _ in range(3):
        steps.append([])
        optimizer.zero_grad()
        backward(model, x[:3], y[:3])
        optimizer.step()
    assert all(len(set(seeds)) == 1 for seeds in steps)
    assert len({seeds[0] for seeds in steps}) == 3


def test_per_sample_gradients_that_cannot_be_used_are_refused_before_anything_is_charged():
    x, y = records()
    model, optimizer = wrapped(mechanism())
    first = next(iter(model.parameters()))

    def refused(text):
        with pytest.raises(InputError, match=text):
            optimizer.step()
        assert optimizer.ledger.rounds == 0

    refused("parameter 0 of shape .* has no per-sample gradient")
    backward(model, x, y)
    backward(model, x, y)
    refused("several backward passes")
    optimizer.zero_grad()
    backward(model, x, y)
    kept = first.grad_sample
    first.grad_sample = kept[:5]
    refused(r"different numbers of records \(got \[5, 40\]\)")
    first.grad_sample = kept[:, :1]
    refused("per-sample gradients of shape")
    first.grad_sample = kept.clone()
    first.grad_sample[3, 0, 1] = torch.nan
    refused("record 3 of the batch has a gradient that is not finite at index 1")
    first.grad_sample = kept
    optimizer.step()
    assert optimizer.ledger.rounds == 1
    with pytest.raises(InputError, match="no per-sample gradient"):  # used up by the step
        optimizer.step()


def test_a_plain_model_has_no_per_sample_gradients():
    x, y = records()
    m = mechanism()
    model = multilayer_perceptron(SIZES, 1)
    optimizer = SMMOptimizer(torch.optim.SGD(model.parameters(), 0.1), m, ledger(m), expected_batch_size=20)
    backward(model, x, y)
    with pytest.raises(InputError, match="GradSampleModule"):
        optimizer.step()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"mu_total": 800.0}, "mu"),
        ({"clip": 300.0}, "clip"),
        ({"coordinate_bound": 9}, "coordinate_bound"),
        ({"accounting": "paper"}, "accounting"),
    ],
)
def test_a_ledger_for_another_mechanism_is_refused(change, field):
    inner = torch.optim.SGD(multilayer_perceptron(SIZES, 1).parameters(), 0.1)
    with pytest.raises(InputError, match=f"{field}: the ledger was opened for"):
        SMMOptimizer(inner, mechanism(**change), ledger(mechanism()), expected_batch_size=20)


def test_other_lengths_and_batch_sizes_are_refused():
    inner = torch.optim.SGD(multilayer_perceptron(SIZES, 1).parameters(), 0.1)
    m = mechanism(dim=10)
    with pytest.raises(InputError, match=f"of length 10, the parameters have {DIM} entries"):
        SMMOptimizer(inner, m, ledger(m), expected_batch_size=20)
    with pytest.raises(InputError, match="expected_batch_size"):
        SMMOptimizer(inner, mechanism(), ledger(mechanism()), expected_batch_size=0)


def test_schedulers_and_checkpoints_work_on_the_wrapped_optimizer():
    x, y = records()
    model, optimizer = wrapped(mechanism(), 1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    backward(model, x, y)
    optimizer.step()
    scheduler.step()
    assert optimizer.original_optimizer.param_groups[0]["lr"] == 0.005
    _, other = wrapped(mechanism(), 1)
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["state"][0]["step"] == 1


def test_flattening_follows_the_model_as_opacus_reads_it():
    x, y = records()
    model, optimizer = wrapped(mechanism(), 1)
    expected = opacus_per_sample_gradients(model, x, y)
    optimizer.zero_grad()
    backward(model, x, y)
    np.testing.assert_array_equal(optimizer._vectors(), expected)
