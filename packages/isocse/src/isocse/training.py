"""Training for the study of dynamics: contrastive by sentence-transformers' trainer, or masked words.

The objective is in-batch InfoNCE on cosines, `-log exp(cos(h_i, h_i+) / tau) / sum_j exp(cos(h_i, h_j+) /
tau)`: sentence-transformers' `MultipleNegativesRankingLoss` with scale `1 / tau`. Continued masked language
modelling is the control: what any further training does.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isocse.dynamics import GeometryCallback
from isocse.encoders import POOLINGS, _cut_layers
from isocse.pairs import Judged, Pairs
from shared_core import InputError, files

OBJECTIVES = ("contrastive", "mlm")
_POOLING_MODES = {"cls": "cls", "mean": "mean", "max": "max", "last": "lasttoken"}
STATE_FILE = "settings.json"


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        objective: "contrastive" or "mlm".
        temperature: Of the contrastive objective.
        batch_size: Pairs, or texts, of a step.
        pooling: "cls", "mean", "max" or "last".
        steps: Updates; one epoch where None.
        learning_rate: Peak, after a warm-up over a tenth of the steps, then linear to 0.
        max_length: Tokens of a text.
        seed: Of order, dropout and new weights.
        freeze_embeddings: Keep the embedding layer as it is.
        cut: Train only so many of the lowest layers, as a smaller encoder.
        mask_share: Of tokens, for masked language modelling.
        device: "cpu", "cuda", or "auto".
    """

    objective: str = "contrastive"
    temperature: float = 0.05
    batch_size: int = 64
    pooling: str = "mean"
    steps: int | None = None
    learning_rate: float = 2e-5
    max_length: int = 32
    seed: int = 0
    freeze_embeddings: bool = False
    cut: int | None = None
    mask_share: float = 0.15
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            allowed = ", ".join(OBJECTIVES)
            raise InputError(f"expected one of {allowed}", field="objective", value=self.objective)
        if self.pooling not in POOLINGS:
            raise InputError(f"expected one of {', '.join(POOLINGS)}", field="pooling", value=self.pooling)
        for name in ("temperature", "learning_rate", "mask_share"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError("expected a number above 0", field=name, value=getattr(self, name))
        if self.objective == "contrastive" and self.batch_size < 2:
            raise InputError(
                "expected 2 or more: with one pair there is no negative and the loss is always 0",
                field="batch_size",
                value=self.batch_size,
            )
        for name, least in (("batch_size", 1), ("steps", 1), ("max_length", 3)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise InputError(f"expected {least} or more", field=name, value=getattr(self, name))

    @property
    def name(self) -> str:
        """A name for folders and legends."""
        if self.objective == "mlm":
            return f"mlm-batch{self.batch_size}-seed{self.seed}"
        return f"tau{self.temperature:g}-batch{self.batch_size}-{self.pooling}-seed{self.seed}"


@dataclass
class Trained:
    """A finished run.

    Attributes:
        model: The trained SentenceTransformer; of mlm, the transformer with its head.
        history: Records of the geometry.
        losses: Training loss by step.
        callback: The callback, with full reports.
    """

    model: Any
    history: list[dict[str, float]]
    losses: list[float]
    callback: GeometryCallback
    recipe: Recipe = field(default_factory=Recipe)


def train(
    base: str | Path,
    pairs: Pairs,
    corpus: Sequence[str],
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    judged: Judged | None = None,
    measure_steps: Sequence[int] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    save: bool = True,
    progress: bool = False,
    **options: Any,
) -> Trained:
    """Train an encoder and measure its geometry along the way.

    Args:
        base: A model's folder or name.
        pairs: What to learn from; for mlm, all their different texts.
        corpus: Held-out sentences to measure on.
        recipe: How to train.
        out: Folder for the model, dynamics.jsonl and checkpoints; nothing is written where None.
        judged: Texts with human similarities, for a score along the way.
        measure_steps: When to measure; 0, 1, 2, 4, 8, ... and the last step where None.
        checkpoint_every: Steps between checkpoints, of which the last is kept.
        resume: Go on from the checkpoint of an interrupted run with the same settings.
        save: Keep the trained model in `out`.
        progress: Show the trainer's progress bar.
        options: Of `analyze`.

    Raises:
        InputError: The data do not fill one batch, or `out` holds a run with other settings.
    """
    if len(pairs) < recipe.batch_size:
        raise InputError(
            f"expected {recipe.batch_size} pairs or more, one batch", field="batch_size", value=len(pairs)
        )
    folder = None if out is None else Path(out)
    if folder is not None:
        _claim(folder, recipe, base, len(pairs), resume)
    from transformers import PrinterCallback

    with _kept_randomness(recipe.seed):
        build = _contrastive if recipe.objective == "contrastive" else _masked
        trainer, model, tokenizer = build(base, pairs, recipe, folder, checkpoint_every, progress)
        callback = GeometryCallback(
            corpus,
            steps=measure_steps,
            tokenizer=tokenizer,
            judged=judged,
            path=None if folder is None else folder / "dynamics.jsonl",
            max_length=recipe.max_length,
            **{"pooling": recipe.pooling, **options},
        )
        trainer.add_callback(callback)
        trainer.remove_callback(PrinterCallback)  # it prints a line a step
        found = sorted(folder.glob("checkpoint-*"), key=_step_of) if folder is not None and resume else []
        with warnings.catch_warnings():
            # Pinned memory without a GPU, and the like: nothing that the person who trains can change.
            warnings.simplefilter("ignore")
            trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if folder is not None:
        if save:
            model.save_pretrained(str(folder / "model"))
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder / "model"))
        files.write_json(folder / "losses.json", losses)
    return Trained(model, callback.history, losses, callback, recipe)


