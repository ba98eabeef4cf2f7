"""Stage B: f_global learns to foresee V of regions that were not looked at."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from rlogist.baselines import random_chooser
from rlogist.batched import FeatureStore, play
from rlogist.modules import Modules, Update
from rlogist.stage import Stage, derived_generator
from rlogist.staged import StagedSettings
from rlogist.transition import episode_length, look


class ForeseeRegions(Stage):
    """Stage B: f_global regresses V of regions that were not looked at, from random sequences of looks.

    Args:
        modules: f_global is trained in place, the rest is left as it is.
        store: Training slides.
        settings: Hyperparameters.
        seed: Of slides and looks.
        update: `global` or `targeted`; the update in use.
    """

    name = "B"

    def __init__(
        self,
        modules: Modules,
        store: FeatureStore,
        settings: StagedSettings,
        seed: int,
        update: Update = "global",
    ) -> None:
        self.modules, self.store, self.settings, self.seed = modules, store, settings, seed
        self.update: Update = update
        self.optimizer = torch.optim.AdamW(modules.f_global.parameters(), lr=settings.global_lr)
        epochs = 0 if update == "none" else settings.global_epochs
        super().__init__(epochs, {"modules": modules}, {"optimizer": self.optimizer})

    def epoch(self) -> dict[str, float]:
        """One random sequence of looks for every slide."""
        self.modules.eval()
        generator = derived_generator(self.seed, 2, self.done)
        batches = batches_of(len(self.store), self.settings.batch, generator)
        losses = [self._sequence(self.store.part(slides), generator) for slides in batches]
        self.done += 1
        return {"loss": float(np.mean(losses))}

    def _sequence(self, batch: FeatureStore, generator: torch.Generator) -> float:
        order = random_looks(batch, self.settings.rho, generator)
        states, observed = batch.scan, torch.zeros_like(batch.valid)
        slides, total = torch.arange(len(batch), device=batch.device), 0.0
        pending: Tensor = torch.zeros(())
        for time in range(order.shape[1]):
            action = order[:, time]
            states, observed = look(
                states, observed, action, batch.seen[slides, action], self.modules.f_global, self.update
            )
            pending = pending + self._error(states, observed, batch)
            if (time + 1) % self.settings.window == 0 or time + 1 == order.shape[1]:
                self.optimizer.zero_grad(set_to_none=True)
                if pending.requires_grad:
                    pending.backward()
                    self.optimizer.step()
                total += float(pending.detach())
                pending, states = torch.zeros(()), states.detach()
        return total / order.shape[1]

    def _error(
        self,
        states: Float[Tensor, "batch regions dim"],
        observed: Bool[Tensor, "batch regions"],
        batch: FeatureStore,
    ) -> Float[Tensor, ""]:
        loss = unobserved_error(states, observed, batch).mean()
        if self.settings.global_ce:
            logits = self.modules.classifier(states, batch.valid)
            loss = loss + self.settings.global_ce * cross_entropy(logits, batch.label)
        return loss


def unobserved_error(
    states: Float[Tensor, "batch regions dim"],
    observed: Bool[Tensor, "batch regions"],
    batch: FeatureStore,
) -> Float[Tensor, " batch"]:
    """Mean squared error to V over the rows of each slide that were not looked at; 0 where there are none."""
    rest = (batch.valid & ~observed).to(states.dtype)
    error = (states - batch.seen).square().mean(dim=-1)
    return (error * rest).sum(-1) / rest.sum(-1).clamp_min(1)


def random_looks(batch: FeatureStore, rho: float, generator: torch.Generator) -> Int64[Tensor, "batch looks"]:
    """Different rows of each slide in random order, as many as the smallest slide's T (at least 1)."""
    looks = min(episode_length(size, rho) for size in batch.sizes)
    draws = torch.rand(batch.valid.shape, generator=generator).to(batch.device).masked_fill(~batch.valid, -1)
    return draws.argsort(dim=-1, descending=True)[:, :looks]


@torch.no_grad()
def foresight(
    store: FeatureStore, modules: Modules, rho: float, seed: int, update: Update = "global"
) -> tuple[float, float]:
    """Squared error to V on unobserved rows after random looks: with the update, and without one.

    A cross-resolution update that helps has the smaller error on slides that it was not trained on.
    """
    errors = []
    for form in (update, "none"):
        played = play(store, modules, random_chooser(seed), rho, form)
        errors.append(float(unobserved_error(played.states, played.observed, store).mean()))
    return errors[0], errors[1]


def batches_of(count: int, size: int, generator: torch.Generator) -> Iterator[Int64[Tensor, " batch"]]:
    """All numbers below `count` in random order, `size` at a time."""
    yield from torch.randperm(count, generator=generator).split(size)
