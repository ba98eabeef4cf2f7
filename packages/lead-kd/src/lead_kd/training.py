"""The training loop: teacher and candidates in, a student out; one process or many, through accelerate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lead_kd.candidates import candidate_mask, own_block, text_number
from lead_kd.checkpoints import read_checkpoint, write_checkpoint
from lead_kd.minilm import MiniLM
from lead_kd.objectives import (
    Candidates,
    Embedding,
    Objective,
    StepLoss,
    check_candidates,
    layers_of,
)
from lead_kd.sampling import Sampler
from lead_kd.scorers import DualEncoder, Scorer, to_device
from lead_kd.scores import gather_plain
from lead_kd.selection import LayerSchedule
from shared_core import InputError
from shared_core.errors import TrainingDiverged
from shared_core.files import check_no_run

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT = "checkpoint.safetensors"
HISTORY = "history.jsonl"


@dataclass(frozen=True)
class Recipe:
    """How to train. Defaults are those of the official scripts where they have one.

    Args:
        steps: Optimizer steps.
        lr: Highest learning rate of the student.
        teacher_lr: Of the teacher, where it trains; the student's where None.
        warmup: Share of the steps in which the rate rises linearly, before it falls linearly to 0.
        weight_decay: AdamW's.
        adam_epsilon: AdamW's.
        clip_norm: Largest norm of each model's gradients.
        accumulate: Groups a step, whose gradients are averaged.
        log_every: Steps between records of the history.
        checkpoint_every: Steps between checkpoints.
        evaluate_every: Steps between evaluations; None for none.
        workers: Processes that prepare texts; 0 prepares them in this one.
        seed: Of dropout.
    """

    steps: int
    lr: float = 5e-5
    teacher_lr: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    clip_norm: float = 2.0
    accumulate: int = 1
    log_every: int = 10
    checkpoint_every: int = 500
    evaluate_every: int | None = None
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError("expected at least 1", field=name, value=getattr(self, name))
        for name in ("lr", "adam_epsilon", "clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError("expected a number above 0", field=name, value=value)
        if not 0 <= self.warmup < 1:
            raise InputError("expected a share from 0 to below 1", field="warmup", value=self.warmup)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0, as a share of the highest."""
        rising = self.steps * self.warmup
        if step < rising:
            return (step + 1) / (rising + 1)
        return max(0.0, (self.steps - step) / (self.steps - rising))


