"""Readers of data sets: NEWTS, EntSUM, ACLSum, CTRLsum's line files, and your own tables.

Each gives a list of `Example`. A malformed row is an error that names file, line and field; with
`skip_bad=True` it is left out with a warning, and the others are kept. Nothing is downloaded.
"""

import csv
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from relattn.examples import Example, Fields, Row, example_of, with_other_summaries
from shared_core import InputError, wheels

logger = logging.getLogger("relattn")

NEWTS_COLUMNS = ("docId", "article", "words1", "words2", "phrases1", "phrases2", "sentences1", "sentences2",
                 "summary1", "summary2")  # fmt: skip
NEWTS_CONTROLS = ("words", "phrases", "sentences")
ACLSUM_ASPECTS = ("challenge", "approach", "outcome")
ACLSUM_SPLITS = ("train", "val", "test")
_LONGEST_CELL = 1 << 27  # articles are longer than the csv module's default of 128 KiB


def load_jsonl(path: str | Path, fields: Fields | None = None, skip_bad: bool = False) -> list[Example]:
    """Examples of a JSON Lines file, one object a line.

    Raises:
        InputError: The file is missing, or a row is malformed; the message has file, line and field.
    """
    return _examples(Path(path), json_lines(Path(path)), fields or Fields(), skip_bad)


def load_csv(path: str | Path, fields: Fields | None = None, skip_bad: bool = False) -> list[Example]:
    """Examples of a CSV file with a header line (UTF-8); a control may hold phrases with `;` between.

    Raises:
        InputError: As for `load_jsonl`.
    """

    def split(row: Row, names: Fields) -> Row:
        control = row.get(names.control)
        return row if not isinstance(control, str) else {**row, names.control: control.split(";")}

    names = fields or Fields()
    rows = ((line, lambda read=read: split(read(), names)) for line, read in _csv_rows(Path(path)))
    return _examples(Path(path), rows, names, skip_bad)


def load_dataset(dataset: Any, fields: Fields | None = None, skip_bad: bool = False) -> list[Example]:
    """Examples of a Hugging Face `datasets.Dataset`, or of any iterable of dictionaries.

    Raises:
        InputError: A row is malformed; the message has its number and the field.
    """
    rows = ((number, lambda row=row: row) for number, row in enumerate(dataset))
    return _examples(None, rows, fields or Fields(), skip_bad)


def load_newts(path: str | Path, control: str = "words", skip_bad: bool = False) -> list[Example]:
    """Examples of NEWTS (`NEWTS_test_600.csv` and the like): two topics, so two examples a row.

    Bahrainian, Feucht, Eickhoff: "NEWTS: A Corpus for News Topic-Focused Summarization", ACL Findings 2022.

    Args:
        path: The CSV file.
        control: "words" (split at commas, all of them: some lists lack the usual trailing comma), "phrases"
            (likewise) or "sentences" (one phrase: the sentence).
        skip_bad: Leave malformed rows out.

    Raises:
        InputError: A column is missing, or a row is malformed.
    """
    if control not in NEWTS_CONTROLS:
        raise InputError(f"expected one of {', '.join(NEWTS_CONTROLS)}", field="control", value=control)
    file = Path(path)

    def read(row: Row, number: int) -> list[Example]:
        _check_columns(row, NEWTS_COLUMNS)
        name = f"{number}-{row['docId']}"  # two rows may share their AssignmentId
        return [
            example_of(
                {
                    "document": row["article"],
                    "control": _phrases(row[f"{control}{topic}"], control),
                    "summary": row[f"summary{topic}"],
                    "id": f"{name}-{topic}",
                    "document_id": row["docId"],
                },
                Fields(),
                number,
            )
            for topic in ("1", "2")
        ]

    return _collect(file, _csv_rows(file), read, skip_bad)


def _phrases(given: Any, control: str) -> list[str]:
    text = given if isinstance(given, str) else ""
    return [text] if control == "sentences" else [part.strip() for part in text.split(",") if part.strip()]


def load_aclsum(
    split: str = "test", source: str = "all", aspects: Sequence[str] = ACLSUM_ASPECTS
) -> list[Example]:
    """Examples of ACLSum: papers, each summarized for three aspects. Reads the installed package `aclsum`.

    Takeshita et al.: "ACLSum: A New Dataset for Aspect-based Summarization of Scientific Publications", NAACL
    2024.

    Args:
        split: "train", "val" or "test".
        source: "abstract", "introduction", "conclusion", or "all" of them: what is summarized.
        aspects: Of "challenge", "approach", "outcome"; the aspect's name is the control.

    Raises:
        InputError: The package is not installed, or there is no such split, part or aspect.
    """
    for value, field, allowed in (
        (split, "split", ACLSUM_SPLITS),
        (source, "source", ("all", "abstract", "introduction", "conclusion")),
        *((aspect, "aspects", ACLSUM_ASPECTS) for aspect in aspects),
    ):
        if value not in allowed:
            raise InputError(f"expected one of {', '.join(allowed)}", field=field, value=value)
    found = []
    lines = wheels.member_bytes("aclsum", f"aclsum/dataset/{split}.jsonl").decode().split("\n")
    for line in filter(str.strip, lines):
        paper = json.loads(line)
        parts = ("abstract", "introduction", "conclusion") if source == "all" else (source,)
        document = " ".join(sentence for part in parts for sentence in paper["sentences"][part])
        found += [
            Example(f"{paper['id']}-{aspect}", paper["id"], document, (aspect,), paper["summary"][aspect])
            for aspect in aspects
        ]
    return with_other_summaries(found)


