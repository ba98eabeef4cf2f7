"""Readers of the layouts that retrieval data really have; each says which file, line and field is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lead_kd.corpus import (
    Corpus,
    RetrievalData,
    beir_line,
    dpr_line,
    msmarco_document_line,
    msmarco_passage_line,
    read_lines,
)
from shared_core import InputError

if TYPE_CHECKING:
    import datasets

Missing = Literal["error", "skip"]
"""What to do about a judgement of a passage or query that is not there."""

Format = Literal["auto", "beir", "msmarco", "msmarco-doc", "dpr"]
FORMATS: tuple[Format, ...] = get_args(Format)


def load_data(
    folder: str | Path, split: str = "train", format: Format = "auto", missing: Missing = "error"
) -> RetrievalData:
    """Read a folder in one of the known layouts.

    Args:
        folder: BEIR: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv. MS MARCO: collection.tsv,
            queries.SPLIT.tsv, qrels.SPLIT.tsv; documents: msmarco-docs.tsv in place of collection.tsv. DPR,
            which LEAD's code reads: psgs_w100.tsv and biencoder-SPLIT.json.
        split: "train", "dev", "test", "dev.small", ...
        format: Which layout; "auto" looks at the files.
        missing: What to do about judgements of passages or queries that are not there.

    Raises:
        InputError: A file is missing or malformed; the message names file, line and field.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("is not a folder", file=folder)
    chosen = _detect(folder) if format == "auto" else format
    match chosen:
        case "beir":
            return load_beir(folder, split, missing)
        case "msmarco" | "msmarco-doc":
            return load_msmarco(folder, split, missing, documents=chosen == "msmarco-doc")
        case "dpr":
            return load_dpr(folder / "psgs_w100.tsv", _dpr_file(folder, split))
    raise InputError(f"expected one of {', '.join(FORMATS)}", field="format", value=format)


