"""Models by name, with their weights, and the preprocessing that belongs to them.

    timm/NAME            a model of timm
    torchvision/NAME     a classification model of torchvision
    hf/NAME-OR-FOLDER    a model of transformers: a folder that `save_pretrained` wrote, or a name on the hub
    module:callable      your own: the callable returns the module, or (module, transform of a PIL image)

Preprocessing is what the model says of itself: a wrong mean or standard deviation is the commonest silent
error. Where a model says nothing, mean, standard deviation and image size must be given. Nothing is
downloaded unless pretrained weights are asked for.
"""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shared_core import InputError, named
from shared_core.errors import needs_extra

_NESTED = ("model", "state_dict")
"""Where checkpoints of training scripts keep the state dict."""
_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile put before every key."""
_SHOWN = 4
"""Names that an error message shows before it counts the rest."""


@dataclass(frozen=True)
class ModelSpec:
    """What model is wanted.

    Args:
        name: see the module's text.
        weights: `pretrained` lets the library fetch its weights; `random` starts from a fixed seed. None is
            for a checkpoint, for a local transformers folder, or where the weights do not matter.
        checkpoint: a state dict, as .safetensors, or as .pt or .pth with nothing but tensors in containers.
        num_classes: outputs of the classifier, where it differs from the library's.
        image_size: height and width of the input, where it differs from the model's own.
        mean, std: of each channel, for images in [0, 1]; they take the place of the model's own.
    """

    name: str
    weights: Literal["pretrained", "random"] | None = None
    checkpoint: Path | None = None
    num_classes: int | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def pretrained(self) -> bool:
        """Whether the library may fetch weights."""
        return self.weights == "pretrained"


@dataclass(frozen=True)
class Preprocessing:
    """From a PIL image to a model's input, as in evaluation."""

    transform: Callable[[Any], Tensor]
    """PIL image -> (channels, height, width), float32."""
    description: dict[str, Any]
    """The same in words and numbers, for the record."""
    mode: str = "RGB"
    """The PIL mode that the transform takes."""
    image_size: tuple[int, int] | None = None
    """Height and width that it gives, where known beforehand."""


@dataclass(frozen=True)
class Source:
    """A floating-point model in evaluation mode, and what belongs to it."""

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    weights: str
    """Where the weights came from, in words; empty where they do not mean anything."""
    class_numbers: dict[str, int] = field(default_factory=dict)
    """Class name -> output, where the model says so."""


def load_model(spec: ModelSpec) -> Source:
    """The model that the spec describes.

    Raises:
        InputError: unknown name, package not installed, weights that cannot be fetched or do not fit, or
            preprocessing that is not known.
    """
    if spec.weights and spec.checkpoint:
        raise InputError("give either a checkpoint or --pretrained/--random, not both", file=spec.checkpoint)
    family, _, name = spec.name.partition("/")
    families = {"timm": _timm, "torchvision": _torchvision, "hf": _huggingface}
    if family in families and name:
        source = families[family](name, spec)
    elif ":" in spec.name:
        source = _own(spec)
    else:
        raise InputError(
            "a model is timm/NAME, torchvision/NAME, hf/NAME-OR-FOLDER or module:callable", value=spec.name
        )
    if spec.checkpoint:
        load_state(source.model, read_state_dict(spec.checkpoint), spec.checkpoint)
        source = replace(source, weights=f"checkpoint {spec.checkpoint}")
    source.model.eval()
    return source


