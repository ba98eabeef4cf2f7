"""Few-shot learning of relevance attention: ten documents, a hundred steps.

The released example trains W_q, W_k, a linear weight that starts at 0.07, and the whole model, with Adam at
3e-5, 10 examples an update, 10 steps of warm-up, then linear decay. It keeps the checkpoint with the best
mean of ROUGE-1, -2 and -L on validation documents.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from relattn.fewshot_data import FewShotExample, SteeredCollator
from relattn.generation import evaluating
from relattn.rouge import rouge_f1
from relattn.steered_model import SteeredModel
from relattn.steerer import Steerer
from relattn.training_state import TrainingState, load_state, save_state
from relattn.weights import RelAttnModule
from shared_core import InputError

__all__ = ["FewShotExample", "FewShotResult", "FewShotSettings", "SteeredCollator", "SteeredModel", "fit"]


@dataclass(frozen=True)
class FewShotSettings:
    """How to train. The defaults are those of the released example.

    Attributes:
        trainable: "all" (the model and the module), "cross_attention" (the decoder's cross-attentions and the
            module) or "new" (the module alone).
        steps: Updates.
        warmup: Updates over which the learning rate rises from 0; it falls back to 0 at the last.
        learning_rate: Adam's, at its highest.
        batch_size: Examples an update.
        micro_batch: Of these, so many go through the model at once.
        label_smoothing: Of the cross-entropy, 0 to 1.
        evaluate_every: Steps between validations.
        max_target_tokens: Longer summaries are cut.
        seed: Order of the examples and dropout.
        generation: Arguments for `generate` in validation.
    """

    trainable: str = "all"
    steps: int = 100
    warmup: int = 10
    learning_rate: float = 3e-5
    batch_size: int = 10
    micro_batch: int = 2
    label_smoothing: float = 0.0
    evaluate_every: int = 10
    max_target_tokens: int = 142
    seed: int = 0
    generation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.trainable not in ("all", "cross_attention", "new"):
            raise InputError(
                'expected "all", "cross_attention" or "new"', field="trainable", value=self.trainable
            )
        for name in ("steps", "batch_size", "micro_batch", "evaluate_every", "max_target_tokens"):
            if getattr(self, name) < 1:
                raise InputError("expected 1 or more", field=name, value=getattr(self, name))
        if not 0 <= self.warmup <= self.steps:
            raise InputError(f"expected 0 to {self.steps}, the steps", field="warmup", value=self.warmup)
        if not self.learning_rate > 0:
            raise InputError("expected a number above 0", field="learning_rate", value=self.learning_rate)
        if not 0 <= self.label_smoothing < 1:
            raise InputError("expected 0 to 1", field="label_smoothing", value=self.label_smoothing)


@dataclass(frozen=True)
class FewShotResult:
    """What training gave. The model and the module hold the parameters of the best step.

    Attributes:
        module: The trained module, for `Steerer(model, tokenizer, module=...)`.
        best_step: Updates behind the chosen parameters; 0 if no step beat the start.
        scores: Validation score by step, mean of ROUGE-1, -2 and -L F1, 0 to 1; step 0 is untrained.
        losses: Training loss of each step.
    """

    module: RelAttnModule
    best_step: int
    scores: dict[int, float]
    losses: list[float]


def new_module(model: PreTrainedModel) -> RelAttnModule:
    """The released few-shot example's module: trained relevance, linear weight from 0.07, no smoothing."""
    return RelAttnModule.for_model(
        model, relevance="trained", weight="linear", initial_weight=0.07, smooth_sigma=None
    )


