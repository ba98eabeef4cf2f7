"""An optimizer wrapper for record-level training with Opacus' per-sample gradients.

It takes the place of `opacus.optimizers.DPOptimizer`: the loop, the model and the wrapped optimizer stay as
they are. One record is one participant; all of them live in this process, which sees every gradient.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from shared_core import InputError
from smm_dp.ledger import PrivacyLedger
from smm_dp.mechanism import SkellamMixture
from smm_dp.packing import add_residues
from smm_dp.randomness import IntegerReader, secure_source
from smm_dp.training import seeded_release

try:
    import torch
except ModuleNotFoundError as _error:
    raise InputError(f"{_error.name} is not installed: pip install 'smm-dp[opacus]'") from _error


class SMMOptimizer(torch.optim.Optimizer):
    """Replaces gradients by the Skellam mixture mechanism's estimate, then lets an optimizer step.

    `step` reads `grad_sample` of every parameter, charges the ledger, encodes each record's gradient, adds
    the residues modulo 2^b, decodes, divides by the *expected* batch size, and calls the wrapped optimizer's
    `step`. A batch may be empty (a Poisson sample can be): then pure noise is released.

    Args:
        optimizer: Any torch optimizer of the parameters of an `opacus.GradSampleModule` that keeps its
            default, loss_reduction="mean", with a loss that is a mean over records.
        mechanism: Of one round; `dim` is the number of parameters. The records of a batch divide its
            `mu_total` among themselves, however many they are.
        ledger: Charged before each release; must have been opened for the mechanism's clip, noise, bound
            and accounting, with the sampling rate of the batches.
        expected_batch_size: qN, not the size that a batch happens to have.
        seed: None for cryptographic noise and a fresh rotation each step. A number draws the noise of the
            whole sum from that seed instead: a simulation, fast, that protects nobody.

    Raises:
        InputError: The ledger or the number of parameters is not the mechanism's; `step` raises it, before
            it charges, where per-sample gradients are missing, accumulated over several backward passes,
            unequal in number, or not finite.

    >>> model, x = torch.nn.Linear(2, 1), torch.ones(4, 2)
    >>> mechanism = SkellamMixture(3, 256.0, 16.0, 16, 40000.0, 4, 16.0, "numeric")
    >>> from smm_dp.privacy import RoundPrivacy
    >>> ledger = PrivacyLedger(None, 4.0, 1e-5, RoundPrivacy(256.0, 40000.0, 16.0, "numeric", 0.5))
    >>> optimizer = SMMOptimizer(torch.optim.SGD(model.parameters(), 0.1), mechanism, ledger,
    ...                          expected_batch_size=4)
    >>> for value in model.parameters():  # what GradSampleModule's backward pass would set
    ...     value.grad_sample = torch.zeros(4, *value.shape)
    >>> optimizer.step()
    >>> optimizer.zero_grad()
    >>> ledger.rounds
    1
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        mechanism: SkellamMixture,
        ledger: PrivacyLedger,
        *,
        expected_batch_size: float,
        seed: int | None = None,
    ) -> None:  # the base class is not initialised: groups and state are the wrapped optimizer's
        self.original_optimizer, self.mechanism, self.ledger = optimizer, mechanism, ledger
        self.expected_batch_size, self.seed = expected_batch_size, seed
        if not expected_batch_size > 0:
            raise InputError(
                "expected a positive number", field="expected_batch_size", value=expected_batch_size
            )
        ledger.check(mechanism)
        if ledger.round_privacy.mu != mechanism.mu_total:
            raise InputError(
                f"the ledger was opened for {ledger.round_privacy.mu:g}, the mechanism has "
                f"{mechanism.mu_total:g}",
                field="mu",
                value=ledger.round_privacy.mu,
            )
        dim = sum(value.numel() for value in self.params)
        if dim != mechanism.dim:
            raise InputError(
                f"the mechanism is for vectors of length {mechanism.dim}, the parameters have {dim} entries",
                field="dim",
                value=mechanism.dim,
            )
        if seed is not None:
            self._release = seeded_release(mechanism, seed, "optimizer")

    @property
    def params(self) -> list[torch.nn.Parameter]:
        """Parameters in the order of their groups: the order in which gradients are flattened."""
        return [value for group in self.param_groups for value in group["params"]]

    @property  # a property, as in Opacus: there is one list of groups, the wrapped optimizer's
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's."""
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, groups: list[dict[str, Any]]
    ) -> None:
        self.original_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's."""
        return self.original_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride] as above
        self.original_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.original_optimizer.defaults = defaults

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state; spent budget is the ledger's matter."""
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the wrapped optimizer's state."""
        self.original_optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and per-sample gradients."""
        for value in self.params:
            setattr(value, "grad_sample", None)  # noqa: B010 Opacus' attribute, unknown to torch's types
        self.original_optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Release the mean gradient of the records in the batch, and step.

        Per-sample gradients are used up: a second step needs a second backward pass.

        Raises:
            BudgetExceeded: By the ledger; nothing was released, parameters are as before.
            InputError: Per-sample gradients are absent or not finite (nothing was charged), or so large that
                the grid has no room for them (charged, nothing released). That training stopped tells that
                there was such a record: keep it to yourself.
        """
        if closure is not None:
            with torch.enable_grad():
                closure()
        vectors = self._vectors()
        self.ledger.charge()
        number = self.ledger.rounds - 1  # never twice the same, also when a run is resumed
        total = self._encoded(vectors) if self.seed is None else self._release(number, vectors).estimate
        mean, start = torch.from_numpy(total / self.expected_batch_size), 0
        for value in self.params:
            part = mean[start : start + value.numel()]
            value.grad = part.view_as(value).to(value.device, value.dtype)
            setattr(value, "grad_sample", None)  # noqa: B010
            start += value.numel()
        return self.original_optimizer.step()

    def _vectors(self) -> Float[np.ndarray, "n dim"]:
        columns = []
        for place, value in enumerate(self.params):
            sample = getattr(value, "grad_sample", None)
            if sample is None:
                raise InputError(
                    f"parameter {place} of shape {tuple(value.shape)} has no per-sample gradient: wrap the "
                    "model in opacus.GradSampleModule and run a backward pass before each step",
                    field="grad_sample",
                )
            if not isinstance(sample, torch.Tensor):
                raise InputError(
                    "per-sample gradients of several backward passes: a record in two of them would be "
                    "counted twice; call zero_grad() before each backward pass",
                    field="grad_sample",
                    value=len(sample),
                )
            if sample.shape[1:] != value.shape:
                raise InputError(
                    f"parameter {place} has per-sample gradients of shape {tuple(sample.shape)}, expected "
                    f"(records, {', '.join(map(str, value.shape))})",
                    field="grad_sample",
                )
            columns.append(sample.detach().flatten(1).cpu())
        counts = {len(column) for column in columns}
        if len(counts) > 1:
            raise InputError(
                "parameters have per-sample gradients of different numbers of records",
                field="grad_sample",
                value=sorted(counts),
            )
        vectors = torch.cat(columns, dim=1).numpy()
        bad = np.argwhere(~np.isfinite(vectors))
        if bad.size:
            record, index = (int(number) for number in bad[0])
            raise InputError(
                f"record {record} of the batch has a gradient that is not finite at index {index}",
                field="grad_sample",
                value=float(vectors[record, index]),
            )
        return vectors

    def _encoded(self, vectors: Float[np.ndarray, "n dim"]) -> Float64[np.ndarray, " dim"]:
        """Return the decoded sum of encodings with cryptographic noise; an empty batch sends one zero."""
        rows = vectors if len(vectors) else np.zeros((1, self.mechanism.dim))
        seed = IntegerReader(secure_source()).below(2**31)
        mechanism = replace(self.mechanism, participants=len(rows), rotation_seed=seed)
        residues = (mechanism.encode(row, participant=f"record {i}") for i, row in enumerate(rows))
        return mechanism.decode(add_residues(residues, mechanism.padded_dim, mechanism.modulus_bits))
