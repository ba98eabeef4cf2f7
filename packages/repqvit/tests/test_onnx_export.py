"""Exported files compute what the simulated model computes, in integers, from few bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hosted_models
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from repqvit import quantize
from repqvit.layers import QuantConv2d, QuantLinear
from repqvit.onnx_export import _Activation, _Weight, compare_onnx, export_onnx
from repqvit.quantized import QuantizedModel
from repqvit.quantizers import UniformAffine
from repqvit.recipes import Recipe
from shared_core import InputError

# Torch's exporter calls deprecated parts of torch and of Python; nothing of it is ours to change.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def vit() -> QuantizedModel:
    return quantize(hosted_models.build("timm-vit"), hosted_models.images("timm-vit"), w_bits=4, a_bits=4)


@pytest.fixture(scope="module")
def exact(vit: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "exact.onnx"
    return export_onnx(vit, path, hosted_models.images("timm-vit", 1), softmax="exact")


def run(path: Path, images: torch.Tensor, outputs: list[str] | None = None) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(outputs, {session.get_inputs()[0].name: images.numpy()})


def executed(path: Path, folder: Path) -> list[str]:
    """Operators that onnxruntime really runs, after its own fusions."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


def widest_step(model: QuantizedModel) -> float:
    """What one flipped code of the head's input can change in a logit."""
    head = model.get_submodule("model.head")
    return float(head.input_quantizer.scale * head.weight.abs().max())


def test_exact_file_equals_the_simulated_model_at_every_batch_size(vit: QuantizedModel, exact: Path) -> None:
    for batch in (1, 3, 8):
        images = hosted_models.images("timm-vit", batch)
        (found,) = run(exact, images)
        expected = vit(images).numpy()
        assert np.abs(found - expected).max() <= 1e-5 + widest_step(vit)
        assert (found.argmax(1) == expected.argmax(1)).all()
    # Flipped codes are the exception: most images agree to float tolerance.
    assert np.isclose(found, expected, atol=1e-4).all(1).mean() >= 0.75


