"""Decoding: settings of `generate`, many steering weights in one batch, how many rows fit into memory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from relattn.encoding import SteerableBatch
from relattn.families import CrossAttention
from relattn.steering import steered
from shared_core import InputError

PAPER_SETTINGS = {
    "num_beams": 4,
    "length_penalty": 2.0,
    "no_repeat_ngram_size": 3,
    "max_length": 142,
    "min_length": 56,
    "do_sample": False,
}
"""The released code's settings for NEWTS, without its random sampling inside beam search."""

_ROW_BY_ROW = (
    "decoder_input_ids",
    "decoder_attention_mask",
    "decoder_inputs_embeds",
    "global_attention_mask",
    "prefix_allowed_tokens_fn",
)

_OURS = (
    "input_ids",
    "inputs",
    "inputs_embeds",
    "attention_mask",
    "encoder_outputs",
    "return_dict_in_generate",
)


def generation_settings(model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for `generate`: what the caller gives, else the model's own settings, else the paper's.

    Beam search with 4 beams and without sampling; 142 new tokens where neither caller nor model limits the
    length.

    Raises:
        InputError: An argument that the steerer fills in itself; one that says something row by row, since
            documents are decoded in an order of their own; or more than one summary a document.
    """
    for name in _OURS:
        if name in given:
            raise InputError("is filled in here: use Steerer.steer to call generate yourself", field=name)
    for name, value in given.items():
        if value is not None and (name in _ROW_BY_ROW or (isinstance(value, Tensor) and value.ndim > 1)):
            raise InputError(
                "has a row a document, but documents are decoded in an order of their own: use Steerer.steer"
                " to call generate yourself",
                field=name,
            )
    settings = dict(given)
    if (returned := setting(model, settings, "num_return_sequences", 1)) != 1:
        raise InputError(
            "expected 1, in the model's generation settings too: a document gets one summary",
            field="num_return_sequences",
            value=returned,
        )
    if settings.get("generation_config") is None:
        settings.setdefault("do_sample", False)
        if setting(model, settings, "num_beams", 1) == 1:
            settings.setdefault("num_beams", PAPER_SETTINGS["num_beams"])
    lengths = ("max_length", "max_new_tokens")
    if all(setting(model, settings, name, None) is None for name in lengths):
        settings["max_new_tokens"] = PAPER_SETTINGS["max_length"]
    return settings


@runtime_checkable
class PerDocument(Protocol):
    """A logits processor that does not treat all documents alike: it is told which ones stand in a batch."""

    def for_documents(self, numbers: Sequence[int]) -> LogitsProcessor:
        """The processor for a batch of these documents, by their numbers in the call; one may occur twice."""
        ...


def settings_for(settings: Mapping[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """The settings for a batch of the documents `numbers` of a call.

    Logits processors that are `PerDocument` are asked for their part; all others must treat rows alike. What
    comes back is ids alone, whatever the model's own settings say.
    """
    found = dict(settings)
    if (config := settings.get("generation_config")) is None:
        found["return_dict_in_generate"] = False
    else:
        found["generation_config"] = config = deepcopy(config)
        config.return_dict_in_generate = False
    if settings.get("logits_processor"):
        found["logits_processor"] = LogitsProcessorList(
            processor.for_documents(numbers) if isinstance(processor, PerDocument) else processor
            for processor in settings["logits_processor"]
        )
    return found


def setting(model: PreTrainedModel, settings: Mapping[str, Any], name: str, default: Any) -> Any:
    """A generation setting as `generate` will see it."""
    given = settings.get("generation_config")  # where it says nothing, generate asks the model's own
    places = (settings.get(name), getattr(given, name, None), getattr(model.generation_config, name, None))
    return next((value for value in places if value is not None), default)


def rows_that_fit(
    model: PreTrainedModel, settings: Mapping[str, Any], layers: int, source_tokens: int
) -> int:
    """How many (document, weight) rows decode together, at least 1, by the memory that they will hold.

    Half of a CUDA device's free memory, 2 GiB elsewhere. A beam holds keys and values of source and target in
    every layer, twice while beams are reordered, and a few copies of its logits.
    """
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "d_model", None) or config.hidden_size
    size = torch.finfo(model.dtype).bits // 8
    target = setting(model, settings, "max_new_tokens", None) or setting(model, settings, "max_length", 142)
    cache = 2 * 2 * layers * width * (source_tokens + target) * size
    logits = 6 * 4 * getattr(config, "vocab_size", 50_000)
    beams = setting(model, settings, "num_beams", 1)
    budget = 2 << 30
    if model.device.type == "cuda":
        budget = torch.cuda.mem_get_info(model.device)[0] // 2
    return max(1, budget // (beams * (cache + logits)))


class BeamCache(EncoderDecoderCache):
    """generate's own cache, but for one thing: beams share their document's source keys and values.

    Beam search puts rows in a new order at each step, within a document, and there the source's part is the
    same in all rows; to copy it took most of the time of decoding many rows.
    """

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorder what the beams have written."""
        self.self_attention_cache.reorder_cache(beam_idx)


def beam_cache(model: PreTrainedModel, settings: Mapping[str, Any]) -> dict[str, BeamCache]:
    """The cache as an argument of `generate`; none where it has no beams or no dynamic cache."""
    own = settings.get("past_key_values") or setting(model, settings, "cache_implementation", None)
    if (
        own is not None
        or setting(model, settings, "num_beams", 1) == 1
        or not setting(model, settings, "use_cache", True)
        or not getattr(model, "_supports_default_dynamic_cache", bool)()
    ):
        return {}
    config = model.config.get_text_config(decoder=True)
    return {"past_key_values": BeamCache(DynamicCache(config=config), DynamicCache(config=config))}


@dataclass(frozen=True)
class RowDecoder:
    """Decodes (document, weight) rows of a batch, in chunks that fit into memory.

    Attributes:
        model: The summarizer.
        layers: Its cross-attentions.
        tokenizer: Of the summaries.
        batch: The documents behind the encoder.
        members: Their numbers in the call.
        settings: Arguments of `generate`.
        max_rows: Rows decoded together.
        seed: Of sampling; None for the global random state.
    """

    model: PreTrainedModel
    layers: Sequence[CrossAttention]
    tokenizer: Any
    batch: SteerableBatch
    members: Sequence[int]
    settings: Mapping[str, Any]
    max_rows: int
    seed: int | None

    def __call__(self, index: Int[Tensor, " rows"], weight: Float[Tensor, "rows layers heads"]) -> list[str]:
        """One summary a row: of document `index[row]` of the batch, steered by `weight[row]`."""
        lines: list[str] = []
        for number, start in enumerate(range(0, len(index), self.max_rows)):
            chunk = slice(start, start + self.max_rows)
            ids = self._decode(index[chunk], weight[chunk], None if self.seed is None else self.seed + number)
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            lines += [text.strip() for text in texts]
        return lines

    def _decode(
        self, index: Int[Tensor, " rows"], weight: Float[Tensor, "rows layers heads"], seed: int | None
    ) -> Int[Tensor, "rows target"]:
        settings = settings_for(self.settings, [self.members[row] for row in index.tolist()])
        index = index.to(self.batch.a_rel.device)
        contexts = [context[index] for context in self.batch.contexts]
        steering = steered(self.layers, contexts, weight.to(self.batch.a_rel))
        rows = self.batch.encoded.rows(index) | beam_cache(self.model, settings)
        with _seeded(self.model, seed), evaluating(self.model), steering:
            return self.model.generate(**rows, **settings)  # pyright: ignore[reportCallIssue]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout is off inside the block; each module is in its former mode behind it."""
    training = {name for name, module in model.named_modules() if module.training}
    try:
        for module in model.modules():
            module.training = False
        yield
    finally:
        for name, module in model.named_modules():  # by name: BigBird puts new modules into old places
            module.training = module.training or name in training


@contextmanager
def _seeded(model: PreTrainedModel, seed: int | None) -> Iterator[None]:
    """Sampling from a seed of its own; the caller's random state is as before behind the block."""
    if seed is None:
        yield
        return
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
