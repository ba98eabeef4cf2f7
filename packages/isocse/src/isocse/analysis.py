"""`analyze`: the geometry of an encoder on a corpus, in one pass of the model over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from isocse.corpus import Corpus, Plan, TokenBatch, repeats
from isocse.encoders import Encoder, load_encoder, pad, pool, tokenize
from isocse.geometry import Geometry, GeometrySettings, Results, Treatment
from isocse.report import MEASURES, GeometryReport, TokenMap, TypeTable
from isocse.streams import Alignment, hashes
from isocse.types import CLASSES, Classifier, Kind, classify
from shared_core import InputError

Baseline = Literal["expected", "sampled", "tokens"]
_BASELINES: dict[str, str] = {
    "expected": "anisotropy",
    "sampled": "anisotropy_sampled",
    "tokens": "anisotropy_tokens",
}
MAP_SENTENCES = 5
"""Sentences whose tokens are all on the map."""
FREQUENCY_BINS = (5, 10, 20, 50, 100, 1000)
"""Least occurrences of each bin of types."""


@dataclass(frozen=True)
class Options:
    """How a corpus is measured; the arguments of `analyze`.

    Attributes:
        layers: "all", or numbers; negative ones count from the last.
        pooling: Of sentence vectors; the model's own where None.
        classes: "stopwords", "frequency", a classifier, or a table from text to class.
        min_count: Fewest occurrences of a type that is analysed.
        sample: Sentences of the samples.
        seed: Of samples and bootstraps.
        include_special: Whether [CLS], [SEP] and the like count in measures of tokens.
        unit: "token", or "word" to put the tokens of a word together.
        baseline: What adjusted values are less of: "expected" (over all draws), "sampled" (one draw), or
            "tokens".
        compat: "official" measures as the paper's published code.
        treatments: "remove-k" for the k dimensions with the greatest contributions, "center", "standardize".
        batch_tokens: Positions of a batch.
        detail: Also measure what needs the samples' pairs and eigenvectors.
    """

    layers: str | Sequence[int] = "all"
    pooling: str | None = None
    classes: str | Classifier | Mapping[str, str] = "stopwords"
    min_count: int = 5
    sample: int = 1000
    seed: int = 0
    include_special: bool = True
    unit: str = "token"
    baseline: str = "expected"
    compat: str | None = None
    treatments: Sequence[str] = ()
    batch_tokens: int = 2048
    detail: bool = True

    def __post_init__(self) -> None:
        allowed = {
            "unit": ("token", "word"),
            "baseline": tuple(_BASELINES),
            "compat": (None, "official"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                listed = ", ".join(str(value) for value in values if value)
                raise InputError(f"expected one of {listed}", field=name, value=getattr(self, name))
        for name, least in (("min_count", 2), ("sample", 4), ("batch_tokens", 1)):
            if getattr(self, name) < least:
                raise InputError(f"expected {least} or more", field=name, value=getattr(self, name))
        if self.compat == "official" and self.unit == "word":
            raise InputError("expected token with compat official", field="unit", value=self.unit)
        for name in self.treatments:
            _treatment_count(name)


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
    report.map = _token_map(report, geometry, drawn)
    return report


def make_options(given: Mapping[str, Any]) -> Options:
    """Options from keyword arguments; a misspelt one is an error that names those there are."""
    unknown = sorted(set(given) - set(Options.__dataclass_fields__))
    if unknown:
        known = ", ".join(Options.__dataclass_fields__)
        raise TypeError(f"unexpected argument {', '.join(unknown)}; options: {known}")
    return Options(**given)


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
    return _fill(name, corpus, table, geometry, chosen, pooling, [])


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


@dataclass
class Types:
    """The types that are analysed, and how a corpus is measured for them.

    Attributes:
        names: Token ids or words.
        kinds: Of each.
        counts: Occurrences.
        classes: Of each, an index into `CLASSES`.
        plan: For the corpus.
    """

    names: list[int | str]
    kinds: list[Kind]
    counts: np.ndarray
    classes: np.ndarray
    plan: Plan


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
    count = _treatment_count(name)
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


def _treatment_count(name: str) -> int:
    """Dimensions that a treatment removes."""
    kind, _, number = name.partition("-")
    if kind == "remove" and number.isdigit() and int(number) > 0:
        return int(number)
    if name in ("center", "standardize"):
        return 0
    raise InputError("expected remove-K, center or standardize", field="treatments", value=name)


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
    return _fill(encoder.name, counts, table, geometry, options, pooling, notes)


def _fill(
    name: str,
    counts: dict[str, int],
    table: Types,
    geometry: Geometry,
    options: Options,
    pooling: str,
    notes: list[str],
) -> GeometryReport:
    official = options.compat == "official"
    analysed = np.array([official or not kind.special for kind in table.kinds], dtype=bool)
    analysed &= table.counts >= options.min_count
    results = geometry.results(analysed, table.classes, first_only=official)
    zeros = max((result.zeros for result in results), default=0)
    if zeros:
        counts = counts | {"zero_vectors": zeros}
        notes = [*notes, f"{zeros} tokens have a state of zeros, which no cosine has, at some layer"]
    report = GeometryReport(
        model=name,
        settings=_recorded(options, pooling),
        corpus=counts,
        layers=list(geometry.layers or []),
        measures=_by_layer([result.measures for result in results]),
        errors=_by_layer([result.errors for result in results]),
        by_class={kind: _by_layer([result.by_class[kind] for result in results], None) for kind in CLASSES},
        by_frequency={},
        types=TypeTable(
            [kind.token for kind in table.kinds],
            [kind.text for kind in table.kinds],
            [CLASSES[number] for number in table.classes],
            table.counts,
            analysed,
            np.stack([result.types for result in results]),
        ),
        top_dimensions=[result.top for result in results],
        removal=_nested([result.removal for result in results]),
        treated=_nested([result.treated for result in results]),
        notes=[*notes, *_thin(results, counts)],
    )
    _adjust(report, _BASELINES["sampled" if official else options.baseline])
    report.by_frequency = _frequency_table(report)
    return report


def _thin(results: list[Results], counts: dict[str, int]) -> list[str]:
    """A note where IsoScore has too few points."""
    width = max((0 if r.sample is None else r.sample.shape[1] for r in results), default=0)
    if counts["sentences"] >= 10 * width:
        return []
    return [
        f"IsoScore is too low by a little: {counts['sentences']} points in {width} dimensions, "
        f"{10 * width} or more are needed"
    ]


def _recorded(options: Options, pooling: str) -> dict[str, Any]:
    names = (
        "min_count", "sample", "seed", "include_special", "unit", "baseline", "compat",
    )  # fmt: skip
    how = options.classes if isinstance(options.classes, str) else "given"
    found = {name: getattr(options, name) for name in names}
    return found | {"pooling": pooling, "classes": how, "treatments": list(options.treatments)}


def _adjust(report: GeometryReport, baseline: str) -> None:
    """Adjusted values, of all that has them: the value less the anisotropy baseline of its layer."""
    m = report.measures
    base = m.get(baseline, m["anisotropy"])
    for name in ("intra_sentence", "self_similarity"):
        if name in m:
            m[f"adjusted_{name}"] = m[name] - base
    for row in report.by_class.values():
        if "self_similarity" in row:
            row["adjusted_self_similarity"] = row["self_similarity"] - base
    semantic = report.by_class["semantic"].get("adjusted_self_similarity")
    if semantic is not None:
        m["spurious_contextualization"] = 1 - semantic
    for row in report.treated.values():
        for name in ("intra_sentence", "self_similarity"):
            if name in row:
                row[f"adjusted_{name}"] = row[name] - row["anisotropy"]
    ordered = {name: m[name] for name in MEASURES if name in m}
    m.clear()
    m.update(ordered)


def _by_layer(rows: Sequence[Mapping[str, float]], order: Any = MEASURES) -> dict[str, np.ndarray]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    if order is not None:
        names.sort(key=list(order).index)
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


def _nested(rows: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, np.ndarray]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: _by_layer([row.get(name, {}) for row in rows], None) for name in names}


def _frequency_table(report: GeometryReport) -> dict[str, dict[str, np.ndarray]]:
    """Mean self-similarity by frequency bin and class."""
    table, found = report.types, {}
    classes = np.array(table.classes)
    for low, high in zip(FREQUENCY_BINS, (*FREQUENCY_BINS[1:], None), strict=True):
        inside = (table.counts >= low) & (table.counts < (high or np.inf)) & table.analysed
        row = {}
        for name in ("semantic", "functional", "subword"):
            chosen = table.self_similarity[:, inside & (classes == name)]
            chosen = chosen[:, np.isfinite(chosen).all(0)]
            if chosen.shape[1]:
                row[name] = chosen.mean(1)
        if row:
            found[f"{low} or more" if high is None else f"{low} to {high - 1}"] = row
    return found


def _token_map(
    report: GeometryReport, geometry: Geometry, drawn: tuple[list[str], Tensor, Tensor] | None
) -> TokenMap | None:
    """The last layer's drawn tokens, and all tokens of some sentences, on principal components of each."""
    layer = geometry.measured[-1]
    if drawn is None or layer.sample.rows is None or layer.sample_kinds.rows is None:
        return None
    points, explained = _principal(layer.sample.rows.double().cpu())
    kinds = layer.sample_kinds.rows.cpu()
    texts, states, kept = drawn
    shown, shown_explained = _principal(states.double()[kept])
    return TokenMap(
        points=points,
        texts=[report.types.texts[row] if row >= 0 else "" for row in kinds[:, 0].tolist()],
        classes=[CLASSES[number] for number in kinds[:, 1].tolist()],
        sentence_points=shown,
        sentence_texts=texts,
        sentences=kept.nonzero()[:, 0].tolist(),
        explained=explained,
        sentence_explained=shown_explained,
    )


def _principal(x: Tensor) -> tuple[np.ndarray, list[float]]:
    """Rows on their first two principal components, and the share of the variance of each component."""
    centred = x - x.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    axes = directions[:, -2:].flip(1)
    axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))  # the sign is arbitrary
    return (centred @ axes).numpy(), (variances[-2:].flip(0) / variances.sum()).tolist()
