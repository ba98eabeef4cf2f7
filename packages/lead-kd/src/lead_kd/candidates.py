"""Which passages of a step are candidates of which query.

All passages of a step are candidates of all its queries, but for what would teach a falsehood: another
positive of the same query, and a second copy of a passage.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Kind = Literal["query", "passage"]


def text_key(kind: Kind, text: str) -> int:
    """Return a 64-bit number that stands for a text."""
    digest = hashlib.blake2b(f"{kind}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def text_number(kind: Kind, text: str) -> int:
    """Return a number that a signed 64-bit tensor holds, from 0; copies of a text have the same."""
    return text_key(kind, text) >> 1


def candidate_mask(
    passage_ids: Int[Tensor, " passages"],
    positive_ids: Int[Tensor, "queries most_positives"],
    target: Int[Tensor, " queries"],
) -> Bool[Tensor, "queries passages"]:
    """Tell which passages are candidates of which query.

    A query's target always is. A passage that has the id of one of the query's positives is no candidate in
    another column; of copies of any other passage the first counts.

    Args:
        passage_ids: Numbers of the passages, not negative.
        positive_ids: Numbers of all passages that are relevant for a query, filled up with -1.
        target: Column of each query's positive.

    >>> ids = torch.tensor([7, 3, 9, 3, 8])
    >>> candidate_mask(ids, torch.tensor([[7, 8], [9, -1]]), torch.tensor([0, 2])).int().tolist()
    [[1, 1, 1, 0, 0], [1, 1, 1, 0, 1]]
    """
    equal = passage_ids[:, None] == passage_ids[None, :]
    repeated = equal.tril(-1).any(1)
    relevant = (passage_ids[None, :, None] == positive_ids[:, None, :]).any(-1)
    allowed = ~relevant & ~repeated[None, :]
    return allowed.scatter(1, target[:, None], True)


def own_block(
    queries: int, per_query: int, device: torch.device | None = None
) -> Int[Tensor, "queries per_query"]:
    """Return the columns of each query's own passages, its positive first."""
    return torch.arange(queries * per_query, device=device).view(queries, per_query)
