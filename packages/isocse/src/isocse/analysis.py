"""`analyze`: the geometry of an encoder on a corpus, in one pass of the model over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isocse.assembly import assemble, token_map
from isocse.corpus import Corpus, Plan, TokenBatch, Types, repeats
from isocse.encoders import Encoder, load_encoder, pad, pool, tokenize
from isocse.geometry import Geometry, GeometrySettings, Treatment
from isocse.options import Options, make_options, removed_dimensions
from isocse.report import GeometryReport
from isocse.streams import Alignment, hashes
from isocse.types import CLASSES, Kind, classify
from shared_core import InputError

MAP_SENTENCES = 5
"""Sentences whose tokens are all on the map."""


def analyze(
    model: Any,
    sentences: Iterable[Any],
    *,
    tokenizer: Any = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    device: str | None = None,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> GeometryReport:
    """Measure the geometry of an encoder on a corpus.

    Args:
        model: A SentenceTransformer, a transformers model, a folder or name of one, or an `Encoder`.
        sentences: Texts; a list, or anything that can be gone through twice, such as `SentenceFile`.
        tokenizer: Of a transformers model.
        pairs: Positive pairs, for alignment.
        device: Where to run the model; where it is, if not given.
        max_length: Longest input in tokens.
        progress: Called with sentences done and all sentences.
        options: As the attributes of `Options`.

    Returns:
        Values by layer, class, frequency and type.

    Raises:
        InputError: The model, the corpus or an option is wrong; the message says what would be right.
    """
    chosen = make_options(options)
    encoder = load_encoder(model, tokenizer, pooling=chosen.pooling, max_length=max_length, device=device)
    pooling = chosen.pooling or encoder.pooling
    corpus = Corpus(encoder, sentences, words=chosen.unit == "word")
    table = choose_types(corpus, chosen)
    with encoder.measuring():
        treatments = _fit_treatments(corpus, encoder, table, chosen)
        geometry = Geometry(len(table.names), _settings(chosen), None, treatments)
        done = 0
        for batch in corpus.batches(table.plan):
            states = encoder.hidden_states(batch.ids, batch.mask)
            geometry.layers = geometry.layers or resolve_layers(chosen.layers, len(states))
            geometry.update(states, batch, pooling)
            done += len(batch.numbers)
            if progress is not None:
                progress(done, corpus.facts.sentences)
        alignment = None if pairs is None else _alignment(encoder, pairs, pooling, geometry.layers)
        drawn = _map_sentences(encoder, corpus, geometry.layers, chosen)
    report = _report(encoder, corpus, table, geometry, chosen, pooling)
    if alignment is not None:
        report.measures["alignment"], report.errors["alignment"] = alignment
    report.map = token_map(report, geometry, drawn)
    return report


def analyze_states(
    batches: Iterable[tuple[Tensor | Sequence[Tensor], Tensor, Tensor]],
    *,
    kinds: Sequence[Kind] | None = None,
    pooling: str = "mean",
    name: str = "states",
    **options: Any,
) -> GeometryReport:
    """The same from hidden states that were computed elsewhere, in one pass.

    Args:
        batches: (hidden states, mask, token ids) of each batch; states are (layers, sentences, tokens, d), or
            a sequence of (sentences, tokens, d).
        kinds: The type of each token id, for names and classes; the ids as names and class "other" where
            None.
        pooling: "cls", "mean", "max" or "last".
        name: Of the model.
        options: As `Options`; layers, min_count, sample, seed, baseline, detail and classes are looked at.
    """
    chosen = make_options(options)
    rows: dict[int | str, int] = {}
    counts: list[int] = []
    geometry, number = Geometry(0, _settings(chosen)), 0
    classes = None if kinds is None else classify(kinds, chosen.classes)
    for states, mask, ids in batches:
        attended = mask.bool().cpu()
        if ids.shape != attended.shape:
            raise InputError(
                f"expected the mask's shape {tuple(attended.shape)}", field="ids", value=ids.shape
            )
        batch = _batch_of_states(ids.cpu(), attended, number, rows, counts, classes)
        number += len(attended)
        for measured in geometry.measured:
            measured.core.types.grow(len(rows))
        geometry._types = len(rows)  # layers that are made with the first batch begin at this size
        layers = list(states)
        geometry.layers = geometry.layers or resolve_layers(chosen.layers, len(layers))
        geometry.update(layers, batch, pooling)
    if number < 2:
        raise InputError("expected at least 2 sentences", field="batches", value=number)
    found = [Kind(str(n), str(n), True, False) if kinds is None else kinds[int(n)] for n in rows]
    numbers = (
        np.full(len(rows), CLASSES.index("other")) if classes is None else classes[[int(n) for n in rows]]
    )
    table = Types(list(rows), found, np.array(counts), numbers, Plan(rows, {}, 3))
    _check_counts(np.array(counts), chosen.min_count)
    corpus = {"sentences": number, "tokens": int(sum(counts))}
    return assemble(name, corpus, table, geometry, chosen, pooling, [])


def _batch_of_states(
    ids: Tensor,
    mask: Tensor,
    first: int,
    rows: dict[int | str, int],
    counts: list[int],
    classes: np.ndarray | None,
) -> TokenBatch:
    flat = mask.reshape(-1).nonzero()[:, 0]
    names = ids.reshape(-1)[flat].numpy()
    for name, count in zip(*np.unique(names, return_counts=True), strict=True):
        if int(name) not in rows:
            rows[int(name)] = len(rows)
            counts.append(0)
        counts[rows[int(name)]] += int(count)
    types = np.array([rows[int(name)] for name in names], dtype=np.int64)
    group = np.full(len(names), CLASSES.index("other")) if classes is None else classes[names]
    sentence = (flat // mask.shape[1]).numpy()
    return TokenBatch(
        ids=ids,
        mask=mask,
        numbers=first + np.arange(len(mask)),
        positions=flat,
        word=None,
        sentence=torch.as_tensor(sentence),
        types=torch.as_tensor(types),
        classes=torch.as_tensor(group.astype(np.int64)),
        repeated=torch.as_tensor(repeats(sentence, types)),
        counted=torch.ones(len(flat), dtype=torch.bool),
    )


def choose_types(corpus: Corpus, options: Options) -> Types:
    """The types with enough occurrences, and their classes.

    Raises:
        InputError: No type has enough.
    """
    official = options.compat == "official"
    counts = dict(corpus.facts.counts)
    if official:
        fill = int(corpus.encoder.tokenizer.pad_token_id or 0)
        counts[fill] = counts.get(fill, 0) + corpus.facts.padded
    names = list(counts)
    kinds = corpus.kinds(names)
    classes = classify(kinds, options.classes)
    numbers = np.array([counts[name] for name in names])
    plain = np.array([official or not kind.special for kind in kinds])
    _check_counts(numbers[plain], options.min_count)
    kept = np.flatnonzero(numbers >= options.min_count)
    by_name = dict(zip(names, classes.tolist(), strict=True))
    chosen = [names[n] for n in kept]
    plan = Plan(
        rows={name: row for row, name in enumerate(chosen)},
        classes=by_name,
        special_class=CLASSES.index("special"),
        include_special=options.include_special,
        batch_tokens=options.batch_tokens,
        official=official,
    )
    return Types(chosen, [kinds[n] for n in kept], numbers[kept], classes[kept], plan)


def _check_counts(counts: np.ndarray, least: int) -> None:
    best = int(counts.max(initial=0))
    if best < least:
        raise InputError(
            f"no type of token occurs {least} times, the most frequent one occurs {best}: "
            f"use a larger corpus or a min_count from 2 to {max(best, 2)}",
            field="min_count",
            value=least,
        )


def resolve_layers(layers: str | Sequence[int], count: int) -> list[int]:
    """Numbers of the layers; negative ones count from the last.

    >>> resolve_layers([0, -1], 7)
    [0, 6]
    """
    if isinstance(layers, str):
        if layers != "all":
            raise InputError("expected all or numbers", field="layers", value=layers)
        return list(range(count))
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong or not layers:
        raise InputError(
            f"expected numbers from 0 (embeddings) to {count - 1}, or from -1 down to {-count}",
            field="layers",
            value=wrong or list(layers),
        )
    return sorted({layer % count for layer in layers})


def _settings(options: Options) -> GeometrySettings:
    return GeometrySettings(options.sample, options.seed, options.detail, options.compat == "official")


def _fit_treatments(
    corpus: Corpus, encoder: Encoder, table: Types, options: Options
) -> dict[int, dict[str, Treatment]]:
    """Maps by layer, fitted on the drawn tokens of the sample's sentences before the main pass."""
    if not options.treatments:
        return {}
    size = corpus.facts.sentences + corpus.facts.empty
    keys = hashes(np.arange(size), options.seed)
    limit = np.sort(keys)[min(options.sample, size) - 1]
    some = [text for text, key in zip(corpus.sentences, keys, strict=True) if key <= limit]
    few = Corpus(encoder, some, words=corpus.words)
    geometry = Geometry(len(table.names), _settings(options))
    for batch in few.batches(table.plan):
        geometry.update(encoder.hidden_states(batch.ids, batch.mask), batch)
    return {
        layer.layer: {name: _treatment(name, layer) for name in options.treatments}
        for layer in geometry.measured
    }


