"""Stage A: classifier and f_local learn on every region at depth."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rlogist.batched import pad, valid_rows
from rlogist.modules import Modules, seeded
from rlogist.sources import Bag
from rlogist.stage import Stage, derived_generator, flat_tensors, part_of
from rlogist.staged import StagedSettings


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


class FullObservation(Stage):
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
        self.name = "low-res" if scan_only else "A"
        self.modules, self.bags, self.validation = modules, bags, validation
        self.settings, self.seed, self.scan_only = settings, seed, scan_only
        a = modules.architecture
        with seeded(derived_generator(seed, 0, 1_000_000)):
            # CLAM's clustering heads: for each class, is this region of it or not.
            self.instance_heads = nn.Linear(a.width, 2 * a.classes).to(modules.device)
        parameters = [*modules.f_local.parameters(), *modules.classifier.parameters()]
        self.optimizer = torch.optim.Adam(
            [*parameters, *self.instance_heads.parameters()],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
        )
        networks = {"modules": modules, "heads": self.instance_heads}
        super().__init__(settings.epochs, networks, {"optimizer": self.optimizer})
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
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.done)
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
        numbers = torch.tensor([self.waited, self.best_loss], dtype=torch.float64)
        return {**super().state_dict(), "numbers": numbers, **flat_tensors({"best": self.best})}

    def load_state_dict(self, stored: dict[str, Tensor]) -> None:
        """Go on from there."""
        super().load_state_dict(stored)
        self.waited, self.best_loss = int(stored["numbers"][0]), float(stored["numbers"][1])
        self.best = part_of(stored, "best")

    def _rows(self, bags: Sequence[Bag]) -> tuple[Float[Tensor, "batch regions dim"], Bool[Tensor, "b r"]]:
        bags = [bag.to(self.modules.device) for bag in bags]  # all of them at once may not fit there
        valid = valid_rows([len(bag) for bag in bags]).to(self.modules.device)
        prepare, centre = self.modules.standardize, self.modules.centre
        kind = "scan" if self.scan_only else "deep"
        rows = pad([prepare(getattr(bag, kind), centre(bag.scan)) for bag in bags])
        return (rows if self.scan_only else self.modules.f_local(rows)), valid

    def _loss(self, bags: Sequence[Bag]) -> Float[Tensor, ""]:
        rows, valid = self._rows(bags)
        label = torch.tensor([bag.label for bag in bags], device=rows.device)
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
        batch = torch.arange(len(rows), device=rows.device).unsqueeze(1)
        chosen = rows[batch, torch.cat([most, least], dim=1)]
        heads = self.instance_heads(self.modules.classifier.embed(chosen)).unflatten(-1, (-1, 2))
        places = torch.arange(2 * count, device=rows.device)
        scores = heads[batch, places, label.unsqueeze(1)]
        target = (places < count).long().expand(len(rows), -1)
        return smooth_top1_svm(scores.flatten(0, 1), target.flatten())

    @torch.no_grad()
    def _validate(self) -> float:
        self.modules.eval()
        logits = [self.modules.classifier(*self._rows([bag])) for bag in self.validation]
        labels = torch.tensor([bag.label for bag in self.validation], device=self.modules.device)
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


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}
