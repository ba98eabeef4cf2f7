"""Collections of passages: in memory, or as offsets into a file of one passage a line."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shared_core import InputError

Parse = Callable[[str], tuple[str, str]]
"""Turns a line into a passage's id and text."""


class Corpus(Sequence[str]):
    """Passages by row, with their ids.

    Args:
        ids: One a passage, no two alike.
        texts: As many texts.
        source: Where they come from, for messages.

    Raises:
        InputError: Two ids are alike, an id is no string, or lengths differ.
    """

    def __init__(self, ids: Sequence[str], texts: Sequence[str], source: str | Path = "corpus") -> None:
        if len(ids) != len(texts):
            raise InputError(f"expected {len(ids)} texts, one an id", file=source, value=len(texts))
        wrong = next((name for name in ids if not isinstance(name, str)), None)
        if wrong is not None:
            raise InputError("expected ids that are strings", file=source, field="id", value=wrong)
        self.ids, self.texts, self.source = list(ids), texts, str(source)
        self._rows = {name: row for row, name in enumerate(self.ids)}
        if len(self._rows) != len(self.ids):
            twice = next(name for row, name in enumerate(self.ids) if self._rows[name] != row)
            raise InputError("two passages have this id", file=source, field="id", value=twice)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the text of a row."""
        return self.texts[row]

    def fingerprint(self, texts: int = 1000) -> str:
        """Return a hash of all ids, and of that many texts, evenly spread: all would have to be read."""
        found = hashlib.blake2b("\n".join(self.ids).encode(), digest_size=16)
        for row in range(0, len(self), max(1, len(self) // texts)):
            found.update(self[row].encode())
        return found.hexdigest()

    def row(self, name: str) -> int | None:
        """Return the row of an id, or None."""
        return self._rows.get(name)


class LineTexts(Sequence[str]):
    """Texts that stay in their file: each is read when it is asked for.

    A file object is opened in each process that reads, so that data loaders can copy this.
    """

    def __init__(self, path: str | Path, offsets: np.ndarray, parse: Parse) -> None:
        self.path, self.offsets, self.parse = Path(path), offsets, parse
        self._file = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Read the text of a row."""
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        with open(self.path, "rb") as file:
            file.seek(int(self.offsets[row]))
            line = file.read(int(self.offsets[row + 1] - self.offsets[row]))
        return self.parse(line.decode("utf-8").rstrip("\r\n"))[1]


def read_lines(path: str | Path, parse: Parse, *, header: bool = False) -> Corpus:
    """Read a file of one passage a line: its ids into memory, its texts as offsets.

    Args:
        path: The file, UTF-8, not compressed.
        parse: Turns a line into id and text, and raises `ValueError` for one that is malformed.
        header: Whether the first line is one.

    Raises:
        InputError: The file is missing, compressed or not UTF-8, or a line is malformed; its number is named.
    """
    path = Path(path)
    if path.suffix == ".gz":
        raise InputError(
            "is compressed; unpack it first, so that passages can be read by position", file=path
        )
    ids: list[str] = []
    offsets = [0]
    position = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            if header and number == 1:
                offsets[0] = position
                continue
            try:
                ids.append(parse(line.decode("utf-8").rstrip("\r\n"))[0])
            except ValueError as error:
                raise InputError(f"line {number}: {error}", file=path) from error
            offsets.append(position)
    if not ids:
        raise InputError("holds no passage", file=path)
    return Corpus(ids, LineTexts(path, np.array(offsets, np.int64), parse), path)


def joined(title: str, text: str) -> str:
    """Join title and text by a space, as BEIR does; an empty title leaves the text."""
    return f"{title} {text}".strip()


def beir_line(line: str) -> tuple[str, str]:
    """Parse a line of BEIR's corpus.jsonl."""
    row = json.loads(line)
    if not isinstance(row, dict) or "_id" not in row or "text" not in row:
        raise ValueError('expected an object with "_id" and "text"')
    if not isinstance(row["_id"], str):
        raise ValueError(f'"_id" is {row["_id"]!r}, expected a string')
    return row["_id"], joined(row.get("title") or "", row["text"] or "")


def msmarco_passage_line(line: str) -> tuple[str, str]:
    r"""Parse a line of MS MARCO's collection.tsv: pid \t text."""
    name, separator, text = line.partition("\t")
    if not separator:
        raise ValueError("expected pid, a tab and the text")
    return name, text


def msmarco_document_line(line: str) -> tuple[str, str]:
    r"""Parse a line of msmarco-docs.tsv: docid \t url \t title \t body."""
    parts = line.split("\t")
    if len(parts) != 4:
        raise ValueError(f"expected docid, url, title and body, got {len(parts)} fields")
    return parts[0], joined(parts[2], parts[3])


def dpr_line(line: str) -> tuple[str, str]:
    r"""Parse a line of DPR's psgs_w100.tsv: id \t "text" \t title."""
    parts = next(csv.reader([line], delimiter="\t"))
    if len(parts) != 3:
        raise ValueError(f"expected id, text and title, got {len(parts)} fields")
    return parts[0], joined(parts[2], parts[1])


@dataclass(frozen=True)
class RetrievalData:
    """Passages, queries and what is relevant.

    Attributes:
        corpus: The passages.
        queries: Text by id.
        qrels: Query id -> passage id -> grade; above 0 is relevant.
        negatives: Query id -> ids of passages that look relevant and are not, best first.
        notes: What was left out or is odd, in sentences.
    """

    corpus: Corpus
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    negatives: dict[str, list[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def positives(self, query: str) -> list[str]:
        """Ids of the passages that are relevant for a query, in the order of the qrels."""
        return [name for name, grade in self.qrels.get(query, {}).items() if grade > 0]

    def judged(self) -> Iterator[str]:
        """Queries that have a relevant passage."""
        return (query for query in self.queries if self.positives(query))
