"""Deployment: a quantized model as an ONNX file in which the matrix products run in integers.

Every linear layer becomes `QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- integer
weight`, the form (QDQ) from which runtimes make an integer product. It needs one scale for the whole
activation tensor: that is what the reparameterization buys, because a scale for each channel cannot be taken
out of the sum over channels. Outputs, biases, LayerNorm, GELU and residual sums stay floating point.

How it is written, each choice measured with onnxruntime on ViT-S/16:

- Narrow activation codes run as uint8. QuantizeLinear saturates at 0 and 255, so a clip of the codes
  at 2^b - 1 makes narrower ones exact, with a quarter of the memory traffic of a clip of the values.
- 4-bit weights are stored packed and cast to 8 bit in the graph; onnxruntime folds the cast when it loads the
  file, and runs as fast as from 8-bit storage, from half the bytes.
- A patch embedding (a convolution whose stride is its kernel) is a matrix product of the patches, and written
  as one: runtimes have no integer convolution with a floating-point output.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repqvit.hosts import set_submodule
from repqvit.layers import AttentionQuantizers, QuantConv2d, QuantizedWeight, QuantLinear
from repqvit.quantized import Batch, QuantizedModel
from repqvit.quantizers import Log2, Quantizer, UniformAffine, log_encode
from shared_core import InputError
from shared_core.errors import needs_extra
from shared_core.files import atomic_path

if TYPE_CHECKING:
    import onnx

MIN_OPSET, MAX_OPSET = 18, 23
"""The opsets that torch writes and converts to."""
INT4_OPSET = 21
"""The first opset with 4-bit integers."""

_PACKED = "codes_to_pack"
"""Name of the buffers that `_pack_weights` stores in 4 bits."""


def export_onnx(
    quantized_model: QuantizedModel,
    path: str | os.PathLike[str],
    sample: Batch,
    form: Literal["qdq"] = "qdq",
    softmax: Literal["float", "exact"] = "float",
    *,
    opset: int = INT4_OPSET,
    dynamic_batch: bool = True,
    weight_storage: Literal["auto", "int8", "int4"] = "auto",
    weight_type: Literal["int8", "uint8"] = "int8",
) -> Path:
    """Write a quantized model as an ONNX file with integer weights and integer matrix products.

    Args:
        quantized_model: what `repqvit.quantize` or `repqvit.load` returned; left unchanged.
        path: the file to write. It appears, or replaces an older one, only when it is whole.
        sample: an input of the model: images `(batch, channels, height, width)`, or a mapping of the keyword
            arguments of its forward. The graph takes this image size; its input is named `image`, or as in
            the mapping.
        form: `qdq`, QuantizeLinear and DequantizeLinear around standard operators.
        softmax: `float` leaves the softmax output and its product with v in floating point: no runtime has an
            integer product of logarithmic codes, and simulating one costs time and accuracy. `exact` writes
            the softmax quantizer as arithmetic: the file then computes what `quantized_model` computes, up to
            the order of floating-point sums. Where such a sum falls on the other side of a rounding, a code
            changes; in a deep model that grows to what a tiny change of the input does.
        opset: 18 to 23.
        dynamic_batch: the batch size is free in the file; otherwise that of `sample`.
        weight_storage: `int4` packs weights of at most 4 bits (opset 21 on); `int8` does not; `auto` packs
            where it can.
        weight_type: x86 processors without VNNI instructions add pairs of uint8 x int8 products in 16 bits,
            with saturation. That is exact for all widths but weights of 8 bits with inputs of 8 bits; for
            those, and such processors, `uint8` is exact, at about 1.7 times the time.

    Returns:
        The path written. The outputs are named `logits` for a single matrix, or as the fields of the model's
        output.

    Raises:
        InputError: a quantizer that no integer product can take (see `repqvit.recipes`), an unknown option or
            opset, a batch size that the model fixes, a path that cannot be written, or the onnx extra
            missing.

    Example:
        >>> import tempfile, timm, torch, repqvit
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10, img_size=32).eval()
        >>> images = torch.randn(8, 3, 32, 32)
        >>> quantized = repqvit.quantize(model, images, w_bits=4, a_bits=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(quantized, folder + "/vit.onnx", images).name
        'vit.onnx'
    """
    _check_options(form, softmax, opset, weight_storage, weight_type)
    if not isinstance(quantized_model, QuantizedModel):
        raise InputError("expected the result of repqvit.quantize", value=type(quantized_model).__name__)
    with needs_extra("onnx", "repqvit"):
        for module in ("onnx", "onnxscript"):
            import_module(module)
    packs = weight_storage == "int4" or (weight_storage == "auto" and opset >= INT4_OPSET)
    with atomic_path(path) as temporary:  # first: a path that cannot be written should not cost an export
        model = copy.deepcopy(quantized_model.model).cpu().eval()
        _install(model, _Style(softmax, weight_type, packs))
        graph = _to_graph(model, sample, opset, dynamic_batch)
        _pack_weights(graph)
        _strip(graph)
        temporary.write_bytes(graph.SerializeToString())
    return Path(path)


@dataclass(frozen=True)
class OnnxAgreement:
    """How an exported file compares with the simulated model on some images."""

    top1_agreement: float
    """Share of images (or of output rows) with the same largest output."""
    max_difference: float
    max_output: float
    """Largest absolute output of the simulated model: the difference's measure."""
    file_bytes: int


@torch.no_grad()
def compare_onnx(
    quantized_model: QuantizedModel, path: str | os.PathLike[str], images: Tensor
) -> OnnxAgreement:
    """Run an exported file in onnxruntime and compare its first output with the simulated model's.

    Args:
        quantized_model: the model that was exported.
        path: the exported file.
        images: `(batch, channels, height, width)`, of the size of the file's sample.
    """
    with needs_extra("onnx", "repqvit"):
        import onnxruntime

    if not os.path.isfile(path):
        raise InputError("there is no such file", file=path)
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.cpu().numpy()})[0])
    expected = next(iter(_named_outputs(quantized_model(images)).values())).cpu()
    return OnnxAgreement(
        float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
        float((found - expected).abs().max()),
        float(expected.abs().max()),
        os.path.getsize(path),
    )


