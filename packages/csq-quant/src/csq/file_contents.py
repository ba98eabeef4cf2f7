"""What a hardened file says, checked field by field before a model gets any of it.

Each field must be one that `csq.save` can have written, and a checksum over all of them tells damage that
leaves a possible value.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csq.activations import check_settings
from csq.size_report import LayerReport
from csq.storage import MAX_WIDTH, Packed, bits_for, reachable, unpack_codes
from shared_core import InputError

FORMAT = "csq"
VERSION = 3
CODES, CODEBOOK, STEPS, MASKS = "csq.codes/", "csq.codebook/", "csq.steps", "csq.masks"
"""Names of the file's own; the first two go before a layer's name."""
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""What weights may be rounded to."""
_ROW = ("name", "tensors", "shape", "width", "offset", "dtype")
_PARTS = ("version", "layers", "shared", "activations", "notes", "checksum")
HIGHEST = 255
"""The largest number that eight planes make."""


@dataclass(frozen=True)
class Contents:
    """A file, taken apart."""

    layers: tuple[LayerReport, ...]
    rest: dict[str, Tensor]
    """What is not quantized, by its key in the model's state dict."""
    shared: dict[str, str]
    """Further keys of tensors in `rest`."""
    activations: dict[str, dict[str, Any]]

    def state(self) -> dict[str, Tensor]:
        """The whole state dict of the plain model."""
        state = {key: weight for layer in self.layers for key, weight in _weights(layer)}
        state |= self.rest
        return state | {key: state[source] for key, source in self.shared.items()}


def _weights(layer: LayerReport) -> list[tuple[str, Tensor]]:
    weight = layer.weight()
    return [(key, weight) for key in layer.tensors]


