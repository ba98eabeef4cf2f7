"""Hard negatives: passages that a retriever puts first and that are not relevant."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lead_kd.corpus import Corpus, RetrievalData
from lead_kd.search import Found
from shared_core import InputError
from shared_core.errors import needs_extra
from shared_core.files import atomic_path


def hard_negatives(
    data: RetrievalData,
    queries: Sequence[str],
    found: Found,
    ids: Sequence[str],
    count: int = 100,
    skip: int = 0,
) -> dict[str, list[str]]:
    """Take the best passages that are not relevant.

    Args:
        data: Tells what is relevant; any judged positive is dropped.
        queries: Ids, in the order of `found`.
        found: The best passages of each query.
        ids: Passage ids by row.
        count: Negatives a query, at most.
        skip: Passages from the top that are passed over, since the very best may be unjudged positives.

    Returns:
        Query id -> passage ids, best first.
    """
    negatives: dict[str, list[str]] = {}
    for query, rows in zip(queries, found.rows, strict=True):
        relevant = set(data.positives(query))
        names = [ids[int(row)] for row in rows[skip:]]
        negatives[query] = [name for name in names if name not in relevant][:count]
    return negatives


def bm25(corpus: Corpus, queries: Sequence[str], k: int = 100) -> Found:
    """Search by BM25 (Lucene's form, k1 = 1.5, b = 0.75), through bm25s.

    Args:
        corpus: The passages.
        queries: Texts.
        k: Passages a query.

    Raises:
        InputError: bm25s is not installed.
    """
    with needs_extra("bm25", "lead-kd"):
        import bm25s
    texts = [corpus[row] for row in range(len(corpus))]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(list(queries), stopwords="en", show_progress=False)
    rows, scores = index.retrieve(tokens, k=min(k, len(corpus)), show_progress=False)
    return Found(np.asarray(rows, np.int64), np.asarray(scores, np.float32))


def write_negatives(path: str | Path, negatives: Mapping[str, Sequence[str]]) -> None:
    """Write negatives, one query a line, as `lead_kd.readers.read_negatives` reads them.

    Raises:
        InputError: There is none, or the folder is missing or cannot be written to.
    """
    if not any(negatives.values()):
        raise InputError("no query has a negative", field="negatives", value=0)
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for query, names in negatives.items():
            if names:
                file.write(json.dumps({"query_id": query, "negatives": list(names)}) + "\n")