def _check_options(form: str, softmax: str, opset: int, weight_storage: str, weight_type: str) -> None:
    for field, value, known in (
        ("form", form, ("qdq",)),
        ("softmax", softmax, ("float", "exact")),
        ("weight_storage", weight_storage, ("auto", "int8", "int4")),
        ("weight_type", weight_type, ("int8", "uint8")),
    ):
        if value not in known:
            raise InputError(f"expected {' or '.join(known)}", field=field, value=value)
    if not isinstance(opset, int) or not MIN_OPSET <= opset <= MAX_OPSET:
        raise InputError(f"expected an opset from {MIN_OPSET} to {MAX_OPSET}", field="opset", value=opset)
    if weight_storage == "int4" and opset < INT4_OPSET:
        raise InputError(f"4-bit weights need opset {INT4_OPSET} or newer", field="opset", value=opset)


# The modules that take the places of the simulated ones. Their forward emits ONNX operators.


@dataclass(frozen=True)
class _Style:
    softmax: str
    weight_type: str
    packs: bool


def _install(model: nn.Module, style: _Style) -> None:
    for name, module in list(model.named_modules()):
        try:
            if isinstance(module, QuantLinear):
                set_submodule(model, name, _Linear(module, style))
            elif isinstance(module, QuantConv2d):
                set_submodule(
                    model, name, _Patches(module, style) if _is_patches(module) else _Conv(module, style)
                )
            elif isinstance(module, AttentionQuantizers):
                set_submodule(model, name, _Attention(module, style))
        except _Undeployable as error:
            raise InputError(f"cannot be deployed: {error}", field=name) from error


class _Undeployable(Exception):
    """Why a quantizer has no integer product, in words."""


def _emit(
    operator: str, inputs: tuple[Tensor | None, ...], like: Tensor, shape: Any = None, axis: int | None = None
) -> Tensor:
    """Put an ONNX operator into the graph, with the dtype, and unless given the shape, of `like`."""
    return torch.onnx.ops.symbolic(
        operator,
        inputs,
        {} if axis is None else {"axis": axis},
        dtype=like.dtype,
        shape=like.shape if shape is None else shape,
    )