def sealed(description: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The file's metadata: one entry, as safetensors writes several in no fixed order."""
    text = _text(description | {"checksum": checksum(description, tensors)})
    return {FORMAT: text}


def checksum(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of a description and of all tensors by name: type, shape, bytes."""
    found = zlib.crc32(_text(description).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def _text(description: Mapping[str, Any]) -> str:
    return json.dumps(description, separators=(",", ":"))


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the metadata says, of a file whose format this version reads.

    Raises:
        InputError: no such file, another format or version, or a description that `csq.save` does not write.
    """
    if not Path(path).is_file():
        raise InputError("there is no such file", file=path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"is no whole safetensors file: {error}", file=path) from error
    if FORMAT not in metadata:
        raise InputError("is no file of csq.save", file=path)
    try:
        description = json.loads(metadata[FORMAT])
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"is damaged: {error}", file=path) from error
    if not isinstance(description, dict):
        raise InputError("is damaged: its description is no object", file=path)
    version = description.get("version")
    if type(version) is not int or version != VERSION:
        raise InputError(
            f"expected format version {VERSION}; a newer csq-quant may read it",
            file=path,
            field="version",
            value=version,
        )
    try:
        _check_description(description)
    except InputError as error:
        raise InputError(f"is damaged: {error}", file=path) from error
    return description


def read_contents(path: str | os.PathLike[str], most: int) -> Contents:
    """Read and check a file.

    Args:
        path: a file of `csq.save`.
        most: the largest number of weights that a layer may have: zeros have no stream whose length would
            tell, and memory is taken for them.

    Raises:
        InputError: as `read_description`; tensors that do not fit the description, or another checksum.
    """
    description = read_description(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    try:
        contents = _contents(description, dict(tensors), most)
        kept = description.pop("checksum")
        if checksum(description, tensors) != kept:
            raise InputError("another checksum than the contents have", field="checksum", value=kept)
    except InputError as error:
        raise InputError(f"is damaged: {error}", file=path) from error
    return contents


# The description.


def _check_description(description: dict[str, Any]) -> None:
    _check_keys(description)
    _expect(_whole(description["checksum"], 0, 2**32 - 1), "checksum", "a number of 32 bits", description)
    for part in ("shared", "activations", "notes"):
        _expect(isinstance(description.get(part, {}), dict), part, "an object", description)
    rows = description["layers"]
    _expect(isinstance(rows, list) and rows, "layers", "a list of one layer or more", description)
    names: set[str] = set()
    keys: set[str] = set()
    for number, row in enumerate(rows):
        _check_row(number, row)
        name, tensors = row[:2]
        if name in names or keys & set(tensors) or len(set(tensors)) < len(tensors):
            raise InputError("expected each name once in the file", field=f"layer {name}", value=tensors)
        names.add(name)
        keys |= set(tensors)
    for key, source in description["shared"].items():
        if not isinstance(source, str) or key in keys:
            raise InputError("expected a name of another tensor", field=f"shared {key}", value=source)
    for name, settings in description["activations"].items():
        check_settings(settings, f"activations {name}")


def _check_keys(description: dict[str, Any]) -> None:
    missing = [key for key in _PARTS if key not in description and key != "notes"]
    unknown = sorted(description.keys() - set(_PARTS))
    if missing or unknown:
        what = [f"lacks {', '.join(missing)}"] if missing else []
        what += [f"has unknown {', '.join(unknown)}"] if unknown else []
        raise InputError(f"{'; '.join(what)}; expected {', '.join(_PARTS)}", field="description")


def _check_row(number: int, row: Any) -> None:
    if not isinstance(row, list) or len(row) != len(_ROW):
        raise InputError(f"expected {', '.join(_ROW)}", field=f"layer {number}", value=row)
    entry: dict[str, Any] = dict(zip(_ROW, row, strict=True))
    name, tensors, shape = row[:3]
    layer = f"layer {name if _word(name) else number}"
    words = isinstance(tensors, list) and tensors and all(map(_word, tensors))
    extents = isinstance(shape, list) and all(_whole(extent, 1, 2**62) for extent in shape)
    _expect(_word(name), layer, "a text", entry, "name")
    _expect(words, layer, "names of tensors", entry, "tensors")
    _expect(extents, layer, "whole numbers from 1 on", entry, "shape")
    _expect(_whole(row[3], 0, MAX_WIDTH), layer, f"0 to {MAX_WIDTH} bits", entry, "width")
    _expect(_whole(row[4], -HIGHEST, HIGHEST), layer, f"{-HIGHEST} to {HIGHEST}", entry, "offset")
    _expect(_word(row[5]) and row[5] in DTYPES, layer, " or ".join(DTYPES), entry, "dtype")


# The tensors.


def _contents(description: dict[str, Any], tensors: dict[str, Tensor], most: int) -> Contents:
    """Take the file's own tensors out of `tensors`; what is left is the rest."""
    rows = description["layers"]
    steps = _take(tensors, STEPS, torch.float32, (len(rows),))
    masks = _take(tensors, MASKS, torch.uint8, (len(rows), None))
    if not 1 <= masks.shape[1] <= 8:
        raise InputError("expected 1 to 8 planes", field=MASKS, value=masks.shape[1])
    layers = tuple(
        _layer(row, step, mask, tensors, most)
        for row, step, mask in zip(rows, steps.tolist(), masks.tolist(), strict=True)
    )
    for key in tensors:
        if key in (STEPS, MASKS) or key.startswith((CODES, CODEBOOK)):
            raise InputError("belongs to no layer of the file", field=key)
    doubled = tensors.keys() & {key for layer in layers for key in layer.tensors}
    if doubled:
        raise InputError("a quantized weight is there twice", field=min(doubled))
    for key, source in description["shared"].items():
        if source not in tensors or key in tensors:
            raise InputError("expected another name of a tensor in the file", field=key, value=source)
    return Contents(layers, tensors, description["shared"], description["activations"])


def _layer(
    row: list[Any], step: float, mask: list[int], tensors: dict[str, Tensor], most: int
) -> LayerReport:
    name, keys, shape, width, offset, dtype = row
    field = f"layer {name}"
    count = math.prod(shape)
    if count > most:
        raise InputError("is far larger than any weight of the model", field=field, value=tuple(shape))
    if not (0 < step < math.inf):
        raise InputError("its step is no positive number", field=field, value=step)
    if not set(mask) <= {0, 1}:
        raise InputError("expected a mask of zeros and ones", field=field, value=mask)
    stream = _take(tensors, CODES + name, torch.uint8, (-(-count * width // 8),), field)
    codebook = None
    if CODEBOOK + name in tensors:
        codebook = _take(tensors, CODEBOOK + name, torch.int16, (None,), field).numpy()
        _check_codebook(codebook, width, offset, field)
    try:
        codes = unpack_codes(Packed(stream.numpy(), count, width, offset, codebook))
    except InputError as error:
        raise InputError(str(error), field=field) from error
    _check_codes(codes, tuple(map(bool, mask)), width if codebook is None else None, offset, field)
    whole = torch.from_numpy(codes.reshape(shape).copy())
    return LayerReport(name, tuple(keys), tuple(map(bool, mask)), step, whole, DTYPES[dtype])


def _check_codebook(codebook: np.ndarray, width: int, offset: int, field: str) -> None:
    if bits_for(len(codebook)) != width or not len(codebook):
        raise InputError(f"expected a codebook that takes {width} bits", field=field, value=len(codebook))
    if offset != 0 or not bool((np.diff(codebook.astype(np.int32)) > 0).all()):
        raise InputError("expected a codebook of rising numbers, and offset 0", field=field, value=offset)


def _check_codes(
    codes: np.ndarray, mask: tuple[bool, ...], width: int | None, offset: int, field: str
) -> None:
    """The numbers must be what these planes make, and those of a stream without codebook start at offset."""
    low, high = int(codes.min()), int(codes.max())
    if width is not None and (low != offset or bits_for(high - low + 1) != width):
        raise InputError(
            f"expected numbers from {offset} on that take {width} bits, got {low} to {high}", field=field
        )
    possible = reachable(mask)
    strange = sorted(set(np.unique(codes).tolist()) - possible)
    if strange:
        text = "".join("01"[on] for on in reversed(mask))
        raise InputError(f"expected numbers that planes {text} make", field=field, value=strange[0])


def _take(
    tensors: dict[str, Tensor],
    key: str,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
    field: str | None = None,
) -> Tensor:
    """Take a tensor of the file's own out of `tensors`; None stands for any extent."""
    tensor = tensors.pop(key, None)
    if tensor is None:
        raise InputError(f"{key} is missing", field=field)
    same = len(shape) == tensor.dim() and all(
        want is None or want == extent for want, extent in zip(shape, tensor.shape, strict=True)
    )
    if not same or tensor.dtype != dtype:
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise InputError(
            f"expected {key} to be {dtype} of ({wanted})", field=field, value=(tensor.dtype, *tensor.shape)
        )
    return tensor


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high  # a bool is no number here


def _word(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _expect(holds: object, field: str, wanted: str, found: dict[str, Any], key: str | None = None) -> None:
    if not holds:
        where = field if key is None else f"{field}: {key}"
        raise InputError(f"expected {wanted}", field=where, value=found.get(key or field))
