"""A training run as a folder.

run.json                  what was asked for
checkpoint.safetensors    the state, from which `--resume` goes on to the same last bit
log.jsonl                 a record an epoch: losses, training top-1, classes in the pool
config.json, model.safetensors   the model with its pool, once the run has ended: what `eval` and others read
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kdcicam.backbones import default_image_size
from kdcicam.checkpoints import load_model, read_checkpoint, save_model
from kdcicam.data import Images, load_images
from kdcicam.flagged import FlaggedImages
from kdcicam.images import Augmentation, readable
from kdcicam.losses import Teachers
from kdcicam.model import CICAM
from kdcicam.settings import Settings
from kdcicam.training import CHECKPOINT, Trained, steps_per_epoch, train
from shared_core import InputError
from shared_core.checkpoints import read_tensors
from shared_core.files import write_json, write_text

RUN, LOG = "run.json", "log.jsonl"
FORMAT = 1


@dataclass(frozen=True)
class TrainingRun:
    """A folder with the settings and what the data is."""

    folder: Path
    settings: Settings
    classes: tuple[str, ...]
    skipped: int
    """Training images that could not be read, under on_error=skip."""

    @classmethod
    def begin(cls, folder: Path, settings: Settings) -> tuple[TrainingRun, Images]:
        """Read the data, make the folder and write run.json.

        Raises:
            InputError: The data or the settings do not fit, before any training.
        """
        settings = replace(settings, image_size=image_size(settings))
        images, skipped = training_images(settings)
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder, settings, images.classes, skipped)
        plain = {key: value for key, value in asdict(run).items() if key != "folder"}
        write_json(folder / RUN, {"format": FORMAT, **plain})
        return run, images

    @classmethod
    def open(cls, folder: Path) -> TrainingRun:
        """Read run.json.

        Raises:
            InputError: There is none, or it is damaged.
        """
        file = folder / RUN
        if not file.is_file():
            raise InputError(f"there is no {RUN}: expected the folder of a training run", file=folder)
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["format"] != FORMAT:
                raise InputError(f"expected format {FORMAT}", file=file, value=kept["format"])
            asked: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in kept["settings"].items()
            }
            return cls(folder, Settings(**asked), tuple(kept["classes"]), kept["skipped"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"is damaged: {error!r}", file=file) from error

    def train(
        self,
        images: Images,
        device: str = "cpu",
        progress: Callable[[int, float], None] | None = None,
        record: Callable[[dict[str, Any]], None] | None = None,
    ) -> Trained:
        """Train, or go on from the checkpoint where there is one, then write the model."""
        started = (self.folder / CHECKPOINT).exists()
        model = build_model(self.settings, len(self.classes), weights=not started)
        teachers = load_teachers(self.settings, model)
        kept: list[dict[str, Any]] = []
        if started:
            before = read_checkpoint(self.folder / CHECKPOINT)
            kept = before.history
            if progress is not None:
                progress(before.step, math.nan)
        log = self.folder / LOG
        main = int(os.environ.get("RANK", "0")) == 0
        if main:
            write_text(log, "".join(map(_line, kept)))  # what was logged after the checkpoint comes again

        def write(entry: dict[str, Any]) -> None:
            with log.open("a", encoding="utf-8") as file:
                file.write(_line(entry))
            if record is not None:
                record(entry)

        trained = train(
            model,
            flagged(self.settings, images),
            self.settings,
            teachers=teachers,
            folder=self.folder,
            resume=True,
            device=device,
            progress=progress,
            record=write,
        )
        if main:
            save_model(trained.model, self.folder, self._notes())
        return trained

    def _notes(self) -> dict[str, Any]:
        kept = {name: getattr(self.settings, name) for name in ("role", "validation")}
        return {**kept, "classes": list(self.classes)}

    def steps(self, images: Images) -> int:
        """Optimizer steps of the whole run."""
        return self.settings.epochs * steps_per_epoch(len(images), self.settings.batch_size)


def training_images(settings: Settings) -> tuple[Images, int]:
    """The training split, and how many of its images were left out as unreadable under on_error=skip."""
    images = load_images(
        Path(settings.data),
        "train",
        images=None if settings.images is None else Path(settings.images),
        validation=settings.validation,
    )
    if settings.on_error == "raise":
        return images, 0
    whole = [i for i, read in readable(images.files, skip=True) if not isinstance(read, InputError)]
    return images.take(whole), len(images) - len(whole)


def image_size(settings: Settings) -> int:
    """Side of the images: what was asked for, or else the backbone's own."""
    return settings.image_size or default_image_size(settings.backbone)


