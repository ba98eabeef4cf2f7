"""A hardened model as an ONNX file whose weights are integers: DequantizeLinear(codes, step) before each use.

Weights of at most 4 bits are stored as int4 (opset 21), of at most 8 as int8, of 9 as int16, zero point 0;
activation quantizers become QuantizeLinear and DequantizeLinear. The file runs at the speed of 8-bit
integers, or of floats where a runtime has no integer kernel: fewer bits buy size, not speed.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from csq.parametrization import bit_layers, unwrap
from csq.size_report import LayerReport, check_unchanged, report
from shared_core import InputError
from shared_core.errors import needs_extra
from shared_core.files import atomic_path

if TYPE_CHECKING:
    import onnx

Wide = Literal["auto", "int16", "int32", "raise"]

MIN_OPSET, MAX_OPSET = 18, 23
"""The opsets that torch writes and converts to."""
NARROW_OPSET = 21
"""The first opset with 4-bit and 16-bit integers."""
_INT4 = "codes_of_4_bits"
"""Name of the buffers that become int4; torch has no such dtype to export."""


def export_onnx(
    final: nn.Module,
    path: str | os.PathLike[str],
    sample: Tensor | Mapping[str, Any],
    *,
    opset: int = NARROW_OPSET,
    dynamic_batch: bool = True,
    wide: Wide = "auto",
) -> Path:
    """Write a hardened model as an ONNX file with integer weights.

    onnxruntime by default rounds the inputs of matrix products with integer weights to 8 bits, a block at a
    time, which changes outputs in the third digit; a session with the option
    `session.qdq_matmulnbits_accuracy_level` set to 1 computes what `final` computes, as `compare_onnx` does.

    Args:
        final: what `csq.harden` or `csq.load` returned; left unchanged.
        path: the file. It appears, or replaces an older one, only when it is whole.
        sample: an input with its batch axis, or the keyword arguments of forward.
        opset: 18 to 23; below 21 nothing is stored in 4 bits.
        dynamic_batch: whether the batch size is free in the file.
        wide: how to store a layer whose integers pass int8, as eight planes do (±255). `auto`: as `int16`
            where the opset has it (21), else as `int32`, which older runtimes know. `int16`, `int32`: so.
            `raise`: not at all. Runtimes make a float weight of either when they load the file, so such a
            layer takes 2 or 4 bytes a weight there and runs as a float one; `wide_layers` names them.

    Returns:
        The path written. A tensor output is named `output`.

    Raises:
        InputError: not a hardened model; with `wide="raise"`, a layer too wide for int8; a model that
            torch.export cannot trace; an option out of range; the onnx extra missing.
    """
    if bit_layers(final):
        raise InputError("still has soft gates; export csq.harden(model)", field="model")
    if not isinstance(opset, int) or not MIN_OPSET <= opset <= MAX_OPSET:
        raise InputError(f"expected an opset from {MIN_OPSET} to {MAX_OPSET}", field="opset", value=opset)
    if wide not in get_args(Wide):
        raise InputError(f"expected {', '.join(get_args(Wide))}", field="wide", value=wide)
    with needs_extra("onnx", "csq-quant"):
        for module in ("onnx", "onnxscript"):
            import_module(module)
    check_unchanged(final)
    layers = report(final).layers
    widest = _widest(final, wide, opset)
    with atomic_path(path) as temporary:  # first: a path that cannot be written should not cost an export
        model = copy.deepcopy(unwrap(final)).cpu().eval()
        _install_weights(model, layers, opset, widest)
        _install_activations(model, opset)
        graph = _to_graph(model, sample, opset, dynamic_batch)
        _store_int4(graph)
        _strip(graph)
        temporary.write_bytes(graph.SerializeToString())
    return Path(path)


@torch.no_grad()
def compare_onnx(final: nn.Module, path: str | os.PathLike[str], sample: Tensor | Mapping[str, Any]) -> float:
    """The largest difference of an exported file's first output, run in onnxruntime, from the model's.

    Args:
        final: the model that was exported, in evaluation mode.
        path: the file.
        sample: an input as for `export_onnx`.

    Raises:
        InputError: no such file; the onnx extra missing.
    """
    with needs_extra("onnx", "csq-quant"):
        import onnxruntime

    if not Path(path).is_file():
        raise InputError("there is no such file", file=path)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float products
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    fields = {session.get_inputs()[0].name: sample} if isinstance(sample, Tensor) else dict(sample)
    feed = {name: value.cpu().numpy() for name, value in fields.items() if isinstance(value, Tensor)}
    found = torch.from_numpy(session.run(None, feed)[0])
    output = final(**sample) if isinstance(sample, Mapping) else final(sample)
    expected = next(value for _, value in _tensors(output)).cpu()
    return float((found - expected).abs().max())


def wide_layers(final: nn.Module) -> dict[str, int]:
    """Weights of each layer whose integers pass int8, by the layer's name."""
    return {layer.name: layer.codes.numel() for layer in report(final).layers if not _fits(layer, 8)}


