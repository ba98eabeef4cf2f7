"""Training of what the environment is made of, in stages (the brief's A, B, B2), before any reinforcement.

A: classifier and f_local on all regions at depth. B: f_global learns to foresee V from random looks. B2: the
classifier is fine-tuned on partly observed states beside full ones, since before it never met mixed ones.
A stage does one epoch at a time and has a state dict: an epoch depends on nothing but that state and its
number, so an interrupted run goes on to the same bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rlogist.batched import Chooser, FeatureStore, make_store, pad, play, valid_rows
from rlogist.modules import Modules, Update, seeded
from rlogist.sources import Bag
from rlogist.transition import episode_length, look
from shared_core import InputError


@dataclass(frozen=True)
class StagedSettings:
    """Hyperparameters of stages A, B and B2. Stage A's are the released code's.

    Args:
        epochs: Of stage A, at most.
        lr: Learning rate of stage A (Adam).
        weight_decay: Of stage A.
        batch: Slides a step.
        instance_weight: Share of the instance loss beside cross-entropy; 0 leaves it out.
        keep: Share of a slide's regions that a step of stage A sees, drawn anew each time; below 1 it keeps
            few slides from being learned by heart.
        instances: Regions with the most and the least attention that the instance loss takes (k_sample).
        track_from: First epoch whose validation loss counts.
        min_epochs: No early stop before.
        patience: Epochs without a better validation loss before stage A ends.
        global_epochs: Of stage B.
        global_lr: AdamW.
        global_ce: Weight of cross-entropy through the frozen classifier beside the squared error.
        window: Looks through which stage B's gradient goes back.
        mixed_epochs: Of stage B2.
        mixed_lr: Adam.
        rho: Longest sequence of random looks in B and B2, as a share of regions.
    """

    epochs: int = 200
    lr: float = 2e-4
    weight_decay: float = 1e-5
    batch: int = 1
    instance_weight: float = 0.3
    keep: float = 1.0
    instances: int = 8
    track_from: int = 20
    min_epochs: int = 100
    patience: int = 20
    global_epochs: int = 30
    global_lr: float = 1e-3
    global_ce: float = 0.0
    window: int = 5
    mixed_epochs: int = 25
    mixed_lr: float = 2e-4
    rho: float = 0.2

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "instances", "patience", "window"):
            if getattr(self, name) < 1:
                raise InputError("expected at least 1", field=name, value=getattr(self, name))
        if not 0 <= self.instance_weight < 1:
            raise InputError("expected 0 to below 1", field="instance_weight", value=self.instance_weight)


@runtime_checkable
class Stage(Protocol):
    """A training stage: `epoch` until `finished`, then `finish`."""

    name: str
    total: int
    done: int

    @property
    def finished(self) -> bool:
        """Whether no epoch is left."""
        ...

    def epoch(self) -> dict[str, float]:
        """Train one epoch; gives what there is to log."""
        ...

    def finish(self) -> None:
        """Leave the modules as the stage's result."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        ...

    def load_state_dict(self, stored: dict[str, Tensor]) -> None:
        """Go on from there."""
        ...


def fit_scale(modules: Modules, bags: Sequence[Bag]) -> None:
    """Set the modules' standardization by the deep features of training slides."""
    rows = torch.cat([(bag.deep - modules.centre(bag.scan)).flatten(0, 1) for bag in bags]).double()
    mean, scale = rows.mean(0), rows.std(0).clamp_min(1e-6)
    transform = torch.diag(1 / scale)
    if modules.architecture.whiten:
        unit = (rows - mean) / scale
        variance, axes = torch.linalg.eigh(unit.T @ unit / len(unit))
        transform = transform @ (axes * (variance + modules.architecture.whiten).rsqrt())
    modules.mean.copy_(mean)
    modules.transform.copy_(transform)


