"""EntSUM: summaries about entities in New York Times articles, whose text comes from a corpus of its own.

Maddela, Kulkarni, Preotiuc-Pietro: "EntSUM: A Data Set for Entity-Centric Extractive Summarization", ACL
2022. The annotations name articles of the licensed corpus LDC2008T19 by their ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from relattn.examples import Example, Row, with_other_summaries
from relattn.readers import json_lines, read_rows
from shared_core import InputError


@dataclass(frozen=True)
class EntsumFields:
    """Names of the annotations' fields; None means: find it in the file.

    Attributes:
        document_id: The article's id, which is the name of its file.
        entity: What the summary is about.
        summary: The summary, or a list of them. In a field named `summary_sentences` a list holds the
            sentences of one summary.
    """

    document_id: str | None = None
    entity: str | None = None
    summary: str | None = None


# We could not see the files. Names are tried in this order, and an error lists those that there are.
_CANDIDATES: Mapping[str, Sequence[str]] = {
    "document_id": ("document_id", "doc_id", "docid", "nyt_id", "nyt_doc_id", "article_id", "id"),
    "entity": ("entity", "entity_name", "entity_text", "entity_mention"),
    "summary": ("summary", "summaries", "entity_summary", "summary_text", "summary_sentences"),
}
_SENTENCES = "summary_sentences"  # its list is one summary, that of the others is several


def load_entsum(
    annotations: str | Path, articles: str | Path, fields: EntsumFields | None = None, skip_bad: bool = False
) -> list[Example]:
    """Examples of EntSUM: an annotation file, and the folder with the articles' texts.

    Where an entity has several summaries, each is an example.

    Args:
        annotations: JSON Lines, `nyt_annotated_*.jsonl`.
        articles: A folder; each article is ID.txt, or ID.xml as in the corpus, at any depth.
        fields: Names of the fields, where they are not found by themselves.
        skip_bad: Leave rows out that are malformed or whose article is missing.

    Raises:
        InputError: A field is not there (the message lists those there are), an article is missing, or a row
            is malformed.
    """
    file, folder = Path(annotations), Path(articles)
    if not folder.is_dir():
        raise InputError("is no folder: expected one with the articles as ID.txt or ID.xml", file=folder)
    places = {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix in (".txt", ".xml")}
    names = fields or EntsumFields()

    def read(row: Row, number: int) -> list[Example]:
        document_id = str(row[_field(row, "document_id", names.document_id)])
        entity = row[_field(row, "entity", names.entity)]
        if not isinstance(entity, str) or not entity.strip():
            raise InputError("expected an entity's name", field="entity", value=entity)
        name = _field(row, "summary", names.summary)
        summaries = _summaries(row[name])
        if name == _SENTENCES:
            summaries = [" ".join(summaries)]
        if document_id not in places:
            raise InputError(
                f"article {document_id} is missing: expected {document_id}.txt or .xml in {folder}"
            )
        text = _article(places[document_id])
        return [
            Example(f"{number}-{document_id}-{n}", document_id, text, (entity.strip(),), summary)
            for n, summary in enumerate(summaries)
        ]

    return with_other_summaries(read_rows(file, json_lines(file), read, skip_bad))


def _field(row: Row, role: str, given: str | None) -> str:
    candidates = (given,) if given else _CANDIDATES[role]
    for name in candidates:
        if name in row:
            return name
    raise InputError(f"is missing: looked for {', '.join(candidates)}, found {', '.join(row)}", field=role)


def _summaries(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise InputError("expected a text or a list of texts", field="summary", value=given)
    return texts


def _article(path: Path) -> str:
    if path.suffix == ".txt":
        return path.read_text(encoding="utf-8")
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise InputError(f"is not XML: {error}", file=path) from error
    blocks = [block for block in root.iter("block") if block.get("class") == "full_text"]
    paragraphs = ["".join(paragraph.itertext()).strip() for block in blocks for paragraph in block.iter("p")]
    if not paragraphs:
        raise InputError('has no <block class="full_text"> with paragraphs', file=path)
    return "\n\n".join(paragraphs)
