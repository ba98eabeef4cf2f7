"""CSQ and its rivals as stages of one training run, so that all get the same data, steps and loop.

A stage decides something about the model (`plan`: plain values, kept in the checkpoint), changes its
structure accordingly (`install`) and acts around each optimizer step. A run that goes on from a checkpoint
installs the kept plans again and then loads the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csq
from csq import rivals
from csq.activations import install_activations, plan_activations
from csq.budget import Budget
from csq.rivals import BsqWeight, LsqWeight, SteWeight
from csq.schedule import Finetune, Schedule
from shared_core import InputError

Plan = dict[str, Any]
Batches = Callable[[int], tuple[Tensor, Tensor]]
"""n -> inputs and labels of n training images, the same at each call."""

SAMPLES = 32
"""Draws of Hutchinson's estimator."""
SENSITIVITY_IMAGES = 256
"""Training images on which the Hessian's traces are estimated."""


class Hooks:
    """What a stage does around the optimizer's steps; this one does nothing."""

    def penalty(self) -> Tensor | None:
        """Return what to add to the loss."""
        return None

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Act after a step of the optimizer."""

    def record(self) -> dict[str, Any]:
        """Return what to log."""
        return {}


@dataclass(frozen=True)
class Stage:
    """A part of a run with its own warm-up and cosine.

    Args:
        name: For the log.
        share: Of the run's steps; the shares of a method's stages sum to 1.
        lr: Factor of the recipe's learning rate.
    """

    name: str
    share: float
    lr: float = 1.0

    def plan(self, model: nn.Module, batches: Batches, seed: int) -> Plan:
        """Decide on the model as the stage before left it."""
        return {}

    def install(self, model: nn.Module, plan: Plan, steps: int) -> Hooks:
        """Change the model's structure in place. Must depend on the model's structure and the plan alone."""
        return Hooks()


@dataclass(frozen=True)
class QuantizedStage(Stage):
    """A stage with quantized weights, and quantized activations where `act_bits` is not 32."""

    act_bits: int = 32
    act_method: Literal["pact", "lsq"] = "pact"
    skip: tuple[str, ...] = ()

    def plan(self, model: nn.Module, batches: Batches, seed: int) -> Plan:
        """Decide on activations, then on weights."""
        activations: Plan = {}
        if self.act_bits != 32:
            example = batches(SENSITIVITY_IMAGES)[0]
            activations = plan_activations(model, self.act_bits, example, self.act_method)
        return {"activations": activations, **self.decide(model, batches, seed)}

    def install(self, model: nn.Module, plan: Plan, steps: int) -> Hooks:
        """Put the quantizers in."""
        install_activations(model, plan["activations"])
        return self.quantize(model, plan, steps)

    def decide(self, model: nn.Module, batches: Batches, seed: int) -> Plan:
        """Return the decisions on weights."""
        return {}

    def quantize(self, model: nn.Module, plan: Plan, steps: int) -> Hooks:
        """Quantize the weights."""
        raise NotImplementedError


class _CsqHooks(Hooks):
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def penalty(self) -> Tensor | None:
        return self.schedule.penalty() if self.schedule.searching else None

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.schedule.step()

    def record(self) -> dict[str, Any]:
        bits = {name: int(planes.selected().sum()) for name, planes in self.schedule.layers.items()}
        return {"beta": self.schedule.beta, "precision": self.schedule.precision(), "bits": bits}


@dataclass(frozen=True)
class CsqStage(QuantizedStage):
    """Bit planes under a `csq.Schedule`; its arguments, and those of `csq.parametrize`.

    With `target_bits` None, masks are fixed to all `n_bits` planes: CSQ-uniform.
    """

    target_bits: float | None = 2.0
    n_bits: int = 8
    init: Literal["pretrained", "scratch"] = "scratch"
    gate_init: float = 0.1
    lam: float = 0.1
    budget: Budget = "weights"
    search: float = 0.75
    beta_max: float = 200.0
    finetune: Finetune = "hold"
    on_miss: Literal["warn", "raise", "settle"] = "settle"
    contiguous: bool = False

    def quantize(self, model: nn.Module, plan: Plan, steps: int) -> Hooks:
        """Parametrize the weights."""
        csq.parametrize(
            model,
            self.n_bits,
            self.skip,
            init=self.init,
            gate_init=self.gate_init,
            mask="fixed" if self.target_bits is None else "search",
        )
        schedule = Schedule(
            model,
            self.target_bits,
            steps,
            budget=self.budget,
            lam=self.lam,
            search=self.search,
            beta_max=self.beta_max,
            finetune=self.finetune,
            on_miss=self.on_miss,
            contiguous=self.contiguous,
        )
        return _CsqHooks(schedule)


@dataclass(frozen=True)
class UniformStage(QuantizedStage):
    """The same bits for all layers, by LSQ or by STE with max scaling."""

    bits: int = 2
    quantizer: Literal["lsq", "ste"] = "lsq"

    def decide(self, model: nn.Module, batches: Batches, seed: int) -> Plan:
        """All alike."""
        return {"bits": dict.fromkeys(rivals.weights(model, self.skip), self.bits)}

    def quantize(self, model: nn.Module, plan: Plan, steps: int) -> Hooks:
        """Put LSQ's or STE's quantizers on the weights, with the plan's bits."""
        bits = plan["bits"]

        def make(name: str, weight: Tensor) -> rivals.Rival:
            return LsqWeight(weight, bits[name]) if self.quantizer == "lsq" else SteWeight(bits[name])

        rivals.attach(model, make, self.skip, check=not plan.get("emptied"))
        return Hooks()


