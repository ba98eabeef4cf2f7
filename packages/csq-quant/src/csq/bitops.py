"""Multiplications of a forward pass, and what they cost in bit operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from csq.parametrization import is_transposed_linear, unwrap
from csq.size_report import report


@dataclass(frozen=True)
class BitOperations:
    """Multiply-accumulates by layer, with the bits of both factors."""

    layers: dict[str, tuple[int, int, int]]
    """Layer name -> multiply-accumulates, weight bits (paper), activation bits."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all quantized layers."""
        return sum(macs for macs, _, _ in self.layers.values())

    @property
    def total(self) -> int:
        """Σ MACs · weight bits · activation bits."""
        return sum(macs * w * a for macs, w, a in self.layers.values())


@torch.no_grad()
def bit_operations(
    model: nn.Module, sample: Tensor | Mapping[str, Any], activation_bits: int | Mapping[str, int] = 32
) -> BitOperations:
    """Count the multiply-accumulates of one forward pass, layer by layer, by running it.

    Weights count with their paper bits (selected planes), as in the paper's tables. Embeddings are looked up,
    not multiplied, and count nothing. A layer that runs several times counts each time. Products without a
    weight (attention's scores) and packed attention weights have no layer of their own and are not counted.

    Args:
        model: parametrized, hardened or loaded.
        sample: one input with its batch axis, or the keyword arguments of forward; divide by its batch.
        activation_bits: of the input of each layer; or by layer name, 32 where a name is missing.
    """
    plain = unwrap(model)
    bits = {key.rpartition(".")[0]: layer.bits for layer in report(model).layers for key in layer.tensors}
    bits = {name.removesuffix(".parametrizations.weight"): value for name, value in bits.items()}
    counted: dict[str, int] = {}
    handles = [
        module.register_forward_hook(_counter(name, counted))
        for name, module in plain.named_modules()
        if name in bits and not isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.MultiheadAttention)
    ]
    training = {module: module.training for module in plain.modules()}
    plain.eval()
    try:
        plain(**sample) if isinstance(sample, Mapping) else plain(sample)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    of_layer = (
        (lambda name: activation_bits.get(name, 32))
        if isinstance(activation_bits, Mapping)
        else lambda name: activation_bits
    )
    return BitOperations({name: (macs, bits[name], of_layer(name)) for name, macs in counted.items()})


def _counter(name: str, counted: dict[str, int]) -> Callable[[nn.Module, Any, Any], None]:
    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight: Any = module.weight
        transposed = getattr(module, "transposed", False)
        if is_transposed_linear(module):  # weight (in, out)
            macs = output.numel() * weight.shape[0]
        elif transposed:  # each input value meets (out channels / groups · kernel) weights
            macs = inputs[0].numel() * weight[0].numel()
        else:  # each output value is a sum over (in channels / groups · kernel) weights
            macs = output.numel() * weight[0].numel()
        counted[name] = counted.get(name, 0) + macs

    return count
