"""Documents with three topics each, made of real paragraphs: what the proof trains and tests on.

The text is that of the 250 papers in the package `aclsum`. A document joins the beginnings of three
paragraphs from three different papers; its generic summary is the lead of one of them, chosen by chance. A
summarizer trained on such pairs is fluent, extractive and uncontrolled: nothing in the source says which
passage the summary is to be about. Control words name one passage, and how well a method makes the summary be
about that passage can be counted.

The vocabulary is small, so that a small model learns it. Words outside it become one unknown token, which
never counts as a match, neither in a metric nor in the choice of control words.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from shared_core import wheels

SEPARATOR = "|"
UNKNOWN = "<oov>"

PASSAGE_WORDS = 12
LEAD_WORDS = 6
PASSAGES = 3
CONTROL_WORDS = 2
# Frequent words say nothing about a passage: control words stand behind these in the vocabulary.
FUNCTION_WORDS = 100

Where = Literal["anywhere", "outside the lead"]


@dataclass(frozen=True)
class TopicDocument:
    """A document of three passages, and a control that names one of them.

    Attributes:
        id: Its name.
        passages: Words of each passage; words outside the vocabulary are the unknown token.
        target: Which passage the control is about.
        control: Words that stand in the target passage and in no other.
    """

    id: str
    passages: tuple[tuple[str, ...], ...]
    target: int
    control: tuple[str, ...]

    @property
    def text(self) -> str:
        """The source: passages with a separator between them."""
        return f" {SEPARATOR} ".join(" ".join(passage) for passage in self.passages)

    @property
    def leads(self) -> tuple[str, ...]:
        """The lead of each passage: what a summary about that passage should say."""
        return tuple(" ".join(passage[:LEAD_WORDS]) for passage in self.passages)


@dataclass(frozen=True)
class Papers:
    """Paragraphs of papers as words, by paper.

    Attributes:
        train: Papers that the summarizer learns from.
        validation: Papers on which settings are chosen.
        test: Papers on which methods are compared.
        vocabulary: Known words, most frequent of the training papers first.
    """

    train: tuple[tuple[tuple[str, ...], ...], ...]
    validation: tuple[tuple[tuple[str, ...], ...], ...]
    test: tuple[tuple[tuple[str, ...], ...], ...]
    vocabulary: tuple[str, ...]


def words_of(text: str) -> list[str]:
    """Words in small letters, and numbers; all else separates.

    >>> words_of("The F1-score rose by 2.5 points.")
    ['the', 'f1', 'score', 'rose', 'by', '2.5', 'points']
    """
    return re.findall(r"[a-z0-9]+(?:[.'][a-z0-9]+)*", text.lower())


def _paragraphs() -> list[list[list[str]]]:
    """Each paper's body paragraphs of at least a passage's length, as words; papers by name."""
    papers = []
    for member in wheels.member_names("aclsum", "aclsum/dataset/paper_jsons/"):
        body = json.loads(wheels.member_bytes("aclsum", member))["pdf_parse"]["body_text"]
        words = [words_of(paragraph["text"]) for paragraph in body]
        papers.append([found for found in words if len(found) >= PASSAGE_WORDS])
    return [paper for paper in papers if paper]


@cache
def load_papers(vocabulary_size: int = 1200, split_seed: int = 2024) -> Papers:
    """Read the papers, and split them by paper: 70 % train, 10 % validation, 20 % test.

    Args:
        vocabulary_size: Known words: the most frequent ones in beginnings of training paragraphs.
        split_seed: Which paper goes where.

    Raises:
        InputError: The package aclsum is not installed.
    """
    papers = _paragraphs()
    order = np.random.default_rng(split_seed).permutation(len(papers))
    first, second = round(0.7 * len(papers)), round(0.8 * len(papers))
    parts = [[papers[i] for i in part] for part in (order[:first], order[first:second], order[second:])]
    counts = Counter(word for paper in parts[0] for words in paper for word in words[:PASSAGE_WORDS])
    vocabulary = tuple(sorted(counts, key=lambda word: (-counts[word], word))[:vocabulary_size])
    known = set(vocabulary)
    cut = [
        tuple(
            tuple(
                tuple(word if word in known else UNKNOWN for word in words[:PASSAGE_WORDS]) for words in paper
            )
            for paper in part
        )
        for part in parts
    ]
    return Papers(*cut, vocabulary=vocabulary)


def draw_passages(
    papers: Sequence[Sequence[Sequence[str]]], generator: np.random.Generator
) -> tuple[tuple[str, ...], ...]:
    """Three passages from three different papers."""
    chosen = generator.choice(len(papers), PASSAGES, replace=False)
    return tuple(tuple(papers[i][int(generator.integers(len(papers[i])))]) for i in map(int, chosen))


def control_words(
    passages: Sequence[Sequence[str]], target: int, rank: dict[str, int], where: Where = "anywhere"
) -> tuple[str, ...]:
    """The rarest known content words of the target passage that no other passage has, up to CONTROL_WORDS.

    Args:
        passages: The document.
        target: Which passage.
        rank: Each known word's place in the vocabulary, 0 the most frequent.
        where: "outside the lead" takes only words that the summary about the passage does not hold.
    """
    others = {word for number, passage in enumerate(passages) if number != target for word in passage}
    lead = set(passages[target][:LEAD_WORDS])
    candidates = [
        word
        for word in dict.fromkeys(passages[target])
        if rank.get(word, -1) >= FUNCTION_WORDS and word not in others
        if where == "anywhere" or word not in lead
    ]
    return tuple(sorted(candidates, key=lambda word: -rank[word])[:CONTROL_WORDS])


def topic_documents(
    papers: Sequence[Sequence[Sequence[str]]],
    vocabulary: Sequence[str],
    generator: np.random.Generator,
    name: str,
    where: Where = "anywhere",
) -> Iterator[TopicDocument]:
    """Documents without end, each with a target passage drawn by chance and its control words."""
    rank = {word: number for number, word in enumerate(vocabulary)}
    number = 0
    while True:
        passages = draw_passages(papers, generator)
        target = int(generator.integers(PASSAGES))
        control = control_words(passages, target, rank, where)
        if len(control) == CONTROL_WORDS:
            yield TopicDocument(f"{name}-{number}", passages, target, control)
            number += 1