def _widest(final: nn.Module, wide: str, opset: int) -> torch.dtype:
    """The type of integers that pass int8.

    Raises:
        InputError: There are such layers, and they are not wanted, or the opset lacks the type.
    """
    if wide == "int32" or (wide == "auto" and opset < NARROW_OPSET):
        return torch.int32
    if (wide == "raise" or opset < NARROW_OPSET) and (names := list(wide_layers(final))):
        more = ", ..." if len(names) > 5 else ""
        advice = (
            "train with n_bits=7 or less, or export with wide='auto'" if wide == "raise"
            else f"int16 needs opset {NARROW_OPSET} or newer: wide='int32' has them in opset {opset}"
        )  # fmt: skip
        raise InputError(
            f"{', '.join(names[:5])}{more}: weights of 9 bits do not fit int8; {advice}", field="wide"
        )
    return torch.int16


def _fits(layer: LayerReport, bits: int) -> bool:
    half = 1 << (bits - 1)
    return -half <= int(layer.codes.min()) and int(layer.codes.max()) < half


# The modules that stand for quantizers in the exported model: their forward emits ONNX operators.


def _emit(operator: str, inputs: tuple[Tensor | None, ...], dtype: torch.dtype, shape: Any) -> Tensor:
    return torch.onnx.ops.symbolic(operator, inputs, dtype=dtype, shape=shape)


class _Dequantized(nn.Module):
    """A weight: codes times step."""

    def __init__(self, layer: LayerReport, opset: int, widest: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        narrow = _fits(layer, 4) and opset >= NARROW_OPSET
        self.name = _INT4 if narrow else "codes"
        codes = layer.codes.to(torch.int8 if _fits(layer, 8) else widest).contiguous()
        self.register_buffer(self.name, codes)
        self.register_buffer("step", torch.tensor(layer.step, dtype=torch.float32))

    def right_inverse(self, weight: Tensor) -> tuple[()]:
        return ()

    def forward(self) -> Tensor:
        codes: Any = getattr(self, self.name)
        step: Any = self.step
        return _emit("DequantizeLinear", (codes, step), torch.float32, codes.shape).to(self.dtype)


class _Activation(nn.Module):
    """Quantize, clip to the width, dequantize."""

    def __init__(self, quantizer: Any, opset: int) -> None:
        super().__init__()
        wide = quantizer.bits > 8
        if wide and opset < NARROW_OPSET:
            raise InputError(
                f"activations above 8 bits need opset {NARROW_OPSET}", field="opset", value=opset
            )
        dtype = {
            (False, False): torch.uint8,
            (True, False): torch.int8,
            (False, True): torch.uint16,
            (True, True): torch.int16,
        }[quantizer.signed, wide]
        self.register_buffer("scale", quantizer.scale.detach().reshape(()).clone())
        self.register_buffer("zero_point", torch.zeros((), dtype=dtype))
        # QuantizeLinear saturates at its type's ends; the clip makes narrower ranges of floats before it.
        limits = quantizer.scale.detach() * torch.tensor([quantizer.low, quantizer.high])
        self.low, self.high = float(limits[0]), float(limits[1])

    def forward(self, x: Tensor) -> Tensor:
        zero_point: Any = self.zero_point
        scale: Any = self.scale
        clipped = x.clamp(self.low, self.high)
        codes = _emit("QuantizeLinear", (clipped, scale, zero_point), zero_point.dtype, x.shape)
        return _emit("DequantizeLinear", (codes, scale, zero_point), x.dtype, x.shape)


def _install_weights(
    model: nn.Module, layers: Iterable[LayerReport], opset: int, widest: torch.dtype
) -> None:
    for layer in layers:
        made: _Dequantized | None = None
        for key in layer.tensors:
            module_name, _, tensor_name = key.rpartition(".")
            module = model.get_submodule(module_name)
            made = made or _Dequantized(layer, opset, widest, getattr(module, tensor_name).dtype)
            torch_parametrize.register_parametrization(module, tensor_name, made, unsafe=True)


def _install_activations(model: nn.Module, opset: int) -> None:
    from csq.activations import ActivationQuantizer

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ActivationQuantizer):
                setattr(module, name, _Activation(child, opset))


# From module to graph.