def _treatment(name: str, layer: Any) -> Treatment:
    sample = layer.sample.rows.double()
    count = removed_dimensions(name)
    if count:
        top = layer.core.sentences.contributions().top(count)
        kept = torch.ones(sample.shape[1], dtype=torch.bool, device=sample.device)
        kept[top] = False
        return lambda x: x[:, kept]
    mean = sample.mean(0)
    if name == "center":
        return lambda x: x - mean.to(x)
    deviation = (sample - mean).square().mean(0).sqrt()
    scale = torch.where(deviation > 0, deviation, 1.0)
    return lambda x: (x - mean.to(x)) / scale.to(x)


def _alignment(
    encoder: Encoder, pairs: Sequence[tuple[str, str]], pooling: str, layers: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Alignment by layer, and its standard error."""
    if not pairs:
        raise InputError("expected at least one positive pair", field="pairs", value=0)
    streams: list[Alignment] = []
    for start in range(0, len(pairs), 32):
        sides = []
        for side in zip(*pairs[start : start + 32], strict=True):
            ids, mask = pad(tokenize(encoder, side).ids, int(encoder.tokenizer.pad_token_id or 0))
            states = encoder.hidden_states(ids, mask)
            sides.append([pool(states[n], mask.to(states[n].device), pooling).float() for n in layers or []])
        streams = streams or [Alignment() for _ in sides[0]]
        for stream, first, second in zip(streams, *sides, strict=True):
            stream.update_pairs(first.cpu(), second.cpu())
    return (
        np.array([float(stream.mean) for stream in streams]),
        np.array([float(stream.error) for stream in streams]),
    )


def _map_sentences(
    encoder: Encoder, corpus: Corpus, layers: Sequence[int] | None, options: Options
) -> tuple[list[str], Tensor, Tensor] | None:
    """Some of the shorter first sentences: tokens, last measured states, and which are no specials."""
    if not options.detail:
        return None
    texts = [text for text in islice(corpus.sentences, 200) if 5 <= len(text.split()) <= 14][:MAP_SENTENCES]
    if not texts:
        return None
    tokens = tokenize(encoder, texts)
    ids, mask = pad(tokens.ids, int(encoder.tokenizer.pad_token_id or 0))
    states = encoder.hidden_states(ids, mask)[(layers or [-1])[-1]]
    special = pad([row.astype(np.int64) for row in tokens.special], 1)[0]
    kept = special == 0
    names = [kind.token for kind in corpus.kinds_of_ids(ids[kept].tolist())]
    return names, states.float().cpu(), kept


def _report(
    encoder: Encoder, corpus: Corpus, table: Types, geometry: Geometry, options: Options, pooling: str
) -> GeometryReport:
    facts = corpus.facts
    counts = {
        "sentences": facts.sentences,
        "tokens": facts.tokens,
        "empty": facts.empty,
        "cut": facts.cut,
        "types": int(sum(not kind.special for kind in table.kinds)),
    }
    notes = []
    if facts.empty:
        notes.append(f"{facts.empty} empty sentences were left out")
    if facts.cut:
        notes.append(f"{facts.cut} sentences were cut at {encoder.max_length} tokens")
    if facts.sentences < options.sample:
        notes.append(f"samples have all {facts.sentences} sentences, there are no {options.sample}")
    if encoder.causal:
        notes.append("a causal model: a token sees only those before it, which lowers self-similarity less")
    return assemble(encoder.name, counts, table, geometry, options, pooling, notes)