def _timm(name: str, spec: ModelSpec) -> Source:
    with needs_extra("timm", "repqvit"):
        import timm
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    options = _set(num_classes=spec.num_classes, img_size=spec.image_size)
    with _making(spec):
        try:
            model = timm.create_model(name, pretrained=spec.pretrained, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            raise InputError(
                f"timm/{name} has no fixed image size to set", field="image-size", value=spec.image_size
            ) from error
    return Source(f"timm/{name}", model, _timm_preprocessing(model, spec), spec.weights or "")


def _timm_preprocessing(model: nn.Module, spec: ModelSpec) -> Preprocessing:
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    config = getattr(model, "pretrained_cfg", None) or {}
    if not config.get("mean") or not config.get("std"):
        return _given_preprocessing(spec)
    resolved = resolve_model_data_config(model)
    channels, *size = resolved["input_size"]
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = (spec.image_size,) * 2 if spec.image_size else built_for or size
    resolved["input_size"] = (channels, height, width)
    for key in ("mean", "std"):
        if value := getattr(spec, key):
            resolved[key] = _per_channel(key, value, channels)
    transform: Any = create_transform(**resolved, is_training=False)
    return Preprocessing(transform, resolved, "L" if channels == 1 else "RGB", (height, width))


def _torchvision(name: str, spec: ModelSpec) -> Source:
    with needs_extra("images", "repqvit"):
        from torchvision import models
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    default = models.get_model_weights(name).DEFAULT  # pyright: ignore[reportAttributeAccessIssue]
    # Only ViTs are made for one size; the others take any.
    options = _set(
        num_classes=spec.num_classes, image_size=spec.image_size if name.startswith("vit") else None
    )
    with _making(spec):
        try:
            model = models.get_model(name, weights=default if spec.pretrained else None, **options)
        except ValueError as error:
            raise InputError(f"torchvision/{name}: {error}") from error
    changes: dict[str, Any] = {key: value for key in ("mean", "std") if (value := getattr(spec, key))}
    if spec.image_size:
        own = default.transforms()
        share = spec.image_size / own.crop_size[0]
        changes |= {"crop_size": spec.image_size, "resize_size": round(own.resize_size[0] * share)}
    transform = default.transforms(**changes)
    description = {
        "input_size": [3, *transform.crop_size * 2],
        "resize_size": list(transform.resize_size),
        "mean": list(transform.mean),
        "std": list(transform.std),
        "interpolation": transform.interpolation.value,
    }
    size = (transform.crop_size[0],) * 2
    numbers = {label: n for n, label in enumerate(default.meta["categories"])}
    return Source(
        f"torchvision/{name}",
        model,
        Preprocessing(transform, description, image_size=size),
        spec.weights or "",
        {} if spec.num_classes else numbers,
    )


def _huggingface(name: str, spec: ModelSpec) -> Source:
    with needs_extra("transformers", "repqvit"):
        import transformers
    local = Path(name).is_dir()
    where: dict[str, Any] = {"local_files_only": local or not spec.pretrained}
    own_weights = local and spec.weights is None and spec.checkpoint is None
    if local and not Path(name, "config.json").is_file():
        raise InputError("has no config.json: expected a folder that save_pretrained wrote", file=name)
    with _making(spec):
        config = transformers.AutoConfig.from_pretrained(name, **where)
        architecture: Any = getattr(transformers, next(iter(config.architectures or ()), ""), None)
        cls: Any = architecture or transformers.AutoModelForImageClassification
        if spec.pretrained or own_weights:
            if spec.num_classes not in (None, config.num_labels):
                raise InputError(
                    f"the weights of {name} have {config.num_labels} classes", field="num-classes"
                )
            model, found = cls.from_pretrained(name, config=config, output_loading_info=True, **where)
            if found["missing_keys"]:
                raise InputError(
                    f"lacks {_some(found['missing_keys'])}: not the weights of a {cls.__name__}", file=name
                )
        else:
            if spec.num_classes:
                config.num_labels = spec.num_classes
            if spec.image_size and hasattr(config, "image_size"):
                config.image_size = spec.image_size
            model = architecture(config) if architecture else cls.from_config(config)
    weights = spec.weights or (f"folder {name}" if own_weights else "")
    return Source(
        f"hf/{name}",
        model,
        _huggingface_preprocessing(name, where, spec),
        weights,
        {label: int(number) for label, number in (config.label2id or {}).items()},
    )


def _huggingface_preprocessing(name: str, where: dict[str, Any], spec: ModelSpec) -> Preprocessing:
    from transformers import AutoImageProcessor

    if Path(name).is_dir() and not Path(name, "preprocessor_config.json").is_file():
        return _given_preprocessing(spec)
    with _making(spec), needs_extra("images", "repqvit"):
        processor = AutoImageProcessor.from_pretrained(name, **where)
    changes: dict[str, Any] = {
        f"image_{key}": list(v) for key in ("mean", "std") if (v := getattr(spec, key))
    }
    if spec.image_size:
        square = {"height": spec.image_size, "width": spec.image_size}
        changes |= {"size": square}
        if getattr(processor, "crop_size", None):
            changes |= {"crop_size": square}

    def transform(image: Any) -> Tensor:
        return processor(images=image, return_tensors="pt", **changes)["pixel_values"][0]

    keys = ("size", "crop_size", "image_mean", "image_std", "resample", "do_resize", "do_center_crop")
    own = {key: value for key in keys if (value := processor.to_dict().get(key)) is not None}
    description = {"processor": type(processor).__name__, **own, **changes}
    size = description.get("crop_size") or description["size"]
    fixed = (size["height"], size["width"]) if "height" in size else None
    return Preprocessing(transform, description, image_size=fixed)


def _own(spec: ModelSpec) -> Source:
    if spec.weights:
        raise InputError(f"{spec.name} makes its own weights: drop --pretrained/--random", value=spec.weights)
    if spec.num_classes:
        raise InputError(f"{spec.name} decides its own outputs", field="num-classes", value=spec.num_classes)
    made = named.made(spec.name, "model")
    model, transform = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{spec.name} must return a torch module, or a pair (module, transform)",
            value=type(model).__name__,
        )
    if transform is not None:
        size = (spec.image_size, spec.image_size) if spec.image_size else None
        preprocessing = Preprocessing(transform, {"transform": repr(transform)}, image_size=size)
    elif getattr(model, "pretrained_cfg", None):
        with needs_extra("timm", "repqvit"):
            preprocessing = _timm_preprocessing(model, spec)
    else:
        preprocessing = _given_preprocessing(spec)
    return Source(spec.name, model, preprocessing, f"made by {spec.name}")


