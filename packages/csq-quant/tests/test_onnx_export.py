"""Exported files hold integers and compute in onnxruntime what the hardened model computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from hosted_models import randomize_masks, small_net, unchecked
from onnx import TensorProto, numpy_helper
from torch import nn

import csq
from csq.activations import quantize_activations
from csq.onnx_export import wide_layers
from shared_core import InputError

pytestmark = pytest.mark.filterwarnings("ignore:hardened at temperature")


def fixed(model: nn.Module, scheme: str) -> nn.Module:
    """Every layer with this mask, most significant plane first, and gates at random."""
    csq.parametrize(model, len(scheme))
    for planes in csq.bit_layers(model).values():
        planes.set_live(torch.tensor([letter == "1" for letter in reversed(scheme)]), fix=True)
        with torch.no_grad():
            planes.positive.copy_(torch.randn_like(planes.positive))
            planes.negative.copy_(torch.randn_like(planes.negative))
    return model


def run(path: Path, x: torch.Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    # Without it onnxruntime rounds the inputs of matrix products with integer weights to 8 bits (docstring).
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def integer_weights(path: Path) -> dict[int, list[onnx.TensorProto]]:
    found: dict[int, list[onnx.TensorProto]] = {}
    for tensor in onnx.load(path).graph.initializer:
        found.setdefault(tensor.data_type, []).append(tensor)
    return found


@pytest.mark.parametrize(("scheme", "dtype"), [("1110000", TensorProto.INT4), ("1111111", TensorProto.INT8)])
def test_weights_are_integers_of_their_width_and_outputs_agree(scheme, dtype, tmp_path):
    final = csq.harden(fixed(small_net(), scheme)).eval()
    path = csq.export_onnx(final, tmp_path / "m.onnx", torch.randn(1, 3, 8, 8))
    onnx.checker.check_model(path)
    tensors = integer_weights(path)
    assert len(tensors[dtype]) == 2
    assert not any(math_size(t) >= 216 for t in tensors[TensorProto.FLOAT])
    for tensor, layer in zip(tensors[dtype], final.report.layers, strict=True):
        stored = numpy_helper.to_array(tensor).astype(np.int16).reshape(layer.shape)
        assert np.array_equal(stored, layer.codes.numpy())
    x = torch.randn(5, 3, 8, 8)  # another batch size than the sample's
    with torch.no_grad():
        np.testing.assert_allclose(run(path, x), final(x).numpy(), rtol=1e-4, atol=1e-4)


def math_size(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims))


@pytest.mark.parametrize(
    ("opset", "wide", "dtype"),
    [(21, "auto", TensorProto.INT16), (18, "auto", TensorProto.INT32), (21, "int32", TensorProto.INT32)],
)
def test_layers_that_pass_int8_are_wider_integers_and_named(opset, wide, dtype, tmp_path):
    model = fixed(small_net(), "11111111")
    csq.bit_layers(model)["4"].set_live(torch.arange(8) >= 5, fix=True)
    final = csq.harden(model).eval()
    assert list(wide_layers(final)) == ["0"]
    path = csq.export_onnx(final, tmp_path / "m.onnx", torch.randn(2, 3, 8, 8), opset=opset, wide=wide)
    onnx.checker.check_model(path)
    (tensor,) = integer_weights(path)[dtype]
    codes = final.report.layers[0].codes
    assert codes.abs().max() > 127
    assert np.array_equal(numpy_helper.to_array(tensor).reshape(codes.shape), codes.numpy())
    assert len(integer_weights(path)[TensorProto.INT4 if opset == 21 else TensorProto.INT8]) == 1
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        np.testing.assert_allclose(run(path, x), final(x).numpy(), rtol=1e-4, atol=1e-4)


def test_layers_that_pass_int8_can_be_refused(tmp_path):
    final = csq.harden(fixed(small_net(), "11111111")).eval()
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(InputError, match="wide: 0, 4: weights of 9 bits do not fit int8; train with"):
        csq.export_onnx(final, tmp_path / "m.onnx", x, wide="raise")
    with pytest.raises(InputError, match=r"int16 needs opset 21 or newer: wide='int32' has them in opset 18"):
        csq.export_onnx(final, tmp_path / "m.onnx", x, wide="int16", opset=18)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(("method", "bits"), [("pact", 4), ("lsq", 8)])
def test_activation_quantizers_become_quantize_and_dequantize(method, bits, tmp_path):
    x = torch.rand(6, 3, 8, 8)
    model = fixed(small_net(), "1100000")
    quantize_activations(model, bits, x, method)
    final = csq.harden(model).eval()
    path = csq.export_onnx(final, tmp_path / "m.onnx", x[:1])
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("QuantizeLinear") == 2
    with torch.no_grad():
        np.testing.assert_allclose(run(path, x), final(x).numpy(), rtol=1e-3, atol=1e-3)


def test_timm_vit_exports(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=4)
    csq.parametrize(model, 7)
    randomize_masks(model, 7)
    final = csq.harden(model).eval()
    x = torch.randn(2, 3, 32, 32)
    path = csq.export_onnx(final, tmp_path / "m.onnx", x)
    with torch.no_grad():
        np.testing.assert_allclose(run(path, x), final(x).numpy(), rtol=1e-3, atol=1e-3)


def test_packed_attention_exports(tmp_path):
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return {"attended": self.attention(x, x, x)[0]}

    final = csq.harden(fixed(Attends(), "1110000")).eval()
    x = torch.randn(2, 4, 8)
    path = csq.export_onnx(final, tmp_path / "m.onnx", {"x": x})
    assert [output.name for output in onnx.load(path).graph.output] == ["attended"]
    with torch.no_grad():
        np.testing.assert_allclose(run(path, x), final(x)["attended"].numpy(), rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was_and_the_file_tells_nothing_of_the_machine(tmp_path):
    final = csq.harden(fixed(small_net(), "1110000")).train()
    before = {key: value.clone() for key, value in final.state_dict().items()}
    path = csq.export_onnx(final, tmp_path / "m.onnx", torch.randn(1, 3, 8, 8))
    assert final.training
    assert all(torch.equal(value, final.state_dict()[key]) for key, value in before.items())
    assert str(Path(csq.__file__).parent).encode() not in path.read_bytes()


def test_differences_are_measured_and_seen(tmp_path):
    final = csq.harden(fixed(small_net(), "1110000")).eval()
    x = torch.randn(3, 3, 8, 8)
    path = csq.export_onnx(final, tmp_path / "m.onnx", x)
    assert csq.compare_onnx(final, path, x) < 1e-4
    with torch.no_grad():
        final[4].bias += 0.5
    assert csq.compare_onnx(final, path, x) == pytest.approx(0.5, abs=1e-4)
    with pytest.raises(InputError, match="there is no such file"):
        csq.compare_onnx(final, tmp_path / "other.onnx", x)


def test_bad_requests_are_refused_before_the_work(tmp_path):
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(InputError, match=r"still has soft gates; export csq\.harden"):
        csq.export_onnx(csq.parametrize(small_net()), tmp_path / "m.onnx", x)
    final = csq.harden(fixed(small_net(), "1110000"))
    with pytest.raises(InputError, match="opset: expected an opset from 18 to 23"):
        csq.export_onnx(final, tmp_path / "m.onnx", x, opset=12)
    with pytest.raises(InputError, match=r"wide: expected auto, int16, int32, raise \(got 'int64'\)"):
        unchecked(csq.export_onnx)(final, tmp_path / "m.onnx", x, wide="int64")
    with pytest.raises(InputError, match="sample: expected an input with its batch axis"):
        csq.export_onnx(final, tmp_path / "m.onnx", x[:0])
    with pytest.raises(InputError, match="there is no folder"):
        csq.export_onnx(final, tmp_path / "none" / "m.onnx", x)
