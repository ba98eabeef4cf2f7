"""What the readers give and evaluation takes: a document, what the reader asked for, and the reference."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from relattn.controls import control_phrases
from shared_core import InputError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """One document and one control.

    Attributes:
        id: Its own name; resuming goes by it.
        document_id: Examples of one document share it: intervals and splits go by document.
        document: The text.
        control: Phrases that say what the summary is to be about.
        summary: The reference; None where there is none.
        other_summaries: References of the same document for its other controls.
    """

    id: str
    document_id: str
    document: str
    control: tuple[str, ...]
    summary: str | None = None
    other_summaries: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fields:
    """The names of a table's columns. A column of `summary`, `id` or `document_id` may be missing.

    Attributes:
        document: The text.
        control: A string, or a list of phrases.
        summary: The reference.
        id: The example's name; its number in the file where missing.
        document_id: The document's name; examples of equal text share a document where missing.
    """

    document: str = "document"
    control: str = "control"
    summary: str = "summary"
    id: str = "id"
    document_id: str = "document_id"


@dataclass(frozen=True)
class MethodSummary:
    """What a method gave for one document.

    Attributes:
        text: The summary.
        weight: Its steering weight; None where the method has none.
        warnings: Truncation, phrases that do not occur, and the like.
    """

    text: str
    weight: float | None = None
    warnings: tuple[str, ...] = ()


def example_of(row: Row, fields: Fields, number: int) -> Example:
    """A table's row as an example.

    Raises:
        InputError: A column is missing (the message lists those there are), or holds something else than
            text.
    """
    document = _text(row, fields.document)
    if not document.strip():
        raise InputError("is empty: expected a text", field=fields.document)
    given = _present(row, fields.control)
    if not isinstance(given, str) and not (
        isinstance(given, Sequence) and all(isinstance(phrase, str) for phrase in given)
    ):
        raise InputError("expected a string or a list of strings", field=fields.control, value=given)
    phrases = control_phrases(given)
    if not phrases:
        raise InputError("is empty: expected a word or phrase", field=fields.control)
    summary = row.get(fields.summary)
    if summary is not None and not isinstance(summary, str):
        raise InputError("expected text", field=fields.summary, value=summary)
    return Example(
        id=_name(row, fields.id, str(number)),
        document_id=_name(row, fields.document_id, ""),
        document=document,
        control=phrases,
        summary=summary if summary and summary.strip() else None,
    )


def with_other_summaries(examples: Iterable[Example]) -> list[Example]:
    """Each example with its document's references for other controls; documents without name get one.

    Raises:
        InputError: Two examples have the same id.
    """
    found = list(examples)
    seen: set[str] = set()
    by_text: dict[str, str] = {}
    for example in found:
        if example.id in seen:
            raise InputError("expected ids that differ, found one twice", field="id", value=example.id)
        seen.add(example.id)
        by_text.setdefault(example.document, example.id)
    named = [e if e.document_id else replace(e, document_id=by_text[e.document]) for e in found]
    of_document: dict[str, list[Example]] = {}
    for example in named:
        of_document.setdefault(example.document_id, []).append(example)
    return [
        replace(
            example,
            other_summaries=tuple(
                dict.fromkeys(
                    other.summary
                    for other in of_document[example.document_id]
                    if other.control != example.control and other.summary and other.summary != example.summary
                )
            ),
        )
        for example in named
    ]


def _present(row: Row, field: str) -> Any:
    value = row.get(field)
    if value is None:
        raise InputError(f"is missing: found {', '.join(map(str, row)) or 'nothing'}", field=field)
    return value


def _text(row: Row, field: str) -> str:
    value = _present(row, field)
    if not isinstance(value, str):
        raise InputError("expected text", field=field, value=value)
    return value


def _name(row: Row, field: str, default: str) -> str:
    value = row.get(field)
    return default if value is None or value == "" else str(value)
