"""Bits of each layer in three counts that are always given together: paper bits, stored bits, bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from csq.budget import top_run
from csq.parametrization import bit_layers, places, unwrap
from csq.storage import CODEBOOK_BITS, paper_bits, stored_form
from shared_core import InputError

STEP_BYTES = 4
"""What a layer's step takes in a file."""


@dataclass(frozen=True, eq=False)
class LayerReport:
    """One quantized weight: weight = step · codes."""

    name: str
    """The layer's name; with the tensor's name where that is not `weight`."""
    tensors: tuple[str, ...]
    """Its keys in the plain model's state dict: several where layers share the weight."""
    mask: tuple[bool, ...]
    """Selected planes, least significant first."""
    step: float
    """The weight of one unit of `codes`."""
    codes: Int[Tensor, "..."] = field(repr=False)
    """Whole numbers, int16, on the CPU, in units of the lowest selected plane."""
    dtype: torch.dtype = torch.float32
    """What the model's weight is rounded to."""

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return self.codes.numel()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.codes.shape)

    @property
    def mask_text(self) -> str:
        """The mask as it is read: most significant plane first."""
        return "".join("1" if on else "0" for on in reversed(self.mask))

    @property
    def bits(self) -> int:
        """Paper bits: selected planes."""
        return paper_bits(self.mask)

    @property
    def stored_bits(self) -> int:
        """Bits a weight takes in a file, the sign and gaps between planes included."""
        return self._form[0]

    @property
    def codebook_entries(self) -> int:
        """Values in the file's codebook, 16 bits each; 0 where weights are stored as plain numbers."""
        return self._form[1]

    @cached_property
    def _form(self) -> tuple[int, int]:
        width, _, codebook = stored_form(self.codes.numpy())
        return width, 0 if codebook is None else len(codebook)

    def weight(self) -> Float[Tensor, "..."]:
        """The weight in `dtype`, exactly as a hardened model has it."""
        return (self.codes.float() * self.step).to(self.dtype)