class _Activation(nn.Module):
    """One scale, one uint8 zero point: quantize, clip to the width, (transpose,) dequantize."""

    scale: Tensor
    zero_point: Tensor
    largest_code: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        if not isinstance(quantizer, UniformAffine):
            raise _Undeployable(
                f"{type(quantizer).__name__} has steps of several sizes within one tensor, and an integer "
                "product takes one scale and zero point; use a recipe with uniform activations (repqvit)"
            )
        if quantizer.scale.numel() != 1:
            raise _Undeployable(
                f"its input has {quantizer.scale.numel()} scales, one a channel, which cannot be taken out "
                "of the sum over channels; the repqvit recipe turns them into one"
            )
        zero_point = float(quantizer.zero_point)
        if not zero_point.is_integer() or not 0 <= zero_point < 2**quantizer.bits:
            raise _Undeployable(
                f"the zero point {zero_point:g} of its input is no code from 0 to {2**quantizer.bits - 1}; "
                "quantize with round_zero_point=True (the repqvit recipe)"
            )
        self.narrow = quantizer.bits < 8
        self.register_buffer("scale", quantizer.scale.detach().reshape(()).clone())
        self.register_buffer("zero_point", torch.tensor(int(zero_point), dtype=torch.uint8))
        self.register_buffer("largest_code", torch.tensor(2**quantizer.bits - 1, dtype=torch.uint8))

    def forward(self, x: Tensor, factor: float | Tensor = 1.0, transpose: bool = False) -> Tensor:
        codes = _emit("QuantizeLinear", (x, self.scale, self.zero_point), self.zero_point, x.shape)
        if self.narrow:
            codes = _emit("Clip", (codes, None, self.largest_code), codes)
        if transpose:  # of a quarter of the bytes, and it leaves the dequantization beside its product
            codes = codes.transpose(-2, -1)
        scale = self.scale if isinstance(factor, float) and factor == 1.0 else self.scale * factor
        return _emit("DequantizeLinear", (codes, scale, self.zero_point), x, codes.shape)