@dataclass(frozen=True)
class RandomStage(UniformStage):
    """Bits drawn at random that meet the target; then as `UniformStage`."""

    target_bits: float = 2.0

    def decide(self, model: nn.Module, batches: Batches, seed: int) -> Plan:
        """Draw with the run's seed."""
        weights = rivals.weights(model, self.skip)
        counts = [weight.numel() for weight in weights.values()]
        drawn = rivals.random_allocation(counts, self.target_bits, np.random.default_rng([seed, 1]))
        return {"bits": dict(zip(weights, drawn, strict=True))}


@dataclass(frozen=True)
class HawqStage(UniformStage):
    """Bits of the least summed Hessian sensitivity at the target (HAWQ); then as `UniformStage`.

    Args:
        traces: Of the layers' Hessians, where another run with the same steps before this stage has them in
            its plan; else they are estimated.
    """

    target_bits: float = 2.0
    traces: tuple[float, ...] | None = None

    def decide(self, model: nn.Module, batches: Batches, seed: int) -> Plan:
        """Estimate traces on training images and solve the integer program."""
        weights, choices = rivals.weights(model, self.skip), range(1, 9)
        traces = self._estimate(model, weights, batches, seed) if self.traces is None else self.traces
        traces = torch.as_tensor(traces)
        counts = np.array([weight.numel() for weight in weights.values()], dtype=float)
        chosen = rivals.cheapest_allocation(
            rivals.sensitivities(list(weights.values()), traces, choices).numpy(),
            counts[:, None] * np.array(choices, dtype=float),
            self.target_bits * counts.sum(),
        )
        bits = {name: choices[choice] for name, choice in zip(weights, chosen, strict=True)}
        return {"bits": bits, "traces": dict(zip(weights, traces.tolist(), strict=True))}

    def _estimate(self, model: nn.Module, weights: dict[str, Tensor], batches: Batches, seed: int) -> Tensor:
        inputs, labels = batches(SENSITIVITY_IMAGES)
        was_training = model.training
        model.eval()
        traces = rivals.hessian_traces(
            lambda: F.cross_entropy(model(inputs), labels),
            list(weights.values()),
            SAMPLES,
            torch.Generator().manual_seed(seed),
        )
        model.train(was_training)
        return traces