class FullObservation:
    """Stage A: f_local and classifier on every region at depth.

    Loss: (1 - w) cross-entropy + w instance loss, a smooth top-1 SVM (Berrada et al. 2018, temperature 1) on
    the regions with the most attention (true class) and the least (not it), as CLAM has it.

    Args:
        modules: Trained in place; the epoch with the best validation loss is kept.
        bags: Training slides.
        validation: Slides that choose the epoch; none, and the last epoch is kept.
        settings: Hyperparameters.
        seed: Of batches and dropout.
        scan_only: Train on Z in the place of V: the classifier of the low-resolution baseline.
    """

    def __init__(
        self,
        modules: Modules,
        bags: Sequence[Bag],
        validation: Sequence[Bag],
        settings: StagedSettings,
        seed: int,
        scan_only: bool = False,
    ) -> None:
        self.name, self.total, self.done = "low-res" if scan_only else "A", settings.epochs, 0
        self.modules, self.bags, self.validation = modules, bags, validation
        self.settings, self.seed, self.scan_only = settings, seed, scan_only
        a = modules.architecture
        with seeded(derived_generator(seed, 0, 1_000_000)):
            # CLAM's clustering heads: for each class, is this region of it or not.
            self.instance_heads = nn.Linear(a.width, 2 * a.classes)
        parameters = [*modules.f_local.parameters(), *modules.classifier.parameters()]
        self.optimizer = torch.optim.Adam(
            [*parameters, *self.instance_heads.parameters()],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
        )
        self.best_loss, self.waited = float("inf"), 0
        self.best = _copy(modules)

    @property
    def finished(self) -> bool:
        """All epochs, or an early stop."""
        stale = self.waited >= self.settings.patience and self.done >= self.settings.min_epochs
        return self.done >= self.settings.epochs or (bool(self.validation) and stale)

    def epoch(self) -> dict[str, float]:
        """Every slide once on average, classes equally often."""
        self.modules.train()
        generator, losses = derived_generator(self.seed, 1, self.done), []
        with seeded(generator):
            for batch in _balanced(self.bags, self.settings.batch, generator):
                loss = self._loss([_some_regions(bag, self.settings.keep, generator) for bag in batch])
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                losses.append(loss.item())
        self.done += 1
        scalars = {"loss": float(np.mean(losses))}
        if self.validation:
            scalars["validation_loss"] = self._validate()
        return scalars

    def finish(self) -> None:
        """The best epoch's weights where there is a validation split."""
        if self.validation and self.best_loss < float("inf"):
            self.modules.load_state_dict(self.best)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        numbers = torch.tensor([self.done, self.waited, self.best_loss], dtype=torch.float64)
        parts = {"modules": self.modules.state_dict(), "best": self.best}
        parts["heads"] = self.instance_heads.state_dict()
        return {"numbers": numbers, **flat_tensors(parts), **optimizer_tensors(self.optimizer)}

    def load_state_dict(self, stored: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.done, self.waited = int(stored["numbers"][0]), int(stored["numbers"][1])
        self.best_loss = float(stored["numbers"][2])
        self.modules.load_state_dict(part_of(stored, "modules"))
        self.instance_heads.load_state_dict(part_of(stored, "heads"))
        self.best = part_of(stored, "best")
        load_optimizer(self.optimizer, stored)

    def _rows(self, bags: Sequence[Bag]) -> tuple[Float[Tensor, "batch regions dim"], Bool[Tensor, "b r"]]:
        valid = valid_rows([len(bag) for bag in bags])
        prepare, centre = self.modules.standardize, self.modules.centre
        kind = "scan" if self.scan_only else "deep"
        rows = pad([prepare(getattr(bag, kind), centre(bag.scan)) for bag in bags])
        return (rows if self.scan_only else self.modules.f_local(rows)), valid

    def _loss(self, bags: Sequence[Bag]) -> Float[Tensor, ""]:
        rows, valid = self._rows(bags)
        label = torch.tensor([bag.label for bag in bags])
        logits, attention = self.modules.classifier.explain(rows, valid)
        weight = self.settings.instance_weight
        loss = (1 - weight) * cross_entropy(logits, label)
        if weight:
            loss = loss + weight * self._instance_loss(rows, attention, valid, label)
        return loss

    def _instance_loss(
        self,
        rows: Float[Tensor, "batch regions dim"],
        attention: Float[Tensor, "batch regions"],
        valid: Bool[Tensor, "batch regions"],
        label: Int64[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        count = min(self.settings.instances, int(valid.sum(-1).min()))
        ranked = attention.detach()
        most = ranked.masked_fill(~valid, -1).topk(count).indices
        least = (-ranked).masked_fill(~valid, -2).topk(count).indices
        batch = torch.arange(len(rows)).unsqueeze(1)
        chosen = rows[batch, torch.cat([most, least], dim=1)]
        heads = self.instance_heads(self.modules.classifier.embed(chosen)).unflatten(-1, (-1, 2))
        scores = heads[batch, torch.arange(2 * count), label.unsqueeze(1)]
        target = (torch.arange(2 * count) < count).long().expand(len(rows), -1)
        return smooth_top1_svm(scores.flatten(0, 1), target.flatten())

    @torch.no_grad()
    def _validate(self) -> float:
        self.modules.eval()
        logits = [self.modules.classifier(*self._rows([bag])) for bag in self.validation]
        labels = torch.tensor([bag.label for bag in self.validation])
        loss = float(cross_entropy(torch.cat(logits), labels))
        if self.done > self.settings.track_from:
            if loss < self.best_loss:
                self.best_loss, self.waited, self.best = loss, 0, _copy(self.modules)
            else:
                self.waited += 1
        return loss


def smooth_top1_svm(
    scores: Float[Tensor, "samples classes"], target: Int64[Tensor, " samples"]
) -> Float[Tensor, ""]:
    """Log sum_j exp(s_j + [j != y]) - s_y, averaged: a hinge with margin 1 smoothed at temperature 1."""
    margin = 1 - torch.nn.functional.one_hot(target, scores.shape[1]).to(scores.dtype)
    right = scores.gather(1, target.unsqueeze(1)).squeeze(1)
    return (torch.logsumexp(scores + margin, dim=1) - right).mean()


class ForeseeRegions:
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
        self.total, self.done = 0 if update == "none" else settings.global_epochs, 0
        self.optimizer = torch.optim.AdamW(modules.f_global.parameters(), lr=settings.global_lr)

    @property
    def finished(self) -> bool:
        """All epochs were done."""
        return self.done >= self.total

    def epoch(self) -> dict[str, float]:
        """One random sequence of looks for every slide."""
        self.modules.eval()
        generator = derived_generator(self.seed, 2, self.done)
        batches = _batches(len(self.store), self.settings.batch, generator)
        losses = [self._sequence(self.store.part(slides), generator) for slides in batches]
        self.done += 1
        return {"loss": float(np.mean(losses))}

    def _sequence(self, batch: FeatureStore, generator: torch.Generator) -> float:
        order = random_looks(batch, self.settings.rho, generator)
        states, observed = batch.scan, torch.zeros_like(batch.valid)
        slides, total = torch.arange(len(batch)), 0.0
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

    def finish(self) -> None:
        """Nothing: the last epoch counts."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        return _plain_state(self.modules, self.optimizer, self.done)

    def load_state_dict(self, stored: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.done = _load_plain(self.modules, self.optimizer, stored)


def unobserved_error(
    states: Float[Tensor, "batch regions dim"],
    observed: Bool[Tensor, "batch regions"],
    batch: FeatureStore,
) -> Float[Tensor, " batch"]:
    """Mean squared error to V over the rows of each slide that were not looked at; 0 where there are none."""
    rest = (batch.valid & ~observed).to(states.dtype)
    error = (states - batch.seen).square().mean(dim=-1)
    return (error * rest).sum(-1) / rest.sum(-1).clamp_min(1)


class MixedStates:
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
        self.total, self.done = settings.mixed_epochs, 0
        self.optimizer = torch.optim.Adam(
            modules.classifier.parameters(), lr=settings.mixed_lr, weight_decay=settings.weight_decay
        )

    @property
    def finished(self) -> bool:
        """All epochs were done."""
        return self.done >= self.total

    def epoch(self) -> dict[str, float]:
        """One state of a random length for every slide, beside its full observation."""
        generator, losses = derived_generator(self.seed, 3, self.done), []
        with seeded(generator):
            for slides in _batches(len(self.store), self.settings.batch, generator):
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
        slides = torch.arange(len(batch))
        for action in order[:, :length].T:
            seen = batch.seen[slides, action]
            states, observed = look(states, observed, action, seen, self.modules.f_global, self.update)
        return states

    def finish(self) -> None:
        """Nothing: the last epoch counts."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        return _plain_state(self.modules, self.optimizer, self.done)

    def load_state_dict(self, stored: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.done = _load_plain(self.modules, self.optimizer, stored)


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


def random_looks(batch: FeatureStore, rho: float, generator: torch.Generator) -> Int64[Tensor, "batch looks"]:
    """Different rows of each slide in random order, as many as the smallest slide's T (at least 1)."""
    looks = min(episode_length(size, rho) for size in batch.sizes)
    draws = torch.rand(batch.valid.shape, generator=generator).masked_fill(~batch.valid, -1)
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


def random_chooser(seed: int) -> Chooser:
    """Scores that are random numbers: looks anywhere with the same probability."""
    generator = torch.Generator().manual_seed(seed)
    return lambda state: torch.rand(state.allowed.shape, generator=generator)


def train_stages(
    modules: Modules,
    bags: Sequence[Bag],
    validation: Sequence[Bag],
    settings: StagedSettings,
    seed: int,
    update: Update = "global",
) -> Iterator[Stage]:
    """The stages in order; each has to be run to its end before the next is asked for."""
    fit_scale(modules, bags)
    yield FullObservation(modules, bags, validation, settings, seed)
    store = make_store(bags, modules)
    yield ForeseeRegions(modules, store, settings, seed, update)
    yield MixedStates(modules, store, settings, seed, update)


def run_stage(stage: Stage) -> None:
    """Run a stage to its end."""
    while not stage.finished:
        stage.epoch()
    stage.finish()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step numbers of Adam by parameter number."""
    stored = optimizer.state_dict()["state"]
    return {f"optimizer.{key}.{name}": value for key, own in stored.items() for name, value in own.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in part_of(stored, "optimizer").items():
        key, _, own = name.partition(".")
        state.setdefault(int(key), {})[own] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def derived_generator(seed: int, *purpose: int) -> torch.Generator:
    """A generator for one purpose (stage, epoch) of a run with this seed."""
    word = int(np.random.SeedSequence([seed, *purpose]).generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator().manual_seed(word)


def _balanced(bags: Sequence[Bag], size: int, generator: torch.Generator) -> Iterator[list[Bag]]:
    labels = torch.tensor([bag.label for bag in bags])
    weights = (1 / torch.bincount(labels).clamp_min(1))[labels]
    drawn = torch.multinomial(weights, len(bags), replacement=True, generator=generator)
    for start in range(0, len(bags), size):
        yield [bags[int(index)] for index in drawn[start : start + size]]


def _some_regions(bag: Bag, keep: float, generator: torch.Generator) -> Bag:
    if keep >= 1:
        return bag
    rows = torch.randperm(len(bag), generator=generator)[: max(1, round(keep * len(bag)))]
    return replace(bag, scan=bag.scan[rows], deep=bag.deep[rows])


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Int64[Tensor, " batch"]]:
    yield from torch.randperm(count, generator=generator).split(size)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def flat_tensors(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several state dicts under one, as PART.NAME."""
    return {f"{part}.{key}": value for part, own in parts.items() for key, value in own.items()}


def part_of(stored: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """One of the state dicts that `flat_tensors` joined."""
    start = f"{part}."
    return {key.removeprefix(start): value for key, value in stored.items() if key.startswith(start)}


def _plain_state(modules: Modules, optimizer: torch.optim.Optimizer, done: int) -> dict[str, Tensor]:
    return {
        "done": torch.tensor(done),
        **flat_tensors({"modules": modules.state_dict()}),
        **optimizer_tensors(optimizer),
    }


def _load_plain(modules: Modules, optimizer: torch.optim.Optimizer, stored: dict[str, Tensor]) -> int:
    modules.load_state_dict(part_of(stored, "modules"))
    load_optimizer(optimizer, stored)
    return int(stored["done"])