def test_inputs_and_outputs_have_sensible_names_and_a_free_batch(exact: Path) -> None:
    session = onnxruntime.InferenceSession(str(exact), providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("image", ["batch", 3, 32, 32])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", ["batch", 5])]


def shallow_swin() -> torch.nn.Module:
    """One stage of two blocks, the second with shifted windows; a map of 20 x 20 in windows of 7."""
    import timm

    shape = {"img_size": 40, "patch_size": 2, "window_size": 7, "embed_dim": 16, "depths": (2,)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, num_heads=(2,), **shape).eval()


@pytest.mark.parametrize(
    ("name", "softmax", "bits"), [("timm-swin-padded", "exact", 4), ("torchvision-vit", "float", 6)]
)
def test_every_linear_product_is_executed_in_integers(
    name: str, softmax: Any, bits: int, tmp_path: Path
) -> None:
    source = shallow_swin() if name == "timm-swin-padded" else hosted_models.build(name)
    model = quantize(source, hosted_models.images(name), w_bits=bits, a_bits=bits)
    shifted = any(getattr(m, "input_shift", None) is not None for m in model.modules())
    assert shifted == (name == "timm-swin-padded")
    path = export_onnx(model, tmp_path / "m.onnx", hosted_models.images(name, 2), softmax=softmax)
    layers = sum(isinstance(m, QuantLinear | QuantConv2d) for m in model.modules())
    attentions = 2
    operators = executed(path, tmp_path)
    assert operators.count("MatMulIntegerToFloat") == layers + attentions  # and q times k
    assert operators.count("MatMul") == attentions  # softmax times v
    assert not {"Gemm", "Conv"} & set(operators)
    agreement = compare_onnx(model, path, hosted_models.images(name, 5))
    assert agreement.file_bytes == path.stat().st_size
    tolerance = 0.02 if softmax == "exact" else 0.5  # a floating-point softmax differs from a 6-bit one
    assert agreement.max_difference <= tolerance * agreement.max_output
    if softmax == "exact":
        assert agreement.top1_agreement == 1


class _Widths(torch.nn.Module):
    def __init__(self, quantizers: list[UniformAffine]) -> None:
        super().__init__()
        self.activations = torch.nn.ModuleList(_Activation(quantizer) for quantizer in quantizers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(activation(x) for activation in self.activations)


def test_activation_codes_of_every_width_equal_a_numpy_reference(tmp_path: Path) -> None:
    scale, widths = np.float32(0.1), range(2, 9)
    quantizers = [UniformAffine(bits) for bits in widths]
    for quantizer in quantizers:
        quantizer.set_parameters(torch.tensor([0.1]), torch.tensor([float(2**quantizer.bits // 3)]))
    # Every code, the ties between them, and values far beyond the range on both sides.
    x = (torch.cat([torch.arange(-300.0, 500), torch.arange(-300.0, 500) + 0.5]) * 0.1)[None]
    path = tmp_path / "q.onnx"
    model = _Widths(quantizers).eval()
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, opset_version=21)
    for bits, quantizer, found in zip(widths, quantizers, run(path, x), strict=True):
        zero = 2**bits // 3
        codes = np.clip(np.rint(x.numpy() / scale) + zero, 0, 2**bits - 1)
        assert len(np.unique(codes)) == 2**bits
        np.testing.assert_array_equal(found, (codes - zero).astype(np.float32) * scale)
        np.testing.assert_array_equal(found, quantizer(x).numpy())


def initializers(path: Path) -> Iterator[onnx.TensorProto]:
    yield from onnx.load(path).graph.initializer


def test_no_large_floating_point_tensor_is_left_in_the_file(vit: QuantizedModel, exact: Path) -> None:
    positions = vit.pos_embed.numel()
    floats = [t for t in initializers(exact) if t.data_type == TensorProto.FLOAT]
    widest_bias = max(m.out_features for m in vit.modules() if isinstance(m, QuantLinear))
    assert max(int(np.prod(t.dims)) for t in floats) <= max(positions, widest_bias)
    weights = sum(m.weight.numel() for m in vit.modules() if isinstance(m, QuantLinear | QuantConv2d))
    packed = [t for t in initializers(exact) if t.data_type == TensorProto.INT4]
    assert sum(int(np.prod(t.dims)) for t in packed) == weights
    assert sum(len(t.raw_data) for t in packed) == weights / 2
    assert b"/site-packages/" not in exact.read_bytes()


def test_storage_and_type_of_weights_change_bytes_but_no_number(
    vit: QuantizedModel, exact: Path, tmp_path: Path
) -> None:
    images = hosted_models.images("timm-vit", 4)
    options = {"weight_storage": "int8", "weight_type": "uint8", "opset": 18, "dynamic_batch": False}
    wide = export_onnx(vit, tmp_path / "wide.onnx", images, softmax="exact", **options)
    weights = sum(m.weight.numel() for m in vit.modules() if isinstance(m, QuantLinear | QuantConv2d))
    unsigned = [t for t in initializers(wide) if t.data_type == TensorProto.UINT8 and len(t.dims) == 2]
    assert sum(len(t.raw_data) for t in unsigned) == weights
    assert wide.stat().st_size - exact.stat().st_size == pytest.approx(weights / 2, rel=0.3)  # less the casts
    session = onnxruntime.InferenceSession(str(wide), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [4, 3, 32, 32]
    np.testing.assert_allclose(run(wide, images)[0], run(exact, images)[0], atol=1e-5)


@pytest.mark.parametrize(("wide", "narrow"), [("INT8", "INT4"), ("UINT8", "UINT4")])
def test_packing_is_read_back_by_onnxruntime(wide: str, narrow: str, tmp_path: Path) -> None:
    from repqvit.onnx_export import _pack_weights

    low = -8 if wide == "INT8" else 0
    codes = np.arange(low, low + 15, dtype=wide.lower()).reshape(3, 5)  # an odd number of them
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["codes_to_pack"], ["out"])],
        "packing",
        [],
        [onnx.helper.make_tensor_value_info("out", getattr(TensorProto, wide), [3, 5])],
        [numpy_helper.from_array(codes, "codes_to_pack")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    _pack_weights(model)
    (packed,) = model.graph.initializer
    assert (packed.data_type, len(packed.raw_data)) == (getattr(TensorProto, narrow), 8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], codes)


@pytest.mark.parametrize("weight_type", ["int8", "uint8"])
def test_weight_codes_in_the_file_dequantize_to_the_weight_in_use(
    vit: QuantizedModel, weight_type: str
) -> None:
    from repqvit.onnx_export import _Style

    layer = vit.get_submodule("model.blocks.0.mlp.fc1")
    written = _Weight(layer.quantized, _Style("float", weight_type, packs=False), transposed=True)
    codes, zero = written.codes.numpy().astype(np.int32), written.zero_point.numpy().astype(np.int32)
    assert codes.max() - codes.min() <= 15
    np.testing.assert_array_equal(
        (codes - zero).astype(np.float32) * written.scale.numpy(), layer.weight.numpy().T
    )


def test_packed_weights_keep_their_order(vit: QuantizedModel, exact: Path) -> None:
    packed = next(
        t
        for t in initializers(exact)
        if t.name.endswith("blocks.0.attn.qkv.integer_weight.codes_to_pack_int4")
    )
    codes = vit.get_submodule("model.blocks.0.attn.qkv").quantized.codes.numpy().astype(int) - 8
    np.testing.assert_array_equal(numpy_helper.to_array(packed).astype(int), codes.T)


def test_all_outputs_of_a_detector_are_written_by_name(tmp_path: Path) -> None:
    model = quantize(hosted_models.build("hf-yolos"), hosted_models.images("hf-yolos"), w_bits=8, a_bits=8)
    sample = {"pixel_values": hosted_models.images("hf-yolos", 1)}
    path = export_onnx(model, tmp_path / "yolos.onnx", sample, softmax="exact")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["pixel_values"]
    names = [o.name for o in session.get_outputs()]
    assert names == ["logits", "pred_boxes", "last_hidden_state"]
    expected = model(**sample)
    for name, found in zip(names, run(path, sample["pixel_values"]), strict=True):
        np.testing.assert_allclose(
            found, expected[name].numpy(), atol=0.05 * float(expected[name].abs().max())
        )


@pytest.mark.parametrize(
    ("recipe", "softmax", "message"),
    [
        ("channelwise", "float", r"attn\.qkv: cannot be deployed: its input has 32 scales, one a channel"),
        ("fq-vit", "float", "PowerOfTwoFactor has steps of several sizes"),
        ("twin-uniform", "float", r"mlp\.fc2: cannot be deployed: TwinUniformGelu"),
        (Recipe(norm="per-tensor", softmax="twin-uniform"), "exact", "TwinUniformSoftmax has steps"),
        ("repqvit-official", "float", "no code from 0 to 15; quantize with round_zero_point"),
    ],
)
def test_a_model_that_no_integer_product_can_run_is_refused_with_the_reason(
    recipe: Any, softmax: Any, message: str, tmp_path: Path
) -> None:
    images = hosted_models.images("timm-vit")
    model = quantize(hosted_models.build("timm-vit"), images, recipe, w_bits=4, a_bits=4)
    with pytest.raises(InputError, match=message):
        export_onnx(model, tmp_path / "m.onnx", images, softmax=softmax)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "qoperator"}, r"form: expected qdq \(got 'qoperator'\)"),
        ({"softmax": "int"}, "softmax: expected float or exact"),
        ({"opset": 13}, r"opset: expected an opset from 18 to 23 \(got 13\)"),
        ({"opset": 18, "weight_storage": "int4"}, "opset: 4-bit weights need opset 21 or newer"),
        ({"weight_storage": "int2"}, "weight_storage: expected auto or int8 or int4"),
        ({"weight_type": "float"}, "weight_type: expected int8 or uint8"),
    ],
)
def test_unknown_options_are_refused(
    vit: QuantizedModel, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checked = {
        "form": "qdq",
        "softmax": "float",
        "opset": 21,
        "weight_storage": "auto",
        "weight_type": "int8",
    }
    from repqvit.onnx_export import _check_options

    with pytest.raises(InputError, match=message):
        _check_options(**{**checked, **options})


def test_a_path_that_cannot_be_written_is_refused_and_an_old_file_survives(
    vit: QuantizedModel, tmp_path: Path
) -> None:
    images = hosted_models.images("timm-vit", 1)
    with pytest.raises(InputError, match="there is no folder"):
        export_onnx(vit, tmp_path / "missing" / "m.onnx", images)
    old = tmp_path / "old.onnx"
    old.write_bytes(b"old")
    with pytest.raises(InputError, match=r"torch\.export cannot trace the model"):
        export_onnx(vit, old, images[:, :, :20])  # the model takes 32 x 32
    with pytest.raises(InputError, match="the sample is empty"):
        export_onnx(vit, old, images[:0])
    assert [p.name for p in tmp_path.iterdir()] == ["old.onnx"]
    assert old.read_bytes() == b"old"


def test_a_missing_extra_is_named(
    vit: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"onnx is not installed: pip install 'repqvit\[onnx\]'"):
        export_onnx(vit, tmp_path / "m.onnx", hosted_models.images("timm-vit", 1))
