"""A corpus as batches of tokens: types are counted first, then sentences come sorted by length.

Nothing grows with the corpus: sentences are read in chunks, twice; only the tokens of a small corpus are kept
between the two passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from isocse.encoders import Encoder, Tokens, pad, tokenize
from isocse.streams import uniforms
from isocse.types import Kind, kinds_of_tokenizer, kinds_of_words
from shared_core import InputError

CHUNK = 4096
"""Sentences that are tokenized and sorted together."""
KEPT_TOKENS = 2_000_000
"""A corpus with fewer tokens is tokenized once."""

_DRAW = 1_000_003


class SentenceFile:
    """A text file with one sentence a line, read anew each time; blank lines are left out.

    Args:
        path: The file, UTF-8.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError("expected a text file with one sentence a line", file=path)

    def __iter__(self) -> Iterator[str]:
        number = 0
        try:
            with open(self.path, encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):  # noqa: B007
                    if line.strip():
                        yield line.strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"is not UTF-8 text: {error.reason} after line {number}", file=self.path
            ) from error


@dataclass
class TokenBatch:
    """Which states of a batch are what.

    Attributes:
        ids: Token ids, for the model.
        mask: Attended tokens.
        numbers: Of the sentences in the corpus.
        positions: Of the attended tokens in the flattened batch.
        word: Of each of these, the unit that it belongs to; None where each token is a unit.
        sentence: Of each unit, its sentence in the batch.
        types: Of each unit, its row among the analysed types, or -1.
        classes: Of each unit, its class.
        repeated: Of each unit, whether its type was in the sentence before.
        counted: Of each unit, whether it is in the measures of tokens; special tokens may not be.
        pads: Positions of the first pad of each padded sentence, where pads are analysed.
        pad_type: Their row.
        all_counted: Whether every unit is in the measures of tokens.
    """

    ids: Int[Tensor, "sentences tokens"]
    mask: Bool[Tensor, "sentences tokens"]
    numbers: np.ndarray
    positions: Tensor
    word: Tensor | None
    sentence: Tensor
    types: Tensor
    classes: Tensor
    repeated: Tensor
    counted: Tensor
    pads: Tensor | None = None
    pad_type: int = -1
    all_counted: bool = field(init=False)
    _starts: np.ndarray = field(init=False)
    _counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.all_counted = bool(self.counted.all())
        sentence = self.sentence[self.counted].cpu().numpy()
        self._counts = np.bincount(sentence, minlength=len(self.numbers))
        self._starts = np.cumsum(self._counts) - self._counts

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same with its indices on a device."""
        for name in (
            "mask",
            "positions",
            "word",
            "sentence",
            "types",
            "classes",
            "repeated",
            "counted",
            "pads",
        ):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.to(device))
        return self

    @property
    def unit_counts(self) -> Int[np.ndarray, " sentences"]:
        """Counted units by sentence."""
        return self._counts

    def drawn(self, seed: int) -> Int[np.ndarray, " sentences"]:
        """One counted unit of each sentence, uniformly, as an index among the counted ones."""
        # Another seed than that of the samples: they keep the smallest hashes, whose shares are all near 0.
        shares = uniforms(self.numbers, seed + _DRAW)
        return self._starts + np.minimum((shares * self._counts).astype(np.int64), self._counts - 1)


@dataclass
class Facts:
    """What the first pass found.

    Attributes:
        sentences: Sentences with at least one token that is not special.
        empty: Sentences without, which are left out.
        tokens: Attended units that are not special, of the sentences that count.
        cut: Sentences that were longer than the model's limit.
        longest: Tokens of the longest.
        counts: Occurrences by type: token id, or word.
        padded: Padded positions where all are padded to the longest.
    """

    sentences: int = 0
    empty: int = 0
    tokens: int = 0
    cut: int = 0
    longest: int = 0
    ids: int = 0
    counts: Counter[int | str] = field(default_factory=Counter)

    @property
    def padded(self) -> int:
        """Padded positions where all are padded to the longest."""
        return self.sentences * self.longest - self.ids


class Corpus:
    """Sentences, tokenized for an encoder.

    Args:
        encoder: Whose tokenizer.
        sentences: Texts, in any form that can be gone through twice.
        words: Put the tokens of a word together.
    """

    def __init__(self, encoder: Encoder, sentences: Iterable[Any], *, words: bool = False) -> None:
        if isinstance(sentences, str):
            raise InputError("expected a list of sentences, not one text", field="sentences")
        self.encoder = encoder
        self.sentences = list(sentences) if isinstance(sentences, Iterator) else sentences
        self.words = words
        self._kept: list[tuple[int, Tokens]] | None = []
        self.facts = self._count()

    def _chunks(self) -> Iterator[tuple[int, Tokens]]:
        texts, number = iter(self.sentences), 0
        while chunk := list(islice(texts, CHUNK)):
            wrong = next((text for text in chunk if not isinstance(text, str)), None)
            if wrong is not None:
                raise InputError("expected texts", field="sentences", value=type(wrong).__name__)
            yield number, tokenize(self.encoder, chunk, words=self.words)
            number += len(chunk)

    def _count(self) -> Facts:
        facts, kept = Facts(), 0
        by_id = np.zeros(0, dtype=np.int64)
        for number, tokens in self._chunks():
            facts.cut += tokens.cut
            used = []
            for row, (ids, special) in enumerate(zip(tokens.ids, tokens.special, strict=True)):
                if special.all():
                    facts.empty += 1
                    continue
                facts.sentences += 1
                facts.longest = max(facts.longest, len(ids))
                facts.ids += len(ids)
                if tokens.words is not None and tokens.texts is not None:
                    present = np.unique(tokens.words[row][~special])
                    facts.counts.update(tokens.texts[row][n] for n in present)
                    facts.tokens += len(present)
                else:
                    used.append(ids)
                    facts.tokens += int((~special).sum())
                kept += len(ids)
            if used:
                found = np.bincount(np.concatenate(used))
                by_id = np.pad(by_id, (0, max(0, len(found) - len(by_id))))
                by_id[: len(found)] += found
            if self._kept is not None:
                self._kept.append((number, tokens))
                self._kept = self._kept if kept <= KEPT_TOKENS else None
        facts.counts.update({int(n): int(by_id[n]) for n in np.flatnonzero(by_id)})
        if facts.sentences + facts.empty == 0:
            raise InputError("expected at least one sentence, the corpus is empty", field="sentences")
        if facts.sentences < 2:
            raise InputError(
                "expected at least 2 sentences that are not empty", field="sentences", value=facts.sentences
            )
        return facts

    def kinds(self, names: Sequence[int | str]) -> list[Kind]:
        """The types with these ids or words."""
        if self.words:
            return kinds_of_words(str(name) for name in names)
        return kinds_of_tokenizer(self.encoder.tokenizer, [int(name) for name in names])

    def kinds_of_ids(self, ids: Sequence[int]) -> list[Kind]:
        """The types with these token ids."""
        return kinds_of_tokenizer(self.encoder.tokenizer, ids)

    def batches(self, plan: Plan) -> Iterator[TokenBatch]:
        """The corpus in batches, longest sentences of a chunk first."""
        chunks = self._kept if self._kept is not None else self._chunks()
        width = self.facts.longest if plan.official else None
        for first, tokens in chunks:
            lengths = np.array([0 if special.all() else len(special) for special in tokens.special])
            order = [int(row) for row in np.argsort(-lengths, kind="stable") if lengths[row]]
            while order:
                count = max(1, plan.batch_tokens // int(width or lengths[order[0]]))
                chosen, order = order[:count], order[count:]
                yield self._batch(tokens, chosen, first, plan, width)

    def _batch(
        self, tokens: Tokens, chosen: list[int], first: int, plan: Plan, width: int | None
    ) -> TokenBatch:
        fill = self.encoder.tokenizer.pad_token_id
        fill = 0 if fill is None else int(fill)
        ids, mask = pad([tokens.ids[row] for row in chosen], fill, width)
        flat_ids = np.concatenate([tokens.ids[row] for row in chosen])
        sentence = np.repeat(np.arange(len(chosen)), [len(tokens.ids[row]) for row in chosen])
        special = np.concatenate([tokens.special[row] for row in chosen])
        word = None
        if tokens.words is None or tokens.texts is None:
            types, group = plan.of_ids(flat_ids)
        else:
            numbers = np.concatenate([tokens.words[row] for row in chosen])
            where, word = _units(sentence, numbers, special)
            names = [
                int(flat_ids[n]) if special[n] else tokens.texts[chosen[sentence[n]]][numbers[n]]
                for n in where
            ]
            types = np.array([plan.rows.get(name, -1) for name in names], dtype=np.int64)
            group = np.array([plan.classes.get(name, 0) for name in names], dtype=np.int64)
            sentence, special = sentence[where], special[where]
        batch = TokenBatch(
            ids=ids,
            mask=mask,
            numbers=first + np.array(chosen, dtype=np.int64),
            positions=mask.reshape(-1).nonzero()[:, 0],
            word=None if word is None else torch.as_tensor(word),
            sentence=torch.as_tensor(sentence),
            types=torch.as_tensor(types),
            classes=torch.as_tensor(np.where(special, plan.special_class, group)),
            repeated=torch.as_tensor(repeats(sentence, types)),
            counted=torch.as_tensor(~special | plan.include_special),
        )
        if plan.official and fill in plan.rows:
            firsts = mask.sum(1) + torch.arange(len(chosen)) * mask.shape[1]
            batch.pads, batch.pad_type = firsts[(~mask).any(1)], plan.rows[fill]
        return batch


@dataclass
class Plan:
    """How a corpus is measured.

    Attributes:
        rows: Type to its row among the analysed ones.
        classes: Type to its class.
        special_class: The class of special tokens.
        include_special: Whether special tokens count in measures of tokens.
        batch_tokens: Positions of a batch, pads included.
        official: Pad everything to the longest sentence and analyse pads, as the published code.
    """

    rows: dict[int | str, int]
    classes: dict[int | str, int]
    special_class: int
    include_special: bool = True
    batch_tokens: int = 2048
    official: bool = False

    def __post_init__(self) -> None:
        known = [name for name in {**self.rows, **self.classes} if isinstance(name, int)]
        self._tables = np.full((2, max(known, default=0) + 1), -1, dtype=np.int64)
        self._tables[1] = 0
        for table, values in zip(self._tables, (self.rows, self.classes), strict=True):
            for name, value in values.items():
                if isinstance(name, int):
                    table[name] = value

    def of_ids(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and class of each token id."""
        inside = np.minimum(ids, self._tables.shape[1] - 1)
        rows, classes = self._tables[:, inside]
        return np.where(ids == inside, rows, -1), np.where(ids == inside, classes, 0)


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


def _units(sentence: np.ndarray, numbers: np.ndarray, special: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First token of each unit in the order of the text, and the unit of each token.

    A unit is a word, or a special token, which belongs to none.
    """
    own = np.where(special, -2 - np.arange(len(special)), numbers)
    new = np.ones(len(own), dtype=bool)
    new[1:] = (own[1:] != own[:-1]) | (sentence[1:] != sentence[:-1])  # tokens of a word stand together
    return np.flatnonzero(new), np.cumsum(new) - 1


def repeats(sentence: np.ndarray, types: np.ndarray) -> np.ndarray:
    """Where the same type was in the same sentence before.

    >>> repeats(np.array([0, 0, 0, 1]), np.array([5, 6, 5, 5])).tolist()
    [False, False, True, False]
    """
    keys = sentence * (int(types.max(initial=0)) + 2) + types + 1
    _, first = np.unique(keys, return_index=True)
    repeated = np.ones(len(types), dtype=bool)
    repeated[first] = False
    return repeated
