"""Exact search by inner product, block by block over any number of passages; faiss where speed is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int

from lead_kd.embeddings import Embeddings
from shared_core import InputError
from shared_core.errors import needs_extra
from shared_core.files import atomic_path

Run = dict[str, dict[str, float]]
"""Query id -> passage id -> score."""


@dataclass(frozen=True)
class Found:
    """The best passages of each query, best first; fewer than asked for where there are fewer passages."""

    rows: Int[np.ndarray, "queries k"]
    scores: Float[np.ndarray, "queries k"]

    def as_run(self, queries: Sequence[str], ids: Sequence[str]) -> Run:
        """Put ids in the place of rows."""
        return {
            query: {ids[int(row)]: float(score) for row, score in zip(rows, scores, strict=True)}
            for query, rows, scores in zip(queries, self.rows, self.scores, strict=True)
        }


def search(
    queries: Float[np.ndarray, "queries dim"],
    passages: Embeddings | Float[np.ndarray, "passages _"],
    k: int = 100,
    *,
    block: int = 65_536,
    query_block: int = 1024,
    device: str = "cpu",
) -> Found:
    """Find the k passages with the largest inner products, exactly.

    Passages are read in blocks, so that neither they nor all scores have to fit into memory. Which of several
    passages with the k-th best score is kept is not defined; `write_run` orders equal scores.

    Args:
        queries: Vectors.
        passages: Vectors, memory-mapped or in memory.
        k: Passages a query.
        block: Passages at a time.
        query_block: Queries at a time.
        device: Where products are computed.

    Raises:
        InputError: Widths differ, k is below 1, there is nothing to search, or a vector is not finite.
    """
    count = len(passages)
    if k < 1:
        raise InputError("expected at least 1", field="k", value=k)
    if count == 0 or len(queries) == 0:
        raise InputError("expected at least one query and one passage", value=(len(queries), count))
    if not np.isfinite(queries).all():
        raise InputError("expected finite query vectors", field="queries")
    k = min(k, count)
    sides = torch.from_numpy(np.ascontiguousarray(queries, np.float32)).to(device).split(query_block)
    best: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(sides)
    for start, part in _blocks(passages, block):
        if part.shape[1] != queries.shape[1]:
            raise InputError(
                f"expected vectors of width {queries.shape[1]}, the queries'",
                field="passages",
                value=part.shape[1],
            )
        if not np.isfinite(part).all():
            raise InputError(f"a vector from row {start} on is no number", field="passages")
        columns = torch.from_numpy(part).to(device).T
        for number, side in enumerate(sides):
            best[number] = _merge(best[number], side @ columns, start, k)
    rows = torch.cat([found[1] for found in best if found is not None]).cpu().numpy()
    scores = torch.cat([found[0] for found in best if found is not None]).cpu().numpy()
    return Found(rows, scores)


def _merge(
    best: tuple[torch.Tensor, torch.Tensor] | None, scores: torch.Tensor, start: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    top, places = scores.topk(min(k, scores.shape[1]), 1)
    rows = places + start
    if best is None:
        return top, rows
    joined, joined_rows = torch.cat([best[0], top], 1), torch.cat([best[1], rows], 1)
    top, places = joined.topk(min(k, joined.shape[1]), 1)
    return top, joined_rows.gather(1, places)


def _blocks(passages: Embeddings | np.ndarray, rows: int) -> Iterable[tuple[int, np.ndarray]]:
    if isinstance(passages, Embeddings):
        return passages.blocks(rows)
    return (
        (start, np.ascontiguousarray(passages[start : start + rows], np.float32))
        for start in range(0, len(passages), rows)
    )


def search_faiss(
    queries: Float[np.ndarray, "queries dim"],
    passages: Embeddings,
    k: int = 100,
    factory: str = "Flat",
    block: int = 65_536,
    nprobe: int | None = None,
    train_on: int = 262_144,
) -> Found:
    """Search a faiss index by inner product.

    Args:
        queries: Vectors.
        passages: Vectors.
        k: Passages a query.
        factory: Any index of faiss' factory, such as "Flat", "IVF4096,Flat" or "HNSW32".
        block: Passages at a time.
        nprobe: Lists of an IVF index that are searched; faiss' own 1 where None.
        train_on: Passages, drawn at random, on which an index that has to be trained is trained.

    Raises:
        InputError: faiss is not installed, does not know the factory's words, has no lists to probe, or finds
            fewer than k.
    """
    with needs_extra("faiss", "lead-kd"):
        import faiss
    try:
        index = faiss.index_factory(queries.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if nprobe is not None:
            faiss.ParameterSpace().set_index_parameter(index, "nprobe", nprobe)
        if not index.is_trained:
            count = min(train_on, len(passages))
            chosen = np.random.default_rng(0).choice(len(passages), count, replace=False)
            index.train(passages.rows(np.sort(chosen)))
        for _, part in passages.blocks(block):
            index.add(part)
    except RuntimeError as error:
        raise InputError(
            f"faiss refuses this index ({str(error).splitlines()[-1]})", field="factory", value=factory
        ) from error
    scores, rows = index.search(np.ascontiguousarray(queries, np.float32), min(k, len(passages)))
    if (rows < 0).any():
        raise InputError(
            f"finds fewer than {k} passages; search more lists (nprobe)", field="factory", value=factory
        )
    return Found(rows, scores)


def write_run(path: str | Path, run: Mapping[str, Mapping[str, float]], tag: str = "lead-kd") -> None:
    """Write a run as trec_eval reads it, in trec_eval's own order: by score, equal scores by descending id.

    Raises:
        InputError: An id has blanks, or the folder is missing or cannot be written to.
    """
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for query, scores in run.items():
            ordered = sorted(scores.items(), key=lambda pair: (pair[1], pair[0]), reverse=True)
            if wrong := next((word for word in (query, *scores) if len(word.split()) != 1), None):
                raise InputError("a run cannot hold an id with blanks", file=path, field="id", value=wrong)
            for rank, (name, score) in enumerate(ordered, 1):
                file.write(f"{query} Q0 {name} {rank} {score!r} {tag}\n")


def read_run(path: str | Path) -> Run:
    """Read a run: query, Q0, passage, rank, score, tag.

    Raises:
        InputError: A line is malformed, or names a passage twice for a query.
    """
    path = Path(path)
    run: Run = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            parts = line.split()
            try:
                query, _, name, _, score, _ = parts
                value = float(score)
            except ValueError:
                raise InputError(
                    f"line {number}: expected query, Q0, passage, rank, score and tag", file=path
                ) from None
            if name in run.setdefault(query, {}):
                raise InputError(
                    f"line {number}: query {query} has this passage twice", file=path, value=name
                )
            run[query][name] = value
    if not run:
        raise InputError("is empty", file=path)
    return run
