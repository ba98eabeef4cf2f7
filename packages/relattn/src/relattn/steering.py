"""Steering at decoding speed: cross-attention mixed with the relevance, without touching its kernel.

The method mixes probabilities, in every decoder layer, head and step:

    A'_tj = (1 - w) A_tj + w a_rel_j

a_rel does not depend on the query and the value projection is affine, so with rows that sum to 1

    A' V = (1 - w) A V + w c,    c = W_v r + b_v,    r = sum_j a_rel_j h_j        (h: encoder states)

which is one interpolation of what enters the output projection with one constant vector per document and
layer. A forward pre-hook on that projection does it: under any attention implementation, with a KV cache,
with weights per document, layer and head. In training with attention dropout it mixes after the dropout where
the formula mixes before; `relattn.reference` follows the formula there.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relattn.families import CrossAttention
from shared_core import InputError

_steered: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_lock = threading.Lock()


def relevant_context(
    relevance: Float[Tensor, "batch tokens"], states: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "batch width"]:
    """The relevant context r = sum_j a_rel_j h_j, in float32 whatever the states are in.

    Args:
        relevance: a_rel, 0 at pads.
        states: Encoder states as the decoder sees them. Pads may hold anything that is finite.
    """
    return torch.einsum("bn,bnd->bd", relevance.float(), states.float())


def context_vectors(
    layers: Sequence[CrossAttention], context: Float[Tensor, "batch width"], dtype: torch.dtype
) -> list[Float[Tensor, "batch inner"]]:
    """Vector c of each layer: r through its value projection, as wide as its output projection's input.

    Args:
        layers: The cross-attentions.
        context: r.
        dtype: The model's.
    """
    return [_as_wide_as_heads(layer.value(context.to(dtype)), layer) for layer in layers]


def _as_wide_as_heads(
    values: Float[Tensor, "batch kv"], layer: CrossAttention
) -> Float[Tensor, "batch inner"]:
    # Heads in groups share a value head (grouped-query attention): each group's vector once per head.
    groups = getattr(layer.attention, "num_key_value_groups", 1)
    if groups == 1:
        return values
    return values.unflatten(1, (layer.heads // groups, -1)).repeat_interleave(groups, dim=1).flatten(1)


def check_weight(weight: Float[Tensor, "rows layers heads"]) -> None:
    """Raise InputError unless every steering weight is a number from 0 to 1."""
    bad = ~((weight >= 0) & (weight <= 1))
    if bad.any():
        raise InputError("expected numbers from 0 to 1", field="weight", value=weight[bad][0].item())


@contextmanager
def steered(
    layers: Sequence[CrossAttention],
    contexts: Sequence[Float[Tensor, "batch inner"]],
    weight: Float[Tensor, "rows layers heads"],
) -> Iterator[None]:
    """Inside the block the model's cross-attention is mixed with the relevance that made the context vectors.

    Forward passes may have any multiple of `batch` rows, each document's rows next to one another, as beam
    search and sampling make them. Rows of weight 0 are left as they are, bit for bit. When the block ends,
    also by an exception, no hook is left. A backward pass belongs inside if it recomputes activations
    (gradient checkpointing).

    Args:
        layers: The decoder's cross-attentions.
        contexts: c of each layer.
        weight: w, from 0 to 1; `rows` is `batch`, or 1 for the same weight in all documents.

    Raises:
        InputError: A weight is not in [0, 1], or the model is being steered already.
    """
    check_weight(weight.detach())
    hooks = [_hook(layer, c, weight[:, n]) for n, (layer, c) in enumerate(zip(layers, contexts, strict=True))]
    outputs = [layer.output for layer in layers]
    with exclusive(outputs):
        handles = []
        try:
            for output, hook in zip(outputs, hooks, strict=True):
                handles += [output.register_forward_pre_hook(hook)] if hook is not None else []
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def exclusive(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Hold the modules for one steering at a time.

    Raises:
        InputError: One of them is held: the model is being steered already, here or in another thread.
    """
    with _lock:
        if any(module in _steered for module in modules):
            raise InputError(
                "is being steered already: leave that block first, one steering at a time", field="model"
            )
        _steered.update(modules)
    try:
        yield
    finally:
        with _lock:
            _steered.difference_update(modules)


def _hook(
    layer: CrossAttention, context: Float[Tensor, "batch inner"], weight: Float[Tensor, "rows heads"]
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None] | None:
    """The pre-hook of one layer, or None where no row is steered."""
    batch = len(context)
    row_is_steered = (weight.detach() > 0).any(1).expand(batch)
    if not row_is_steered.any():
        return None
    channels = context.shape[1] // weight.shape[1]
    per_channel = weight.repeat_interleave(channels, dim=1).expand(batch, -1)
    keep_some = not bool(row_is_steered.all())
    expanded: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor]] = {}
    owner = threading.get_ident()

    def for_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.shape[layer.batch_dim]
        key = (rows, x.dtype, x.device)
        if key not in expanded:
            if rows % batch:
                raise InputError(
                    f"expected a multiple of {batch} rows, one document's side by side, got {rows}"
                )
            tiled = (t.repeat_interleave(rows // batch, dim=0).unsqueeze(1 - layer.batch_dim).to(x.device)
                     for t in (context, per_channel, row_is_steered[:, None]))  # fmt: skip
            c, w, steer = tiled
            expanded[key] = c.to(x.dtype), w.to(x.dtype), steer
        return expanded[key]

    def mix(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if threading.get_ident() != owner and not torch.is_grad_enabled():
            raise RuntimeError("this model is being steered in another thread: wait for it, or use a copy")
        x, *rest = inputs
        c, w, steer = for_rows(x)
        mixed = torch.lerp(x, c.expand_as(x), w.expand_as(x))
        return (torch.where(steer, mixed, x) if keep_some else mixed, *rest)

    return mix