@dataclass
class Trained:
    """What a run gave; the student was trained in place.

    Attributes:
        history: A record every `log_every` steps: step, loss and its terms, rate, pairs and weights.
        evaluations: What `evaluate` returned, by step.
        masked: Candidates that were masked, over all steps of this process since the start or resume.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    masked: int = 0


def distill(
    student: DualEncoder,
    teacher: Scorer | None,
    objective: Objective,
    sampler: Sampler,
    recipe: Recipe,
    schedule: LayerSchedule | None = None,
    *,
    co_train: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    about: dict[str, Any] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    on_step: Callable[[int, StepLoss], None] | None = None,
    accelerator: Accelerator | None = None,
) -> Trained:
    """Train a student.

    Args:
        student: Is changed in place.
        teacher: Is only read, unless `co_train`; None for objectives that need none.
        objective: What to minimize.
        sampler: What each step has; its number of processes is the accelerator's.
        recipe: How to train.
        schedule: Pairs of layers; needed by objectives that align them.
        co_train: Train the teacher with an optimizer of its own, as published.
        out: Folder of checkpoint and history; None keeps neither.
        resume: Go on from the checkpoint in `out`, where there is one, to the same result as a run without a
            break (to the bit on a CPU).
        about: What else a resumed run must have in common with the first, such as names of data and models.
        evaluate: Called every `evaluate_every` steps and at the end, by the main process.
        on_step: Called after each step, with the number of steps that are done.
        accelerator: For several processes, mixed precision or a GPU; a plain one where None.

    Raises:
        InputError: Parts do not fit together, or the checkpoint is of another run.
        TrainingDiverged: The loss is not finite.
    """
    run = _Run(student, teacher, objective, sampler, recipe, schedule, co_train, accelerator)
    settings = {
        "recipe": {
            name: value
            for name, value in asdict(recipe).items()
            if name not in ("log_every", "checkpoint_every", "evaluate_every", "workers")
        },
        "objective": type(objective).__name__,
        "objective settings": objective.settings(),
        "co_train": co_train,
        "precision": str(run.accelerator.mixed_precision),
        "sampler": [sampler.batch_size, sampler.negatives, sampler.seed, sampler.processes],
        "data": sampler.fingerprint(),
        "layers": None if schedule is None else asdict(schedule),
        **(about or {}),
    }
    folder = None if out is None else Path(out)
    done, trained = 0, Trained()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        run.checkpoint = folder / CHECKPOINT
        if run.accelerator.is_main_process:
            check_no_run(folder / CHECKPOINT, resume)
        if resume and (folder / CHECKPOINT).exists():
            done = read_checkpoint(
                folder / CHECKPOINT, settings, run.modules, run.optimizers, run.accelerator.scaler
            )
            trained.history = _read_history(folder / HISTORY, done)

    def save(step: int) -> None:
        if folder is not None and run.accelerator.is_main_process:
            _write_history(folder / HISTORY, trained.history)
            write_checkpoint(
                folder / CHECKPOINT, step, settings, run.modules, run.optimizers, run.accelerator.scaler
            )

    with torch.random.fork_rng(devices=_cuda_devices()):
        for step, groups in zip(range(done, recipe.steps), run.groups(done), strict=False):
            loss, pairs, masked = run.step(step, groups)
            trained.masked += masked
            finished = step + 1
            if finished % recipe.log_every == 0 or finished == recipe.steps:
                trained.history.append(_record(finished, loss, pairs, recipe.rate(step)))
            if on_step is not None:
                on_step(finished, loss)
            every = recipe.evaluate_every
            if (
                evaluate is not None
                and run.accelerator.is_main_process
                and ((every and finished % every == 0) or finished == recipe.steps)
            ):
                student.eval()
                trained.evaluations[finished] = evaluate()
            # After the evaluation: a run that is killed in it does it again.
            if finished % recipe.checkpoint_every == 0 or finished == recipe.steps:
                save(finished)
    student.eval()
    return trained


class _Run:
    """Models, optimizers and one step."""

    def __init__(
        self,
        student: DualEncoder,
        teacher: Scorer | None,
        objective: Objective,
        sampler: Sampler,
        recipe: Recipe,
        schedule: LayerSchedule | None,
        co_train: bool,
        accelerator: Accelerator | None,
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # Encoders may have parts without a gradient, such as BERT's pooler.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = accelerator or Accelerator(cpu=_on_cpu(student), kwargs_handlers=[unused])
        self.recipe, self.sampler, self.schedule, self.co_train = recipe, sampler, schedule, co_train
        self.checkpoint: Path | None = None
        if sampler.processes != self.accelerator.num_processes:
            raise InputError(
                f"expected the accelerator's {self.accelerator.num_processes} processes",
                field="sampler.processes",
                value=sampler.processes,
            )
        if objective.needs_teacher and teacher is None:
            raise InputError(f"{type(objective).__name__} needs a teacher", field="teacher", value=None)
        if not objective.needs_teacher:
            teacher = None
        if co_train != objective.co_train:
            raise InputError(
                f"{type(objective).__name__} {'trains' if objective.co_train else 'only reads'} the teacher",
                field="co_train",
                value=co_train,
            )
        if co_train and (teacher is None or not any(True for _ in teacher.parameters())):
            raise InputError("a teacher that is read from a cache cannot train", field="co_train", value=True)
        self.student, self.teacher, self.objective = student, teacher, objective
        self._check_pairs()
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.modules: dict[str, nn.Module] = {"student": student}
        self.rates: dict[str, float] = {}
        own = list(objective.parameters())
        if own:
            self.modules["objective"] = objective
        self.wrapped = self._trained("student", student, recipe.lr, own)
        self.loss = self.accelerator.prepare(objective) if own else objective
        self.models = [self.wrapped, *([self.loss] if own else [])]
        self.asked: Any = teacher
        if teacher is not None:
            device = self.accelerator.device
            teacher.to(device)
            teacher.train(co_train)
            if co_train:
                self.modules["teacher"] = teacher
                self.asked = self._trained("teacher", teacher, recipe.teacher_lr or recipe.lr, [])
                self.models.append(self.asked)

    def _trained(self, name: str, module: nn.Module, rate: float, more: Sequence[nn.Parameter]) -> Any:
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [*parameters, *more], lr=rate, eps=self.recipe.adam_epsilon, weight_decay=self.recipe.weight_decay
        )
        wrapped, self.optimizers[name] = self.accelerator.prepare(module, optimizer)
        self.rates[name] = rate
        return wrapped

    def _check_pairs(self) -> None:
        objective, schedule = self.objective, self.schedule
        if not objective.needs_pairs or isinstance(objective, Embedding):
            return
        if schedule is None:
            raise InputError(f"{type(objective).__name__} needs a schedule of layers", field="schedule")
        assert self.teacher is not None
        expected = (self.teacher.n_layers, self.student.n_layers)
        if (schedule.teacher_layers, schedule.student_layers) != expected:
            raise InputError(
                f"expected {expected[0]} teacher layers and {expected[1]} student layers",
                field="schedule",
                value=(schedule.teacher_layers, schedule.student_layers),
            )

    def groups(self, done: int) -> Iterator[list[dict[str, Any]]]:
        """Tensors of each step from `done` on: one dictionary a group that is accumulated."""
        loader = DataLoader(
            _Steps(self, done),
            batch_size=None,
            num_workers=self.recipe.workers,
            prefetch_factor=4 if self.recipe.workers else None,
        )
        return iter(loader)

    def step(self, step: int, groups: list[dict[str, Any]]) -> tuple[StepLoss, list[tuple[int, int]], int]:
        """One optimizer step."""
        self.student.train()
        torch.manual_seed(_seed(self.recipe.seed, step, self.accelerator.process_index))
        pairs = self._pairs(step)
        masked = 0
        loss: StepLoss | None = None
        for number, group in enumerate(groups):
            last = number == len(groups) - 1
            with ExitStack() as waiting:
                for model in () if last else self.models:
                    waiting.enter_context(self.accelerator.no_sync(model))
                loss, left_out = self._forward(to_device(group, self.accelerator.device), pairs)
                if not torch.isfinite(loss.total):
                    what = f"the loss is {loss.total.item()} at step {step + 1}"
                    raise TrainingDiverged.at(what, self.recipe.lr, self.checkpoint)
                self.accelerator.backward(loss.total / len(groups))
                masked += left_out
        assert loss is not None
        for name, optimizer in self.optimizers.items():
            for part in optimizer.param_groups:
                part["lr"] = self.rates[name] * self.recipe.rate(step)
            # Each optimizer by itself: accelerate's own clipping would unscale the gradients of all, twice.
            self.accelerator.unscale_gradients(optimizer)
            torch.nn.utils.clip_grad_norm_(
                [p for part in optimizer.param_groups for p in part["params"]], self.recipe.clip_norm
            )
            optimizer.step()
            optimizer.zero_grad()
        return loss, pairs, masked

    def _forward(self, group: dict[str, Any], pairs: list[tuple[int, int]]) -> tuple[StepLoss, int]:
        ids = gather_plain(group["passage_ids"])
        queries = len(group["positive_ids"])
        per_query = len(group["passage_ids"]) // queries
        offset = self.accelerator.process_index * queries * per_query
        own = own_block(queries, per_query, ids.device) + offset
        mask = candidate_mask(ids, group["positive_ids"], own[:, 0])
        on = Candidates(own[:, 0], mask, own)
        of_teacher, of_student = layers_of(pairs) if pairs else ([-1], [-1])
        of_teacher = [layer % self.teacher.n_layers for layer in of_teacher] if self.teacher else []
        of_student = [layer % self.student.n_layers for layer in of_student]
        watched = (
            self.objective.step(
                [group["student"][side]["attention_mask"] for side in ("queries", "passages")]
            )
            if isinstance(self.objective, MiniLM)
            else nullcontext()
        )
        if isinstance(self.objective, MiniLM):
            _same_tokens(group)
        with watched, self.accelerator.autocast():
            student = self.wrapped(group["student"], of_student)
            teacher = None
            if self.teacher is not None:
                with torch.set_grad_enabled(self.co_train):
                    teacher = self.asked(group["teacher"], of_teacher)
                student, on = check_candidates(student, teacher, on)
            loss = self.loss(student, teacher, on, pairs)
        return loss, int((~mask).sum())

    def _pairs(self, step: int) -> list[tuple[int, int]]:
        if not self.objective.needs_pairs:
            return []
        assert self.teacher is not None
        if isinstance(self.objective, Embedding):
            return [(self.teacher.n_layers - 1, self.student.n_layers - 1)]
        assert self.schedule is not None
        return self.schedule.pairs(step)


class _Steps(Dataset[list[dict[str, Any]]]):
    """Texts of each step as tensors; runs in the loader's processes."""

    def __init__(self, run: _Run, done: int) -> None:
        self.sampler, self.accumulate = run.sampler, run.recipe.accumulate
        self.process, self.done = run.accelerator.process_index, done
        self.steps = run.recipe.steps
        self.collate_student, self.teacher = run.student.collate, run.teacher

    def __len__(self) -> int:
        return max(self.steps - self.done, 0)

    def __getitem__(self, number: int) -> list[dict[str, Any]]:
        if number >= len(self):
            raise IndexError(number)
        first = (self.done + number) * self.accumulate
        return [self._tensors(first + part) for part in range(self.accumulate)]

    def _tensors(self, group_number: int) -> dict[str, Any]:
        group = self.sampler.group(group_number, self.process)
        corpus = self.sampler.data.corpus
        positives = [
            [text_number("passage", corpus[int(row)]) if row >= 0 else -1 for row in rows]
            for rows in group.positive_ids
        ]
        tensors = {
            "student": self.collate_student(group.queries, group.passages),
            # Numbers of texts: a passage may stand in the corpus under two ids.
            "passage_ids": torch.tensor([text_number("passage", text) for text in group.passages]),
            "positive_ids": torch.tensor(positives),
        }
        if self.teacher is not None:
            tensors["teacher"] = self.teacher.collate(group.queries, group.passages)
        return tensors


