"""A summarizer and a relevance-attention module as one `nn.Module`, to train with any loop or trainer."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from relattn.encoding import prepare
from relattn.families import CrossAttention, uses_attention_interface
from relattn.reference import steered_reference
from relattn.steerer import Steerer
from relattn.steering import steered
from relattn.weights import RelAttnModule


class SteeredModel(nn.Module):
    """Cross-entropy of a steered summarizer; gradients reach the model and the module.

    Works as the `model` of transformers' Trainer, with `SteeredCollator` as its `data_collator` and
    `remove_unused_columns=False`.

    Args:
        model: The summarizer.
        tokenizer: Its tokenizer.
        module: The parameters of relevance attention.
        label_smoothing: Of the cross-entropy.
        source_prefix: See `Steerer`.
        reference: Mix probabilities before the attention's dropout, as the formula says, by the slow path.
            The default is yes where the model has attention dropout and asks the attention interface (LED,
            ProphetNet and FSMT do not); else the fast path, which mixes behind the dropout.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        module: RelAttnModule,
        *,
        label_smoothing: float = 0.0,
        source_prefix: str = "",
        reference: bool | None = None,
    ) -> None:
        super().__init__()
        self.model, self.module = model, module
        self.steerer = Steerer(model, tokenizer, module=module, source_prefix=source_prefix)
        self.label_smoothing = label_smoothing
        dropout = any(attention_dropout(layer) > 0 for layer in self.steerer.layers)
        self.reference = dropout and uses_attention_interface(model) if reference is None else reference

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"],
        control_ids: Int[Tensor, "batch controls"],
        control_mask: Int[Tensor, "batch controls"],
        labels: Int[Tensor, "batch target"],
    ) -> dict[str, Tensor]:
        """Loss (mean over labels that are not -100) and logits (batch, target, vocabulary)."""
        steerer = self.steerer
        batch = prepare(
            self.model,
            steerer.layers,
            self.module.relevance,
            input_ids,
            attention_mask.bool(),
            control_ids,
            control_mask.bool(),
        )
        weight = self.module(batch.control_mean, batch.source_mean)
        inputs = batch.encoded.rows(torch.arange(len(input_ids), device=input_ids.device))
        steering = (
            steered_reference(self.model, steerer.layers, batch.a_rel, weight)
            if self.reference and self.training
            else steered(steerer.layers, batch.contexts, weight)
        )
        with steering:
            logits = self.model(**inputs, decoder_input_ids=self._shifted(labels), use_cache=False).logits
        return {"loss": self._loss(logits, labels), "logits": logits}

    def _loss(
        self, logits: Float[Tensor, "batch target vocabulary"], labels: Int[Tensor, "batch target"]
    ) -> Float[Tensor, ""]:
        return nn.functional.cross_entropy(
            logits.flatten(0, 1).float(),
            labels.flatten(),
            ignore_index=-100,
            label_smoothing=self.label_smoothing,
        )

    def _shifted(self, labels: Int[Tensor, "batch target"]) -> Int[Tensor, "batch target"]:
        own = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if own is not None:  # mBART's starts with the language that ends the labels
            return own(labels=labels)
        config = self.model.config
        start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
        return torch.cat(
            [start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, config.pad_token_id)], dim=1
        )


def attention_dropout(layer: CrossAttention) -> float:
    """Dropout rate of a cross-attention's probabilities."""
    for name in ("attention_dropout", "attn_dropout", "dropout"):  # ProphetNet's `dropout` acts elsewhere
        rate = getattr(layer.attention, name, None)
        if isinstance(rate, nn.Dropout):
            rate = rate.p
        if isinstance(rate, int | float):
            return float(rate)
    return 0.0
