"""CSQ in Hugging Face's Trainer: the schedule as a callback, the budget's penalty in the loss.

All state of the schedule is in the model's state dict, so that the Trainer's own checkpoints resume it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from csq.optimizer_groups import param_groups
from csq.parametrization import bit_layers
from csq.schedule import Schedule
from shared_core import InputError

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as missing:
    if missing.name != "transformers":
        raise
    raise InputError("transformers is not installed: pip install 'csq-quant[transformers]'") from missing

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class ScheduleCallback(TrainerCallback):
    """Makes the schedule when training begins, goes on by one step with the optimizer, logs.

    The log has `csq_precision` and `csq_beta` beside the loss. Use `add_schedule`: the callback alone does
    not reach the loss.

    Args:
        target_bits: As for `csq.Schedule`.
        options: Further arguments of `csq.Schedule`; the number of steps is the Trainer's.
    """

    def __init__(self, target_bits: float | None, **options: Any) -> None:
        self.target_bits, self.options = target_bits, options
        self.schedule: Schedule | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the state that stands in the model, which may be that of a checkpoint."""
        self.schedule = Schedule(kwargs["model"], self.target_bits, state.max_steps, **self.options)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise β; fix the scheme where the search ends."""
        assert self.schedule is not None
        self.schedule.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add precision and temperature to the training log."""
        if self.schedule is not None and logs is not None and "loss" in logs:
            numbers = {"csq_precision": self.schedule.precision(), "csq_beta": self.schedule.beta}
            logs.update(numbers)
            state.log_history[-1].update(numbers)


def add_schedule(trainer: Trainer, target_bits: float | None, **options: Any) -> ScheduleCallback:
    """Let a Trainer drive a parametrized model to a precision: before `trainer.train()`.

    The penalty is added to the loss that the Trainer computes in training, once a step, however many
    batches are accumulated; losses of evaluation stay as they are. Gates, masks and scales are taken out of
    the parameters that decay.

    Args:
        trainer: Its model went through `csq.parametrize`; its optimizer is not made yet.
        target_bits: As for `csq.Schedule`.
        options: Further arguments of `csq.Schedule`.

    Returns:
        The callback, whose `schedule` is there once training has begun.

    Raises:
        InputError: The model has no bit planes, or the Trainer has its optimizer already.
    """
    if trainer.model is None or not bit_layers(trainer.model):
        raise InputError("has no bit planes; call csq.parametrize first", field="trainer")
    if trainer.optimizer is not None:
        raise InputError(
            "has its optimizer already, which may decay gates; let the Trainer make it", field="trainer"
        )
    callback = ScheduleCallback(target_bits, **options)
    trainer.add_callback(callback)
    compute_loss, decaying = trainer.compute_loss, trainer.get_decay_parameter_names

    @functools.wraps(compute_loss)
    def with_penalty(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = compute_loss(model, inputs, *args, **kwargs)
        if not model.training or callback.schedule is None:
            return found
        items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        penalty = callback.schedule.penalty() / _parts(trainer, items)
        return (found[0] + penalty, *found[1:]) if isinstance(found, tuple) else found + penalty

    @functools.wraps(decaying)
    def without_gates(model: nn.Module) -> list[str]:
        free_ids = {id(parameter) for parameter in param_groups(model)[1]["params"]}
        free = {name for name, parameter in model.named_parameters() if id(parameter) in free_ids}
        return [name for name in decaying(model) if name not in free]

    patched: Any = trainer  # a method of this one Trainer; a subclass of the user's stays what it is
    patched.compute_loss, patched.get_decay_parameter_names = with_penalty, without_gates
    return callback


def _parts(trainer: Trainer, items: Tensor | int | None) -> int:
    """By how much to divide here: the Trainer divides accumulated losses, but not those it finds scaled."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = trainer.compute_loss_func is not None or (
            trainer.model_accepts_loss_kwargs and items is not None
        )
    return trainer.current_gradient_accumulation_steps if scaled else 1
