"""Stage B2: the classifier meets partly observed slides, which stage A never showed it."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from rlogist.batched import FeatureStore
from rlogist.foreseeing import batches_of, random_looks
from rlogist.modules import Modules, Update, seeded
from rlogist.stage import Stage, derived_generator
from rlogist.staged import StagedSettings
from rlogist.transition import look


class MixedStates(Stage):
    """Stage B2: the classifier is fine-tuned on states after random looks and on full observation together.

    Args:
        modules: The classifier is trained in place, the rest is left as it is.
        store: Training slides.
        settings: Hyperparameters.
        seed: Of slides, looks and dropout.
        update: The update in use.
    """

    name = "B2"

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
        self.optimizer = torch.optim.Adam(
            modules.classifier.parameters(), lr=settings.mixed_lr, weight_decay=settings.weight_decay
        )
        super().__init__(settings.mixed_epochs, {"modules": modules}, {"optimizer": self.optimizer})

    def epoch(self) -> dict[str, float]:
        """One state of a random length for every slide, beside its full observation."""
        generator, losses = derived_generator(self.seed, 3, self.done), []
        with seeded(generator):
            for slides in batches_of(len(self.store), self.settings.batch, generator):
                batch = self.store.part(slides)
                states = self._some_state(batch, generator)
                self.modules.train()
                losses.append(classifier_step(self.modules, self.optimizer, states, batch))
        self.modules.eval()
        self.done += 1
        return {"loss": float(np.mean(losses))}

    @torch.no_grad()
    def _some_state(
        self, batch: FeatureStore, generator: torch.Generator
    ) -> Float[Tensor, "batch regions dim"]:
        self.modules.eval()
        order = random_looks(batch, self.settings.rho, generator)
        # Long sequences are met as often as short ones: the length is uniform.
        length = int(torch.randint(1, order.shape[1] + 1, (), generator=generator))
        states, observed = batch.scan, torch.zeros_like(batch.valid)
        slides = torch.arange(len(batch), device=batch.device)
        for action in order[:, :length].T:
            seen = batch.seen[slides, action]
            states, observed = look(states, observed, action, seen, self.modules.f_global, self.update)
        return states


def classifier_step(
    modules: Modules,
    optimizer: torch.optim.Optimizer,
    states: Float[Tensor, "batch regions dim"],
    batch: FeatureStore,
) -> float:
    """One step of the classifier on given states and on full observation, equally weighted."""
    partly = cross_entropy(modules.classifier(states, batch.valid), batch.label)
    fully = cross_entropy(modules.classifier(batch.seen, batch.valid), batch.label)
    optimizer.zero_grad(set_to_none=True)
    (partly + fully).backward()
    optimizer.step()
    return float(partly.detach() + fully.detach()) / 2
