"""The methods that can be compared, by name: the same documents and controls in, one summary a document out.

| name | what it does |
| --- | --- |
| plain | the summarizer alone |
| prefix | the control in front of the document (CA+Doc) |
| pplm | gradient steps on the decoder's memory towards the control's words |
| bias | cross-attention turned away from sentences that are not relevant, before the softmax (PASTA-like) |
| boost | a bonus for the control's words in every step's scores |
| extract | only the most relevant sentences reach the summarizer |
| relattn | relevance attention with one weight for all documents (or a trained module's) |
| relattn-online | relevance attention, the weight chosen for each document without labels |
| relattn-prefix | relevance attention on top of the prefix, as with CTRLsum's models |
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from relattn.controls import Control, control_phrases, encode_control
from relattn.encoding import EncodedBatch, encode
from relattn.examples import MethodSummary
from relattn.extract import extract, relevant_sentences, sentence_relevance
from relattn.generation import beam_cache, evaluating, generation_settings, settings_for
from relattn.logit_boost import KeywordBoost
from relattn.pplm import PPLM, PPLMCost
from relattn.prefix import with_prefix
from relattn.results import ControlledSummary
from relattn.softmax_bias import softmax_bias
from relattn.source import SourceDocument, pad
from relattn.steerer import Steerer
from shared_core import InputError

MethodName = Literal[
    "plain", "prefix", "pplm", "bias", "boost", "extract", "relattn", "relattn-online", "relattn-prefix"
]
METHODS: tuple[MethodName, ...] = get_args(MethodName)


@dataclass(frozen=True)
class MethodSettings:
    """Settings of all methods; each reads its own.

    Attributes:
        weight: Steering weight of relattn and relattn-prefix; None for the steerer's own.
        online: Options of online selection: grid, similarity, select.
        boost: Bonus of a keyword, in nats.
        alpha: Share of the odds that irrelevant tokens keep, above 0 to 1.
        sentences: How many sentences are relevant, for bias and extract.
        pplm: Options of `relattn.pplm.PPLM`.
        batch_size: Documents decoded together.
        generate: Arguments of the model's `generate`.
    """

    weight: float | None = None
    online: dict[str, Any] = field(default_factory=dict)
    boost: float = 2.0
    alpha: float = 0.01
    sentences: int = 3
    pplm: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    generate: dict[str, Any] = field(default_factory=dict)


def summarize(
    method: MethodName,
    steerer: Steerer,
    documents: Sequence[str],
    controls: Sequence[Control],
    settings: MethodSettings | None = None,
    cost: PPLMCost | None = None,
) -> list[MethodSummary]:
    """Summaries by one of `METHODS`.

    Args:
        method: Its name.
        steerer: The summarizer, its tokenizers, and how relevance is computed.
        documents: The texts.
        controls: One control a document; not blank.
        settings: See `MethodSettings`.
        cost: PPLM's passes are added here.

    Raises:
        InputError: An unknown method, another number of controls than documents, or what `Steerer.generate`
            says.
    """
    settings = settings or MethodSettings()
    if len(controls) != len(documents):
        raise InputError(f"expected {len(documents)}, one a document, got {len(controls)}", field="controls")
    for number, control in enumerate(controls):
        if not control_phrases(control):
            raise InputError(f"control {number} is empty: expected a word or phrase", field="controls")
    match method:
        case "plain":
            return _plain(steerer, documents, settings)
        case "prefix":
            return _plain(steerer, with_prefix(documents, controls), settings)
        case "extract":
            found = steerer.relevance(documents, controls, batch_size=settings.batch_size)
            kept = [extract(text, r, settings.sentences) for text, r in zip(documents, found, strict=True)]
            return _plain(steerer, kept, settings)
        case "boost":
            return _with_processor(steerer, documents, controls, settings, lambda batch, bags: KeywordBoost(
                bags, settings.boost))  # fmt: skip
        case "pplm":
            return _pplm(steerer, documents, controls, settings, cost)
        case "bias":
            return _bias(steerer, documents, controls, settings)
        case "relattn":
            return _steered(steerer, documents, controls, settings, settings.weight)
        case "relattn-online":
            return _steered(steerer, documents, controls, settings, "online", **settings.online)
        case "relattn-prefix":
            return _steered(steerer, with_prefix(documents, controls), controls, settings, settings.weight)
    raise InputError(f"expected one of {', '.join(METHODS)}", field="method", value=method)


def bag_of_words(control: Control, tokenizer: Any) -> list[int]:
    """Token ids of a control's words as a summary would write them: those of its phrases inside a text.

    Raises:
        InputError: The vocabulary knows none.
    """
    return sorted(set(encode_control(control, tokenizer).ids))


def _plain(steerer: Steerer, documents: Sequence[str], settings: MethodSettings) -> list[MethodSummary]:
    blank = [None] * len(documents)
    options = {"batch_size": settings.batch_size, "on_empty": "plain"} | settings.generate
    return [
        MethodSummary(s.text, None, s.warnings) for s in steerer.generate(documents, blank, 0.0, **options)
    ]


def _steered(
    steerer: Steerer,
    documents: Sequence[str],
    controls: Sequence[Control],
    settings: MethodSettings,
    weight: Any,
    **options: Any,
) -> list[MethodSummary]:
    options = {"batch_size": settings.batch_size} | options | settings.generate
    found: list[ControlledSummary] = steerer.generate(documents, controls, weight, **options)
    return [MethodSummary(summary.text, summary.weight, summary.warnings) for summary in found]


@dataclass(frozen=True)
class _Members:
    """Some documents of a call behind the encoder, in the call's order."""

    numbers: range
    texts: list[SourceDocument]
    encoded: EncodedBatch
    warnings: list[tuple[str, ...]]


