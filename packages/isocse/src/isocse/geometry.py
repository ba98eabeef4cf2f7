"""The geometry of one layer and of all, from hidden states that come in batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from isocse import cosines, dimensions, isotropy
from isocse.corpus import TokenBatch
from isocse.encoders import pool
from isocse.streams import (
    Covariance,
    MeanCosine,
    Moments,
    Sample,
    SelfSimilarity,
    SentenceCosine,
)
from isocse.types import CLASSES
from shared_core import InputError

Treatment = Callable[[Tensor], Tensor]
"""A map of token states, such as the removal of dimensions; fitted beforehand."""

REMOVED = (1, 2, 3, 5)
"""How many of the dimensions with the greatest contributions are taken away from the sample."""
INFORMATIVITY_ROWS = 300
"""Of the sample, since all pairs are correlated."""


@dataclass(frozen=True)
class GeometrySettings:
    """What is measured.

    Attributes:
        sample: Sentences of the samples: one drawn token and one sentence vector of each.
        seed: Of the samples and of the bootstrap.
        detail: Also measure what needs the samples' pairs or eigenvectors. Training logs go without.
        fresh_draw: Draw other tokens for each layer, as the published code.
    """

    sample: int = 1000
    seed: int = 0
    detail: bool = True
    fresh_draw: bool = False


class LayerGeometry:
    """Everything that is measured of one layer.

    Args:
        dimensions: Of the states.
        types: Number of analysed types.
        settings: What is measured.
        layer: The layer's number, for draws and errors.
        treatments: Name to map; self-similarity, intra-sentence similarity and anisotropy are measured of
            treated states as well.
        device: Where states are.
    """

    def __init__(
        self,
        dimensions: int,
        types: int,
        settings: GeometrySettings,
        layer: int,
        treatments: Mapping[str, Treatment] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings, self.layer = settings, layer
        self.core = CoreStreams(dimensions, types, settings.seed, device)
        self.treatments = dict(treatments or {})
        self.treated: dict[str, CoreStreams] = {}
        self._types, self._device = types, device
        self.norms = Moments(len(CLASSES)).to(device)
        self.tokens = MeanCosine(dimensions, len(CLASSES)).to(device)
        self.sample = Sample(settings.sample, settings.seed)
        self.sample_kinds = Sample(settings.sample, settings.seed)  # row among types, and class
        self.drawn = Covariance(dimensions).to(device)
        self.pooled = MeanCosine(dimensions).to(device)
        self.pooled_sample = Sample(settings.sample, settings.seed)
        self.pooled_covariance = Covariance(dimensions).to(device)

    def update(
        self,
        h: Float[Tensor, "sentences tokens d"],
        batch: TokenBatch,
        pooling: str | None = None,
    ) -> None:
        """Add a batch.

        Args:
            h: States of the layer.
            batch: Which of them are what, on the same device.
            pooling: Of the sentences' vectors; they are not measured where None.
        """
        flat = h.reshape(-1, h.shape[-1])
        states = _unit_states(flat, batch)
        norms = states.norm(dim=1)
        self._check(norms, batch)
        units = states / torch.where(norms > 0, norms, 1.0)[:, None]
        sums = self.core.update(states, units, norms, batch)
        self._update_pads(flat, batch)
        classes = batch.classes
        if not batch.all_counted:
            states, units, norms, classes = (part[batch.counted] for part in (states, units, norms, classes))
        self.tokens.update_units(states, units, norms, classes)
        self.norms.update(norms, classes)
        seed = self.settings.seed + (1 + self.layer if self.settings.fresh_draw else 0)
        some = batch.drawn(seed)
        counted = batch.unit_counts > 0
        where = torch.as_tensor(some[counted], device=states.device)
        chosen = states[where]
        self.sample.update(chosen, batch.numbers[counted])
        kinds = torch.stack([batch.types, batch.classes], dim=1)[batch.counted]
        self.sample_kinds.update(kinds[where], batch.numbers[counted])
        self.drawn.update(chosen)
        if pooling is not None:
            summed = pooling == "mean" and batch.all_counted and batch.word is None
            pooled = sums / batch.mask.sum(1, keepdim=True) if summed else pool(h, batch.mask, pooling)
            self._update_pooled(pooled.float(), batch.numbers)
        for name, treat in self.treatments.items():
            self._update_treated(name, treat, flat, batch)

    def _update_pooled(self, pooled: Float[Tensor, "sentences d"], numbers: np.ndarray) -> None:
        self.pooled.update(pooled)
        self.pooled_sample.update(pooled, numbers)
        self.pooled_covariance.update(pooled)

    def _update_treated(self, name: str, treat: Treatment, flat: Tensor, batch: TokenBatch) -> None:
        states = treat(_unit_states(flat, batch)).float()
        if name not in self.treated:
            width = states.shape[1]
            self.treated[name] = CoreStreams(width, self._types, self.settings.seed, self._device)
        norms = states.norm(dim=1)
        self.treated[name].update(states, states / torch.where(norms > 0, norms, 1.0)[:, None], norms, batch)

    def _update_pads(self, flat: Tensor, batch: TokenBatch) -> None:
        if batch.pads is None or not len(batch.pads):
            return
        states = flat[batch.pads].float()
        units = states / states.norm(dim=1, keepdim=True).clamp_min(1e-30)
        types = torch.full((len(states),), batch.pad_type, dtype=torch.int64, device=states.device)
        self.core.types.update(units, types, torch.zeros_like(types, dtype=torch.bool))

    def _check(self, norms: Tensor, batch: TokenBatch) -> None:
        bad = ~torch.isfinite(norms)
        if bad.any():
            sentence = int(batch.numbers[int(batch.sentence[int(bad.nonzero()[0])])])
            raise InputError(
                f"NaN or infinity at layer {self.layer}, sentence {sentence}", field="hidden states"
            )


class CoreStreams:
    """Self-similarity, intra-sentence similarity and expected anisotropy of one kind of states."""

    def __init__(self, dimensions: int, types: int, seed: int, device: torch.device | str) -> None:
        self.types = SelfSimilarity(types, dimensions).to(device)
        self.intra = Moments(shift=0.5).to(device)
        self.sentences = SentenceCosine(dimensions, seed).to(device)

    def update(
        self,
        states: Float[Tensor, "n d"],
        units: Float[Tensor, "n d"],
        norms: Float[Tensor, " n"],
        batch: TokenBatch,
    ) -> Float[Tensor, "sentences d"]:
        """Add a batch: states, the same with length 1, and their lengths. Gives sums by sentence."""
        if len(self.types.counts):
            self.types.update(units, batch.types, batch.repeated, norms > 0)
        sentence = batch.sentence
        if not batch.all_counted:
            states, units, norms = states[batch.counted], units[batch.counted], norms[batch.counted]
            sentence = sentence[batch.counted]
        count = len(batch.numbers)
        sums, unit_sums = (
            part.new_zeros(count, part.shape[1]).index_add_(0, sentence, part).double()
            for part in (states, units)
        )
        present = norms.new_zeros(count, dtype=torch.float64).index_add_(0, sentence, (norms > 0).double())
        lengths = sums.norm(dim=1)
        kept = (present > 0) & (lengths > 0)
        means = unit_sums[kept] / present[kept, None]
        self.intra.update((means * sums[kept]).sum(1) / lengths[kept])
        self.sentences.update(means, batch.numbers[kept.cpu().numpy()])
        return sums


class Geometry:
    """The geometry of all layers: give it the hidden states of each batch, then ask for the `results`.

    Args:
        types: Number of analysed types.
        settings: What is measured.
        layers: Which of the states that come are measured; all where None.
        treatments: By layer, name to map.
    """

    def __init__(
        self,
        types: int,
        settings: GeometrySettings | None = None,
        layers: Sequence[int] | None = None,
        treatments: Mapping[int, Mapping[str, Treatment]] | None = None,
    ) -> None:
        self.settings = settings or GeometrySettings()
        self.layers = None if layers is None else list(layers)
        self.treatments = dict(treatments or {})
        self.measured: list[LayerGeometry] = []
        self._types = types

    def update(
        self,
        states: Sequence[Float[Tensor, "_ _ _"]],
        batch: TokenBatch,
        pooling: str | None = None,
    ) -> None:
        """Add a batch.

        Args:
            states: Of each layer; layers may have different sizes.
            batch: Which of them are what.
            pooling: Of sentences' vectors; they are not measured where None.
        """
        if self.layers is None:
            self.layers = list(range(len(states)))
        device = states[0].device if states[0].device.type != "mps" else torch.device("cpu")  # no float64
        batch.to(device)
        if not self.measured:
            for layer in self.layers:
                width, treatments = states[layer].shape[-1], self.treatments.get(layer)
                self.measured.append(
                    LayerGeometry(width, self._types, self.settings, layer, treatments, device)
                )
        for layer, measured in zip(self.layers, self.measured, strict=True):
            measured.update(states[layer].to(device), batch, pooling)

    def results(
        self, analysed: np.ndarray, classes: np.ndarray, *, first_only: bool = False
    ) -> list[Results]:
        """What was measured, by layer.

        Args:
            analysed: Rows of the types that self-similarity is the mean of.
            classes: Of all types.
            first_only: Take the first occurrence in a sentence only, and round by type to three digits, as
                the published code.
        """
        return [_results(layer, analysed, classes, first_only) for layer in self.measured]


@dataclass
class Results:
    """Numbers of one layer.

    Attributes:
        measures: Name to value.
        errors: Name to standard error, for all that rests on a sample.
        by_class: Class to name to value.
        types: Self-similarity by type; NaN where there is none.
        top: The dimensions with the greatest contributions, as (dimension, absolute, share or None).
        removal: What is left of the sample without some dimensions.
        treated: Treatment to measures of treated states.
        sample: The drawn tokens' states.
        sample_numbers: The sentences that these are of.
    """

    measures: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    by_class: dict[str, dict[str, float]] = field(default_factory=dict)
    types: np.ndarray = field(default_factory=lambda: np.zeros(0))
    top: list[tuple[int, float, float | None]] = field(default_factory=list)
    removal: dict[str, dict[str, float]] = field(default_factory=dict)
    treated: dict[str, dict[str, float]] = field(default_factory=dict)
    sample: Tensor | None = None
    sample_numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    zeros: int = 0


def _results(layer: LayerGeometry, analysed: np.ndarray, classes: np.ndarray, first_only: bool) -> Results:
    found = Results(zeros=layer.tokens.zeros)
    m, e = found.measures, found.errors
    sample = layer.sample.rows
    sample = torch.zeros(0, 1) if sample is None else sample.double().cpu()

    m |= _core_measures(layer.core, analysed, e, first_only, found)
    m["anisotropy_tokens"] = layer.tokens.mean_cosine()
    if len(sample) > 1:
        m["anisotropy_sampled"] = cosines.mean_cosine(sample)
        e["anisotropy_sampled"] = _error(sample, layer.settings.seed)
    norms = layer.norms.all_groups()
    m["norm"], m["norm_spread"] = float(norms.mean), float(norms.std)
    e["norm"] = float(norms.error)
    m["mean_distance"], m["mean_share"] = layer.tokens.common_component()
    m["cosine_to_mean"] = layer.tokens.cosine_to_mean()
    if layer.drawn.count > 2 and _has_shape(layer.drawn, sample):
        m["isoscore_tokens"] = layer.drawn.isoscore
        e["isoscore_tokens"] = isotropy.isoscore_error(sample, layer.drawn.count)
    _sentence_measures(layer, m, e)
    _by_class(layer, found, classes)
    contributions = layer.core.sentences.contributions()
    found.top = _top(contributions)
    if contributions.reliable:
        m["top_dimension_share"] = float(contributions.share.max())
    if layer.settings.detail and len(sample) > 3:
        _sample_measures(layer, sample, found, contributions)
    for name, core in layer.treated.items():
        found.treated[name] = _core_measures(core, analysed, {}, first_only, None)
    found.sample, found.sample_numbers = sample, layer.sample.numbers
    return found


def _core_measures(
    core: CoreStreams,
    analysed: np.ndarray,
    errors: dict[str, float],
    first_only: bool,
    found: Results | None,
) -> dict[str, float]:
    values = core.types.values(first_only=first_only).cpu().numpy()
    other = core.types.values(first_only=not first_only).cpu().numpy()
    if first_only:
        values = np.round(values, 3)
    chosen = values[analysed]
    chosen = chosen[np.isfinite(chosen)]
    other = other[analysed]
    m: dict[str, float] = {"anisotropy": core.sentences.value, "intra_sentence": float(core.intra.mean)}
    errors["anisotropy"] = core.sentences.error
    errors["intra_sentence"] = float(core.intra.error)
    if len(chosen):
        m["self_similarity"] = float(chosen.mean())
        m["self_similarity_other_count"] = float(other[np.isfinite(other)].mean())
        errors["self_similarity"] = float(chosen.std(ddof=1) / len(chosen) ** 0.5) if len(chosen) > 1 else 0.0
    if found is not None:
        found.types = values
    return m


def _sentence_measures(layer: LayerGeometry, m: dict[str, float], e: dict[str, float]) -> None:
    sample = layer.pooled_sample.rows
    if sample is None or len(sample) < 3:
        return
    sample = sample.double().cpu()
    m["sentence_cosine"] = layer.pooled.mean_cosine()
    share = len(sample) / layer.pooled_covariance.count
    e["sentence_cosine"] = _error(sample, layer.settings.seed) * share**0.5
    if not _has_shape(layer.pooled_covariance, sample):
        return  # all sentences have one vector, as those of [CLS] at the embedding layer
    m["isoscore_sentences"] = layer.pooled_covariance.isoscore
    e["isoscore_sentences"] = isotropy.isoscore_error(sample, layer.pooled_covariance.count)
    m["uniformity"], e["uniformity"] = isotropy.uniformity_with_error(sample)
    if layer.settings.detail:
        m["partition_sentences"], e["partition_sentences"] = isotropy.partition_with_error(
            sample, torch.Generator().manual_seed(0)
        )


def _sample_measures(
    layer: LayerGeometry, sample: Tensor, found: Results, contributions: dimensions.Contributions
) -> None:
    m, e = found.measures, found.errors
    offset = layer.tokens.mean().cpu()
    centred = sample - offset
    m["residual_anisotropy"] = _mean_cosine(centred)
    if np.isfinite(m["residual_anisotropy"]):
        e["residual_anisotropy"] = _error(centred, layer.settings.seed)
    m["partition_tokens"], e["partition_tokens"] = isotropy.partition_with_error(
        sample, torch.Generator().manual_seed(0)
    )
    some = sample[:INFORMATIVITY_ROWS]
    for count in REMOVED:
        if count + 2 > sample.shape[1]:
            break
        top = contributions.top(count).cpu()
        left = dimensions.remove_dimensions(sample, top)
        found.removal[f"top {count} removed"] = {
            "anisotropy": _mean_cosine(left),
            "informativity": _informativity(some, top),
        }
    found.removal["z-scores"] = {"anisotropy": _mean_cosine(dimensions.standardize(sample))}


@functools.lru_cache(maxsize=2)  # the layers of a model ask for the same ones
def _resamples(n: int, seed: int) -> Tensor:
    return cosines.resamples(n, np.random.default_rng(seed))


def _error(sample: Tensor, seed: int) -> float:
    return cosines.resampled_error(sample, _resamples(len(sample), seed))


def _has_shape(covariance: Covariance, sample: Tensor) -> bool:
    """Whether vectors differ by more than rounding."""
    return float(covariance.matrix.trace()) > 1e-12 * float(sample.square().sum(1).mean())


def _mean_cosine(sample: Tensor) -> float:
    try:
        return cosines.mean_cosine(sample)
    except InputError:  # nothing is left of states that are all alike
        return float("nan")


def _informativity(sample: Tensor, top: Tensor) -> float:
    try:
        return dimensions.informativity(sample, top)
    except InputError:  # all cosines alike
        return float("nan")


def _top(contributions: dimensions.Contributions, count: int = 5) -> list[tuple[int, float, float | None]]:
    shares: Any = contributions.share if contributions.reliable else None
    return [
        (int(k), float(contributions.absolute[k]), None if shares is None else float(shares[k]))
        for k in contributions.top(count)
    ]


def _by_class(layer: LayerGeometry, found: Results, classes: np.ndarray) -> None:
    means = layer.norms.mean.cpu()
    for number, name in enumerate(CLASSES):
        count = float(layer.tokens.counts[number])
        values = found.types[classes == number]
        values = values[np.isfinite(values)]
        row: dict[str, float] = {"tokens": count, "types": float(len(values))}
        if count:
            row["norm"] = float(means[number])
        if count > 1:
            row["anisotropy"] = layer.tokens.mean_cosine(number)
        if len(values):
            row["self_similarity"] = float(values.mean())
            row["self_similarity_error"] = (
                float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
            )
        found.by_class[name] = row


def _unit_states(flat: Tensor, batch: TokenBatch) -> Tensor:
    """States of units in float32: of tokens, or the means of words."""
    states = flat[batch.positions].float()
    if batch.word is None:
        return states
    count = len(batch.sentence)
    sums = states.new_zeros(count, states.shape[1]).index_add_(0, batch.word, states)
    return sums / torch.bincount(batch.word, minlength=count)[:, None]
