"""Which queries, positives and negatives each step has: decided by seed and step alone.

Nothing about data has to be kept in a checkpoint, and processes agree without talking to each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from lead_kd.corpus import RetrievalData
from shared_core import InputError

_ORDER, _EXAMPLE = 0, 1  # purposes that random numbers are drawn for


@dataclass(frozen=True)
class Group:
    """The texts of one process in one step; passages in the order [q1+, q1-1, ..., q2+, ...].

    Attributes:
        queries: Texts.
        passages: Texts, 1 + m a query.
        passage_ids: Rows of the corpus.
        positive_ids: Rows of all passages that are relevant for a query, filled up with -1.
    """

    queries: list[str]
    passages: list[str]
    passage_ids: Int[np.ndarray, " passages"]
    positive_ids: Int[np.ndarray, "queries most_positives"]


class Sampler:
    """Draws the groups of a training run.

    Each epoch is a new order of the queries and a new choice of hard negatives; the queries that fill no step
    at its end are left out. Where a query has fewer hard negatives than are wanted, passages drawn at random
    stand in.

    Args:
        data: What to train on; queries without a positive are left out.
        batch_size: Queries a process and step.
        negatives: Hard negatives a query, m.
        seed: Of all draws.
        shuffle_positives: Draw the positive; else the first one is taken, as in the official scripts.
        processes: Processes that share a step.

    Attributes:
        queries: Ids of the queries that are trained on.
        without_positive: Queries that were left out.
        filled: Queries that have fewer hard negatives than are wanted.

    Raises:
        InputError: Too few queries have a positive, or the corpus is too small to draw negatives from.
    """

    def __init__(
        self,
        data: RetrievalData,
        batch_size: int,
        negatives: int = 1,
        seed: int = 0,
        *,
        shuffle_positives: bool = False,
        processes: int = 1,
    ) -> None:
        for name, value, least in (("batch size", batch_size, 1), ("negatives", negatives, 0)):
            if value < least:
                raise InputError(f"expected at least {least}", field=name, value=value)
        self.data, self.batch_size, self.negatives, self.seed = data, batch_size, negatives, seed
        self.shuffle_positives, self.processes = shuffle_positives, processes
        self.queries = list(data.judged())
        self.without_positive = len(data.queries) - len(self.queries)
        if len(self.queries) < batch_size * processes:
            raise InputError(
                f"expected at least the {batch_size * processes} queries of a step to have a positive",
                file=data.corpus.source,
                field="queries",
                value=len(self.queries),
            )
        if batch_size * processes * (1 + negatives) < 2:
            raise InputError(
                "one query without negatives has nothing to be told from", field="negatives", value=negatives
            )
        self._positives = [self._rows(data.positives(query)) for query in self.queries]
        self._hard = [self._rows(data.negatives.get(query, [])) for query in self.queries]
        self.filled = sum(len(rows) < negatives for rows in self._hard)
        most = max(map(len, self._positives))
        if self.filled and len(data.corpus) < most + negatives:
            raise InputError(
                "is too small to draw negatives from", file=data.corpus.source, value=len(data.corpus)
            )
        self._steps_an_epoch = len(self.queries) // (batch_size * processes)

    def fingerprint(self) -> str:
        """Return a hash of what is trained on: queries, positives, hard negatives, and some of the texts."""
        found = hashlib.blake2b(self.data.corpus.fingerprint().encode(), digest_size=16)
        for query, *rows in zip(self.queries, self._positives, self._hard, strict=True):
            found.update(f"{query}\0{self.data.queries[query]}\0{[list(part) for part in rows]}".encode())
        return found.hexdigest()

    def group(self, step: int, process: int = 0) -> Group:
        """Return the texts of a step, counted from 0, for one process."""
        epoch, position = divmod(step, self._steps_an_epoch)
        order = _random(self.seed, _ORDER, epoch).permutation(len(self.queries))
        start = (position * self.processes + process) * self.batch_size
        chosen = order[start : start + self.batch_size]
        rows = [row for number in chosen for row in self._example(int(number), epoch)]
        most = max(len(self._positives[number]) for number in chosen)
        positives = np.full((len(chosen), most), -1, np.int64)
        for line, number in enumerate(chosen):
            positives[line, : len(self._positives[number])] = self._positives[number]
        return Group(
            [self.data.queries[self.queries[number]] for number in chosen],
            [self.data.corpus[row] for row in rows],
            np.array(rows, np.int64),
            positives,
        )

    def _example(self, number: int, epoch: int) -> list[int]:
        """Rows of a query's positive and negatives in one epoch."""
        random = _random(self.seed, _EXAMPLE, epoch, number)
        positives, hard = self._positives[number], self._hard[number]
        positive = positives[int(random.integers(len(positives)))] if self.shuffle_positives else positives[0]
        chosen = [int(hard[place]) for place in random.permutation(len(hard))[: self.negatives]]
        taken = {*positives.tolist(), *chosen}
        while len(chosen) < self.negatives:
            row = int(random.integers(len(self.data.corpus)))
            if row not in taken:
                taken.add(row)
                chosen.append(row)
        return [int(positive), *chosen]

    def _rows(self, names: Sequence[str]) -> Int[np.ndarray, " rows"]:
        found = [self.data.corpus.row(name) for name in names]
        return np.array([row for row in found if row is not None], np.int64)


def _random(*words: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(list(words)))