class _Named(nn.Module):
    """The model with positional inputs and a tuple of tensors as output, whose names it tells."""

    def __init__(
        self, model: nn.Module, sample: Tensor | Mapping[str, Any], note: Callable[[list[str]], None]
    ) -> None:
        super().__init__()
        self.model, self.note = model, note
        fields = {} if isinstance(sample, Tensor) else sample
        self.names = [name for name, value in fields.items() if isinstance(value, Tensor)]
        self.constants = {name: value for name, value in fields.items() if not isinstance(value, Tensor)}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        by_name = dict(zip(self.names, inputs, strict=True)) if self.names else {}
        output = self.model(**by_name, **self.constants) if by_name else self.model(*inputs)
        tensors = dict(_tensors(output))
        self.note(list(tensors))
        return tuple(tensors.values())


def _tensors(output: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield "output", output
    elif isinstance(output, Mapping):
        yield from ((name, value) for name, value in output.items() if isinstance(value, Tensor))
    elif isinstance(output, tuple | list):
        yield from ((f"output_{i}", value) for i, value in enumerate(output) if isinstance(value, Tensor))
    else:
        raise InputError("the model's output has no tensors", field="model", value=type(output).__name__)


def _to_graph(
    model: nn.Module, sample: Tensor | Mapping[str, Any], opset: int, dynamic_batch: bool
) -> onnx.ModelProto:
    fields = {"input": sample} if isinstance(sample, Tensor) else dict(sample)
    inputs = {name: value.cpu() for name, value in fields.items() if isinstance(value, Tensor)}
    if not inputs or any(not len(value) for value in inputs.values()):
        raise InputError("expected an input with its batch axis, of one image or more", field="sample")
    if dynamic_batch:  # torch.export takes a size of 1 for a constant
        inputs = {
            name: torch.cat([value] * 2) if len(value) == 1 else value for name, value in inputs.items()
        }
    names: list[str] = []
    wrapped = _Named(model, sample, lambda found: names.__setitem__(slice(None), found)).eval()
    shapes = {"inputs": ({0: torch.export.Dim("batch")},) * len(inputs)} if dynamic_batch else None
    with torch.no_grad(), _plain_attention(), warnings.catch_warnings():
        # onnxscript and torch warn of their own deprecated calls; nothing there is ours to change.
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                wrapped, tuple(inputs.values()), dynamic_shapes=shapes, strict=False
            )
        except InputError:
            raise
        except Exception as error:  # torch names its errors in private modules, and none of them is for users
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            fixed = "; a model that fixes its batch size needs dynamic_batch=False" if dynamic_batch else ""
            raise InputError(f"torch.export cannot trace the model: {first.strip()}{fixed}") from error
        made = torch.onnx.export(
            program, (), dynamo=True, opset_version=opset, input_names=list(inputs), verbose=False
        )
    assert made is not None
    graph = made.model_proto
    _rename(graph, dict(zip((output.name for output in graph.graph.output), names, strict=True)))
    return graph


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without nn.MultiheadAttention's fused path, for which ONNX has no operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _rename(graph: onnx.ModelProto, names: dict[str, str]) -> None:
    for node in graph.graph.node:
        for ends in (node.input, node.output):
            ends[:] = [names.get(name, name) for name in ends]
    for output in graph.graph.output:
        output.name = names[output.name]


def _store_int4(graph: onnx.ModelProto) -> None:
    """Give the narrow weights their type: two to a byte, the first in the low bits."""
    import numpy as np
    from onnx import TensorProto, numpy_helper

    for tensor in graph.graph.initializer:
        if tensor.name.endswith(_INT4):
            nibbles = numpy_helper.to_array(tensor).reshape(-1).view(np.uint8) & 15
            nibbles = np.append(nibbles, np.zeros(len(nibbles) % 2, np.uint8))
            tensor.data_type = TensorProto.INT4
            tensor.raw_data = (nibbles[0::2] | nibbles[1::2] << 4).tobytes()
            assert math.ceil(math.prod(tensor.dims) / 2) == len(tensor.raw_data)
    narrow = {tensor.name for tensor in graph.graph.initializer if tensor.data_type == TensorProto.INT4}
    for value in graph.graph.value_info:
        if value.name in narrow:
            value.type.tensor_type.elem_type = TensorProto.INT4


def _strip(graph: onnx.ModelProto) -> None:
    """Remove the exporter's notes: stack traces with paths of this machine, larger than a small model."""
    parts = [graph, graph.graph, *graph.graph.node, *graph.graph.initializer, *graph.graph.value_info]
    for part in [*parts, *graph.graph.input, *graph.graph.output]:
        del part.metadata_props[:]
        part.doc_string = ""