def flagged(settings: Settings, images: Images, *, keep: bool = False) -> FlaggedImages:
    """Training images with the augmentation and lottery of the settings; `keep` as for `FlaggedImages`."""
    first, side = Augmentation.parse(settings.augmentation), image_size(settings)
    if settings.role != "student":
        return FlaggedImages(images, side, {0: first}, (0,), settings.seed, keep=keep)
    by_flag = {
        0: first,
        1: Augmentation.parse(settings.augmentation_cls),
        2: Augmentation.parse(settings.augmentation_loc),
    }
    return FlaggedImages(images, side, by_flag, settings.flags, settings.seed, keep=keep)


def build_model(settings: Settings, classes: int, weights: bool = True) -> CICAM:
    """The model before training: by the seed, with the backbone's weights where the settings name them.

    Raises:
        InputError: The settings do not fit the backbone or the number of classes.
    """
    if settings.last is not None and settings.last > classes:
        raise InputError(f"expected 1 to the {classes} classes", field="last", value=settings.last)
    options: dict[str, Any] = {}
    named = settings.backbone in ("vgg16", "vgg16-imagenet", "inception_v3")
    if named and settings.role == "cam":
        options["non_local"] = False
    if settings.pretrained:
        if named:
            raise InputError(
                "is for timm's models; give the weights' file with weights", field="pretrained", value=True
            )
        options["pretrained"] = weights
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        model = CICAM(
            settings.backbone,
            classes,
            image_size=image_size(settings),
            update_rate=settings.update_rate,
            combine=settings.combine,  # type: ignore[arg-type] checked by Settings
            last=settings.last,
            context=settings.role not in ("nl-ccam", "cam"),
            **options,
        )
    if settings.weights is not None and weights:
        state = read_tensors(Path(settings.weights))
        if hasattr(model.backbone, "load_pretrained"):
            model.backbone.load_pretrained(state)  # type: ignore[operator]
        else:
            _load_matching(model.backbone, state, settings.weights)
    return model


def _load_matching(backbone: torch.nn.Module, state: dict[str, Any], file: str) -> None:
    inner = backbone.get_submodule("model" if hasattr(backbone, "model") else "module")
    ours = inner.state_dict()
    fits = {
        key: state[key] for key, value in ours.items() if key in state and state[key].shape == value.shape
    }
    lacking = [key for key in ours if key not in fits]
    if lacking:
        raise InputError("lacks this tensor of the backbone", file=file, value=lacking[0])
    inner.load_state_dict(fits)


def load_teachers(settings: Settings, student: CICAM) -> Teachers | None:
    """The teachers that the settings name; None for a run that is no student or has no teacher.

    Raises:
        InputError: A teacher does not fit the student.
    """
    if settings.role != "student":
        return None
    paths = (settings.cls_teacher, settings.loc_teacher)
    cls, loc = (None if path is None else load_model(Path(path)) for path in paths)
    return Teachers(cls, loc, student) if cls is not None or loc is not None else None


def student_flags(cls: str | None, loc: str | None, given: tuple[int, ...] | None) -> tuple[int, ...]:
    """From which flags a student's images draw: those whose teacher is there, and 0; all for the control."""
    if given is not None:
        return given
    if cls is None and loc is None:
        return (0, 1, 2)
    return (0, *((1,) if cls else ()), *((2,) if loc else ()))


def resumed(settings: Settings, folder: Path) -> TrainingRun:
    """The run in a folder, once it is known that nothing else is asked for now.

    Raises:
        InputError: A setting differs.
    """
    run = TrainingRun.open(folder)
    free = {"workers": settings.workers, "checkpoint_every": settings.checkpoint_every}
    kept = replace(run.settings, **free)
    asked = replace(settings, image_size=image_size(settings))
    for name, value in asdict(asked).items():
        if value != getattr(kept, name):
            raise InputError(
                f"is another run: expected {getattr(kept, name)}, as it began with",
                file=folder,
                field=name,
                value=value,
            )
    return replace(run, settings=kept)


def _line(entry: dict[str, Any]) -> str:
    finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in entry.items()}
    return json.dumps(finite) + "\n"