def fit(
    model: PreTrainedModel,
    tokenizer: Any,
    train: Sequence[FewShotExample],
    validation: Sequence[FewShotExample],
    module: RelAttnModule | None = None,
    settings: FewShotSettings | None = None,
    *,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    source_prefix: str = "",
) -> FewShotResult:
    """Train relevance attention on a few examples.

    Args:
        model: The summarizer. Its parameters change, unless only the module's are trained.
        tokenizer: Of source and summary.
        train: Training examples.
        validation: Examples of other documents, to choose the best step.
        module: What to train; that of the released example by default.
        settings: See `FewShotSettings`.
        checkpoint: A file (safetensors) that holds the state after each validation.
        resume: Go on from the checkpoint, if there is one, to the same result as an uninterrupted run (to the
            bit on a CPU).
        on_step: Called after each update with its number, from 1, and its loss.
        source_prefix: See `Steerer`.

    Raises:
        InputError: No example; a document of both train and validation; nothing to train; a checkpoint of
            another run.
    """
    settings = settings or FewShotSettings()
    _check_examples(train, validation)
    module = new_module(model) if module is None else module
    steered = SteeredModel(
        model, tokenizer, module, label_smoothing=settings.label_smoothing, source_prefix=source_prefix
    )
    collate = SteeredCollator(steered.steerer, settings.max_target_tokens)
    parameters = _trainable(steered, settings.trainable)
    optimizer = torch.optim.Adam(parameters.values(), lr=settings.learning_rate)
    fingerprint = {
        **asdict(settings),
        "module": asdict(module.config),
        "source_prefix": source_prefix,
        "train": [e.fingerprint for e in train],
        "validation": [e.fingerprint for e in validation],
    }
    state = None
    if resume and checkpoint is not None and Path(checkpoint).exists():
        state = load_state(checkpoint, parameters, optimizer, fingerprint)
    if state is None:
        score = validate(steered.steerer, validation, settings.generation)
        state = TrainingState(0, 0, {0: score}, [], _copy(parameters))
    with _only_trainable(steered, parameters):
        for step in range(state.step, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * learning_rate_factor(
                    step, settings.warmup, settings.steps
                )
            chosen = [
                train[n] for n in examples_of_step(step, settings.batch_size, len(train), settings.seed)
            ]
            loss = _update(steered, optimizer, collate, chosen, settings, step)
            state.losses.append(loss)
            state.step = step + 1
            if state.step % settings.evaluate_every == 0 or state.step == settings.steps:
                state.scores[state.step] = validate(steered.steerer, validation, settings.generation)
                if state.scores[state.step] > state.scores[state.best_step]:
                    state.best_step, state.best = state.step, _copy(parameters)
                if checkpoint is not None:
                    save_state(checkpoint, state, parameters, optimizer, fingerprint)
            if on_step is not None:
                on_step(state.step, loss)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.best[name])
    return FewShotResult(module, state.best_step, state.scores, state.losses)


def validate(steerer: Steerer, examples: Sequence[FewShotExample], generation: dict[str, Any]) -> float:
    """Mean of ROUGE-1, -2 and -L F1 (0 to 1) of steered summaries against the examples'."""
    summaries = steerer.generate([e.document for e in examples], [e.control for e in examples], **generation)
    pairs = [(s.text, e.summary) for s, e in zip(summaries, examples, strict=True)]
    kinds = ("rouge1", "rouge2", "rougeL")
    return sum(rouge_f1(*pair, kind) for pair in pairs for kind in kinds) / (len(kinds) * len(pairs))


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Linear rise over `warmup` steps from 0 to 1, then linear fall to 0 at `steps`; `step` counts from 0."""
    if step < warmup:
        return step / warmup
    return (steps - step) / max(1, steps - warmup)


def examples_of_step(step: int, batch_size: int, examples: int, seed: int) -> list[int]:
    """Which examples an update sees: all in a new order each epoch, a function of step and seed alone."""
    found = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, examples)
        order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        found.append(int(order[place]))
    return found


def _update(
    steered: SteeredModel,
    optimizer: torch.optim.Optimizer,
    collate: SteeredCollator,
    examples: Sequence[FewShotExample],
    settings: FewShotSettings,
    step: int,
) -> float:
    """One update; the loss is the mean over the summary tokens of all its examples, however they are cut."""
    parts = [
        collate(examples[n : n + settings.micro_batch]) for n in range(0, len(examples), settings.micro_batch)
    ]
    tokens = sum(int((part["labels"] != -100).sum()) for part in parts)
    device = steered.model.device
    total = 0.0
    optimizer.zero_grad()
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # dropout of a step depends on the seed and the step alone
        torch.manual_seed(settings.seed * 1_000_003 + step)
        steered.train()
        for part in parts:
            share = int((part["labels"] != -100).sum()) / tokens
            loss = steered(**{name: tensor.to(device) for name, tensor in part.items()})["loss"] * share
            loss.backward()
            total += loss.item()
        steered.eval()
    optimizer.step()
    return total


def _check_examples(train: Sequence[FewShotExample], validation: Sequence[FewShotExample]) -> None:
    for name, examples in (("train", train), ("validation", validation)):
        if not examples:
            raise InputError("expected one example or more, got none", field=name)
    both = {e.document_id for e in train} & {e.document_id for e in validation}
    if both:
        raise InputError(
            f"document {min(both)!r} is among the training documents too: split by document",
            field="validation",
        )


def _trainable(steered: SteeredModel, which: str) -> dict[str, nn.Parameter]:
    found = {f"module.{name}": p for name, p in steered.module.named_parameters()}
    if which == "all":
        found |= {f"model.{name}": p for name, p in steered.model.named_parameters()}
    elif which == "cross_attention":
        parts = {
            id(p) for x in steered.steerer.layers for m in (x.attention, x.output) for p in m.parameters()
        }
        found |= {f"model.{name}": p for name, p in steered.model.named_parameters() if id(p) in parts}
    if not found:
        raise InputError(
            'this module has no parameters: train "all", or a weight that is not "fixed"', field="module"
        )
    return found


@contextmanager
def _only_trainable(steered: SteeredModel, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for the chosen parameters only; every flag and mode is as before behind the block."""
    chosen = {id(parameter) for parameter in parameters.values()}
    flags = [(parameter, parameter.requires_grad) for parameter in steered.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in chosen)
        with evaluating(steered):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def _copy(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
