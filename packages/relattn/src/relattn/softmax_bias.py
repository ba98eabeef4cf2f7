"""Pre-softmax bias: cross-attention looks less at tokens outside the relevant span (after PASTA).

log(alpha) is added to the logits of all source tokens outside the span, before the softmax: each keeps a
share alpha of its odds. Unlike relevance attention it cannot bring attention to a token that the query turns
away from.

Zhang et al.: "Tell Your Model Where to Attend", ICLR 2024.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from relattn.families import CrossAttention, uses_attention_interface
from relattn.logit_boost import rows_per_document
from relattn.reference import _attention_implementation, _eager_attention
from relattn.steering import exclusive
from shared_core import InputError


@contextmanager
def softmax_bias(
    model: PreTrainedModel,
    layers: Sequence[CrossAttention],
    span: Bool[Tensor, "batch tokens"],
    alpha: float = 0.01,
) -> Iterator[None]:
    """Inside the block every cross-attention, layer and head adds log(alpha) outside the span.

    Rows (beams) of a document stand side by side. The attention implementation is switched to an eager one
    for the block, and restored behind it. A document whose span is empty is left as it is.

    Args:
        model: The model.
        layers: Its cross-attentions, `relattn.families.cross_attentions(model)`.
        span: True at the source tokens to attend to.
        alpha: Share of the odds that tokens outside keep, above 0 to 1.

    Raises:
        InputError: The model does not ask transformers' attention interface (LED, ProphetNet, FSMT), alpha is
            out of range, or the model is being steered already.
    """
    if not 0 < alpha <= 1:
        raise InputError("expected a share above 0, at most 1", field="alpha", value=alpha)
    if not uses_attention_interface(model):
        raise InputError(
            f"{type(model).__name__} does not use transformers' attention interface", field="model"
        )
    outside = ~span & span.any(1, keepdim=True)
    name = f"softmax_bias_{uuid4().hex}"
    bias = torch.zeros(span.shape, device=span.device).masked_fill(outside, math.log(alpha))
    biased = {id(layer.attention) for layer in layers}

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        if id(module) in biased:
            copies = rows_per_document(len(query), len(bias))
            mine = bias.repeat_interleave(copies, dim=0)[:, None, None].to(query)
            extra = key.shape[2] - mine.shape[3]  # some encoders pad inside, to a multiple of their block
            mine = nn.functional.pad(mine, (0, extra))
            mask = mine if mask is None else mask + mine
        return _eager_attention(module)(module, query, key, value, mask, **kwargs)

    with (
        exclusive([layer.output for layer in layers]),
        _attention_implementation(model, name, attend),
    ):
        yield