class _BsqHooks(Hooks):
    def __init__(self, model: nn.Module, alpha: float, steps: int, interval: int) -> None:
        self.layers = {n: q for n, q in rivals.rival_layers(model).items() if isinstance(q, BsqWeight)}
        self.alpha, self.steps, self.interval = alpha, steps, interval
        self.counter = next(iter(self.layers.values())).steps_done

    def penalty(self) -> Tensor | None:
        return self.alpha * rivals.bsq_penalty(self.layers.values())

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for layer in self.layers.values():
            layer.clip()
        self.counter += 1
        if int(self.counter) % self.interval == 0 or int(self.counter) == self.steps:
            for layer in self.layers.values():
                layer.requantize()
                for moment in optimizer.state.get(layer.planes, {}).values():
                    moment.zero_()  # places have moved: old momentum is of other bits

    def record(self) -> dict[str, Any]:
        bits = {name: layer.bits for name, layer in self.layers.items()}
        sizes = {name: layer.planes[0, 0].numel() for name, layer in self.layers.items()}
        return {"bits": bits, "precision": sum(bits[n] * sizes[n] for n in bits) / sum(sizes.values())}


@dataclass(frozen=True)
class BsqStage(QuantizedStage):
    """BSQ's search: the group lasso empties planes, which are dropped every `interval` of the stage.

    Args:
        alpha: The regularizer's weight, the only handle on size.
        interval: Share of the stage's steps between two re-quantizations; the paper's is 100 of 350 epochs.
    """

    alpha: float = 0.01
    interval: float = 2 / 7

    def quantize(self, model: nn.Module, plan: Plan, steps: int) -> Hooks:
        """Put planes in place of the weights."""
        rivals.attach(model, lambda _, weight: BsqWeight(weight), self.skip)
        return _BsqHooks(model, self.alpha, steps, max(1, round(self.interval * steps)))


@dataclass(frozen=True)
class BsqFinetuneStage(UniformStage):
    """Training with the bits that BSQ found, from the weights that it found.

    A layer that the search has emptied keeps 1 bit, the least that BSQ's planes and CSQ's `min_bits` leave to
    any layer: it trains on, grows ternary weights again, and its size counts as 1 paper bit and as the bits
    that its numbers then take in the file, as everybody's does.
    """

    def decide(self, model: nn.Module, batches: Batches, seed: int) -> Plan:
        """Read bits and steps off the planes."""
        layers = list(rivals.hard_layers(model))
        return {
            "bits": {each.name: each.bits for each in layers},
            "steps": {each.name: each.step for each in layers},
            "emptied": [each.name for each in layers if not bool(each.codes.any())],
        }

    def install(self, model: nn.Module, plan: Plan, steps: int) -> Hooks:
        """Replace planes by LSQ's or STE's quantizers; activations are quantized already."""
        rivals.detach(model)
        hooks = self.quantize(model, plan, steps)
        for name, layer in rivals.rival_layers(model).items():
            if isinstance(layer, LsqWeight):
                layer.set_step(plan["steps"][name])  # goes on from the same values
        return hooks


@dataclass(frozen=True)
class Method:
    """A way to train a classifier: stages whose shares sum to 1.

    Raises:
        InputError: They do not.
    """

    name: str
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        total = sum(stage.share for stage in self.stages)
        if abs(total - 1) > 1e-9:
            raise InputError("expected shares that sum to 1", field="stages", value=total)

    def harden(self, model: nn.Module, batches: Iterable[Tensor] | None) -> nn.Module:
        """Return plain modules with the final weights, BatchNorm estimated anew on the batches.

        CSQ's come as a copy, the others' in place.
        """
        if csq.bit_layers(model):
            return csq.harden(model, batches)
        if rivals.rival_layers(model):
            return rivals.harden(model, batches)
        return model if batches is None else csq.reestimate_batchnorm(model, batches)
