"""Control phrases: from what a reader typed to token ids, and whether a text holds them."""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared_core import InputError

Control = str | Sequence[str]
"""What the reader asked for: one phrase, or several."""

# Thai, Lao, Myanmar, Khmer; kana; ideographs.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_WORD_MARKS = "\u2581\u0120 "  # SentencePiece's, byte-level BPE's


@dataclass(frozen=True)
class EncodedControl:
    """A control in the encoder's vocabulary.

    Attributes:
        phrases: Its phrases, trimmed, each once.
        ids: Their tokens in a row, without special and unknown tokens.
        unknown: The phrases of which the vocabulary knows no part; they say nothing.
    """

    phrases: tuple[str, ...]
    ids: tuple[int, ...]
    unknown: tuple[str, ...] = ()


def control_phrases(control: Control) -> tuple[str, ...]:
    """A control's phrases, trimmed, blank ones dropped, each once, in order.

    Raises:
        InputError: It is something else than text.

    >>> control_phrases([" jazz ", "", "opera", "jazz"])
    ('jazz', 'opera')
    >>> control_phrases("climate policy")
    ('climate policy',)
    """
    given = [control] if isinstance(control, str) else control
    if not isinstance(given, Sequence) or not all(isinstance(phrase, str) for phrase in given):
        raise InputError("expected a phrase or a list of phrases", field="controls", value=control)
    return tuple(dict.fromkeys(phrase.strip() for phrase in given if phrase.strip()))


def encode_control(control: Control, tokenizer: Any, number: int = 0) -> EncodedControl:
    """A control's phrases as ids, each phrase tokenized on its own, in its form inside a text.

    Byte-level BPE knows " music" and "music" as different tokens, of which a text nearly always holds the
    first: for such tokenizers each phrase gets a leading space.

    Args:
        control: One phrase or several.
        tokenizer: The *encoder's* tokenizer.
        number: Which control it is, for messages.

    Raises:
        InputError: The control is blank, or the vocabulary knows no token of it.
    """
    phrases = control_phrases(control)
    if not phrases:
        raise InputError(
            f"control {number} is empty: expected a word or phrase", field="controls", value=control
        )
    prefix = " " if is_byte_level(tokenizer) else ""
    dropped = {*tokenizer.all_special_ids, tokenizer.unk_token_id}
    ids: list[int] = []
    unknown = []
    for phrase in phrases:
        known = [
            i for i in tokenizer(prefix + phrase, add_special_tokens=False)["input_ids"] if i not in dropped
        ]
        # A word mark alone is what SentencePiece leaves of a word of unknown letters.
        if any(token.strip(_WORD_MARKS) for token in tokenizer.convert_ids_to_tokens(known)):
            ids += known
        else:
            unknown.append(phrase)
    if not ids:
        raise InputError(
            f"control {number}: the tokenizer's vocabulary knows no token of it",
            field="controls",
            value=list(phrases),
        )
    return EncodedControl(phrases, tuple(ids), tuple(unknown))


def is_byte_level(tokenizer: Any) -> bool:
    """Whether a tokenizer is a byte-level BPE (GPT-2, BART, LED): a leading space belongs to the token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hasattr(tokenizer, "byte_encoder")
    if (first := backend.pre_tokenizer) is None:
        return False
    steps = [json.loads(first.__getstate__())]  # the backend's own JSON holds the whole vocabulary
    while steps:
        step = steps.pop()
        if step.get("type") == "ByteLevel":
            return True
        steps += step.get("pretokenizers", [])
    return False


def occurs_in(phrase: str, text: str) -> bool:
    """Whether a phrase stands in a text as whole words, whatever the case, spacing and form of accents.

    Scripts that put no space between words (Chinese, Japanese, Thai) have no whole words to look for: there
    any place counts.

    >>> occurs_in("Climate  policy", "A new climate policy.")
    True
    >>> occurs_in("art", "They start.")
    False
    """
    words = _plain(phrase).split()
    if not words:
        return False
    begin = "" if _UNSPACED.match(words[0][0]) else r"(?<!\w)"
    end = "" if _UNSPACED.match(words[-1][-1]) else r"(?!\w)"
    return re.search(begin + r"\s+".join(map(re.escape, words)) + end, _plain(text)) is not None


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