def _same_tokens(group: dict[str, Any]) -> None:
    """Check that student and teacher read the same token ids.

    Raises:
        InputError: They do not.
    """
    for side in ("queries", "passages"):
        own, told = (group[model][side]["input_ids"] for model in ("student", "teacher"))
        if own.shape != told.shape or not torch.equal(own, told):
            raise InputError(
                "minilm needs the same tokens on both sides: the same tokenizer and lengths", field=side
            )


def _record(step: int, loss: StepLoss, pairs: Sequence[tuple[int, int]], rate: float) -> dict[str, Any]:
    record: dict[str, Any] = {"step": step, "loss": loss.total.item(), **loss.log, "rate": rate}
    if pairs:
        record["pairs"] = [list(pair) for pair in pairs]
    if loss.weights is not None:
        record["weights"] = loss.weights.tolist()
    return record


def _write_history(path: Path, history: Sequence[dict[str, Any]]) -> None:
    from shared_core.files import write_text

    write_text(path, "".join(json.dumps(record) + "\n" for record in history))


def _read_history(path: Path, done: int) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record["step"] <= done]


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(list(words)).generate_state(1, np.uint64)[0] >> 1)


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count()))


def _on_cpu(module: nn.Module) -> bool:
    return cast(Tensor, next(module.parameters())).device.type == "cpu"
