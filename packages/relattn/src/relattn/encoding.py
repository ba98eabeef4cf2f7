"""A batch behind the encoder: one pass gives relevance, context vectors, and what decoding starts from."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from relattn.families import (
    CrossAttention,
    decoder_view,
    encoder_arguments,
    encoder_of,
    source_embeddings,
)
from relattn.relevance import Relevance, RelevanceInputs
from relattn.steering import context_vectors, relevant_context
from relattn.weights import masked_mean


@dataclass(frozen=True)
class EncodedBatch:
    """A batch behind the encoder.

    Attributes:
        input_ids: Source ids.
        mask: True at real source tokens.
        source_vectors: K, the encoder's input representation.
        states: The encoder's output.
        decoder_states: The same as the decoder's cross-attention sees it.
    """

    input_ids: Int[Tensor, "batch tokens"]
    mask: Bool[Tensor, "batch tokens"]
    source_vectors: Float[Tensor, "batch tokens width"]
    states: Float[Tensor, "batch tokens width"]
    decoder_states: Float[Tensor, "batch tokens width2"]

    def rows(self, index: Int[Tensor, " rows"]) -> dict[str, Any]:
        """What `generate` (or a forward pass) takes, for documents `index`, repeated as listed.

        The ids go along because some logits processors look at the source; the encoder does not run again.
        """
        return {
            "input_ids": self.input_ids[index],
            "attention_mask": self.mask[index].long(),
            "encoder_outputs": BaseModelOutput(last_hidden_state=cast(Any, self.states[index])),
        }


@dataclass(frozen=True)
class SteerableBatch:
    """An encoded batch with everything that steering needs.

    Attributes:
        encoded: The batch behind the encoder.
        scores: Raw relevance scores s.
        a_rel: The relevance distribution.
        contexts: Each layer's context vectors c, (batch, inner).
        control_mean: Mean of each control's raw embeddings.
        source_mean: Mean of the encoder's last states over real tokens.
    """

    encoded: EncodedBatch
    scores: Float[Tensor, "batch tokens"]
    a_rel: Float[Tensor, "batch tokens"]
    contexts: list[Tensor]
    control_mean: Float[Tensor, "batch width"]
    source_mean: Float[Tensor, "batch width2"]


def encode(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    global_attention: Int[Tensor, "batch tokens"] | None = None,
) -> EncodedBatch:
    """One pass of the encoder. Ids and masks on the model's device.

    Args:
        model: The summarizer.
        ids: Source ids.
        mask: True at real source tokens.
        global_attention: LED's mask, 1 at tokens with global attention; each row's first real token if None.
    """
    more = encoder_arguments(model, mask)
    if more and global_attention is not None:
        more = {"global_attention_mask": global_attention}
    with _attention_type_kept(encoder_of(model)):
        output = encoder_of(model)(
            input_ids=ids, attention_mask=mask.long(), output_hidden_states=True, return_dict=True, **more
        )
    states = output.last_hidden_state
    # Some encoders (PEGASUS-X, block-sparse BigBird) pad to a multiple of their block inside.
    first = output.hidden_states[0][:, : ids.shape[1]]
    return EncodedBatch(ids, mask, first, states, decoder_view(model, states))


@contextmanager
def _attention_type_kept(encoder: nn.Module) -> Iterator[None]:
    """BigBird turns to full attention at a short batch, and would stay with it for all longer ones."""
    before = getattr(encoder, "attention_type", None)
    try:
        yield
    finally:
        if before is not None and before != getattr(encoder, "attention_type", None):
            cast(Any, encoder).set_attention_type(before)


def prepare(
    model: PreTrainedModel,
    layers: Sequence[CrossAttention],
    relevance: Relevance,
    ids: Int[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    control_ids: Int[Tensor, "batch controls"],
    control_mask: Bool[Tensor, "batch controls"],
    phrases: Sequence[Sequence[str]] = (),
    tokens: Sequence[Sequence[str]] = (),
    global_attention: Int[Tensor, "batch tokens"] | None = None,
) -> SteerableBatch:
    """Encode a batch once; its relevance to the controls, and the context vector of each layer.

    Args:
        model: The summarizer.
        layers: Its cross-attentions.
        relevance: How relevance is computed.
        ids: Source ids.
        mask: True at real source tokens.
        control_ids: Ids of the controls' tokens.
        control_mask: True at real control tokens, at least one a row.
        phrases: The controls as text, for relevances that read it.
        tokens: The real source tokens as text, likewise.
        global_attention: See `encode`.
    """
    device = model.device
    wide = None if global_attention is None else global_attention.to(device)
    encoded = encode(model, ids.to(device), mask.to(device), wide)
    vectors = source_embeddings(model, control_ids.to(device))
    real = control_mask.to(device)
    inputs = RelevanceInputs(
        control_ids.to(device), real, vectors, encoded.source_vectors, encoded.mask, phrases, tokens
    )
    scores = relevance.scores(inputs)
    a_rel = relevance.distribution(scores, encoded.mask)
    context = relevant_context(a_rel, encoded.decoder_states)
    contexts = context_vectors(layers, context, encoded.decoder_states.dtype)
    source_mean = masked_mean(encoded.states, encoded.mask)
    return SteerableBatch(encoded, scores, a_rel, contexts, masked_mean(vectors, real), source_mean)