def load_corpus(folder: str | Path, format: Format = "auto") -> Corpus:
    """Read the passages alone of a folder that `load_data` reads.

    Raises:
        InputError: As for `load_data`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("is not a folder", file=folder)
    match _detect(folder) if format == "auto" else format:
        case "beir":
            return read_lines(_needed(folder / "corpus.jsonl"), beir_line)
        case "msmarco":
            return read_lines(_needed(folder / "collection.tsv"), msmarco_passage_line)
        case "msmarco-doc":
            return read_lines(_needed(folder / "msmarco-docs.tsv"), msmarco_document_line)
        case "dpr":
            return read_lines(_needed(folder / "psgs_w100.tsv"), dpr_line, header=True)
    raise InputError(f"expected one of {', '.join(FORMATS)}", field="format", value=format)


_MARKS: tuple[tuple[str, Format], ...] = (
    ("corpus.jsonl", "beir"),
    ("collection.tsv", "msmarco"),
    ("msmarco-docs.tsv", "msmarco-doc"),
    ("psgs_w100.tsv", "dpr"),
)


def _detect(folder: Path) -> Format:
    for name, format in _MARKS:
        if (folder / name).exists():
            return format
    expected = ", ".join(name for name, _ in _MARKS)
    raise InputError(f"has none of {expected}", file=folder)


def load_beir(folder: str | Path, split: str = "test", missing: Missing = "error") -> RetrievalData:
    """Read BEIR's layout.

    Raises:
        InputError: As for `load_data`.
    """
    folder = Path(folder)
    corpus = load_corpus(folder, "beir")
    queries = read_queries(folder / "queries.jsonl")
    return _complete(corpus, queries, read_qrels(_split_file(folder / "qrels", split)), missing, folder)


def load_msmarco(
    folder: str | Path, split: str = "train", missing: Missing = "error", *, documents: bool = False
) -> RetrievalData:
    """Read MS MARCO's layout: passages, or documents.

    Raises:
        InputError: As for `load_data`.
    """
    folder = Path(folder)
    corpus = load_corpus(folder, "msmarco-doc" if documents else "msmarco")
    prefix = "msmarco-doc" if documents else ""
    queries = read_queries(_first_of(folder, f"queries.{split}.tsv", f"{prefix}{split}-queries.tsv"))
    qrels = read_qrels(_first_of(folder, f"qrels.{split}.tsv", f"{prefix}{split}-qrels.tsv"))
    judged = {name: text for name, text in queries.items() if name in qrels}
    return _complete(corpus, judged, qrels, missing, folder)


def load_dpr(passages: str | Path, examples: str | Path) -> RetrievalData:
    """Read DPR's layout as LEAD's code does: contexts are numbered from 0, the ids of passages from 1.

    Args:
        passages: psgs_w100.tsv: id, text and title behind a header.
        examples: A JSON list of {"question", "positive_ctxs": [number], "hard_negative_ctxs": [number]}.

    Raises:
        InputError: A file is missing or malformed, or a number has no passage.
    """
    corpus = read_lines(_needed(Path(passages)), dpr_line, header=True)
    path = _needed(Path(examples))
    rows = _json(path)
    if not isinstance(rows, list):
        raise InputError("expected a list of examples", file=path)
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    negatives: dict[str, list[str]] = {}
    for number, row in enumerate(rows):
        try:
            question, positive, hard = row["question"], row["positive_ctxs"], row["hard_negative_ctxs"]
        except (KeyError, TypeError) as error:
            raise InputError(f"example {number}: lacks {error}", file=path) from error
        name = str(number)
        queries[name] = question
        qrels[name] = dict.fromkeys(_contexts(positive, corpus, path, number), 1)
        negatives[name] = _contexts(hard, corpus, path, number)
    return RetrievalData(corpus, queries, qrels, negatives)


def load_pairs(dataset: datasets.Dataset) -> RetrievalData:
    """Read sentence-transformers' columns: a query, a positive, and negatives where there are some.

    Args:
        dataset: The first column is the query, the second the positive, further ones that begin with
            "negative" are negatives. Equal texts are one passage.

    Raises:
        InputError: It has less than two columns, or a cell is no text.
    """
    names = dataset.column_names
    if len(names) < 2:
        raise InputError("expected a query column and a positive column", field="columns", value=names)
    hard = [name for name in names[2:] if name.startswith("negative")]
    rows: dict[str, str] = {}  # text -> id
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    negatives: dict[str, list[str]] = {}
    known: dict[str, str] = {}
    for number, row in enumerate(dataset):
        cells: Any = row
        for name in (*names[:2], *hard):
            if not isinstance(cells[name], str):
                raise InputError(f"row {number}: expected a text", field=name, value=cells[name])
        query = known.setdefault(cells[names[0]], str(len(known)))
        queries[query] = cells[names[0]]
        positive = rows.setdefault(cells[names[1]], str(len(rows)))
        qrels.setdefault(query, {})[positive] = 1
        negatives.setdefault(query, []).extend(rows.setdefault(cells[name], str(len(rows))) for name in hard)
    corpus = Corpus(list(rows.values()), list(rows), "dataset")
    clean = {
        query: [name for name in dict.fromkeys(names) if name not in qrels[query]]
        for query, names in negatives.items()
    }
    return RetrievalData(corpus, queries, qrels, {query: names for query, names in clean.items() if names})


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Read judgements: BEIR's three columns behind a header, or TREC's four.

    Raises:
        InputError: The file is missing or empty, or a line is malformed; BEIR's header may not be left out.
    """
    path = _needed(Path(path))
    qrels: dict[str, dict[str, int]] = {}
    for number, line in _lines(path):
        parts = line.split("\t") if "\t" in line else line.split()
        if number == 1 and parts[:2] == ["query-id", "corpus-id"]:
            continue
        if len(parts) == 3 and number == 1:
            raise InputError(
                "line 1: expected BEIR's header (query-id, corpus-id, score) or TREC's four columns",
                file=path,
            )
        if len(parts) not in (3, 4):
            raise InputError(f"line {number}: expected 3 or 4 columns, got {len(parts)}", file=path)
        query, passage, grade = parts[0], parts[-2], parts[-1]
        try:
            qrels.setdefault(query, {})[passage] = int(grade)
        except ValueError:
            raise InputError(
                f"line {number}: expected a whole number", file=path, field="grade", value=grade
            ) from None
    if not qrels:
        raise InputError("holds no judgement", file=path)
    return qrels


def read_queries(path: str | Path) -> dict[str, str]:
    r"""Read queries: BEIR's objects with "_id" and "text", or MS MARCO's qid \t text, one a line.

    Raises:
        InputError: The file is missing or empty, or a line is malformed or repeats an id.
    """
    path = _needed(Path(path))
    queries: dict[str, str] = {}
    for number, line in _lines(path):
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
                name, text = row["_id"], row["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f'line {number}: expected an object with "_id" and "text" ({error!r})', file=path
                ) from error
        else:
            name, separator, text = line.partition("\t")
            if not separator:
                raise InputError(f"line {number}: expected qid, a tab and the text", file=path)
        _new_query(queries, name, text, path, number)
    if not queries:
        raise InputError("holds no query", file=path)
    return queries


