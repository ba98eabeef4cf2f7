"""Steering as the formula reads: probabilities are mixed inside the attention, before its dropout.

The slow path beside `relattn.steering`, which it checks. It holds all probabilities in memory (eager
attention). Use it to train with attention dropout, or to see the mixed probabilities through
`output_attentions=True`. It works where a model asks transformers' attention interface; LED, ProphetNet and
FSMT do not.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from relattn.families import CrossAttention, decoder_of, uses_attention_interface
from relattn.steering import check_weight, exclusive
from shared_core import InputError


@contextmanager
def steered_reference(
    model: PreTrainedModel,
    layers: Sequence[CrossAttention],
    relevance: Float[Tensor, "batch tokens"],
    weight: Float[Tensor, "rows layers heads"],
) -> Iterator[None]:
    """Inside the block each cross-attention's probabilities are (1 - w) A + w a_rel.

    Rows, weights and errors as for `relattn.steering.steered`. The model's attention implementation is
    switched for the block, and restored behind it.

    Raises:
        InputError: The model does not ask the attention interface, a weight is not in [0, 1], or the model is
            being steered already.
        RuntimeError: A cross-attention ran inside the block that was not steered, or a pass of the decoder
            left one out (LayerDrop in training may).
    """
    if not uses_attention_interface(model):
        raise InputError(
            f"{type(model).__name__} does not use transformers' attention interface, so its probabilities"
            " cannot be mixed: use the fast path",
            field="model",
        )
    check_weight(weight.detach())
    mixing = {id(layer.attention): (relevance, weight[:, n]) for n, layer in enumerate(layers)}
    reached: set[int] = set()
    name = f"relattn_{uuid4().hex}"

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ):
        plain = _eager_attention(module)
        if id(module) not in mixing:
            return plain(module, query, key, value, mask, **kwargs)
        reached.add(id(module))
        dropout = kwargs.pop("dropout", 0.0)
        _, probabilities = plain(module, query, key, value, mask, dropout=0.0, **kwargs)
        mixed = _mix(probabilities, *mixing[id(module)])
        kept = nn.functional.dropout(mixed, dropout, training=module.training)
        groups = kept.shape[1] // value.shape[1]  # above 1 in grouped-query attention
        return (kept @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous(), mixed

    with (
        exclusive([layer.output for layer in layers]),
        _attention_implementation(model, name, attend),
        _expected(model, layers) as expected,
    ):
        yield
    if missed := expected - reached:
        raise RuntimeError(
            f"steering reached {len(expected) - len(missed)} of {len(expected)} cross-attentions that ran"
        )


@contextmanager
def _expected(model: PreTrainedModel, layers: Sequence[CrossAttention]) -> Iterator[set[int]]:
    """The ids of the attention modules that steering must reach, filled in while passes run.

    Each module that runs; and all of them once the decoder runs without dropping layers at random.
    """
    decoder = decoder_of(model)
    found: set[int] = set()

    def decoder_runs(*_: Any) -> None:
        if not (decoder.training and getattr(decoder, "layerdrop", 0.0)):
            found.update(id(layer.attention) for layer in layers)

    handles = [decoder.register_forward_pre_hook(decoder_runs)]
    handles += [
        layer.attention.register_forward_pre_hook(lambda module, _: found.add(id(module))) for layer in layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _mix(
    probabilities: Float[Tensor, "rows heads targets tokens"],
    relevance: Float[Tensor, "batch tokens"],
    weight: Float[Tensor, "some heads"],
) -> Float[Tensor, "rows heads targets tokens"]:
    """(1 - w) A + w a_rel, where each document's rows (beams) stand side by side."""
    copies, left = divmod(len(probabilities), len(relevance))
    if left:
        raise InputError(
            f"expected a multiple of {len(relevance)} rows, one document's side by side,"
            f" got {len(probabilities)}"
        )
    a = relevance.repeat_interleave(copies, dim=0)[:, None, None].to(probabilities)
    w = weight.expand(len(relevance), -1).repeat_interleave(copies, dim=0)[:, :, None, None].to(probabilities)
    return (1 - w) * probabilities + w * a


def _eager_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The eager attention of a module's own file: position biases, caps and groups are its family's."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward")  # noqa: B009


@contextmanager
def _attention_implementation(
    model: PreTrainedModel, name: str, attend: Callable[..., Any]
) -> Iterator[None]:
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    AttentionInterface.register(name, attend)
    # Without a mask function of the same name transformers passes no mask at all, and pads are attended.
    AttentionMaskInterface.register(name, eager_mask)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            type(registry)._global_mapping.pop(name, None)