def load_ctrlsum(
    folder: str | Path, split: str = "test", keywords: str = "oracleword", separator: str = " => "
) -> list[Example]:
    """Examples of CTRLsum's line files: SPLIT.source, SPLIT.target and SPLIT.oracleword, one example a line.

    Where SPLIT.source is missing, SPLIT.oraclewordsource is read: keywords, separator and source in one line.

    He et al.: "CTRLsum: Towards Generic Controllable Text Summarization", EMNLP 2022.

    Args:
        folder: Where the files are.
        split: "train", "val" or "test".
        keywords: Suffix of the keyword file.
        separator: Between keywords and source, where they share a line. Phrases are separated by ` | `.

    Raises:
        InputError: A file is missing, the files have different numbers of lines, or a line is malformed.
    """
    base = Path(folder, split)
    targets = _lines(base.with_name(f"{split}.target"))
    joined = base.with_name(f"{split}.{keywords}source")
    if base.with_name(f"{split}.source").exists() or not joined.exists():
        sources, words = (_lines(base.with_name(f"{split}.{suffix}")) for suffix in ("source", keywords))
    else:
        pairs = [_split_once(joined, n, line, separator) for n, line in enumerate(_lines(joined), 1)]
        words, sources = [word for word, _ in pairs], [source for _, source in pairs]
    if not len(sources) == len(words) == len(targets):
        raise InputError(
            f"expected as many lines in each file, found {len(sources)} sources, {len(words)} keywords,"
            f" {len(targets)} targets",
            file=base,
        )
    file = base.with_name(f"{split}.{keywords}")
    rows = (
        (n, lambda row=row: {"document": row[0], "control": row[1].split("|"), "summary": row[2]})
        for n, row in enumerate(zip(sources, words, targets, strict=True), 1)
    )
    return _examples(file, rows, Fields(), skip_bad=False)


def _split_once(file: Path, number: int, line: str, separator: str) -> tuple[str, str]:
    before, found, after = line.partition(separator)
    if not found:
        raise InputError(f"line {number} has no {separator!r} between keywords and source", file=file)
    return before, after


def _lines(file: Path) -> list[str]:
    return _open(file).rstrip("\n").split("\n")


def _open(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text: {error.reason} at byte {error.start}", file=file) from error


# Reading a row may fail by itself (broken JSON), so a row comes as a function that gives it.
_Read = Callable[[], Row]


def json_lines(file: Path) -> Iterator[tuple[int, _Read]]:
    """Line numbers of a JSON Lines file, each with a function that reads the object there."""
    for number, line in enumerate(_open(file).split("\n"), 1):  # splitlines also cuts inside JSON strings
        if line.strip():
            yield number, lambda line=line: _object(line)


def _object(line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise InputError("expected a JSON object", value=row)
    return row


def _csv_rows(file: Path) -> Iterator[tuple[int, _Read]]:
    _open(file)  # not UTF-8 shows here, with its own message
    with file.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.reader(lines)
        header = _next_cells(table)
        if header is None:
            raise InputError("is empty: expected a header line", file=file)
        while True:
            begin = table.line_num + 1
            try:
                cells = _next_cells(table)
            except csv.Error as error:
                raise InputError(f"line {begin} is not CSV: {error}", file=file) from error
            if cells is None:
                return
            if cells:
                yield begin, lambda cells=cells: _record(header, cells)


def _next_cells(table: Iterator[list[str]]) -> list[str] | None:
    before = csv.field_size_limit(_LONGEST_CELL)  # the limit is the whole process's
    try:
        return next(table, None)
    finally:
        csv.field_size_limit(before)


def _record(header: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(header):
        raise InputError(f"expected {len(header)} columns as in the header, found {len(cells)}")
    return dict(zip(header, cells, strict=True))


def _check_columns(row: Row, columns: Iterable[str]) -> None:
    missing = [column for column in columns if column not in row]
    if missing:
        raise InputError(f"is missing: found {', '.join(map(str, row))}", field=", ".join(missing))


def _examples(
    file: Path | None, rows: Iterable[tuple[int, _Read]], fields: Fields, skip_bad: bool
) -> list[Example]:
    return _collect(file, rows, lambda row, number: [example_of(row, fields, number)], skip_bad)


def read_rows(
    file: Path | None,
    rows: Iterable[tuple[int, _Read]],
    read: Callable[[Row, int], list[Example]],
    skip_bad: bool,
) -> list[Example]:
    """Examples of each row; an error says in which file, line and field it is, or is a warning.

    Raises:
        InputError: A row is malformed and `skip_bad` is off, or no example is left.
    """
    found: list[Example] = []
    for number, row in rows:
        try:
            found += read(row(), number)
        except InputError as error:
            where = f"{'row' if file is None else 'line'} {number}"
            place = ", ".join(part for part in (where, error.field) if part)
            located = InputError(error.message, file=file, field=place, value=error.value)
            if not skip_bad:
                raise located from error
            logger.warning("skipped: %s", located)
    if not found:
        raise InputError("holds no example", file=file)
    return found


def _collect(
    file: Path | None,
    rows: Iterable[tuple[int, _Read]],
    read: Callable[[Row, int], list[Example]],
    skip_bad: bool,
) -> list[Example]:
    found = read_rows(file, rows, read, skip_bad)
    try:
        return with_other_summaries(found)
    except InputError as error:
        raise InputError(error.message, file=file, field=error.field, value=error.value) from error
