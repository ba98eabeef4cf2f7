"""Makes a smaller student out of a larger model's layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from shared_core import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def prune_layers(model: SentenceTransformer, keep: Sequence[int]) -> SentenceTransformer:
    """Copy a model with only some of its layers, as the start of a student.

    Args:
        model: A sentence-transformers model around a transformers encoder.
        keep: The layers that stay, as indices from 0, in rising order; [1, 3, 5] halves a model of six.

    Raises:
        InputError: A layer is not there, the order is not rising, or the layers of this architecture cannot
            be found.
    """
    layers = layer_stack(encoder_of(model))
    if not keep or list(keep) != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= len(layers):
        raise InputError(
            f"expected rising layers from 0 to {len(layers) - 1}", field="keep", value=list(keep)
        )
    small = copy.deepcopy(model)
    encoder = encoder_of(small)
    stack = layer_stack(encoder)
    kept = [stack[number] for number in keep]
    while len(stack):
        del stack[-1]
    stack.extend(kept)
    _set_depth(encoder, len(kept))
    return small


def layer_stack(encoder: nn.Module) -> nn.ModuleList:
    """Find the list of an encoder's layers: the ModuleList as long as its configuration says.

    Raises:
        InputError: There is no such list, or more than one.
    """
    depth = _depth(encoder)
    found = [part for part in encoder.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    if len(found) != 1:
        raise InputError(
            f"expected one list of {depth} layers in {type(encoder).__name__}",
            field="model",
            value=len(found),
        )
    return found[0]


_DEPTH_NAMES = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")


def _depth(encoder: Any) -> int:
    for name in _DEPTH_NAMES:
        depth = getattr(encoder.config, name, None)
        if isinstance(depth, int):
            return depth
    raise InputError("its configuration does not say how many layers it has", field="model")


def _set_depth(encoder: Any, depth: int) -> None:
    for name in _DEPTH_NAMES:
        if name in encoder.config.to_dict():
            setattr(encoder.config, name, depth)
    types = getattr(encoder.config, "layer_types", None)
    if types is not None:
        encoder.config.layer_types = types[:depth]


def encoder_of(model: SentenceTransformer) -> Any:
    """Find the transformers encoder inside a sentence-transformers model.

    Raises:
        InputError: There is none.
    """
    encoder = getattr(model[0], "model", None)
    if not isinstance(encoder, nn.Module) or not hasattr(encoder, "config"):
        raise InputError(
            "expected a sentence-transformers model around a transformers encoder",
            field="model",
            value=type(model[0]).__name__,
        )
    return encoder
