"""Temperature, budget and stages of a training run (CSQ, Section 3).

The schedule computes; what it has to remember stands in buffers of the model's bit planes. So a model's state
dict resumes a run to the last bit, and copies of a model in several processes stay alike.
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from csq.budget import Average, Budget, rare_values, settle, top_run
from csq.parametrization import bit_layers
from csq.planes import DEAD
from csq.storage import file_bits
from shared_core import InputError

Finetune = Literal["hold", "reramp"]
OnMiss = Literal["warn", "raise", "settle"]

PLAN = (
    "target_bits", "steps", "search steps", "beta_max", "lam", "budget", "finetune", "contiguous", "min_bits",
    "on_miss",
)  # fmt: skip
"""What the numbers of a plan are, in the order in which bit planes keep them."""

SETTLED = 0.02
"""How far from its target, as a share of it, a settled scheme may lie without a warning."""

MISS = 0.25
"""Bits between average and target from which the controller has failed."""
REFRESH = 16
"""Steps between looks for planes that are switched off for good: a look costs the device a stop."""


class Schedule:
    """Drives a parametrized model from soft bits to an exact scheme at a target precision.

    The search takes the first steps: β grows exponentially with each step from 1 to beta_max, and
    `penalty` pushes the average precision down, or up, to the target. Then the scheme is fixed: masks become
    1[m_B >= 0] for good, the penalty is over, and weight gates train on.

    Args:
        model: what `csq.parametrize` returned, also inside DistributedDataParallel or torch.compile.
        target_bits: average precision wanted, in the unit of `budget`; None where all masks are fixed.
        steps: optimizer steps of the whole run, at least 2.
        budget: what the average is over. `weights`: selected planes, each layer counted by its number of
            weights: the model's size. `layers`: each layer alike, as the official code does; says little
            about size. `bytes`: stored bits by weights, sign and gaps included; the least possible is 2.
            The search counts what a mask can make (`csq.storage.stored_bits`), and its penalty pushes all
            planes of a layer alike, also those inside a run, which cost nothing; `precision` counts so too.
            `on_miss="settle"` counts what the weights really take when the scheme is fixed, codebooks
            included; where finetuning carries that past 2 %, the last step gives up values that few weights
            have, for the nearest ones.
        lam: λ, the penalty's weight. A mask moves at most lr / (1 - momentum) · λ |ΔS| β / 4 a step: 0.1 to
            0.5 for runs of 100 to 1000 steps, 0.01 for 600 epochs.
        search: share of the steps that search, above 0, at most 1.
        beta_max: the temperature that the search ends at.
        finetune: `hold` keeps β there for the rest; `reramp` starts again from 1, with gates put back to ±m0
            so that the function goes on (`csq.BitPlanes.recentre`).
        contiguous: fix each layer's scheme to a run of planes: as many as were selected, from the highest
            selected one down, so that the values are a uniform grid.
        min_bits: planes that each layer keeps at least when the scheme is fixed. A layer without planes is
            zero, which a model survives only beside a residual path. 0 permits it.
        on_miss: when the search ends further than 0.25 bits from the target: `warn`, or `raise` InputError.
            `settle` switches planes with the smallest |m_B| off or on until the average is within 2 %,
            whatever the distance.
        trace_every: steps between records in `trace`; a hundredth of the run unless given.

    Attributes:
        trace: records of `step`, `beta`, `precision` (the average of `budget`), `searching` and `bits`
            (planes by layer name). Precision falls, grows again and settles: the method's "growing".

    Raises:
        InputError: a value out of range; a model without bit planes; a model whose state belongs to a run
            with another plan, as when a checkpoint is resumed with another target. All arguments but
            trace_every are the plan.

    Example:
        >>> import torch, csq
        >>> model = csq.parametrize(torch.nn.Linear(8, 4))
        >>> optimizer = torch.optim.SGD(csq.param_groups(model), lr=0.1, momentum=0.9)
        >>> schedule = csq.Schedule(model, target_bits=3.0, steps=40)
        >>> for _ in range(40):
        ...     loss = (model(torch.ones(2, 8)) - 1).square().mean() + schedule.penalty()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     schedule.step()
        >>> schedule.searching, schedule.beta
        (False, 200.0)
    """

    def __init__(
        self,
        model: nn.Module,
        target_bits: float | None,
        steps: int,
        *,
        budget: Budget = "weights",
        lam: float = 0.1,
        search: float = 0.75,
        beta_max: float = 200.0,
        finetune: Finetune = "hold",
        contiguous: bool = False,
        min_bits: int = 1,
        on_miss: OnMiss = "warn",
        trace_every: int | None = None,
    ) -> None:
        self.layers = bit_layers(model)
        if not self.layers:
            raise InputError("has no bit planes; call csq.parametrize first", field="model")
        self._planes = list(self.layers.values())
        self.n_bits = self._planes[0].n_bits
        self.target_bits, self.steps, self.lam, self.beta_max = target_bits, steps, lam, beta_max
        self.budget: Budget = budget
        self.finetune: Finetune = finetune
        self.contiguous, self.min_bits, self.on_miss = contiguous, min_bits, on_miss
        self._check(search)
        self.search_steps = min(steps, max(1, round(search * steps)))
        self.trace_every = trace_every or max(1, steps // 100)
        self.trace: list[dict[str, Any]] = []
        counts = [planes.positive[0].numel() for planes in self._planes]
        self._average = Average(counts, self.n_bits, budget)
        self._plan = self._describe()
        self._seen: tuple[int, int] | None = None
        self._step = 0
        self._start()

    @property
    def step_count(self) -> int:
        """Steps done."""
        self._sync()
        return self._step

    @property
    def searching(self) -> bool:
        """True until the scheme is fixed."""
        return any(planes.searching for planes in self._planes)

    @property
    def beta(self) -> float:
        """The temperature β of the coming step."""
        return self._temperature(self.step_count)

    def precision(self) -> float:
        """The average precision of the hard masks, in the unit of `budget`."""
        return float(self._average(torch.stack([p.selected() for p in self._planes])))

    def penalty(self) -> Float[Tensor, ""]:
        """λ ΔS Σ_l w_l Σ_b f_β(m_B^b), to be added to the loss; 0 once the scheme is fixed.

        ΔS = (average of the hard masks - target) / n is a constant for autograd: above the target the term
        makes masks fall, below it, grow. w_l is the layer's part in the budget over the greatest part of any
        layer, so 1 for all where budget="layers".
        """
        self._sync()
        device = self._planes[0].mask.device
        if not self.searching or self.target_bits is None:
            return torch.zeros((), device=device)
        with torch.autocast(device.type, enabled=False):
            masks = torch.stack([planes.mask.to(device) for planes in self._planes])
            gates = torch.sigmoid(masks * self._planes[0].temperature)
            excess = (self._average(masks.detach() >= 0) - self.target_bits) / self.n_bits
            influence = (self._average.shares / self._average.shares.max()).to(device, gates.dtype)
            return self.lam * excess.to(gates.dtype) * (influence * gates.sum(1)).sum()

    @torch.no_grad()
    def step(self) -> None:
        """Go on by one optimizer step: raise β and, where the search ends, fix the scheme."""
        self._sync()
        self._step += 1
        if self._step == self.search_steps and self.searching:
            self._fix()
        if self._step == self.steps and self.budget == "bytes" and self.on_miss == "settle":
            self._meet_file()
        beta = self._temperature(self._step)
        for planes in self._planes:
            planes.step.fill_(self._step)
            planes.set_temperature(beta)
        self._seen = _stamp(self._planes[0].step)
        if self.searching and self._step % REFRESH == 0:
            self._skip_dead_planes(beta)
        if self._step % self.trace_every == 0 or self._step in (self.search_steps, self.steps):
            self._record()

    # Stages.

    def _temperature(self, step: int) -> float:
        if step <= self.search_steps:
            progress = step / self.search_steps
            if step == self.search_steps and self.finetune == "reramp" and self.steps > step:
                progress = 0.0
        elif self.finetune == "reramp":
            progress = min(1.0, (step - self.search_steps) / (self.steps - self.search_steps))
        else:
            progress = 1.0
        return float(self.beta_max**progress)

    def _skip_dead_planes(self, beta: float) -> None:
        live = (torch.stack([planes.mask for planes in self._planes]) * beta > DEAD).cpu()
        for planes, row in zip(self._planes, live, strict=True):
            if planes.searching:
                planes.set_live(row.to(planes.live.device))

    def _fix(self) -> None:
        masks = torch.stack([planes.mask.detach() for planes in self._planes]).cpu()
        if not bool(torch.isfinite(masks).all()):
            raise InputError("masks are not finite: the training diverged", field="model")
        chosen = torch.stack([planes.selected() for planes in self._planes]).cpu()
        chosen = self._keep_least(chosen, masks)
        if self.target_bits is not None:
            chosen = self._meet_target(chosen, masks)
        for planes, row in zip(self._planes, chosen, strict=True):
            planes.set_live(row.to(planes.live.device), fix=True)
            if self.finetune == "reramp" and self.steps > self.search_steps:
                planes.recentre()

    def _keep_least(self, chosen: Bool[Tensor, "layers planes"], masks: Tensor) -> Tensor:
        chosen = chosen.clone()
        for name, row, mask in zip(self.layers, chosen, masks, strict=True):
            if int(row.sum()) < self.min_bits:
                row[:] = False
                row[mask.topk(self.min_bits).indices] = True
                warnings.warn(
                    f"{name}: the search kept fewer than min_bits={self.min_bits} planes; its strongest "
                    "are kept",
                    stacklevel=4,
                )
        return torch.stack([top_run(row) for row in chosen]) if self.contiguous else chosen

    def _meet_target(self, chosen: Bool[Tensor, "layers planes"], masks: Tensor) -> Tensor:
        assert self.target_bits is not None
        if self.on_miss == "settle":
            settled, reached = settle(
                chosen,
                masks,
                self._average,
                self.target_bits,
                min_bits=self.min_bits,
                contiguous=self.contiguous,
                cost=cache(self._file_bits) if self.budget == "bytes" else None,
            )
            if abs(reached - self.target_bits) > SETTLED * self.target_bits:
                warnings.warn(
                    f"settled at {reached:.3f} bits where {self.target_bits:g} were asked for: no plane that "
                    "could be switched is small enough",
                    stacklevel=4,
                )
            return settled
        reached = float(self._average(chosen))
        if abs(reached - self.target_bits) > MISS:
            direction = "raise lam or train longer" if reached > self.target_bits else "lower lam"
            message = (
                f"the search ended at {reached:.2f} bits where {self.target_bits:g} were asked for; "
                f"{direction}, or use on_miss='settle'"
            )
            if self.on_miss == "raise":
                raise InputError(message, field="target_bits")
            warnings.warn(message, stacklevel=4)
        return chosen

    def _file_bits(self, layer: int, row: tuple[bool, ...]) -> float:
        """Bits a weight that a layer would take in the file as its weights are now, its codebook included."""
        return file_bits(self._codes(layer, row))

    def _codes(self, layer: int, row: tuple[bool, ...]) -> np.ndarray:
        """Codes of a layer with some of its planes, in units of the lowest one, as files have them."""
        planes = self._planes[layer]
        codes = planes.codes(torch.tensor(row, device=planes.mask.device)).cpu().numpy()
        return codes >> row.index(True) if any(row) else codes

    def _meet_file(self) -> None:
        """Give up rare values where finetuning carried the file past its budget.

        A value that one weight alone has may cost every weight of its layer a bit. Weights of such values
        take the gates of one that has the nearest other value; where most is saved for a weight goes first.
        """
        if self.target_bits is None:
            return
        codes = [self._codes(n, tuple(p.selected().tolist())) for n, p in enumerate(self._planes)]
        shares: list[float] = self._average.shares.tolist()
        while True:
            reached = sum(share * file_bits(own) for share, own in zip(shares, codes, strict=True))
            if reached <= (1 + SETTLED) * self.target_bits:
                return
            found = [
                (shares[layer] * saved / len(weights), layer, weights, instead)
                for layer, own in enumerate(codes)
                for saved, weights, instead in [rare_values(own)]
                if saved > 0
            ]
            if not found:
                warnings.warn(
                    f"finetuning moved what the file takes to {reached:.3f} bits where {self.target_bits:g} "
                    "were asked for: too many weights have the values that cost it",
                    stacklevel=3,
                )
                return
            _, layer, weights, instead = max(found, key=lambda one: one[0])
            codes[layer].reshape(-1)[weights] = codes[layer].reshape(-1)[instead]
            for gates in (self._planes[layer].positive, self._planes[layer].negative):
                flat = gates.flatten(1)
                flat[:, weights] = flat[:, instead]
                gates.copy_(flat.view_as(gates))

    def _record(self) -> None:
        selected = torch.stack([planes.selected() for planes in self._planes]).cpu()
        self.trace.append(
            {
                "step": self._step,
                "beta": self._temperature(self._step),
                "precision": float(self._average(selected)),
                "searching": self.searching,
                "bits": dict(zip(self.layers, selected.sum(1).tolist(), strict=True)),
            }
        )

    # State, which stands in the model.

    def _describe(self) -> Tensor:
        """The plan in numbers, PLAN_FIELDS of them."""
        return torch.tensor(
            [
                -1 if self.target_bits is None else self.target_bits,  # masks are fixed
                self.steps,
                self.search_steps,
                self.beta_max,
                self.lam,
                get_args(Budget).index(self.budget),
                get_args(Finetune).index(self.finetune),
                self.contiguous,
                self.min_bits,
                get_args(OnMiss).index(self.on_miss),
            ],
            dtype=torch.float64,
        )

    @torch.no_grad()
    def _start(self) -> None:
        self._sync()
        if self._step == 0:
            for planes in self._planes:
                planes.plan.copy_(self._plan)
                planes.set_temperature(self._temperature(0))
            self._record()

    def _sync(self) -> None:
        """Read the state anew if something but `step` wrote it: a loaded state dict, a broadcast."""
        if self._seen == (stamp := _stamp(self._planes[0].step)):
            return
        self._seen = stamp
        self._step = int(self._planes[0].step)
        found = self._planes[0].plan.cpu()
        if self._step > 0 and not torch.equal(found, self._plan):
            differing = [
                f"{name} {_words(name, old)} there, {_words(name, new)} here"
                for name, old, new in zip(PLAN, found.tolist(), self._plan.tolist(), strict=True)
                if old != new
            ]
            if self._step >= found[PLAN.index("steps")]:
                state = "has finished a run"
                advice = "to start anew, call csq.parametrize on csq.harden(model)"
            else:
                state, advice = "is in the midst of a run", "resume with the same"
            raise InputError(f"{state} with another plan ({'; '.join(differing)}); {advice}", field="model")

    def _check(self, search: float) -> None:
        n = self.n_bits
        if any(planes.n_bits != n for planes in self._planes):
            raise InputError("its layers have different n_bits; a schedule drives one number of planes")
        if self.target_bits is None:
            if any(planes.searching for planes in self._planes):
                raise InputError("expected a number, as the model's masks are learned", field="target_bits")
        elif not isinstance(self.target_bits, int | float) or not math.isfinite(self.target_bits):
            raise InputError("expected a number", field="target_bits", value=self.target_bits)
        else:
            least, most = (2.0, n + 1.0) if self.budget == "bytes" else (1 / n, float(n))
            if not least <= self.target_bits <= most:
                raise InputError(
                    f"expected {least:g} to {most:g} bits for {n} planes; less would prune the model away",
                    field="target_bits",
                    value=self.target_bits,
                )
        for field, value, known in (
            ("budget", self.budget, get_args(Budget)),
            ("finetune", self.finetune, get_args(Finetune)),
            ("on_miss", self.on_miss, get_args(OnMiss)),
        ):
            if value not in known:
                raise InputError(f"expected {', '.join(known)}", field=field, value=value)
        if not isinstance(self.steps, int) or self.steps < 2:
            raise InputError("expected a whole number of steps, at least 2", field="steps", value=self.steps)
        for field, value, low, high in (
            ("lam", self.lam, 0.0, math.inf),
            ("search", search, 0.0, 1.0),
            ("beta_max", self.beta_max, 1.0, 1e4),
            ("min_bits", self.min_bits, -1, n),
        ):
            if not low < value <= high:
                raise InputError(f"expected above {low:g}, at most {high:g}", field=field, value=value)


def _words(name: str, value: float) -> str:
    """A number of the plan as the argument that it stands for."""
    choices = {"budget": get_args(Budget), "finetune": get_args(Finetune), "on_miss": get_args(OnMiss)}
    if name in choices:
        return choices[name][int(value)]
    if name == "contiguous":
        return str(bool(value))
    return "None" if name == "target_bits" and value < 0 else f"{value:g}"


def _stamp(tensor: Tensor) -> tuple[int, int]:
    """Changes when a tensor is written to or replaced by another; asks nothing of its device."""
    return id(tensor), tensor._version