@dataclass(frozen=True)
class Report:
    """All quantized weights of a model."""

    layers: tuple[LayerReport, ...]
    float_parameters: int
    """Values of the state dict that stay in floating point: biases, normalisation, layers left out."""
    rest_bytes: int
    """Bytes that all that is not quantized takes in a file, each tensor once in its own dtype."""

    @property
    def weights(self) -> int:
        """Quantized weights, first and last layers and shortcuts included."""
        return sum(layer.weights for layer in self.layers)

    @property
    def average_bits(self) -> float:
        """Paper bits a weight, over weights."""
        return sum(layer.bits * layer.weights for layer in self.layers) / self.weights

    @property
    def average_bits_by_layer(self) -> float:
        """Paper bits with each layer counted alike, the official code's average."""
        return sum(layer.bits for layer in self.layers) / len(self.layers)

    @property
    def average_stored_bits(self) -> float:
        """Stored bits a weight, over weights."""
        return self.stored_bits / self.weights

    @property
    def stored_bits(self) -> int:
        """Bits that all quantized weights take in a file, codebooks included."""
        return sum(
            layer.stored_bits * layer.weights + CODEBOOK_BITS * layer.codebook_entries
            for layer in self.layers
        )

    @property
    def compression(self) -> float:
        """32 bits over stored bits, for the quantized weights."""
        return 32 * self.weights / max(1, self.stored_bits)

    @property
    def paper_compression(self) -> float:
        """32 bits over paper bits, as the paper counts."""
        return 32 / max(self.average_bits, 1e-12)

    @property
    def expected_bytes(self) -> int:
        """What a file takes without its header: streams in whole bytes, codebooks, steps, masks, the rest."""
        streams = sum(-(-layer.stored_bits * layer.weights // 8) for layer in self.layers)
        codebooks = sum(CODEBOOK_BITS // 8 * layer.codebook_entries for layer in self.layers)
        scales = sum(STEP_BYTES + len(layer.mask) for layer in self.layers)
        return streams + codebooks + scales + self.rest_bytes

    def rows(self) -> list[dict[str, Any]]:
        """A row a layer in plain values; `mask` is text, most significant plane first."""
        return [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "weights": layer.weights,
                "mask": layer.mask_text,
                "bits": layer.bits,
                "stored_bits": layer.stored_bits,
                "step": layer.step,
            }
            for layer in self.layers
        ]

    def totals(self) -> dict[str, int | float]:
        """The three counts, with what they are made of."""
        return {
            "weights": self.weights,
            "average_bits": self.average_bits,
            "average_bits_by_layer": self.average_bits_by_layer,
            "average_stored_bits": self.average_stored_bits,
            "compression": self.compression,
            "paper_compression": self.paper_compression,
            "float_parameters": self.float_parameters,
            "expected_bytes": self.expected_bytes,
        }


REPORT_ATTRIBUTE = "_csq_report"


def report(model: nn.Module) -> Report:
    """The scheme of a parametrized model as it stands, or of a hardened or loaded one.

    Raises:
        InputError: the model is neither.
    """
    kept = getattr(unwrap(model), REPORT_ATTRIBUTE, None)
    if not bit_layers(model):
        if not isinstance(kept, Report):
            raise InputError("expected a model of csq.parametrize, csq.harden or csq.load", field="model")
        # The rest as it is now: it may have been cast since.
        return Report(kept.layers, *rest_of_model(model, kept.layers))
    return Report(tuple(hard_layers(model)), *rest_of_model(model))


def check_unchanged(model: nn.Module) -> None:
    """Check that a hardened or loaded model still has the weights that its report describes.

    Raises:
        InputError: one is another; names it.
    """
    state = unwrap(model).state_dict()
    for layer in report(model).layers:
        for key in layer.tensors:
            weight = state.get(key)
            if weight is None or not torch.equal(weight.cpu(), layer.weight().to(weight.dtype)):
                raise InputError(
                    "its weight is no longer the quantized one; train the soft model and harden again",
                    field=key,
                )


def hard_layers(model: nn.Module, contiguous: bool = False) -> Iterator[LayerReport]:
    """Each weight of a parametrized model with all gates 1[m >= 0], in units of its lowest selected plane."""
    keys: dict[int, list[str]] = {}
    for module_name, _, tensor_name, planes in places(model):
        keys.setdefault(id(planes), []).append(f"{module_name}.{tensor_name}" if module_name else tensor_name)
    for name, planes in bit_layers(model).items():
        selected = planes.selected().cpu()
        selected = top_run(selected) if contiguous else selected
        low = int(selected.nonzero().min()) if bool(selected.any()) else 0
        codes = (
            planes.codes(selected.to(planes.mask.device)).cpu() >> low
        )  # exact: all are multiples of 2^low
        step = planes.step_size() * 2**low
        mask = tuple(map(bool, selected.tolist()))
        yield LayerReport(name, tuple(keys[id(planes)]), mask, step, codes, planes.dtype)


def rest_of_model(model: nn.Module, layers: Iterable[LayerReport] = ()) -> tuple[int, int]:
    """As `rest_of_file`, of all that is neither bit planes nor a weight of these layers; each tensor once."""
    planes = {
        id(tensor) for each in bit_layers(model).values() for tensor in (*each.parameters(), *each.buffers())
    }
    quantized = {key for layer in layers for key in layer.tensors}
    state = unwrap(model).state_dict(keep_vars=True)
    tensors = {id(t): t for key, t in state.items() if isinstance(t, Tensor) and key not in quantized}
    return rest_of_file(t for key, t in tensors.items() if key not in planes)


def rest_of_file(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Number of floating-point values, and bytes, of tensors that a file holds as they are."""
    kept = list(tensors)
    floats = sum(t.numel() for t in kept if t.is_floating_point())
    return floats, sum(t.numel() * t.element_size() for t in kept)
