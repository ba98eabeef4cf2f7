"""The bit planes of one weight, as a parametrization in the sense of torch.nn.utils.parametrize."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from csq.functional import GradientBuffers, plane_sum, step_size
from shared_core import InputError

DEAD = -17.0
"""β m_B below which a mask gate is 0 in float32 arithmetic (4e-8), and its plane is skipped."""
GATE_INIT = 0.1
"""m0, unless another is given."""
PLAN_FIELDS = 10
"""Numbers that a schedule writes into `plan`; see csq.schedule."""


class BitPlanes(nn.Module):
    """The gates of one weight. Called without arguments, it returns the weight.

    Parameters, always float32 (a slope p(1-p) of 16 bits would underflow): `positive` and `negative`
    `(planes, *shape)`, least significant plane first; `mask` `(planes,)`; `log_scale` `()`. All state of the
    schedule is in buffers, so that a model's state dict alone resumes it: `temperature` β, `live` (planes
    that are computed; once `mask_fixed`, the scheme), `step` and `plan`.

    Args:
        weight: the weight to represent, any shape, finite.
        n_bits: planes, 1 to 8.
        init: `scratch` is the official one: gates are the bits 0/1 of round(|W| (2^n - 1) / max|W|) and masks
            are 0; the first function is then about 0.116 W, for models trained from the start with
            normalisation. `pretrained` puts gates at ±gate_init and divides by what such gates yield at the
            current temperature: W is the n-bit-rounded weight at step 0, and as long as gates do not move.
        mask: `fixed` keeps all planes from the start (CSQ-uniform), `search` learns which to keep.
        gate_init: m0 of `pretrained`, above 0.
        compiled: use the fused kernel.
    """

    undecayed = ("positive", "negative", "mask", "log_scale")

    positive: nn.Parameter
    negative: nn.Parameter
    mask: nn.Parameter
    log_scale: nn.Parameter
    temperature: Tensor
    live: Tensor
    mask_fixed: Tensor
    step: Tensor
    plan: Tensor
    centres: Tensor
    gain: Tensor

    def __init__(
        self,
        weight: Tensor,
        n_bits: int = 8,
        *,
        init: Literal["pretrained", "scratch"] = "pretrained",
        mask: Literal["search", "fixed"] = "search",
        gate_init: float = GATE_INIT,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.n_bits, self.compiled, self.dtype = n_bits, compiled, weight.dtype
        shape, device = (n_bits, *weight.shape), weight.device
        self.positive = nn.Parameter(torch.empty(shape, device=device))
        self.negative = nn.Parameter(torch.empty(shape, device=device))
        self.mask = nn.Parameter(torch.empty(n_bits, device=device))
        # Its logarithm is learned: s stays above 0, and a step changes it in proportion.
        self.log_scale = nn.Parameter(torch.empty((), device=device))
        centred = init == "pretrained"
        searching = mask == "search"
        self.register_buffer("temperature", torch.ones((), device=device))
        self.register_buffer("live", torch.ones(n_bits, dtype=torch.bool, device=device))
        self.register_buffer("mask_fixed", torch.tensor(not searching, device=device))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("plan", torch.zeros(PLAN_FIELDS, dtype=torch.float64, device=device))
        # m0 of weight and mask gates that the gain undoes; 0 for none.
        self.register_buffer("centres", torch.tensor([gate_init if centred else 0.0] * 2, device=device))
        # Follows from the buffers above; kept, as it changes once a step and is wanted by each forward pass.
        self.register_buffer("gain", torch.ones((), device=device), persistent=False)
        self._gradient_memory = GradientBuffers()
        self._live_planes = tuple(range(n_bits))
        self._fixed = not searching
        with torch.no_grad():
            self._update_gain()
        self.reset(weight)

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        """Start anew from a weight of the same shape; the schedule's state stays."""
        values = weight.detach().float()
        top = values.abs().max()
        if not 0 < float(top) < math.inf:
            raise InputError("expected finite values, not all zero", field="weight", value=float(top))
        codes = (values.abs() / top * (2**self.n_bits - 1)).round().to(torch.int16)
        centre = float(self.centres[0])
        on, off = (centre, -centre) if centre else (1.0, 0.0)
        for plane in range(self.n_bits):
            bit = ((codes >> plane) & 1).bool()
            self.positive[plane] = torch.where(bit & (values > 0), on, off)
            self.negative[plane] = torch.where(bit & (values < 0), on, off)
        self.mask.fill_(float(self.centres[1]))
        self.log_scale.copy_(top.log())

    def right_inverse(self, weight: Tensor) -> tuple[()]:
        """Called by torch when a weight is assigned; the empty tuple says that no other tensor is kept."""
        self.reset(weight)
        return ()

    def forward(self) -> Tensor:
        """The weight, in the dtype that the layer's own weight had."""
        with torch.autocast(self.positive.device.type, enabled=False):
            weight = plane_sum(
                self.positive,
                self.negative,
                self.mask_gates(),
                self.scale * self.gain,
                self.temperature,
                self._live_planes,
                compiled=self.compiled,
                buffers=self._gradient_memory,
            )
            return weight.to(self.dtype)

    def mask_gates(self) -> Float[Tensor, " planes"]:
        """f_β(m_B), or the fixed scheme.

        In the latter the mask stays in the graph, with gradient 0: data-parallel training waits for the
        gradient of each parameter.
        """
        soft = torch.sigmoid(self.mask * self.temperature)
        return torch.where(self.mask_fixed, self.live.to(soft.dtype), soft)

    def _update_gain(self) -> None:
        """Set `gain` to 1 over what gates at their initial ±m0 yield at this temperature; 1 as β grows."""
        weight_gates = torch.tanh(self.temperature * self.centres[0] / 2)
        mask_gates = torch.sigmoid(self.temperature * self.centres[1])
        mask_gates = torch.where(self.mask_fixed, torch.ones_like(mask_gates), mask_gates)
        gain = torch.where(self.centres[0] > 0, 1 / (weight_gates * mask_gates), torch.ones_like(mask_gates))
        self.gain.copy_(gain)

    @property
    def scale(self) -> Float[Tensor, ""]:
        """s, above 0."""
        return self.log_scale.exp()

    @property
    def searching(self) -> bool:
        """True while the mask is learned."""
        return not self._fixed

    def selected(self) -> Bool[Tensor, " planes"]:
        """The hard mask: 1[m_B >= 0], or the fixed scheme."""
        return torch.where(self.mask_fixed, self.live, self.mask.detach() >= 0)

    def codes(self, selected: Bool[Tensor, " planes"] | None = None) -> Int[Tensor, "*shape"]:
        """Q of the hard weight q s / (2^n - 1), int16: all gates 1[m >= 0], planes of `selected` only."""
        selected = self.selected() if selected is None else selected
        codes = torch.zeros(self.positive.shape[1:], dtype=torch.int16, device=self.positive.device)
        for plane in selected.nonzero().flatten().tolist():
            difference = (self.positive[plane] >= 0).to(torch.int16) - (self.negative[plane] >= 0).to(
                torch.int16
            )
            codes += difference << plane
        return codes

    def step_size(self) -> float:
        """The hard weight of one unit of `codes`."""
        return float(step_size(self.scale.detach(), self.n_bits))

    @torch.no_grad()
    def set_temperature(self, temperature: float) -> None:
        """Set β."""
        self.temperature.fill_(temperature)
        self._update_gain()

    @torch.no_grad()
    def set_live(self, live: Bool[Tensor, " planes"], fix: bool = False) -> None:
        """Compute only these planes from now on; with `fix`, they are the scheme and the mask is done."""
        self.live.copy_(live)
        if fix:
            self.mask_fixed.fill_(True)
        self._read_state()

    @torch.no_grad()
    def recentre(self) -> None:
        """Put each weight gate at ±m0 on its side of 0; the soft weight is then the hard one, at every β.

        Without it, a temperature that starts again from 1 makes another function of the same gates: about
        0.1 to 0.5 W after a start from scratch; with the gain of a pretrained start, bits that moved from
        ±m0 to m count m / m0 times.
        """
        centre = float(self.centres[0]) or GATE_INIT
        for gates in (self.positive, self.negative):
            gates.copy_(torch.where(gates >= 0, centre, -centre))
        self.centres[0] = centre
        self._update_gain()

    @torch.no_grad()
    def _read_state(self) -> None:
        """Keep on the host what decides which kernels run: asking the device for it would stall each step."""
        self._update_gain()
        self._live_planes = tuple(self.live.nonzero().flatten().tolist())
        self._fixed = bool(self.mask_fixed)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_state()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BitPlanes:
        """Move; of a change of dtype only take note, for the weight that is returned."""

        def keep_precision(tensor: Tensor) -> Tensor:
            # As one row: planes of a convolution have five dimensions, which channels_last does not know.
            moved = fn(tensor.reshape(-1)).view(tensor.shape)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if fn(torch.empty(0, dtype=self.dtype, device=self.mask.device)).is_floating_point():
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.mask.device)).dtype
        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:  # noqa: D102 (torch's own hook for repr)
        return f"planes={self.n_bits}, shape={tuple(self.positive.shape[1:])}"