class _Weight(nn.Module):
    """Integer codes of a weight, `(in, out)` for a matrix product, and their dequantization."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantized: QuantizedWeight, style: _Style, transposed: bool) -> None:
        super().__init__()
        if not quantized.codes.numel():
            raise _Undeployable("its weight is not quantized")
        if not bool((quantized.zero_point == quantized.zero_point.round()).all()):
            raise _Undeployable("a zero point of its weight is no integer")
        signed = style.weight_type == "int8"
        middle = 2 ** (quantized.bits - 1) if signed else 0  # narrow signed codes straddle 0: they fit 4 bits
        dtype = torch.int8 if signed else torch.uint8

        def centred(codes: Tensor) -> Tensor:
            return (codes.to(torch.int16) - middle).to(dtype)

        codes = centred(quantized.codes.flatten(1).T if transposed else quantized.codes).contiguous()
        self.name = _PACKED if style.packs and quantized.bits <= 4 else "codes"
        self.axis = 1 if transposed else 0
        self.register_buffer(self.name, codes)
        self.register_buffer("scale", quantized.scale.detach().clone())
        self.register_buffer("zero_point", centred(quantized.zero_point))

    def forward(self) -> Tensor:
        codes: Tensor = getattr(self, self.name)
        inputs = (codes, self.scale, self.zero_point)
        return _emit("DequantizeLinear", inputs, self.scale, codes.shape, axis=self.axis)


class _Linear(nn.Module):
    def __init__(self, layer: QuantLinear | QuantConv2d, style: _Style) -> None:
        super().__init__()
        self.activation = _Activation(layer.input_quantizer)
        self.integer_weight = _Weight(layer.quantized, style, transposed=True)
        self.bias = layer.bias
        self.weight = layer.weight.detach()  # hosts ask for its dtype; not a parameter, so not in the file
        self.input_shift: Tensor | None
        self.register_buffer("input_shift", getattr(layer, "input_shift", None))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:  # of a matrix and a bias onnxruntime makes a Gemm, which has no integer form
            return self.forward(x[None]).squeeze(0)
        if self.input_shift is not None:
            x = x + self.input_shift
        weight = self.integer_weight()
        product = _emit("MatMul", (self.activation(x), weight), x, (*x.shape[:-1], weight.shape[1]))
        return product if self.bias is None else product + self.bias


def _is_patches(conv: QuantConv2d) -> bool:
    return (
        tuple(conv.kernel_size) == tuple(conv.stride)
        and conv.groups == 1
        and conv.padding in ((0, 0), "valid")
        and tuple(conv.dilation) == (1, 1)
    )


class _Patches(nn.Module):
    """A convolution whose stride is its kernel size, as the matrix product that it is."""

    def __init__(self, layer: QuantConv2d, style: _Style) -> None:
        super().__init__()
        self.linear = _Linear(layer, style)
        self.kernel_size = layer.kernel_size
        self.weight = layer.weight.detach()

    def forward(self, image: Tensor) -> Tensor:
        patch_height, patch_width = self.kernel_size
        batch, channels = image.shape[:2]
        rows, columns = image.shape[2] // patch_height, image.shape[3] // patch_width
        image = image[:, :, : rows * patch_height, : columns * patch_width]
        patches = image.reshape(batch, channels, rows, patch_height, columns, patch_width)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        return self.linear(patches).transpose(1, 2).reshape(batch, -1, rows, columns)


class _Conv(nn.Module):
    def __init__(self, layer: QuantConv2d, style: _Style) -> None:
        super().__init__()
        self.activation = _Activation(layer.input_quantizer)
        self.integer_weight = _Weight(layer.quantized, style, transposed=False)
        self.layer = layer
        self.bias = layer.bias
        self.weight = layer.weight.detach()
        layer.weight = None  # pyright: ignore[reportAttributeAccessIssue]  # only the geometry is used

    def forward(self, image: Tensor) -> Tensor:
        return self.layer._conv_forward(self.activation(image), self.integer_weight(), self.bias)


class _LogSoftmaxCodes(nn.Module):
    """A logarithmic quantizer as arithmetic; codes are decoded through a table of their values."""

    scale: Tensor
    values: Tensor

    def __init__(self, quantizer: Log2) -> None:
        super().__init__()
        self.bits, self.steps_per_octave = quantizer.bits, quantizer.steps_per_octave
        self.zero_code = quantizer.zero_code
        self.register_buffer("scale", quantizer.scale.detach().clone())
        codes = torch.arange(2**quantizer.bits + 1, dtype=torch.float32)
        self.register_buffer("values", quantizer._decode(codes, quantizer.scale.detach()))

    def forward(self, probabilities: Tensor) -> Tensor:
        codes = log_encode(probabilities, self.scale, self.bits, self.steps_per_octave, self.zero_code)
        return _emit("Gather", (self.values, codes.to(torch.int32)), probabilities)


class _Attention(AttentionQuantizers):
    """Takes the place of `AttentionQuantizers`: q and k in integers; softmax and v as the style says."""

    def __init__(self, quantizers: AttentionQuantizers, style: _Style) -> None:
        nn.Module.__init__(self)
        self.query = _Activation(quantizers.query)
        self.key = _Activation(quantizers.key)
        # A product with floating-point probabilities is one in floating point: quantizing v would gain
        # nothing.
        self.value = _Activation(quantizers.value) if style.softmax == "exact" else nn.Identity()
        self.softmax: nn.Module = nn.Identity()
        if style.softmax == "exact":
            softmax = quantizers.softmax
            self.softmax = _LogSoftmaxCodes(softmax) if isinstance(softmax, Log2) else _Activation(softmax)

    @property
    def off(self) -> bool:
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = (t.repeat_interleave(groups, dim=-3) for t in (key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        # The factor goes into q's scale: nothing stands between the codes and their product.
        logits = self.query(query, factor=scale) @ self.key(key, transpose=True)
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            logits = logits + attn_mask
        return self.softmax(F.softmax(logits, dim=-1)) @ self.value(value)


# From the model to the file.


class _Outputs(nn.Module):
    """The model with tensors in, in the order of `names`, and tensors out, in the order of their names."""

    def __init__(
        self,
        model: nn.Module,
        names: list[str] | None,
        constants: dict[str, Any],
        note: Callable[[Iterable[str]], None],
    ) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.constants = constants
        self.note = note

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.names is None:
            output = self.model(*inputs)
        else:
            output = self.model(**dict(zip(self.names, inputs, strict=True)), **self.constants)
        outputs = _named_outputs(output)
        self.note(outputs)
        return tuple(outputs.values())


def _named_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors of a model's output: as a mapping (transformers) names them, else `logits` or numbered."""
    if isinstance(output, Tensor):
        return {"logits" if output.ndim == 2 else "output": output}
    if isinstance(output, Mapping):
        return {name: value for name, value in output.items() if isinstance(value, Tensor)}
    if isinstance(output, tuple | list):
        tensors = [value for value in output if isinstance(value, Tensor)]
        return {f"output_{index}": value for index, value in enumerate(tensors)}
    raise InputError("the model's output has no tensors", value=type(output).__name__)


