"""Documents as the encoder reads them: tokens, where each stands in the text, what a length limit cut off."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from relattn.controls import Control, EncodedControl, control_phrases, encode_control, occurs_in
from shared_core import InputError

logger = logging.getLogger("relattn")


@dataclass(frozen=True)
class SourceDocument:
    """One tokenized document.

    Attributes:
        text: The document.
        ids: Its tokens, special ones included, cut to the limit.
        tokens: The text of each token; the name of those that stand for no text.
        offsets: Where each token stands in the text, [start, end); None if the tokenizer is a slow one.
        special: True at special tokens.
        lost: How many tokens the limit cut off.
    """

    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...] | None
    special: tuple[bool, ...]
    lost: int = 0

    @property
    def kept_until(self) -> int | None:
        """Where the kept part of the text ends; None if the tokenizer gives no offsets."""
        return None if self.offsets is None else max((end for _, end in self.offsets), default=0)

    def word_at(self, token: int) -> str:
        """The whole word of which a token is a part."""
        if self.offsets is None:
            return self.tokens[token].strip()
        start, end = self.offsets[token]
        piece = self.text[start:end]
        start += len(piece) - len(piece.lstrip())
        while start > 0 and not self.text[start - 1].isspace():
            start -= 1
        while end < len(self.text) and not self.text[end].isspace():
            end += 1
        return self.text[start:end].strip()


def read_documents(
    tokenizer: Any, documents: Sequence[str], limit: int | None, prefix: str = ""
) -> list[SourceDocument]:
    """Tokenize documents, each behind the prefix and cut to at most `limit` tokens.

    The prefix is the model's ("summarize: "), not the document's: its tokens stand for no text.

    Raises:
        InputError: A document is blank, no text, or has no token but special ones; or documents is one
            string.
    """
    if isinstance(documents, str):
        raise InputError("expected a list of documents, got one string: put it in a list", field="documents")
    found = []
    for number, text in enumerate(documents):
        if not isinstance(text, str):
            raise InputError(f"document {number} is no text", field="documents", value=text)
        if not text.strip():
            raise InputError(f"document {number} is empty: expected a text", field="documents")
        document = _read(tokenizer, text, limit, prefix)
        if all(document.special):
            raise InputError(
                f"document {number} has no token: expected a text", field="documents", value=text
            )
        found.append(document)
    return found


def _read(tokenizer: Any, text: str, limit: int | None, prefix: str = "") -> SourceDocument:
    fast = bool(getattr(tokenizer, "is_fast", False))
    options = {"return_special_tokens_mask": True, "return_offsets_mapping": fast, "verbose": False}
    encoded = tokenizer(prefix + text, truncation=False, **options)
    lost = 0
    if limit is not None and len(encoded["input_ids"]) > limit:
        lost = len(encoded["input_ids"]) - limit
        encoded = tokenizer(prefix + text, truncation=True, max_length=limit, **options)
    ids = tuple(encoded["input_ids"])
    special = tuple(bool(flag) for flag in encoded["special_tokens_mask"])
    offsets = None
    if fast:
        # A token of the prefix ends at 0, where the text begins: it stands for none of it.
        moved = ((max(a - len(prefix), 0), max(b - len(prefix), 0)) for a, b in encoded["offset_mapping"])
        offsets = tuple((int(a), int(b)) for a, b in moved)
        special = tuple(s or (b > 0 and end == 0) for s, (_, b), (_, end) in
                        zip(special, encoded["offset_mapping"], offsets, strict=True))  # fmt: skip
    names = tokenizer.convert_ids_to_tokens(list(ids))
    if offsets is None:
        tokens = tuple(tokenizer.convert_tokens_to_string([name]) for name in names)
    else:
        tokens = tuple(text[a:b] if b > a else name for (a, b), name in zip(offsets, names, strict=True))
    return SourceDocument(text, ids, tokens, offsets, special, lost)


def read_controls(
    tokenizer: Any, controls: Sequence[Control | None], documents: int, on_empty: str
) -> list[EncodedControl | None]:
    """Encode one control a document; None where it is blank and blank means "plain".

    Raises:
        InputError: Another number of controls than documents, a blank control (unless on_empty is "plain"),
            or one without a known token.
    """
    if on_empty not in ("error", "plain"):
        raise InputError('expected "error" or "plain"', field="on_empty", value=on_empty)
    if isinstance(controls, str):
        raise InputError("expected a list with one control a document, got one string", field="controls")
    if len(controls) != documents:
        raise InputError(f"expected {documents}, one a document, got {len(controls)}", field="controls")
    found: list[EncodedControl | None] = []
    for number, control in enumerate(controls):
        given: Control = "" if control is None else control
        blank = not control_phrases(given)
        found.append(None if blank and on_empty == "plain" else encode_control(given, tokenizer, number))
    return found


def pad(
    rows: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Rows of ids, padded on the right to the longest (at least one), and a mask: True at the given ids."""
    width = max(1, *map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[n, : len(row)] = True
    return ids, mask


def warnings_about(document: SourceDocument, control: EncodedControl | None, best: int) -> tuple[str, ...]:
    """What a reader should know before trusting a summary: lost tokens, phrases that the text does not hold.

    Args:
        document: The document.
        control: Its control, None for no control.
        best: The token that scores highest against the control.
    """
    found = []
    phrases = () if control is None else control.phrases
    kept, end = document.text, document.kept_until
    if document.lost:
        kept, rest = (document.text, "") if end is None else (document.text[:end], document.text[end:])
        cut = [p for p in phrases if occurs_in(p, rest) and not occurs_in(p, kept)]
        where = f"; {_listed(cut)} stands only in the lost part" if cut else ""
        found.append(f"document truncated: {document.lost} tokens were lost{where}")
    if control is not None and control.unknown:
        found.append(f"the vocabulary does not know {_listed(control.unknown)}")
    if phrases and not any(occurs_in(p, kept) for p in phrases):
        found.append(
            f"{_listed(phrases)} does not occur in the source; best match: {document.word_at(best)!r}"
        )
    for warning in found:
        logger.warning("%s", warning)
    return tuple(found)


def _listed(phrases: Sequence[str]) -> str:
    return ", ".join(repr(phrase) for phrase in phrases)