def _encoded(steerer: Steerer, documents: Sequence[str], batch_size: int) -> Iterator[_Members]:
    texts = steerer.read(documents)
    for start in range(0, len(texts), batch_size):
        numbers = range(start, min(start + batch_size, len(texts)))
        mine = [texts[n] for n in numbers]
        ids, mask = pad([text.ids for text in mine], steerer.pad_id)
        device = steerer.model.device
        with torch.no_grad(), evaluating(steerer.model):
            encoded = encode(steerer.model, ids.to(device), mask.to(device))
        lost = [(f"document truncated: {text.lost} tokens were lost",) if text.lost else () for text in mine]
        yield _Members(numbers, mine, encoded, lost)


def _decode(steerer: Steerer, encoded: EncodedBatch, settings: dict[str, Any], **more: Any) -> list[str]:
    rows = torch.arange(len(encoded.input_ids), device=encoded.input_ids.device)
    given = encoded.rows(rows) | beam_cache(steerer.model, settings)
    with torch.no_grad(), evaluating(steerer.model):
        ids = steerer.model.generate(**given, **settings, **more)  # pyright: ignore[reportCallIssue]
    texts = steerer.target_tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _with_processor(
    steerer: Steerer,
    documents: Sequence[str],
    controls: Sequence[Control],
    settings: MethodSettings,
    make: Callable[[EncodedBatch, list[list[int]]], LogitsProcessor],
) -> list[MethodSummary]:
    options = generation_settings(steerer.model, settings.generate)
    found = []
    for batch in _encoded(steerer, documents, settings.batch_size):
        bags = [bag_of_words(controls[n], steerer.target_tokenizer) for n in batch.numbers]
        mine = settings_for(options, batch.numbers)
        processors = LogitsProcessorList([*mine.pop("logits_processor", ()), make(batch.encoded, bags)])
        lines = _decode(steerer, batch.encoded, mine, logits_processor=processors)
        found += [MethodSummary(line, None, lost) for line, lost in zip(lines, batch.warnings, strict=True)]
    return found


def _pplm(
    steerer: Steerer,
    documents: Sequence[str],
    controls: Sequence[Control],
    settings: MethodSettings,
    cost: PPLMCost | None,
) -> list[MethodSummary]:
    def make(batch: EncodedBatch, bags: list[list[int]]) -> PPLM:
        processor = PPLM(steerer.model, batch.states, batch.mask.long(), bags, **settings.pplm)
        if cost is not None:
            processor.cost = cost
        return processor

    return _with_processor(steerer, documents, controls, settings, make)


def _bias(
    steerer: Steerer, documents: Sequence[str], controls: Sequence[Control], settings: MethodSettings
) -> list[MethodSummary]:
    options = generation_settings(steerer.model, settings.generate)
    results = steerer.relevance(documents, controls, batch_size=settings.batch_size)
    found = []
    for batch in _encoded(steerer, documents, settings.batch_size):
        span = torch.zeros_like(batch.encoded.mask)
        for row, n in enumerate(batch.numbers):
            chosen = relevant_sentences(sentence_relevance(documents[n], results[n]), settings.sentences)
            # Special tokens stay: models rest their attention there when a step needs nothing of the source.
            special = batch.texts[row].special
            for place, (start, stop) in enumerate(results[n].offsets or ()):
                inside = stop > start and any(s.begin < stop and start < s.end for s in chosen)
                span[row, place] = inside or special[place]
        with softmax_bias(steerer.model, steerer.layers, span, settings.alpha):
            lines = _decode(steerer, batch.encoded, settings_for(options, batch.numbers))
        found += [
            MethodSummary(line, None, results[n].warnings)
            for line, n in zip(lines, batch.numbers, strict=True)
        ]
    return found
