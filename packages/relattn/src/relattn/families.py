"""Where a transformers model keeps its cross-attention, source embeddings and the states its decoder sees."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared_core import InputError

SUPPORTED = (
    "BART",
    "PEGASUS",
    "PEGASUS-X",
    "mBART",
    "Marian",
    "M2M100",
    "T5",
    "mT5",
    "Flan-T5",
    "LongT5",
    "BigBird-PEGASUS",
    "LED",
    "ProphetNet",
    "FSMT",
    "EncoderDecoderModel",
)
"""Families on which tests check steering. Others of the same layout (Blenderbot, PLBart, ...) work too."""

_BLOCK_NAMES = ("encoder_attn", "EncDecAttention", "cross_attn", "cross_attention", "crossattention")
_VALUE_NAMES = ("v_proj", "v", "value_proj", "value")
_OUTPUT_NAMES = ("out_proj", "o", "o_proj", "c_proj", "output.dense")
_HEAD_NAMES = ("num_heads", "n_heads", "num_attn_heads", "num_attention_heads")


@dataclass(frozen=True)
class CrossAttention:
    """One decoder layer's cross-attention.

    Attributes:
        name: Its name inside the decoder.
        attention: The module that computes the attention (and calls transformers' attention interface).
        value: Encoder states (..., width) to values (..., heads x head width).
        output: The projection behind the attention; its input is the heads' output side by side.
        heads: Number of heads.
        batch_dim: Which dimension of the output projection's input is the batch: 1 for FSMT, else 0.
    """

    name: str
    attention: nn.Module
    value: Callable[[Tensor], Tensor]
    output: nn.Module
    heads: int
    batch_dim: int = 0


def cross_attentions(model: PreTrainedModel) -> list[CrossAttention]:
    """The cross-attentions of the decoder, first layer first; one for each decoder layer, never none.

    Raises:
        InputError: The model is not an encoder-decoder, or merges cross- and self-attention, or its
            cross-attention has no layout known here. The message lists the supported families.
    """
    kind = type(model).__name__
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise _unsupported(f"{kind} is not an encoder-decoder model: it has no cross-attention")
    decoder = _part(model, "decoder")
    blocks = [(n, block) for n, block in decoder.named_modules() if n.rpartition(".")[2] in _BLOCK_NAMES]
    if not blocks:
        raise _unsupported(f"{kind} has no cross-attention of its own in its decoder")
    found = [_cross_attention(name, block, kind) for name, block in blocks]
    layers = _decoder_layers(model)
    if layers is not None and layers != len(found):
        raise _unsupported(f"{kind} has {layers} decoder layers but {len(found)} cross-attentions")
    return found


def source_embeddings(model: PreTrainedModel, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
    """Rows of the *encoder's* embedding table, raw: no scale, position or norm.

    Models whose encoder and decoder have tables of their own (EncoderDecoderModel, FSMT, untied T5) speak of
    the source in the encoder's.
    """
    encoder = encoder_of(model)
    own = isinstance(encoder, PreTrainedModel)  # FSMT's encoder is not
    table = encoder.get_input_embeddings() if own else encoder.embed_tokens
    assert isinstance(table, nn.Module)
    assert isinstance(table.weight, Tensor)
    return nn.functional.embedding(ids.to(table.weight.device), table.weight)


def encoder_of(model: PreTrainedModel) -> nn.Module:
    """The model's encoder."""
    return _part(model, "encoder")


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The model's decoder."""
    return _part(model, "decoder")


def decoder_view(
    model: PreTrainedModel, states: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "batch tokens width2"]:
    """Encoder states as the cross-attention sees them: EncoderDecoderModel may project them first."""
    projection = getattr(model, "enc_to_dec_proj", None)
    return states if projection is None else projection(states)


def encoder_arguments(
    model: PreTrainedModel, mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"]
) -> dict[str, Tensor]:
    """What an encoder wants beside ids and mask: LED's global attention, on each row's first real token."""
    if model.config.model_type != "led":
        return {}
    first = mask.long().argmax(dim=1, keepdim=True)
    return {"global_attention_mask": torch.zeros_like(mask, dtype=torch.long).scatter(1, first, 1)}


def uses_attention_interface(model: PreTrainedModel) -> bool:
    """Whether the decoder asks transformers' attention interface. LED, ProphetNet and FSMT do not."""
    ask = getattr(
        _part(model, "decoder"), "_can_set_attn_implementation", None
    )  # FSMT's decoder has no such method
    return ask is not None and ask()


def source_limit(model: PreTrainedModel) -> int | None:
    """The most source tokens for which the encoder has positions, None where positions have no end (T5)."""
    config = getattr(encoder_of(model), "config", model.config)
    names = ("max_encoder_position_embeddings", "max_position_embeddings")  # the first is LED's
    limit = next((n for name in names if isinstance(n := getattr(config, name, None), int)), None)
    if limit is not None and config.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl"):
        return limit - config.pad_token_id - 1  # their positions start behind the padding's
    return limit


def _part(model: PreTrainedModel, which: str) -> nn.Module:
    part = model.get_encoder() if which == "encoder" else model.get_decoder()
    if part is None or part is model:
        raise _unsupported(f"{type(model).__name__} has no {which} of its own")
    return part


def _unsupported(what: str) -> InputError:
    return InputError(f"{what}: expected one of {', '.join(SUPPORTED)}", field="model")


def _decoder_layers(model: PreTrainedModel) -> int | None:
    config = getattr(_part(model, "decoder"), "config", model.config)
    for owner, name in (
        (model.config, "num_decoder_layers"),  # T5's num_layers is the encoder's
        (config, "decoder_layers"),
        (config, "num_decoder_layers"),
        (config, "num_hidden_layers"),
    ):
        number = getattr(owner, name, None)
        if isinstance(number, int):
            return number
    return None


def _child(block: nn.Module, name: str) -> nn.Module | None:
    part: nn.Module | None = block
    for step in name.split("."):
        part = getattr(part, step, None)
    return part if isinstance(part, nn.Module) else None


def _first(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((part for name in names if (part := _child(block, name)) is not None), None)


def _cross_attention(name: str, block: nn.Module, kind: str) -> CrossAttention:
    attention = _child(block, "self") or block  # BERT-like blocks: .self attends, .output projects
    value, output = _first(attention, _VALUE_NAMES), _first(block, _OUTPUT_NAMES)
    values: Callable[[Tensor], Tensor] | None = value
    if value is None and (merged := _child(block, "c_attn")) is not None:
        values = _second_half(merged)  # GPT-2 projects keys and values in one
    heads = next((n for owner in (attention, getattr(attention, "config", None)) for a in _HEAD_NAMES
                  if isinstance(n := getattr(owner, a, None), int)), None)  # fmt: skip
    if values is None or output is None or heads is None:
        raise _unsupported(
            f"{kind}: {name} has no value projection, output projection or number of heads known here"
        )
    time_first = type(attention).__module__.endswith("modeling_fsmt")
    return CrossAttention(name, attention, values, output, heads, batch_dim=int(time_first))


def _second_half(projection: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda states: projection(states).chunk(2, dim=-1)[1]
