"""Workloads: what a worker does again and again, as a spec that a record states and a worker builds.

Models have random weights: how fast they run does not depend on what they learnt.
"""

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from shared_core import InputError
from shared_core.errors import needs_extra
from shared_core.named import imported

DTYPES = ("float32", "float16", "bfloat16")
_TORCH = ("torchvision", "timm", "transformers")
_PLAIN = re.compile(r"(sleep|spin):(\d+(?:\.\d+)?)(us|ms|s)")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@runtime_checkable
class Task(Protocol):
    """A workload that was built: model and inputs are there, `step` may be timed."""

    facts: Mapping[str, Any]
    """What a record says of it: parameters, whether in evaluation mode, ..."""

    def step(self, requests: int) -> Mapping[str, float] | None:
        """Serve that many requests at once (training: one step); phases in ns, if it measures any."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all that `step` asked of it."""
        ...


@dataclass(frozen=True)
class Workload:
    """What a worker does in its instance.

    Attributes:
        source: Where the model comes from; `custom`: `model` is `module:callable`; `sleep` and `spin` load no
            model and idle or compute for the time that `model` gives.
        model: Its name there.
        mode: `infer` (evaluation and inference mode), `train` (forward, loss, backward, optimizer),
            `generate` (prompt, then one token after another with a cache of keys and values).
        batch: Items of a request or step.
        image_size: Height and width of images in pixels.
        sequence_length: Tokens of a text or prompt.
        new_tokens: Tokens to generate after the prompt, the first included.
        dtype: Of weights and inputs.
        seed: Of weights and synthetic inputs.
        classes: Of the classifier.
        config: What the model's constructor or configuration takes beside that.
        image_folder: Images in one folder a class, instead of synthetic ones; reading them is the phase
            `pipeline`.
        dataset: Instead of synthetic inputs: a folder that Hugging Face's `save_to_disk` wrote, or a parquet,
            csv or json file, with a column of images, `input_ids` or `text`; reading is the phase `pipeline`.
        tokenizer: Folder of the tokenizer for a column `text`.
        preload: Whether inputs are read once, before the measurement, so that the pipeline is left out of it.
        learning_rate: Of SGD with momentum 0.9.
    """

    source: str
    model: str
    mode: str = "infer"
    batch: int = 1
    image_size: int = 224
    sequence_length: int = 64
    new_tokens: int = 16
    dtype: str = "float32"
    seed: int = 0
    classes: int = 1000
    config: Mapping[str, Any] = field(default_factory=dict)
    image_folder: str = ""
    dataset: str = ""
    tokenizer: str = ""
    preload: bool = False
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        for name in ("batch", "image_size", "sequence_length", "new_tokens", "classes"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise InputError("expected a whole number above 0", field=name, value=value)
        if self.source not in (*_TORCH, "custom", "sleep", "spin"):
            raise InputError(
                "expected torchvision, timm, transformers or custom", field="workload", value=self.source
            )
        if self.mode not in ("infer", "train", "generate"):
            raise InputError("expected infer, train or generate", field="mode", value=self.mode)
        if self.mode == "generate" and self.source not in ("transformers", "custom"):
            raise InputError(
                "only transformers' models generate", field="mode", value=f"{self.source}/{self.model}"
            )
        if self.dtype not in DTYPES:
            raise InputError(f"expected one of {', '.join(DTYPES)}", field="dtype", value=self.dtype)
        if self.image_folder and self.source not in ("torchvision", "timm"):
            raise InputError(
                "only models of images take a folder of them", field="image_folder", value=self.model
            )
        if self.image_folder and not Path(self.image_folder).is_dir():
            raise InputError("is not a folder", field="image_folder", value=self.image_folder)
        if self.dataset and (self.image_folder or self.source not in _TORCH):
            raise InputError(
                "only models by name take one, and no folder beside it", field="dataset", value=self.dataset
            )
        if self.dataset and not Path(self.dataset).exists():
            raise InputError("is not there", field="dataset", value=self.dataset)
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise InputError("expected 0 or more", field="learning_rate", value=self.learning_rate)
        if self.source in ("sleep", "spin"):
            self.seconds  # noqa: B018 - refuses a text that is no time
        if self.source == "custom" and not re.fullmatch(r"[\w.]+:[\w.]+", self.model):
            raise InputError("expected module:callable", field="workload", value=self.model)

    @property
    def name(self) -> str:
        """As `parse` reads it: `torchvision/resnet18`, `spin:2ms`, `module:callable`."""
        if self.source == "custom":
            return self.model
        return f"{self.source}{'/' if self.source in _TORCH else ':'}{self.model}"

    @property
    def seconds(self) -> float:
        """What a `sleep` or `spin` takes."""
        found = _PLAIN.fullmatch(f"{self.source}:{self.model}")
        if not found:
            raise InputError("expected a time such as 10ms", field=self.source, value=self.model)
        return float(found[2]) * _UNITS[found[3]]

    @property
    def spec(self) -> dict[str, Any]:
        """What a record states: the fields that this workload uses."""
        spec: dict[str, Any] = {
            name: getattr(self, name) for name in ("source", "model", "mode", "batch", "seed")
        }
        if self.source in _TORCH:
            spec["dtype"] = self.dtype
        if self.source in ("torchvision", "timm"):
            spec |= {"image_size": self.image_size, "classes": self.classes}
        if self.source == "transformers":
            spec["sequence_length"] = self.sequence_length
            spec |= {"new_tokens": self.new_tokens} if self.mode == "generate" else {"classes": self.classes}
        if self.config:
            spec["config"] = dict(self.config)
        if self.image_folder:
            spec |= {"image_folder": self.image_folder, "preload": self.preload}
        if self.dataset:
            spec |= {"dataset": self.dataset, "tokenizer": self.tokenizer, "preload": self.preload}
        if self.mode == "train" and self.source in _TORCH:
            spec["learning_rate"] = self.learning_rate
        return spec

    def build(self, device: str = "cpu", requests: int = 1) -> Task:
        """Make model and inputs on the device.

        Args:
            device: `cpu` or `cuda:0`.
            requests: The most that one step must serve.

        Raises:
            InputError: The model is not known, or its package is not installed.
        """
        if self.source in ("sleep", "spin"):
            return _Plain(self.seconds, self.source == "spin")
        if self.source == "custom":
            return _custom(self, device)
        with needs_extra("torch", "migperf"):
            from migperf.models import build
        return build(self, device, requests)


def from_spec(spec: Mapping[str, Any]) -> Workload:
    """Read a workload back from a record.

    Raises:
        InputError: A field is unknown, missing or out of its range.

    >>> from_spec({"source": "spin", "model": "2ms"}).name
    'spin:2ms'
    """
    known = Workload.__dataclass_fields__
    if unknown := sorted(set(spec) - set(known)):
        raise InputError(f"a workload has {', '.join(known)}", field="workload", value=", ".join(unknown))
    for name in ("source", "model"):
        if name not in spec:
            raise InputError("is missing", field=f"workload.{name}")
    return Workload(**spec)


def parse(text: str, **options: Any) -> Workload:
    """Read a workload's name: `torchvision/resnet18`, `transformers/bert`, `module:callable`, ...

    Args:
        text: The name.
        options: Other fields of `Workload`.

    >>> parse("timm/vit_tiny_patch16_224", mode="train", batch=8).spec["image_size"]
    224
    """
    if found := _PLAIN.fullmatch(text):
        return from_spec({"source": found[1], "model": f"{found[2]}{found[3]}", **options})
    source, slash, model = text.partition("/")
    if slash and source in _TORCH:
        return from_spec({"source": source, "model": model, **options})
    if re.fullmatch(r"[\w.]+:[\w.]+", text):
        return from_spec({"source": "custom", "model": text, **options})
    raise InputError(
        "expected torchvision/NAME, timm/NAME, transformers/NAME, sleep:10ms, spin:2ms or module:callable",
        field="workload",
        value=text,
    )


def torchvision(model: str, **options: Any) -> Workload:
    """Return a model of torchvision, `resnet50`."""
    return from_spec({"source": "torchvision", "model": model, **options})


def timm(model: str, **options: Any) -> Workload:
    """Return a model of timm, `vit_base_patch16_224`."""
    return from_spec({"source": "timm", "model": model, **options})


def transformers(model: str, **options: Any) -> Workload:
    """Return a model of transformers by its type (`bert`), a known name (`bert-base-cased`) or a folder."""
    return from_spec({"source": "transformers", "model": model, **options})


def custom(model: str, **options: Any) -> Workload:
    """Return `module:callable`: it is called with workload and device, and gives a `Task` or a function.

    A function without arguments is one step that is done when it returns.
    """
    return from_spec({"source": "custom", "model": model, **options})


def sleep(duration: str) -> Workload:
    """Return a step that idles, `10ms`."""
    return Workload("sleep", duration)


def spin(duration: str) -> Workload:
    """Return a step that takes so much time of a core, `2ms`: twice as long where it gets half of one."""
    return Workload("spin", duration)


class _Plain:
    """Idles, or uses processor time; needs no model."""

    def __init__(self, seconds: float, spin: bool) -> None:
        self.seconds, self.spin = seconds, spin
        self.facts: Mapping[str, Any] = {}

    def step(self, requests: int) -> None:
        if not self.spin:
            time.sleep(self.seconds)
            return
        end = time.thread_time_ns() + round(self.seconds * 1e9)
        while time.thread_time_ns() < end:
            pass

    def synchronize(self) -> None:
        pass


class _Function:
    """A user's function as a task."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        self.facts: Mapping[str, Any] = {}

    def step(self, requests: int) -> None:
        for _ in range(requests):
            self.function()

    def synchronize(self) -> None:
        pass


def _custom(workload: Workload, device: str) -> Task:
    task = imported(workload.model, "workload")(workload, device)
    if isinstance(task, Task):
        return task
    if callable(task):
        return _Function(task)
    raise InputError(
        f"gave a {type(task).__name__}, expected a function or an object with step, synchronize and facts",
        field="workload",
        value=workload.model,
    )
