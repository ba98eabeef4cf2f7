"""PPLM with a bag of words: at every step the decoder's memory is nudged towards the control's words.

The baseline that the method is compared with. At every decoding step the keys and values that the decoder
looks back on, of its self-attention and of its cross-attention, are perturbed by a few gradient steps on

    -log sum_{v in bag} p(v) + kl_scale KL(p || p0)

each of size `step_size` g / |g|^1.5, and the next token's scores become gm * perturbed + (1 - gm) *
unperturbed. Each row has its own bag, its own loss and its own norms: what a row becomes does not depend on
its neighbours. (The released code sums one loss over the batch.)

Every step begins at the unperturbed memory, or, with `accumulate`, at what the steps before have made of it,
as in the published code, where each step hands its perturbed memory on. The step size of the examples, 1e-5,
is for large models: on small ones it changes next to nothing, where 0.01 to 0.5 does.

Dathathri et al.: "Plug and Play Language Models", ICLR 2020.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, LogitsProcessor, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from relattn.logit_boost import rows_per_document
from shared_core import InputError

Memory = list[Tensor]
"""Keys and values in a row: self K, self V, cross K, cross V of layer 0, then of layer 1, and so on."""

_TINY = 1e-15  # keeps a zero gradient from dividing by zero; as in the published code


@dataclass
class PPLMCost:
    """What PPLM did, for comparison: plain decoding takes one forward pass a step."""

    steps: int = 0
    forward_passes: int = 0
    backward_passes: int = 0


class PPLM(LogitsProcessor):
    """PPLM as a logits processor, for `generate(..., logits_processor=[...])`: greedy, beams or sampling.

    The memory of what a row has written is computed anew at each step, in one pass over all of it, since beam
    search changes which row has written what. With `accumulate` each row finds its own memory by what it has
    written: the same words of the same document have the same memory. `cost` counts all passes.

    Args:
        model: An encoder-decoder model whose decoder keeps its keys and values in a cache.
        encoder_states: The encoder's output.
        attention_mask: True, or 1, at real source tokens.
        bags: Token ids of each document's words, in the decoder's vocabulary; a row with an empty bag is left
            as it is.
        iterations: Gradient steps a decoding step.
        step_size: Of a gradient step. The default is that of the published examples, for large models.
        gamma: Exponent of the gradient's norm.
        kl_scale: Weight of the term that keeps the perturbed distribution near the unperturbed one.
        gm: Share of the perturbed logits, 0 to 1.
        accumulate: Each step begins at the memory that the step before has perturbed, as published.

    Raises:
        InputError: The bags are not as many as the documents, or a setting is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder_states: Float[Tensor, "batch tokens width"],
        attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
        bags: Sequence[Sequence[int]],
        *,
        iterations: int = 3,
        step_size: float = 1e-5,
        gamma: float = 1.5,
        kl_scale: float = 0.01,
        gm: float = 0.65,
        accumulate: bool = False,
    ) -> None:
        if len(bags) != len(encoder_states):
            raise InputError(f"expected {len(encoder_states)}, one a document, got {len(bags)}", field="bags")
        if not 0 <= gm <= 1:
            raise InputError("expected a share from 0 to 1", field="gm", value=gm)
        if iterations < 1 or not step_size > 0:
            raise InputError(
                "expected at least 1 iteration and a step size above 0", value=(iterations, step_size)
            )
        self.model = model
        self.iterations, self.step_size, self.gamma = iterations, step_size, gamma
        self.kl_scale, self.gm, self.accumulate = kl_scale, gm, accumulate
        self.cost = PPLMCost()
        self._states, self._mask = encoder_states.detach(), attention_mask
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        self._bag = torch.zeros(len(bags), vocabulary, dtype=torch.bool, device=encoder_states.device)
        for row, bag in enumerate(bags):
            self._bag[row, list(bag)] = True
        self._cross: list[tuple[Tensor, Tensor]] = []  # does not change while decoding
        self._last: tuple[Tensor, Memory] | None = None  # what rows had written, and their perturbed memory

    def for_documents(self, numbers: Sequence[int]) -> "PPLM":
        """The same for a batch of these documents: `Steerer.generate` decodes them in its own order.

        Raises:
            InputError: There is no bag for one of them.
        """
        if max(numbers) >= len(self._bag):
            raise InputError(f"expected a bag for each document, got {len(self._bag)}", field="bags")
        rows = torch.tensor(numbers, device=self._bag.device)
        chosen = copy(self)
        chosen._states, chosen._mask, chosen._bag = self._states[rows], self._mask[rows], self._bag[rows]
        chosen._cross, chosen._last = [], None
        return chosen

    def __call__(
        self, input_ids: Int[Tensor, "rows written"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Log-probabilities of the fused scores. A score of minus infinity stays one."""
        copies = rows_per_document(len(scores), len(self._bag))
        bag = self._bag.repeat_interleave(copies, dim=0)
        if not bag.any():
            return scores
        perturbed = self.perturbed_logits(input_ids).to(scores)
        fused = self.gm * perturbed.log_softmax(1) + (1 - self.gm) * scores.log_softmax(1)
        fused = fused.masked_fill(scores.isneginf(), -torch.inf).log_softmax(1)
        return torch.where(bag.any(1, keepdim=True), fused, scores)

    def perturbed_logits(self, input_ids: Int[Tensor, "rows written"]) -> Float[Tensor, "rows vocabulary"]:
        """The next token's logits when the memory has been perturbed."""
        copies = rows_per_document(len(input_ids), len(self._bag))
        bag = self._bag.repeat_interleave(copies, dim=0)
        self.cost.steps += 1
        last = input_ids[:, -1:]
        before = None
        memory = self._handed_on(input_ids[:, :-1], copies) if self.accumulate else None
        if memory is None:
            memory = self._memory(input_ids[:, :-1], copies)
        else:
            with torch.no_grad():
                before = self._forward(input_ids, _empty_cache(), copies).float().log_softmax(1)
        # Half precision would round both norms and small changes to 0; the sum alone is in the model's type.
        changes: Memory = [
            torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32)) for part in memory
        ]
        for _ in range(self.iterations):
            changes = [change.detach().requires_grad_() for change in changes]
            with torch.enable_grad():
                logits, _ = self._next(last, _changed(memory, changes), copies)
                log_p = logits.float().log_softmax(1)
                before = log_p.detach() if before is None else before  # the first changes are zero
                loss = -log_p.masked_fill(~bag, -torch.inf).logsumexp(1)
                loss = loss + self.kl_scale * (log_p.exp() * (log_p - before)).sum(1)
                loss = loss.where(bag.any(1), 0.0)  # a row without a bag has no wish
                gradients = torch.autograd.grad(loss.sum(), changes, allow_unused=True)
            self.cost.backward_passes += 1
            changes = [
                change if gradient is None else change - self.step_size * self._normalised(gradient)
                for change, gradient in zip(changes, gradients, strict=True)
            ]
        with torch.no_grad():
            logits, after = self._next(last, _changed(memory, changes), copies)
        self._last = (input_ids.clone(), after) if self.accumulate else None
        return logits

    def _handed_on(self, written: Int[Tensor, "rows before"], copies: int) -> Memory | None:
        """The perturbed memory of the rows of the step before that wrote this; None at a beginning."""
        if self._last is None or self._last[0].shape != written.shape:
            return None
        rows = torch.arange(len(written), device=written.device)
        same = (self._last[0][None] == written[:, None]).all(2)
        same &= rows[:, None] // copies == rows[None] // copies  # rows of one document
        if not same.any(1).all():
            return None
        parents = same.int().argmax(1)
        return [part[parents] for part in self._last[1]]

    def _normalised(self, gradient: Float[Tensor, " rows *rest"]) -> Float[Tensor, " rows *rest"]:
        """The gradient over its norm to the power gamma, the norm of each row by itself."""
        if not gradient.numel():
            return gradient
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        norms = gradient.flatten(1).norm(dim=1).clamp(min=_TINY) ** self.gamma
        return gradient / norms.view(-1, *[1] * (gradient.dim() - 1))

    @torch.no_grad()
    def _memory(self, written: Int[Tensor, "rows before"], copies: int) -> Memory:
        """Keys and values of what a row has written, all but its last token, and of the source."""
        first = written if written.shape[1] else torch.zeros_like(written.new_zeros(len(written), 1))
        cache = _empty_cache()
        self._forward(first, cache, copies)
        if not self._cross:
            self._cross = [_keys_and_values(layer) for layer in cache.cross_attention_cache.layers]
            self._cross = [(k[::copies], v[::copies]) for k, v in self._cross]
        memory: Memory = []
        for own, (cross_k, cross_v) in zip(cache.self_attention_cache.layers, self._cross, strict=True):
            k, v = _keys_and_values(own)
            length = written.shape[1]  # 0 at the first step: the pass above was for the source's keys only
            memory += [k[:, :, :length], v[:, :, :length]]
            memory += [cross_k.repeat_interleave(copies, dim=0), cross_v.repeat_interleave(copies, dim=0)]
        return memory

    def _next(
        self, last: Int[Tensor, "rows 1"], memory: Memory, copies: int
    ) -> tuple[Float[Tensor, "rows vocabulary"], Memory]:
        """The next token's logits, and the memory with the last token in it."""
        layers = [memory[i : i + 4] for i in range(0, len(memory), 4)]
        own = DynamicCache([(k, v) for k, v, _, _ in layers]) if layers[0][0].shape[2] else DynamicCache()
        cache = EncoderDecoderCache(own, DynamicCache([(k, v) for _, _, k, v in layers]))
        logits = self._forward(last, cache, copies)
        pairs = zip(own.layers, cache.cross_attention_cache.layers, strict=True)
        return logits, [
            part for mine, cross in pairs for layer in (mine, cross) for part in _keys_and_values(layer)
        ]

    def _forward(
        self, ids: Int[Tensor, "rows some"], cache: EncoderDecoderCache, copies: int
    ) -> Float[Tensor, "rows vocabulary"]:
        self.cost.forward_passes += 1
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self._states.repeat_interleave(copies, dim=0)),
            attention_mask=self._mask.repeat_interleave(copies, dim=0),
            decoder_input_ids=ids,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]


def _empty_cache() -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _changed(memory: Memory, changes: Memory) -> Memory:
    return [(part + change).to(part.dtype) for part, change in zip(memory, changes, strict=True)]


def _keys_and_values(layer: object) -> tuple[Tensor, Tensor]:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        raise InputError(
            "its decoder keeps no keys and values in a cache, which PPLM perturbs", field="model"
        )
    return keys, values
