"""Types of tokens: which carry meaning of their own and which are there for grammar."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared_core import InputError
from shared_core.errors import needs_extra

CLASSES = ("semantic", "functional", "subword", "special", "other")
"""semantic: content words. functional: function words and punctuation. subword: pieces of words. special:
tokens of the tokenizer such as [CLS]. other: numbers and what is neither."""

CLOSED_CLASS = frozenset(("ADP", "AUX", "CCONJ", "DET", "PART", "PRON", "SCONJ", "PUNCT", "SYM"))
"""Universal parts of speech that count as functional."""

METHODS = ("stopwords", "frequency", "pos")


@dataclass(frozen=True)
class Kind:
    """A type.

    Attributes:
        token: As the tokenizer writes it, or the word.
        text: The text that it stands for, lower case.
        whole: Whether it begins a word: pieces within words do not.
        special: Whether it is a special token.
    """

    token: str
    text: str
    whole: bool
    special: bool


Classifier = Callable[[Sequence[Kind]], Sequence[str]]


def kinds_of_tokenizer(tokenizer: Any, ids: Iterable[int]) -> list[Kind]:
    """The types with these ids.

    ``##x`` of WordPiece is a piece; so is a letter without the leading mark of a space in byte-level BPE (Ġ)
    and SentencePiece (▁).
    """
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens([int(number) for number in ids])
    mark = _space_mark(tokenizer)
    found = []
    for number, token in zip(ids, tokens, strict=True):
        text = token.removeprefix("##") if mark == "##" else token.removeprefix(mark)
        piece = token.startswith("##") if mark == "##" else not token.startswith(mark)
        found.append(Kind(token, text.lower(), not piece or _is_punctuation(text), int(number) in special))
    return found


def _space_mark(tokenizer: Any) -> str:
    size = len(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(list(range(0, size, max(1, size // 2000))))
    counts = {mark: sum(str(token).startswith(mark) for token in tokens) for mark in ("##", "Ġ", "▁")}
    return max(counts, key=lambda mark: counts[mark]) if any(counts.values()) else "##"


def kinds_of_words(words: Iterable[str]) -> list[Kind]:
    """The types of words, where tokens are put together."""
    return [Kind(word, word, True, False) for word in words]


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where words stand: runs of letters, digits and apostrophes within them, or single other signs.

    >>> [("It's 5%!")[a:b] for a, b in word_spans("It's 5%!")]
    ["It's", '5', '%', '!']
    """
    return [match.span() for match in re.finditer(r"\w+(?:['’]\w+)*|[^\w\s]", text)]


def stopwords(kinds: Sequence[Kind]) -> list[str]:
    """Class of each type by scikit-learn's list of English stop words.

    >>> stopwords(kinds_of_words(["the", "river", ",", "1984"]))
    ['functional', 'semantic', 'functional', 'other']
    """
    listed = _stop_words()
    return [_by_text(kind, kind.text in listed) for kind in kinds]


def by_frequency(kinds: Sequence[Kind], *, share: float = 0.1, language: str = "en") -> list[str]:
    """Class by word frequency: the most frequent words are functional, and punctuation.

    Args:
        kinds: Types.
        share: Of the whole words among them, how many are functional.
        language: Of wordfreq's list.
    """
    with needs_extra("frequency", "isocse"):
        from wordfreq import zipf_frequency
    words = [kind for kind in kinds if _is_word(kind)]
    if not words:
        return [_by_text(kind, False) for kind in kinds]
    values = {kind.text: zipf_frequency(kind.text, language) for kind in words}
    limit = float(np.quantile([values[kind.text] for kind in words], 1 - share))
    return [_by_text(kind, kind.text in values and values[kind.text] >= limit) for kind in kinds]


def by_part_of_speech(nlp: Callable[[str], Iterable[Any]], sentences: Iterable[str]) -> Classifier:
    """A classifier by the part of speech that a tagger gives a word most often in a corpus.

    Args:
        nlp: A spaCy pipeline, or anything that gives, for a text, tokens with `text` and `pos_` (universal
            tags).
        sentences: The corpus.
    """
    tags: dict[str, Counter[str]] = defaultdict(Counter)
    for sentence in sentences:
        for token in nlp(sentence):
            tags[token.text.lower()][token.pos_] += 1
    closed = {word for word, counts in tags.items() if counts.most_common(1)[0][0] in CLOSED_CLASS}
    return lambda kinds: [_by_text(kind, kind.text in closed) for kind in kinds]


def classify(kinds: Sequence[Kind], how: str | Classifier | Mapping[str, str]) -> np.ndarray:
    """Number of the class of each type, an index into `CLASSES`.

    Args:
        kinds: Types.
        how: "stopwords" or "frequency"; a function of the types; or a table from text to class, where what it
            does not hold is "other".

    Raises:
        InputError: A name is none of these.
    """
    if callable(how):
        names = list(how(kinds))
    elif isinstance(how, Mapping):
        names = ["special" if kind.special else how.get(kind.text, "other") for kind in kinds]
    elif how == "stopwords":
        names = stopwords(kinds)
    elif how == "frequency":
        names = by_frequency(kinds)
    else:
        raise InputError(
            "expected stopwords or frequency (for pos give by_part_of_speech(nlp, sentences))",
            field="classes",
            value=how,
        )
    unknown = sorted({name for name in names if name not in CLASSES})
    if unknown or len(names) != len(kinds):
        raise InputError(f"expected one of {', '.join(CLASSES)} a type", field="classes", value=unknown)
    return np.array([CLASSES.index(name) for name in names], dtype=np.int64)


def _by_text(kind: Kind, functional: bool) -> str:
    if kind.special:
        return "special"
    if _is_punctuation(kind.text):
        return "functional"
    if not kind.whole:
        return "subword"
    if functional:
        return "functional"
    return "semantic" if kind.text.replace("'", "").replace("’", "").isalpha() else "other"


def _is_word(kind: Kind) -> bool:
    return kind.whole and not kind.special and kind.text.isalpha()


def _is_punctuation(text: str) -> bool:
    return bool(text) and all(unicodedata.category(sign)[0] in "PS" for sign in text)


@functools.cache
def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    # Words with an apostrophe, which the list holds without: a tokenizer may keep them whole.
    contracted = {
        f"{word}{mark}{end}" for word in ENGLISH_STOP_WORDS for mark in "'’" for end in ("s", "t", "re")
    }
    return frozenset(ENGLISH_STOP_WORDS | contracted | {"s", "t", "re", "ve", "ll", "d", "m"})
