"""A training run as a folder: what was asked for, where it stands, and the models that come out of it.

run.json                the settings and the shape of the data, from which the run is rebuilt
checkpoint.safetensors  the state, from which `csq train --resume` goes on to the same last bit
log.jsonl               a record a line: step, loss, validation accuracy, temperature, precision, bits
report.json             the scheme in its three counts, when the run has ended
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import csq
from csq import sources
from csq.activations import activation_plan
from csq.checkpoints import Checkpoint, read_checkpoint
from csq.data import ImageData, PixelSplit, load_images
from csq.files import load, read_notes
from csq.methods import Method
from csq.settings import Settings
from csq.stages import has_batchnorm, method_for
from csq.training import CHECKPOINT, Recipe, Trained, batch_indices, stage_ends, train
from shared_core import InputError
from shared_core.files import write_json, write_text

RUN, LOG, REPORT = "run.json", "log.jsonl", "report.json"
FORMAT = 1
BN_BATCHES = 200
"""Training batches that BatchNorm's final statistics are taken from."""


def read_images(settings: Settings, data: str | None = None) -> ImageData:
    """Return a run's images, from another place than it was trained from where `data` is given.

    Grey images become three equal channels for torchvision's models, which take no other. Mean and standard
    deviation are those given, else those of the library's published weights where weights are given, else
    those of the training images.
    """
    images = load_images(
        data or settings.data,
        size=settings.image_size,
        validation=settings.validation,
        limit=settings.limit,
        seed=settings.seed,
    )
    if sources.family(settings.model) == "torchvision" and len(images.mean) == 1:
        images = coloured(images)
    known = sources.normalization(settings.model) if settings.weights else None
    for field, given, published in (
        ("mean", settings.mean, known and known[0]),
        ("std", settings.std, known and known[1]),
    ):
        values = given or published
        if values is None or (given is None and len(values) != len(images.mean)):
            continue
        if len(values) != len(images.mean):
            raise InputError(f"expected {len(images.mean)} numbers", field=field, value=values)
        images = replace(images, **{field: tuple(values)})
    if min(images.std) <= 0:
        raise InputError("expected numbers above 0", field="std", value=images.std)
    return images


def coloured(images: ImageData) -> ImageData:
    """Return grey images as three equal channels."""

    def tripled(split: Any) -> PixelSplit:
        return PixelSplit(split.pixels.expand(-1, 3, -1, -1), split.labels)

    parts = {name: tripled(getattr(images, name)) for name in ("train", "validation", "test")}
    return replace(images, **parts, mean=images.mean * 3, std=images.std * 3)


