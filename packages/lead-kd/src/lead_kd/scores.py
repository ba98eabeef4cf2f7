"""Scores of queries against candidates from features of layers, and gathering over processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lead_kd.losses import log_distribution
from shared_core import InputError

Gather = Callable[[Tensor], Tensor]
"""Joins a tensor's first dimension over processes, and keeps its gradient."""

MAXSIM_BUDGET = 64 * 2**20
"""Bytes that token-by-token similarities may take at a time."""


@dataclass(frozen=True)
class Scores:
    """What a model says of a step's queries and candidates.

    Attributes:
        layers: Scores from each layer.
        final: The scores that the model would rank by.
        vectors: The features that they come from, of queries and of passages, where a text has one a layer.
    """

    layers: Float[Tensor, "layers queries passages"]
    final: Float[Tensor, "queries passages"]
    vectors: tuple[Float[Tensor, "layers queries dim"], Float[Tensor, "layers passages dim"]] | None = None


def layer_scores(
    queries: Float[Tensor, "layers queries dim"], passages: Float[Tensor, "layers passages dim"]
) -> Float[Tensor, "layers queries passages"]:
    """Dot products of every query with every passage, layer by layer: s_l(q, p) = h_l(q) . h_l(p).

    They are computed in float32 or wider, also under autocast: raw products of [CLS] vectors are in the
    hundreds, where half precision has no fractions.
    """
    with full_precision(queries):
        return widened(queries) @ widened(passages).transpose(1, 2)


def widened(tensor: Tensor) -> Tensor:
    """Make half precision float32, and leave wider types."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def full_precision(tensor: Tensor) -> torch.autocast:
    """Leave autocast on the device of a tensor."""
    return torch.autocast(tensor.device.type, enabled=False)


def layer_distributions(
    queries: Float[Tensor, "layers queries dim"],
    passages: Float[Tensor, "layers passages dim"],
    *,
    temperature: float = 1.0,
    mask: Bool[Tensor, "queries passages"] | None = None,
) -> Float[Tensor, "layers queries passages"]:
    """Every layer's distribution over the candidate passages.

    Args:
        queries: One vector a layer and query.
        passages: One vector a layer and passage.
        temperature: Divides the scores.
        mask: True for what is a candidate.

    Returns:
        Probabilities that sum to 1 over passages.

    >>> import torch
    >>> layer_distributions(torch.ones(1, 1, 2), torch.zeros(1, 4, 2)).tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]
    """
    return log_distribution(layer_scores(queries, passages), mask, temperature).exp()


def maxsim(
    queries: Float[Tensor, "queries query_tokens dim"],
    passages: Float[Tensor, "passages passage_tokens dim"],
    query_mask: Bool[Tensor, "queries query_tokens"],
    passage_mask: Bool[Tensor, "passages passage_tokens"],
    budget: int = MAXSIM_BUDGET,
) -> Float[Tensor, "queries passages"]:
    """ColBERT's late interaction: s(q, p) = sum over query tokens of the best matching passage token.

    Args:
        queries: Token vectors.
        passages: Token vectors.
        query_mask: Which query tokens count; ColBERT's added [MASK] tokens do.
        passage_mask: Which passage tokens can be matched; at least one a passage.
        budget: Bytes that a block of token similarities may take; blocks are over passages.

    Raises:
        InputError: A passage has no token that can be matched.
    """
    if not passage_mask.any(1).all():
        raise InputError("expected at least one token in every passage", field="passages")
    queries, passages = widened(queries), widened(passages)
    count, tokens, _ = queries.shape
    a_passage = count * tokens * passages.shape[1] * queries.element_size()
    size = max(1, budget // max(a_passage, 1))
    lowest = torch.finfo(queries.dtype).min
    blocks = []
    for start in range(0, len(passages), size):
        block, counted = passages[start : start + size], passage_mask[start : start + size]
        with full_precision(queries):
            similar = torch.einsum("qid,pjd->qpij", queries, block)
        best = similar.masked_fill(~counted[None, :, None, :], lowest).amax(-1)
        blocks.append((best * query_mask[:, None, :]).sum(-1))
    return torch.cat(blocks, 1)


def only_here(tensor: Tensor) -> Tensor:
    """Gather of a single process."""
    return tensor


def gather_with_gradient(tensor: Float[Tensor, "rows ..."]) -> Float[Tensor, "all_rows ..."]:
    """Join a tensor's rows over all processes; every process has the same number of rows.

    Gradients flow back to each process's own rows from the losses of all. With the average that
    DistributedDataParallel makes, they are those of one process with all rows.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    return _Gather.apply(tensor)  # pyright: ignore[reportReturnType]


def gather_padded(tensor: Float[Tensor, "rows tokens ..."]) -> Float[Tensor, "all_rows most_tokens ..."]:
    """As `gather_with_gradient`, where processes differ in the second dimension: zeros fill it up."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    longest = torch.tensor(tensor.shape[1], device=tensor.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    missing = int(longest) - tensor.shape[1]
    padding = [0, 0] * (tensor.ndim - 2) + [0, missing]
    return gather_with_gradient(F.pad(tensor, padding))


def gather_plain(tensor: Tensor) -> Tensor:
    """Join rows of a tensor that has no gradient, such as ids."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """all_gather whose backward sums over processes what each of them wants of the others' rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: Tensor) -> Tensor:
        return gather_plain(tensor)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        import torch.distributed as dist

        total = grads[0].contiguous()
        dist.all_reduce(total)
        rows = len(total) // dist.get_world_size()
        return total[dist.get_rank() * rows : (dist.get_rank() + 1) * rows]
