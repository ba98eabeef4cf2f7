"""Models by name, to train on a user's images and to fill from a hardened file.

    csq/resnet20         CIFAR's residual networks, any depth 6 n + 2
    torchvision/NAME     a classification model of torchvision
    timm/NAME            a model of timm
    module:callable      your own: called without arguments, it returns the module

Nothing is downloaded: weights start at random, or come from a safetensors file.
"""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csq.resnet import CifarResNet
from shared_core import InputError, named
from shared_core.errors import needs_extra

_RESNET = re.compile(r"resnet(\d+)")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation that all classification weights of torchvision expect."""
_SHOWN = 4
"""Names that an error message shows before it counts the rest."""


def family(name: str) -> str:
    """Return what stands before the slash: csq, torchvision or timm; "own" for module:callable."""
    prefix, _, rest = name.partition("/")
    if prefix in ("csq", "torchvision", "timm") and rest:
        return prefix
    if ":" in name:
        return "own"
    raise InputError(
        "expected csq/resnet20, torchvision/NAME, timm/NAME or module:callable", field="model", value=name
    )


def build(name: str, classes: int, shape: tuple[int, int, int], seed: int = 0) -> nn.Module:
    """Return a model with random weights for images of one shape.

    Args:
        name: See the module's text.
        classes: Outputs.
        shape: Channels, height and width of the images.
        seed: Of the weights; torch's generator is left alone.

    Raises:
        InputError: Unknown name, package not installed, or a model that gives no `(batch, classes)` scores
            for such images in training.
    """
    makers = {"csq": _resnet, "torchvision": _torchvision, "timm": _timm, "own": _own}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = makers[family(name)](name, classes, shape)
        _check_scores(name, model, classes, shape)
    return model


def _resnet(name: str, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    found = _RESNET.fullmatch(name.partition("/")[2])
    if found is None:
        raise InputError(
            "expected csq/resnet20, or another depth 6 n + 2 in its place", field="model", value=name
        )
    depth = int(found[1])
    return CifarResNet(depth, classes, shape[0], width=8 if depth == 8 else 16)


def _torchvision(name: str, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    with needs_extra("images", "csq-quant"):
        from torchvision import models
    short = name.partition("/")[2]
    known = models.list_models(module=models)
    if short not in known:
        raise _unknown(name, known)
    options: dict[str, Any] = {"num_classes": classes}
    if short.startswith("vit"):
        options["image_size"] = shape[1]
    if short in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    with _one_line(name):
        return models.get_model(short, weights=None, **options)


def _timm(name: str, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    with needs_extra("timm", "csq-quant"):
        import timm
    short = name.partition("/")[2]
    if not timm.is_model(short):
        raise _unknown(name, timm.list_models())
    options: dict[str, Any] = {"num_classes": classes, "in_chans": shape[0]}
    with _one_line(name):
        try:
            return timm.create_model(short, img_size=shape[1:], **options)
        except TypeError as error:  # convolutional models take any size, and no such argument
            if "img_size" not in str(error):
                raise
        return timm.create_model(short, **options)


def _own(name: str, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    model = named.made(name, "model")
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}", field="model", value=name)
    return model


@torch.no_grad()
def _check_scores(name: str, model: nn.Module, classes: int, shape: tuple[int, int, int]) -> None:
    probe = copy.deepcopy(model).train()  # a copy: BatchNorm would learn from the zeros
    try:
        scores: Any = probe(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        size = "x".join(map(str, shape))
        raise InputError(
            f"does not take images of {size} ({_first_line(error)}); see --image-size",
            field="model",
            value=name,
        ) from error
    if not isinstance(scores, Tensor) or scores.shape != (2, classes):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(
            f"gives {got} in training for 2 images, expected scores of shape (2, {classes})",
            field="model",
            value=name,
        )


def normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and standard deviation that published weights of a model expect; None where unknown."""
    if family(name) == "torchvision":
        return _IMAGENET
    if family(name) == "timm":
        with needs_extra("timm", "csq-quant"):
            import timm
        config: Any = timm.get_pretrained_cfg(name.partition("/")[2])
        if config is not None and config.mean and config.std:
            return tuple(config.mean), tuple(config.std)
    return None


def load_weights(model: nn.Module, file: Path, classes: int) -> None:
    """Fill a model from a safetensors state dict.

    A classifier for another number of classes starts anew, with a warning; all else must fit exactly.

    Raises:
        InputError: No such file, not safetensors, or it does not fit; one error says all that does not.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise InputError("there is no such file", file=file, field="weights")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise InputError(
            f"is no whole safetensors file ({_first_line(error)})", file=file, field="weights"
        ) from error
    own = model.state_dict()
    other = [key for key in own if key in state and state[key].shape != own[key].shape]
    heads = [
        key
        for key in other
        if own[key].shape[:1] == (classes,) and own[key].shape[1:] == state[key].shape[1:]
    ]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (
            ("lacks", [key for key in own if key not in state]),
            ("has unexpected", [key for key in state if key not in own]),
            ("has in another shape", [key for key in other if key not in heads]),
        )
        if names
    ]
    if problems:
        raise InputError(f"does not fit {type(model).__name__}: {'; '.join(problems)}", file=file)
    if heads:
        warnings.warn(
            f"{file}: {_some(heads)} starts anew, as it is for another number of classes than {classes}",
            stacklevel=2,
        )
    model.load_state_dict({**state, **{key: own[key] for key in heads}})


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _unknown(name: str, known: list[str]) -> InputError:
    library, _, short = name.partition("/")
    close = difflib.get_close_matches(short, known, n=3)
    advice = f"; close ones: {', '.join(close)}" if close else ""
    return InputError(f"{library} has no model of this name{advice}", field="model", value=name)


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """What a library says of arguments that a model cannot be made with, as bad input."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        raise InputError(f"cannot be made: {_first_line(error)}", field="model", value=name) from error