@dataclass(frozen=True)
class TrainingRun:
    """A folder with its settings.

    Raises:
        InputError: From its methods: the folder, its files or its data do not fit.
    """

    folder: Path
    settings: Settings
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    """Channels, height and width of images."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    steps: int
    epoch: int
    """Steps an epoch."""

    @classmethod
    def begin(cls, folder: Path, settings: Settings, data: ImageData) -> TrainingRun:
        """Make the folder and write run.json, once the model is known to fit the data."""
        count = len(data.train.labels)
        epoch = count // min(settings.batch_size, count)
        shape = data.shape
        if settings.shift >= min(shape[1:]):
            raise InputError(
                f"expected less than an image's side, {min(shape[1:])}", field="shift", value=settings.shift
            )
        run = cls(
            folder, settings, data.classes, (shape[0], shape[1], shape[2]), data.mean, data.std,
            settings.epochs * epoch, epoch,
        )  # fmt: skip
        stage_ends(run.method, run.steps)
        folder.mkdir(parents=True, exist_ok=True)
        plain = {key: value for key, value in asdict(run).items() if key != "folder"}
        write_json(folder / RUN, {"format": FORMAT, **plain})
        return run

    @classmethod
    def open(cls, folder: Path) -> TrainingRun:
        """Read run.json."""
        file = folder / RUN
        if not file.is_file():
            raise InputError(f"there is no {RUN}: expected a folder that csq train wrote", file=folder)
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept.pop("format") != FORMAT:
                raise InputError(f"expected format {FORMAT}", file=file)
            settings = Settings(**_tuples(kept.pop("settings")))
            return cls(folder, settings, **_tuples(kept))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"is damaged: {error}", file=file) from error

    def images(self, data: str | None = None) -> ImageData:
        """Return the run's images, or those of the same kind at another place."""
        images = read_images(self.settings, data)
        if images.classes != self.classes or images.shape != self.shape:
            raise InputError(
                f"expected {len(self.classes)} classes and images of {self.shape}, as the run was trained "
                f"on; got {len(images.classes)} and {images.shape}",
                file=data or self.settings.data,
            )
        return replace(images, mean=self.mean, std=self.std)

    def float_model(self) -> nn.Module:
        """Return the model before any training."""
        model = sources.build(self.settings.model, len(self.classes), self.shape, self.settings.seed)
        if self.settings.weights is not None:
            sources.load_weights(model, Path(self.settings.weights), len(self.classes))
        return model

    @cached_property
    def method(self) -> Method:
        """The stages."""
        model = sources.build(self.settings.model, len(self.classes), self.shape, self.settings.seed)
        return method_for(self.settings, self.steps, has_batchnorm(model))

    @property
    def recipe(self) -> Recipe:
        """How it is trained; the learning rate is followed for each stage by itself."""
        settings = self.settings
        return Recipe(
            self.steps,
            batch_size=settings.batch_size,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            optimizer=settings.optimizer,
            clip_norm=settings.clip_norm,
            shift=settings.shift,
            flip=settings.flip,
            seed=settings.seed,
            log_every=max(1, self.steps // 100),
            evaluate_every=self.epoch * max(1, settings.epochs // 20),
            checkpoint_every=self.epoch,
        )

    def train(
        self, data: ImageData, device: str = "cpu", progress: Callable[[int, float], None] | None = None
    ) -> Trained:
        """Train, or go on from the checkpoint where there is one, to the same end."""
        # A run that goes on gets its weights from the checkpoint: the file it began with may be gone.
        started = (self.folder / CHECKPOINT).exists()
        model = replace(self, settings=replace(self.settings, weights=None)) if started else self
        kept = read_checkpoint(self.folder / CHECKPOINT).history if started else []
        log = self.folder / LOG
        write_text(log, "".join(map(_line, kept)))  # what was logged after the checkpoint comes again

        def record(entry: dict[str, Any]) -> None:
            with log.open("a", encoding="utf-8") as file:
                file.write(_line(entry))

        return train(
            model.float_model().to(device),
            self.method,
            data,
            self.recipe,
            folder=self.folder,
            resume=True,
            progress=progress,
            record=record,
        )

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The state as it is on disk."""
        return read_checkpoint(self.folder / CHECKPOINT)

    def soft_model(self) -> nn.Module:
        """Return the model at the checkpoint, with its quantizers, in evaluation mode."""
        kept = self.checkpoint
        model = sources.build(self.settings.model, len(self.classes), self.shape, self.settings.seed)
        ends = stage_ends(self.method, self.steps)
        for index, plan in enumerate(kept.plans):
            begin = ends[index - 1] if index else 0
            self.method.stages[index].install(model, plan, ends[index] - begin)
        try:
            model.load_state_dict(kept.model)
        except RuntimeError as error:
            raise InputError(f"does not fit {RUN}: {error}", file=self.folder / CHECKPOINT) from error
        return model.eval()

    def hard_model(self, data: ImageData | None, device: str = "cpu", *, warn: bool = False) -> nn.Module:
        """Return plain modules with the final weights; BatchNorm is estimated anew where data is given.

        Args:
            data: Its training part is read.
            device: Where the model is then.
            warn: Say where hardening changes weights by much.
        """
        model = self.soft_model().to(device)
        with warnings.catch_warnings():
            if not warn:
                warnings.filterwarnings("ignore", message="hardened at temperature")
            return self._harden(model, data)

    def _harden(self, model: nn.Module, data: ImageData | None) -> nn.Module:
        return self.method.harden(model, None if data is None else bn_inputs(data, self.settings)).eval()

    @property
    def activations(self) -> dict[str, Any]:
        """The activation quantizers, by layer, as `csq.activations.install_activations` takes them."""
        return next((p["activations"] for p in self.checkpoint.plans if p.get("activations")), {})

    def file_bytes(self, hard: nn.Module) -> int:
        """Return the bytes of the file that `csq harden` would write."""
        with tempfile.TemporaryDirectory() as folder:
            return csq.save(hard, Path(folder, "model.safetensors"), notes=self.notes())

    def notes(self, **more: Any) -> dict[str, Any]:
        """What a hardened file says of itself: enough to build its model and to feed it."""
        return {
            "model": self.settings.model,
            "method": self.settings.method,
            "target_bits": self.settings.target_bits,
            "classes": list(self.classes),
            "shape": list(self.shape),
            "mean": list(self.mean),
            "std": list(self.std),
            **more,
        }


@dataclass(frozen=True)
class HardenedFile:
    """A model out of a file that `csq harden` wrote."""

    path: Path
    model: nn.Module
    notes: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> HardenedFile:
        """Build the model that the file's notes name, and fill it.

        Raises:
            InputError: Not such a file, or its notes are missing: a file of `csq.save` alone is read by
                `csq.load`.
        """
        notes = read_notes(path)
        if not {"model", "classes", "shape", "mean", "std"} <= notes.keys():
            raise InputError("does not name its model: use csq.load in Python", file=path)
        _check_notes(notes, path)
        channels, height, width = notes["shape"]
        model = sources.build(notes["model"], len(notes["classes"]), (channels, height, width))
        return cls(path, load(model, path).eval(), notes)

    @property
    def activations(self) -> dict[str, Any]:
        """The activation quantizers, by layer."""
        return activation_plan(self.model)

    def images(self, data: str) -> ImageData:
        """Return images for this model: its size, normalization and classes."""
        size = self.notes["shape"][1]
        images = load_images(data, size=size)
        if self.notes["shape"][0] == 3 and len(images.mean) == 1:
            images = coloured(images)
        if list(images.classes) != self.notes["classes"]:
            raise InputError(
                f"its classes are not those of {self.path}: expected {', '.join(self.notes['classes'][:5])}",
                file=data,
                value=", ".join(images.classes[:5]),
            )
        return replace(images, mean=tuple(self.notes["mean"]), std=tuple(self.notes["std"]))


def _check_notes(notes: dict[str, Any], path: Path) -> None:
    shape, words = notes["shape"], notes["classes"]
    sized = isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    channels = shape[0] if sized else 0
    for key, fits, wanted in (
        ("model", isinstance(notes["model"], str), "a model's name"),
        ("shape", sized, "channels, height and width"),
        ("classes", isinstance(words, list) and words and all(isinstance(w, str) for w in words), "names"),
        ("mean", _finite(notes["mean"], channels), f"{channels} numbers"),
        ("std", _finite(notes["std"], channels) and min(notes["std"]) > 0, f"{channels} numbers above 0"),
    ):
        if not fits:
            raise InputError(f"is damaged: expected {wanted}", file=path, field=key, value=notes[key])


def _finite(values: Any, length: int) -> bool:
    fits = isinstance(values, list) and len(values) == length > 0
    return fits and all(type(v) in (int, float) and math.isfinite(v) for v in values)


def bn_inputs(data: ImageData, settings: Settings) -> Iterator[Float[Tensor, "n channels h w"]]:
    """Yield batches of training images, each image once, up to `BN_BATCHES`."""
    count = len(data.train.labels)
    size = min(settings.batch_size, count)
    for step in range(min(BN_BATCHES, count // size)):
        yield data.inputs(data.train.read(batch_indices(count, size, settings.seed, step)))


def bit_operations(model: nn.Module, shape: tuple[int, ...], activations: dict[str, Any]) -> Any:
    """Return `csq.bit_operations` of one image; layers without a quantizer take 32-bit inputs."""
    device = next(model.parameters()).device
    bits = {name: int(settings["bits"]) for name, settings in activations.items()}
    return csq.bit_operations(model, torch.zeros(1, *shape, device=device), bits)


def _line(record: dict[str, Any]) -> str:
    finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
    return json.dumps(finite) + "\n"


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