def read_negatives(path: str | Path) -> dict[str, list[str]]:
    """Read hard negatives.

    Args:
        path: What `lead-kd mine` writes, a JSON object {"query_id", "negatives": [id]} a line; or MS MARCO's
            triples qid, pid+, pid-, one a line.

    Raises:
        InputError: The file is missing, or a line is malformed.
    """
    path = _needed(Path(path))
    found: dict[str, list[str]] = {}
    for number, line in _lines(path):
        if line.startswith("{"):
            try:
                row = json.loads(line)
                found.setdefault(str(row["query_id"]), []).extend(str(name) for name in row["negatives"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f'line {number}: expected an object with "query_id" and "negatives" ({error!r})',
                    file=path,
                ) from error
        else:
            parts = line.split("\t")
            if len(parts) != 3:
                raise InputError(f"line {number}: expected qid, pid+ and pid-", file=path)
            found.setdefault(parts[0], []).append(parts[2])
    if not found:
        raise InputError("holds no negative", file=path)
    return {query: list(dict.fromkeys(names)) for query, names in found.items()}


def with_negatives(data: RetrievalData, negatives: dict[str, list[str]], source: str | Path) -> RetrievalData:
    """Put hard negatives beside data; those that are relevant after all are dropped and counted.

    Raises:
        InputError: A negative is not in the corpus.
    """
    kept: dict[str, list[str]] = {}
    dropped = 0
    for query, names in negatives.items():
        for name in names:
            if data.corpus.row(name) is None:
                raise InputError(
                    f"query {query} names a passage that {data.corpus.source} lacks", file=source, value=name
                )
        relevant = set(data.positives(query))
        kept[query] = [name for name in names if name not in relevant]
        dropped += len(names) - len(kept[query])
    notes = (f"{dropped} negatives are positives of the same query and were dropped.",) if dropped else ()
    return RetrievalData(data.corpus, data.queries, data.qrels, kept, (*data.notes, *notes))


def _complete(
    corpus: Corpus,
    queries: dict[str, str],
    qrels: dict[str, dict[str, int]],
    missing: Missing,
    source: Path,
) -> RetrievalData:
    """Check that judgements are of queries and passages that are there."""
    lost_passages = [
        (query, name) for query, judged in qrels.items() for name in judged if corpus.row(name) is None
    ]
    lost_queries = [query for query in qrels if query not in queries]
    if missing == "error" and (lost_passages or lost_queries):
        what = (
            f"judges passage {lost_passages[0][1]!r} of query {lost_passages[0][0]!r}, which the corpus lacks"
            if lost_passages
            else f"judges query {lost_queries[0]!r}, which has no text"
        )
        raise InputError(
            f"{what} ({len(lost_passages)} such passages, {len(lost_queries)} such queries); "
            "missing='skip' (--skip-missing) leaves them out",
            file=source,
        )
    notes = []
    if lost_passages or lost_queries:
        notes.append(
            f"{len(lost_passages)} judgements of missing passages and {len(lost_queries)} queries without "
            "text were left out."
        )
    gone = set(lost_passages)
    kept = {
        query: {name: grade for name, grade in judged.items() if (query, name) not in gone}
        for query, judged in qrels.items()
        if query in queries
    }
    return RetrievalData(corpus, queries, kept, {}, tuple(notes))


def _contexts(numbers: Iterable[Any], corpus: Corpus, path: Path, example: int) -> list[str]:
    found = []
    for number in numbers:
        if not str(number).isdigit() or int(number) >= len(corpus):
            raise InputError(
                f"example {example}: expected the number of one of {len(corpus)} passages, from 0",
                file=path,
                value=number,
            )
        found.append(corpus.ids[int(number)])
    return found


def _new_query(queries: dict[str, str], name: object, text: object, path: Path, number: int) -> None:
    if not isinstance(name, str) or not isinstance(text, str):
        raise InputError(f"line {number}: expected id and text to be strings", file=path, value=name)
    if name in queries:
        raise InputError(f"line {number}: two queries have this id", file=path, field="id", value=name)
    queries[name] = text


def _needed(path: Path) -> Path:
    if not path.is_file():
        beside = (
            ", ".join(sorted(file.name for file in path.parent.glob("*"))[:12])
            if path.parent.is_dir()
            else ""
        )
        raise InputError(f"there is no such file ({path.parent} has: {beside or 'nothing'})", file=path)
    return path


def _split_file(folder: Path, split: str) -> Path:
    return _needed(folder / f"{split}.tsv")


def _first_of(folder: Path, *names: str) -> Path:
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def _dpr_file(folder: Path, split: str) -> Path:
    found = sorted(folder.glob(f"biencoder-*{split}*.json"))
    return found[0] if found else folder / f"biencoder-{split}.json"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, encoding="utf-8", newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"is not UTF-8 ({error.reason})", file=path) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"is not JSON: {error}", file=path) from error
