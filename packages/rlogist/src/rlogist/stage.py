"""What all stages of training have in common: epochs, and a state from which a killed run goes on.

A stage does one epoch at a time and has a state dict: an epoch depends on nothing but that state and its
number, so an interrupted run goes on to the same bits.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn


class Stage(ABC):
    """A training stage: `epoch` until `finished`, then `finish`.

    Args:
        total: Epochs, at most.
        trained: Networks whose weights are the stage's state, by name.
        optimizers: Of them, by name.
    """

    name: str

    def __init__(
        self,
        total: int,
        trained: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
    ) -> None:
        self.total, self.done = total, 0
        self._trained, self._optimizers = trained, optimizers

    @property
    def finished(self) -> bool:
        """Whether no epoch is left."""
        return self.done >= self.total

    @abstractmethod
    def epoch(self) -> dict[str, float]:
        """Train one epoch; gives what there is to log."""

    def finish(self) -> None:  # noqa: B027, most stages have nothing to do here
        """Leave the networks as the stage's result: as the last epoch left them, unless a stage chooses."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        parts = {name: own.state_dict() for name, own in self._trained.items()}
        parts |= {name: _moments(own) for name, own in self._optimizers.items()}
        return {"done": torch.tensor(self.done), **flat_tensors(parts)}

    def load_state_dict(self, stored: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.done = int(stored["done"])
        for name, network in self._trained.items():
            network.load_state_dict(part_of(stored, name))
        for name, optimizer in self._optimizers.items():
            _load_moments(optimizer, part_of(stored, name))


def run_stage(stage: Stage) -> None:
    """Run a stage to its end."""
    while not stage.finished:
        stage.epoch()
    stage.finish()


def derived_generator(seed: int, *purpose: int) -> torch.Generator:
    """A generator for one purpose (stage, epoch) of a run with this seed."""
    word = int(np.random.SeedSequence([seed, *purpose]).generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator().manual_seed(word)


def flat_tensors(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several state dicts under one, as PART.NAME."""
    return {f"{part}.{key}": value for part, own in parts.items() for key, value in own.items()}


def part_of(stored: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """One of the state dicts that `flat_tensors` joined."""
    start = f"{part}."
    return {key.removeprefix(start): value for key, value in stored.items() if key.startswith(start)}


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step numbers of Adam, as NUMBER-OF-PARAMETER.NAME."""
    stored = optimizer.state_dict()["state"]
    return {f"{key}.{name}": value for key, own in stored.items() for name, value in own.items()}


def _load_moments(optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in stored.items():
        key, _, own = name.partition(".")
        state.setdefault(int(key), {})[own] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
