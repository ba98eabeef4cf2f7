"""Federated training in one process: one record is one participant, its gradient is its vector.

The plain reference that the Flower app is compared with. Rounds sample participants by independent coin
flips (Poisson sampling), sum their clipped gradients through a mechanism and divide by the *expected* number.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float64

from shared_core import InputError
from shared_core.files import atomic_path
from smm_dp.baselines import RoundedMechanism
from smm_dp.ledger import BudgetExceeded, PrivacyLedger
from smm_dp.mechanism import SkellamMixture
from smm_dp.randomness import seeded_source
from smm_dp.simulation import SimulatedSum, simulate_sum

if TYPE_CHECKING:
    import torch

Release = Callable[[int, Float[np.ndarray, "n dim"]], SimulatedSum]
"""(round, vectors of those who take part) -> their estimated sum."""


def seeded_release(
    mechanism: SkellamMixture | RoundedMechanism, seed: int, purpose: str = "training"
) -> Release:
    """Return a simulated release: a fresh public rotation every round, and noise from a seed."""

    def release(number: int, rows: Float[np.ndarray, "n dim"]) -> SimulatedSum:
        turned = replace(mechanism, rotation_seed=(seed << 20) + number)
        return simulate_sum(turned, rows, seeded_source((seed << 20) + number, purpose))

    return release


def per_sample_gradients(
    model: "torch.nn.Module", inputs: "torch.Tensor", targets: "torch.Tensor"
) -> Float[np.ndarray, "n dim"]:
    """Return the cross-entropy gradient of each record, flattened in the order of `model.parameters()`.

    Args:
        model: Any module that `torch.func.vmap` can map; for others see `opacus_per_sample_gradients`.
        inputs: Records, first axis n (n may be 0).
        targets: Class numbers, shape (n,).
    """
    import torch
    from torch.func import functional_call, grad, vmap

    parameters = {name: value.detach() for name, value in model.named_parameters()}
    if len(inputs) == 0:
        return np.zeros((0, sum(value.numel() for value in parameters.values())))

    def loss(values: dict, record: "torch.Tensor", target: "torch.Tensor") -> "torch.Tensor":
        logits = functional_call(model, values, (record[None],))
        return torch.nn.functional.cross_entropy(logits, target[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, targets)
    return torch.cat([gradients[name].flatten(1) for name in parameters], dim=1).numpy()


def opacus_per_sample_gradients(
    model: "torch.nn.Module", inputs: "torch.Tensor", targets: "torch.Tensor"
) -> Float[np.ndarray, "n dim"]:
    """Return the same by Opacus' hooks, which know layers that vmap does not.

    Args:
        model: An `opacus.GradSampleModule` with its default, loss_reduction="mean".
        inputs: Records, first axis n ≥ 1.
        targets: Class numbers.
    """
    import torch

    model.zero_grad(set_to_none=True)
    torch.nn.functional.cross_entropy(model(inputs), targets).backward()  # opacus scales means back
    samples = [getattr(value, "grad_sample").flatten(1) for value in model.parameters()]  # noqa: B009 set by opacus
    return torch.cat(samples, dim=1).numpy()


@dataclass
class Adam:
    """Adam on one flat vector (Kingma and Ba 2015), with a state that is easy to save."""

    dim: int
    rate: float
    step: int = 0
    mean: Float64[np.ndarray, " dim"] = field(init=False)
    square: Float64[np.ndarray, " dim"] = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.square = np.zeros(self.dim), np.zeros(self.dim)

    def update(self, gradient: Float64[np.ndarray, " dim"]) -> Float64[np.ndarray, " dim"]:
        """Return what to add to the parameters."""
        self.step += 1
        self.mean += 0.1 * (gradient - self.mean)
        self.square += 0.001 * (gradient**2 - self.square)
        mean = self.mean / (1 - 0.9**self.step)
        return -self.rate * mean / (np.sqrt(self.square / (1 - 0.999**self.step)) + 1e-8)


@dataclass(frozen=True)
class TrainingResult:
    """What a run gave. Rates are averages over rounds, not private."""

    accuracy: float
    rounds: int
    clip_rate: float
    wrap_rate: float
    stopped: str | None
    """Why training ended early, e.g. the budget; None where it did not."""


@dataclass
class FederatedTraining:
    """Training of a model on records that are each one participant's.

    Args:
        model: The model; it is trained in place.
        inputs: Training records, first axis N.
        targets: Class numbers, shape (N,).
        sampling_rate: q.
        learning_rate: Of Adam on the averaged gradient.
        seed: Of the sampling; a round's sample depends on seed and round only, so that a resumed run
            equals an
            uninterrupted one.
    """

    model: "torch.nn.Module"
    inputs: "torch.Tensor"
    targets: "torch.Tensor"
    sampling_rate: float
    learning_rate: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise InputError(
                "a sampling rate lies in (0, 1]", field="sampling_rate", value=self.sampling_rate
            )
        self.optimizer = Adam(sum(value.numel() for value in self.model.parameters()), self.learning_rate)
        self.round = 0

    def participants(self, number: int) -> np.ndarray:
        """Return who takes part in a round: every record flips its own coin."""
        generator = np.random.default_rng([self.seed, number])
        return np.flatnonzero(generator.random(len(self.inputs)) < self.sampling_rate)

    def rounds(
        self, release: Release, rounds: int, ledger: PrivacyLedger | None = None, *, paid: int = 0
    ) -> Iterator[SimulatedSum]:
        """Train up to round number `rounds`, yielding each release; the ledger is charged before each.

        Args:
            release: Gives a round's estimate.
            rounds: Number of rounds in all.
            ledger: The ledger.
            paid: Rounds to come that the ledger has charged already. Only where `release` gives the same
                for the same round again, as seeded ones do: what was charged is then one release.

        Raises:
            BudgetExceeded: By the ledger, before the release that would exceed it.
        """
        import torch
        from torch.nn.utils import parameters_to_vector, vector_to_parameters

        while self.round < rounds:
            chosen = self.participants(self.round)
            if ledger is not None and paid <= 0:
                ledger.charge()
            paid -= 1
            vectors = per_sample_gradients(self.model, self.inputs[chosen], self.targets[chosen])
            result = release(self.round, vectors)
            mean = result.estimate / (self.sampling_rate * len(self.inputs))
            with torch.no_grad():
                flat = parameters_to_vector(self.model.parameters())
                flat += torch.from_numpy(self.optimizer.update(mean)).to(flat.dtype)
                vector_to_parameters(flat, self.model.parameters())
            self.round += 1
            yield result

    def run(
        self,
        release: Release,
        rounds: int,
        test: "tuple[torch.Tensor, torch.Tensor]",
        ledger: PrivacyLedger | None = None,
    ) -> TrainingResult:
        """Train, stop at the budget, and measure accuracy on `test` (records, class numbers)."""
        seen: list[SimulatedSum] = []
        stopped = None
        try:
            seen.extend(self.rounds(release, rounds, ledger))
        except BudgetExceeded as error:
            stopped = str(error)
        rates = [(each.clip_rate, each.wrap_rate) for each in seen] or [(0.0, 0.0)]
        clip_rate, wrap_rate = (math.fsum(column) / len(rates) for column in zip(*rates, strict=True))
        return TrainingResult(accuracy(self.model, *test), self.round, clip_rate, wrap_rate, stopped)

    def save(self, path: str | Path) -> None:
        """Write model and optimizer to a safetensors file."""
        from safetensors.numpy import save_file
        from torch.nn.utils import parameters_to_vector

        state = {
            "parameters": parameters_to_vector(self.model.parameters()).detach().numpy(),
            "mean": self.optimizer.mean,
            "square": self.optimizer.square,
            "round": np.array([self.round, self.optimizer.step, self.seed]),
        }
        with atomic_path(path) as temporary:
            save_file(state, temporary)

    def resume(self, path: str | Path) -> None:
        """Continue from a file that `save` wrote.

        Raises:
            InputError: It is no such file, or belongs to another model or seed.
        """
        import torch
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
        from torch.nn.utils import vector_to_parameters

        try:
            state = load_file(path)
            number, step, seed = (int(value) for value in state["round"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"is not a checkpoint of a training run: {error}", file=path) from error
        if state["mean"].size != self.optimizer.dim or seed != self.seed:
            raise InputError("the checkpoint is of another model or seed", file=path)
        vector_to_parameters(torch.from_numpy(state["parameters"].copy()), self.model.parameters())
        self.optimizer.mean, self.optimizer.square = state["mean"].copy(), state["square"].copy()
        self.optimizer.step, self.round = step, number


def accuracy(model: "torch.nn.Module", inputs: "torch.Tensor", targets: "torch.Tensor") -> float:
    """Return the share of records that are classified right."""
    import torch

    with torch.no_grad():
        return float((model(inputs).argmax(1) == targets).double().mean())


def multilayer_perceptron(sizes: tuple[int, ...], seed: int) -> "torch.nn.Module":
    """Return a ReLU network with these layer sizes, initialised from its own seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    layers: list[torch.nn.Module] = []
    for width, following in pairwise(sizes):
        layer = torch.nn.Linear(width, following)
        with torch.no_grad():
            for value in (layer.weight, layer.bias):
                value.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])
