"""Training data: pairs of texts in the layouts that are around, and texts with human similarities."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared_core import InputError

# Names of the columns, in the order in which they are looked for: sentence-transformers', then SimCSE's.
_LAYOUTS = (
    ("anchor", "positive", "negative"),
    ("sent0", "sent1", "hard_neg"),
    ("sentence1", "sentence2", ""),
)


@dataclass(frozen=True)
class Pairs:
    """Training pairs.

    Attributes:
        anchors: Texts.
        positives: Of each, a text that means the same; the text itself for unsupervised training, where
            dropout tells them apart.
        negatives: Of each, a text that does not; None where there are none.
        supervised: Whether positives are other texts.
    """

    anchors: list[str]
    positives: list[str]
    negatives: list[str] | None
    supervised: bool

    def __len__(self) -> int:
        return len(self.anchors)

    def columns(self) -> dict[str, list[str]]:
        """Columns for a `datasets.Dataset`."""
        found = {"anchor": self.anchors, "positive": self.positives}
        return found | ({"negative": self.negatives} if self.negatives is not None else {})


def unsupervised(sentences: Sequence[str]) -> Pairs:
    """Each sentence with itself, as SimCSE: two passes with dropout. Repeated sentences are kept once."""
    once = list(dict.fromkeys(sentences))
    return Pairs(once, once, None, False)


def load_pairs(path: str | Path) -> Pairs:
    """Pairs of a file.

    ``.txt`` has one sentence a line, for unsupervised training. ``.csv``, ``.tsv`` and ``.jsonl`` have
    columns anchor, positive[, negative]; or sent0, sent1[, hard_neg] (SimCSE's); or sentence1, sentence2.

    Raises:
        InputError: The file or a column is missing, a text is empty, or there are fewer than 2 pairs.
    """
    path = Path(path)
    if path.suffix == ".txt":
        from isocse.corpus import SentenceFile

        return _enough(unsupervised(list(SentenceFile(path))), path)
    rows = list(_rows(path))
    if not rows:
        raise InputError("expected at least 2 pairs", file=path, value=0)
    present = rows[0][1]
    layout = next((names for names in _LAYOUTS if names[0] in present or names[1] in present), None)
    if layout is None:
        raise InputError(
            "expected the columns anchor and positive (and negative), or sent0 and sent1 (and hard_neg)",
            file=path,
            field="columns",
            value=list(present),
        )
    missing = [name for name in layout[:2] if name not in present]
    if missing:
        raise InputError("the column is missing", file=path, field=missing[0])
    names = [name for name in layout if name and name in present]
    for number, row in rows:
        for name in names:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise InputError(
                    f"line {number}: expected a text", file=path, field=name, value=row.get(name)
                )
    columns = [[row[name].strip() for _, row in rows] for name in names]
    return _enough(Pairs(columns[0], columns[1], columns[2] if len(columns) > 2 else None, True), path)


def _enough(pairs: Pairs, path: Path) -> Pairs:
    if len(pairs) < 2:
        raise InputError("expected at least 2 pairs", file=path, value=len(pairs))
    return pairs


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix not in (".csv", ".tsv", ".jsonl"):
        raise InputError("expected a .txt, .csv, .tsv or .jsonl file", file=path, value=path.suffix)
    if not path.is_file():
        raise InputError("is not there", file=path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            if path.suffix != ".jsonl":
                reader = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
                for row in reader:
                    yield reader.line_num, {str(name): value for name, value in row.items()}
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _object(line, path, number)
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text: {error.reason}", file=path) from error
    except csv.Error as error:
        raise InputError(f"is not a table: {error}", file=path) from error


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"line {number}: is not JSON: {error}", file=path) from error
    if not isinstance(row, dict):
        raise InputError(f"line {number}: expected an object", file=path)
    return row


@dataclass(frozen=True)
class Judged:
    """Pairs of texts with human similarities.

    Attributes:
        first: Texts.
        second: Texts.
        scores: Human similarity, any scale.
    """

    first: list[str]
    second: list[str]
    scores: list[float]


def load_judged(path: str | Path) -> Judged:
    """A file with columns sentence1, sentence2, score (.csv, .tsv, .jsonl), or the original STS-B layout.

    The original ``sts-test.csv`` is tab-separated without header and quoting: genre, file, year, id, score,
    sentence, sentence, sometimes two more columns.

    Raises:
        InputError: The file or a column is missing, or a score is no number.
    """
    path = Path(path)
    if path.name.startswith("sts-") and path.suffix == ".csv":
        rows = list(_stsbenchmark(path))
    else:
        rows = []
        for number, row in _rows(path):
            missing = [name for name in ("sentence1", "sentence2", "score") if row.get(name) is None]
            if missing:
                raise InputError(f"line {number}: the column is missing", file=path, field=missing[0])
            rows.append((number, row["sentence1"], row["sentence2"], row["score"]))
    if len(rows) < 3:
        raise InputError("expected at least 3 pairs", file=path, value=len(rows))
    scores = []
    for number, _, _, score in rows:
        try:
            scores.append(float(score))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"line {number}: expected a number", file=path, field="score", value=score
            ) from error
    return Judged([row[1] for row in rows], [row[2] for row in rows], scores)


def _stsbenchmark(path: Path) -> Iterator[tuple[int, str, str, str]]:
    if not path.is_file():
        raise InputError("is not there", file=path)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        cells = line.split("\t")
        if len(cells) < 7:
            raise InputError(
                f"line {number}: expected 7 columns with tabs between: genre, file, year, id, score, "
                "sentence, sentence",
                file=path,
                value=len(cells),
            )
        yield number, cells[5], cells[6], cells[4]