def _to_graph(model: nn.Module, sample: Batch, opset: int, dynamic_batch: bool) -> onnx.ModelProto:
    fields = {"image": sample} if isinstance(sample, Tensor) else dict(sample)
    tensors = {name: value.cpu() for name, value in fields.items() if isinstance(value, Tensor)}
    constants = {name: value for name, value in fields.items() if not isinstance(value, Tensor)}
    if not tensors or any(not len(tensor) for tensor in tensors.values()):
        raise InputError("the sample is empty: give one image, as a batch of one", field="sample")
    if dynamic_batch:  # torch.export takes a size of 1 for a constant
        tensors = {name: torch.cat([t, t]) if len(t) == 1 else t for name, t in tensors.items()}
    batch = torch.export.Dim("batch")
    output_names: list[str] = []

    def note(names: Iterable[str]) -> None:
        output_names[:] = names

    wrapped = _Outputs(model, None if isinstance(sample, Tensor) else list(tensors), constants, note)
    with torch.no_grad():
        program = _traced(
            wrapped, tuple(tensors.values()), ({0: batch},) * len(tensors) if dynamic_batch else None
        )
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            input_names=list(tensors),
            verbose=False,
        )
    assert exported is not None
    graph = exported.model_proto
    _name(graph, output_names, dynamic_batch)
    return graph


def _traced(
    model: nn.Module, inputs: tuple[Tensor, ...], shapes: tuple[dict[int, Any], ...] | None
) -> torch.export.ExportedProgram:
    dynamic = None if shapes is None else {"inputs": shapes}
    try:
        return torch.export.export(model, inputs, dynamic_shapes=dynamic, strict=False)
    except InputError:
        raise
    except Exception as error:  # torch names its errors in private modules, and none of them is for users
        fixed = "" if shapes is None else "; a model that fixes its batch size needs dynamic_batch=False"
        raise InputError(f"torch.export cannot trace the model: {_first_line(error)}{fixed}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _name(graph: onnx.ModelProto, output_names: list[str], dynamic_batch: bool) -> None:
    """Give the outputs their names, and the free dimension the name `batch` (torch invents others)."""
    renamed = dict(zip((output.name for output in graph.graph.output), output_names, strict=True))
    for node in graph.graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    for output in graph.graph.output:
        output.name = renamed[output.name]
    if dynamic_batch:
        free = graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param
        for value in [*graph.graph.input, *graph.graph.output, *graph.graph.value_info]:
            for size in value.type.tensor_type.shape.dim:
                if size.dim_param == free:
                    size.dim_param = "batch"


def _pack_weights(graph: onnx.ModelProto) -> None:
    """Store the 4-bit weights in 4 bits; a Cast at the start of the graph gives them their 8-bit name."""
    from onnx import TensorProto, helper, numpy_helper

    narrow: dict[int, int] = {TensorProto.INT8: TensorProto.INT4, TensorProto.UINT8: TensorProto.UINT4}
    casts = []
    for tensor in graph.graph.initializer:
        if not tensor.name.endswith(_PACKED):
            continue
        nibbles = numpy_helper.to_array(tensor).reshape(-1).view("uint8") & 15
        if len(nibbles) % 2:
            nibbles = torch.cat([torch.from_numpy(nibbles), torch.zeros(1, dtype=torch.uint8)]).numpy()
        name, wide = tensor.name, tensor.data_type
        tensor.name, tensor.data_type = f"{name}_int4", narrow[wide]
        tensor.raw_data = (
            nibbles[0::2] | nibbles[1::2] << 4
        ).tobytes()  # the first of a pair in the low bits
        casts.append(helper.make_node("Cast", [tensor.name], [name], name=f"unpack_{name}", to=wide))
    nodes = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend(casts + nodes)


def _strip(graph: onnx.ModelProto) -> None:
    """Remove the exporter's notes (stack traces with the paths of this machine, half a megabyte of them)."""
    parts = [graph, graph.graph, *graph.graph.node, *graph.graph.initializer, *graph.graph.value_info]
    for part in [*parts, *graph.graph.input, *graph.graph.output]:
        del part.metadata_props[:]
        part.doc_string = ""