def _contrastive(
    base: str | Path, pairs: Pairs, recipe: Recipe, folder: Path | None, every: int | None, progress: bool
) -> tuple[Any, Any, Any]:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.base.sampler import BatchSamplers
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = sentence_transformer(base, recipe)
    arguments: Any = SentenceTransformerTrainingArguments
    made = arguments(
        **_arguments(recipe, folder, every, progress),
        # A text twice in a batch would be its own negative.
        batch_sampler=BatchSamplers.NO_DUPLICATES,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=made,
        train_dataset=Dataset.from_dict(pairs.columns()),
        loss=MultipleNegativesRankingLoss(model, scale=1 / recipe.temperature),
    )
    return trainer, model, None


def sentence_transformer(base: str | Path, recipe: Recipe) -> Any:
    """A SentenceTransformer with the recipe's pooling on a transformer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from shared_core.command import usable_device

    try:
        transformer = Transformer(str(base), max_seq_length=recipe.max_length)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot be loaded: {reason}", field="base", value=str(base)) from error
    if recipe.cut is not None:
        _cut_layers(transformer.auto_model, recipe.cut)
    if recipe.freeze_embeddings:
        transformer.auto_model.embeddings.requires_grad_(False)
    mode: Any = _POOLING_MODES[recipe.pooling]
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=mode)
    model = SentenceTransformer(modules=[transformer, pooling], device=usable_device(recipe.device))
    # Not into the model's card: texts of the training data, chosen at random.
    model.model_card_data.set_widget_examples = lambda dataset: None
    return model


def _masked(
    base: str | Path, pairs: Pairs, recipe: Recipe, folder: Path | None, every: int | None, progress: bool
) -> tuple[Any, Any, Any]:
    from transformers import (
        AutoModelForMaskedLM,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    start = sentence_transformer(base, recipe)
    transformer, tokenizer = start[0].auto_model, start[0].tokenizer
    model = AutoModelForMaskedLM.from_config(transformer.config)
    body = getattr(model, model.base_model_prefix)
    missing = body.load_state_dict(transformer.state_dict(), strict=False).missing_keys
    if missing:
        raise InputError(f"its weights do not fit a masked language model: {missing[:3]}", field="base")
    model.tie_weights()
    if recipe.freeze_embeddings:
        body.embeddings.requires_grad_(False)
    texts = list(dict.fromkeys([*pairs.anchors, *pairs.positives]))
    encoded = tokenizer(texts, truncation=True, max_length=recipe.max_length)
    rows = [{"input_ids": ids} for ids in encoded["input_ids"]]
    arguments: Any = TrainingArguments
    trainer = Trainer(
        model=model,
        args=arguments(**_arguments(recipe, folder, every, progress)),
        train_dataset=rows,  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=recipe.mask_share),
    )
    return trainer, model, tokenizer


def _arguments(recipe: Recipe, folder: Path | None, every: int | None, progress: bool) -> dict[str, Any]:
    from shared_core.command import usable_device

    return {
        "output_dir": str(folder or "unused"),
        "max_steps": recipe.steps or -1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "warmup_steps": 0.1,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "use_cpu": usable_device(recipe.device) == "cpu",
        "dataloader_drop_last": True,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": not progress,
        "save_strategy": "no" if folder is None or every is None else "steps",
        "save_steps": every or 500,
        "save_total_limit": 1,
    }


def _claim(folder: Path, recipe: Recipe, base: str | Path, pairs: int, resume: bool) -> None:
    """Write what the run is into its folder, or check that a run there is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(recipe) | {"base": str(base), "pairs": pairs}
    file = folder / STATE_FILE
    if file.is_file():
        before: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        other = sorted(name for name in settings if before.get(name) != settings[name])
        if other:
            names = ", ".join(other)
            raise InputError(f"holds a run with other settings ({names}): give another", file=folder)
        if not resume:
            raise InputError("holds this run already: give --resume to go on, or another folder", file=folder)
    files.write_json(file, settings)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


@contextmanager
def _kept_randomness(seed: int) -> Iterator[None]:
    """The trainers seed the global generators: give the caller's back afterwards."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002