def _given_preprocessing(spec: ModelSpec) -> Preprocessing:
    """Shorter side to the image size (bicubic), centre crop, normalisation: for models that say nothing."""
    missing = [key for key in ("mean", "std", "image_size") if not getattr(spec, key)]
    if not (spec.mean and spec.std and spec.image_size):
        options = ", ".join("--" + key.replace("_", "-") for key in missing)
        raise InputError(f"{spec.name} carries no preprocessing: give {options} as it was trained with")
    channels = len(spec.mean)
    std = _per_channel("std", spec.std, channels)
    if channels not in (1, 3):
        raise InputError("expected 1 or 3 values, one for each channel", field="mean", value=spec.mean)
    with needs_extra("images", "repqvit"):
        from torchvision.transforms import v2
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(spec.image_size, v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(spec.image_size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(spec.mean, std),
        ]
    )
    description = {
        "input_size": [channels, spec.image_size, spec.image_size],
        "mean": list(spec.mean),
        "std": list(std),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    size = (spec.image_size, spec.image_size)
    return Preprocessing(transform, description, "L" if channels == 1 else "RGB", size)


def _set(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _per_channel(key: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) != channels:
        raise InputError(f"expected {channels} values, one for each channel", field=key, value=values)
    if key == "std" and min(values) <= 0:
        raise InputError("expected positive values", field=key, value=values)
    return values


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A state dict from a file, also one nested under "model" or "state_dict" as training scripts write it.

    Raises:
        InputError: no such file, damaged, or something in it is no tensor (pickled objects are never loaded).
    """
    if not path.is_file():
        raise InputError("no such file", file=path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content: Any = load_file(path)
        except SafetensorError as error:
            raise InputError(f"not a readable safetensors file ({error})", file=path) from error
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise InputError(
                "holds more than tensors, which is not loaded because it could run code: save the state dict "
                "alone",
                file=path,
            ) from error
        except (RuntimeError, EOFError, ValueError) as error:
            raise InputError(f"not a readable checkpoint ({_first_line(error)})", file=path) from error
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise InputError("expected a state dict (name -> tensor)", file=path, value=type(content).__name__)
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise InputError(
            f"expected a state dict (name -> tensor), also found {_some(others)} that are none", file=path
        )
    for prefix in _WRAPPERS:
        if all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    return dict(content)


def load_state(model: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Load a state dict that must fit exactly; one error says all that does not.

    Raises:
        InputError: with the missing, unexpected and wrongly shaped entries.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of other shape", shapes))
        if names
    ]
    if problems:
        raise InputError(f"does not fit {type(model).__name__}: {'; '.join(problems)}", file=file)
    model.load_state_dict(dict(state))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _unknown(library: str, name: str, known: list[str]) -> InputError:
    close = difflib.get_close_matches(name, known, n=3)
    return InputError(
        f"{library} has no model of this name" + (f"; close ones: {', '.join(close)}" if close else ""),
        value=name,
    )


@contextmanager
def _making(spec: ModelSpec) -> Iterator[None]:
    """Random weights the same each time, and one line where the library cannot get what it needs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            yield
        except InputError:
            raise
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not spec.pretrained:
                raise
            if not spec.pretrained:
                advice = "give a local folder, or --pretrained to let the library fetch it"
            elif spec.name.startswith("hf/"):
                advice = "without a network give a local folder, hf/FOLDER"
            else:
                advice = "without a network give --checkpoint FILE"
            raise InputError(f"{spec.name} could not be had ({_first_line(error)}); {advice}") from error
