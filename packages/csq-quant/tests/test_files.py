"""Files bring back the model to the last bit, take the bytes that the report states, and fail in words."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import timm
import torch
import torchvision
import transformers
from hosted_models import images, optimizer_for, randomize_masks, small_net, train
from safetensors import safe_open
from torch import nn

import csq
from csq import rivals
from csq.activations import quantize_activations
from shared_core import InputError

pytestmark = pytest.mark.filterwarnings("ignore:hardened at temperature")


def hardened(model: nn.Module, n_bits: int = 8) -> nn.Module:
    csq.parametrize(model, n_bits)
    randomize_masks(model, n_bits)
    return csq.harden(model)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


HOSTS = {
    "torchvision": lambda: torchvision.models.mobilenet_v3_small(num_classes=4),
    "timm": lambda: timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=4),
    "transformers, tied": gpt2,
    "bfloat16": lambda: small_net().to(torch.bfloat16),
    "no BatchNorm": lambda: nn.Sequential(nn.Linear(5, 3)),
}


@pytest.mark.parametrize("host", HOSTS)
def test_a_plain_model_is_filled_to_the_last_bit(host, tmp_path):
    final = hardened(HOSTS[host]())
    csq.save(final, tmp_path / "m.safetensors")
    found = csq.load(HOSTS[host](), tmp_path / "m.safetensors")
    assert type(found) is type(final)
    for key, value in final.state_dict().items():
        assert torch.equal(value, found.state_dict()[key]), key
    assert found.report.rows() == final.report.rows()
    assert csq.report(found).totals() == final.report.totals()
    csq.save(found, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


def test_bytes_are_stored_bits_and_the_float_rest(tmp_path):
    resnet10 = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1] * 4, num_classes=10)
    final = hardened(resnet10, n_bits=4)
    size = csq.save(final, tmp_path / "m.safetensors")
    assert size == (tmp_path / "m.safetensors").stat().st_size
    assert size == pytest.approx(final.report.expected_bytes, rel=0.02)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        for layer in final.report.layers:
            stream = file.get_slice(f"csq.codes/{layer.name}").get_shape()[0]
            assert stream == -(-layer.stored_bits * layer.weights // 8)


class Buffers(nn.Module):
    """Integers, bools, an unused bfloat16 parameter, and one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.again = nn.Linear(64, 64), nn.Linear(3, 64)
        self.again.bias = self.layer.bias
        self.register_buffer("positions", torch.arange(3000))
        self.register_buffer("used", torch.zeros(500, dtype=torch.bool))
        self.table = nn.Parameter(torch.randn(300, 2, dtype=torch.bfloat16))


MIXED = {
    "half": lambda: hardened(torchvision.models.squeezenet1_1(num_classes=10).half(), 4),
    "half afterwards": lambda: hardened(torchvision.models.squeezenet1_1(num_classes=10), 4).half(),
    "integer buffers": lambda: hardened(Buffers()),
    "left out": lambda: csq.harden(csq.parametrize(small_net().double(), skip=["4"])),
    "activations": lambda: hardened(with_activations("pact")),
    "a scheme of the rivals": lambda: rivals.harden(
        rivals.attach(small_net().half(), lambda _, weight: rivals.LsqWeight(weight, 3))
    ),
}


@pytest.mark.parametrize("kind", MIXED)
def test_bytes_are_counted_as_they_are_written(kind, tmp_path):
    final = MIXED[kind]()
    path = tmp_path / "m.safetensors"
    size = csq.save(final, path)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    expected = csq.report(final).expected_bytes
    assert size - header == expected
    again = csq.load(copy.deepcopy(final), path)
    assert csq.report(again).float_parameters == csq.report(final).float_parameters


def test_saving_what_is_not_exact_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match=r"still has soft gates; save csq\.harden"):
        csq.save(csq.parametrize(small_net()), path)
    with pytest.raises(InputError, match=r"expected a model of csq\.parametrize"):
        csq.save(small_net(), path)
    final = hardened(small_net())
    with torch.no_grad():
        final[4].weight[0, 0] += 0.01
    with pytest.raises(InputError, match=r"4\.weight: its weight is no longer the quantized one"):
        csq.save(final, path)
    assert not path.exists()


def test_an_interrupted_save_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    csq.save(hardened(small_net()), path)
    before = path.read_bytes()

    def stop(tensors, name, metadata):
        name.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("csq.files.save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        csq.save(hardened(small_net(), 3), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_loaded_model_computes_what_was_trained(tmp_path):
    final = hardened(small_net()).eval()
    csq.save(final, tmp_path / "m.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = csq.load(small_net(), tmp_path / "m.safetensors").eval()
    x, _ = images()
    assert torch.equal(final(x), found(x))


@pytest.mark.filterwarnings("ignore:settled at")  # of two layers, none is small enough
def test_integers_read_bit_by_bit_from_the_file_reproduce_a_trained_models_outputs_to_the_last_bit(tmp_path):
    """By a reader that knows the format and none of the package's code: bits low first, offset, step."""
    model = csq.parametrize(small_net(), 5)
    x, _ = images()
    train(model, optimizer_for(model), csq.Schedule(model, 2.5, 60, lam=0.3, on_miss="settle"), 60)
    final = csq.harden(model, [x]).eval()
    csq.save(final, tmp_path / "m.safetensors")
    plain = small_net().eval()
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
        description = json.loads(file.metadata()["csq"])
    state = {key: value for key, value in tensors.items() if not key.startswith("csq.")}
    rows = zip(description["layers"], tensors["csq.steps"], strict=True)
    for (name, keys, shape, width, offset, _), step in rows:
        bits = "".join(f"{byte:08b}"[::-1] for byte in tensors[f"csq.codes/{name}"].tolist())
        found = [int(bits[i * width : (i + 1) * width][::-1] or "0", 2) for i in range(math.prod(shape))]
        if (book := tensors.get(f"csq.codebook/{name}")) is not None:
            found = [int(book[index]) for index in found]
        codes = torch.tensor(found, dtype=torch.float32) + offset
        state |= dict.fromkeys(keys, (codes * step).reshape(shape))
    plain.load_state_dict(state)
    assert torch.equal(plain(x), final(x))


def test_a_weight_shared_with_a_skipped_layer_is_refused():
    """Half a tie would be two weights in training, and one again in the file's model."""
    model = nn.ModuleDict({"emb": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["emb"].weight
    with pytest.raises(InputError, match=r"emb: shares its weight with head"):
        csq.parametrize(model, skip=("head",))
    assert not csq.bit_layers(model)
    csq.parametrize(model)
    assert model["head"].weight is model["emb"].weight or torch.equal(
        model["head"].weight, model["emb"].weight
    )


class Tied(nn.Module):
    """An embedding and a head; `tie` makes their weights one."""

    def __init__(self, *, tie: bool) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        if tie:
            self.head.weight = self.emb.weight


def test_two_weights_do_not_silently_become_one_that_the_model_ties(tmp_path):
    path = tmp_path / "m.safetensors"
    csq.save(hardened(Tied(tie=False)), path)
    tied = Tied(tie=True)
    before = tied.emb.weight.clone()
    with pytest.raises(
        InputError, match=r"m\.safetensors: has different weights for emb\.weight and head\.weight, .* tied"
    ):
        csq.load(tied, path)
    assert torch.equal(tied.emb.weight, before)


@pytest.mark.parametrize("skip", [(), ("head",)])
def test_equal_weights_load_into_one_that_the_model_ties_and_count_once(tmp_path, skip):
    untied = Tied(tie=False)
    with torch.no_grad():
        untied.head.weight.copy_(untied.emb.weight)
    final = csq.harden(csq.parametrize(untied, 8, skip=skip, mask="fixed"))
    with torch.no_grad():
        final.head.weight.copy_(final.emb.weight)
    csq.save(final, tmp_path / "m.safetensors")
    found = csq.load(Tied(tie=True), tmp_path / "m.safetensors")
    assert torch.equal(found.emb.weight, final.emb.weight)
    assert [layer.tensors for layer in found.report.layers] == [("emb.weight", "head.weight")]
    assert found.report.weights == 20
    csq.save(found, tmp_path / "again.safetensors")
    again = csq.load(Tied(tie=True), tmp_path / "again.safetensors")
    assert torch.equal(again.head.weight, final.emb.weight)


def with_activations(method="lsq", bits=4, **more) -> nn.Module:
    x, _ = images(8)
    return quantize_activations(small_net(), bits, x, method, **more)


class TestActivations:
    @pytest.fixture(params=["lsq", "pact"])
    def final(self, request) -> nn.Module:
        return hardened(with_activations(request.param)).eval()

    @pytest.fixture
    def path(self, final, tmp_path):
        csq.save(final, tmp_path / "m.safetensors")
        return tmp_path / "m.safetensors"

    def test_a_plain_model_gets_the_files_quantizers(self, final, path):
        found = csq.load(small_net(), path).eval()
        x, _ = images()
        assert torch.equal(found(x), final(x))
        for name, (bits, signed) in {"0": (8, True), "4": (4, False)}.items():
            ours, theirs = (m.get_submodule(f"{name}.input_quantizer") for m in (found, final))
            assert type(ours) is type(theirs)
            assert (ours.bits, ours.signed) == (theirs.bits, theirs.signed) == (bits, signed)
        if hasattr(theirs, "gradient_scale"):
            assert ours.gradient_scale == theirs.gradient_scale

    def test_a_model_that_has_them_keeps_them(self, final, path):
        model = with_activations(final[0].input_quantizer.settings()["method"])
        kept = model[0].input_quantizer
        found = csq.load(model, path).eval()
        assert found[0].input_quantizer is kept
        assert len(found[0]._forward_pre_hooks) == 1
        x, _ = images()
        assert torch.equal(found(x), final(x))

    def test_a_model_with_others_is_refused_and_left_alone(self, final, path):
        method = final[0].input_quantizer.settings()["method"]
        other = with_activations(method, 5)
        before = other[0].weight.clone()
        with pytest.raises(
            InputError, match=rf"safetensors: 4: inputs are {method} of 4 bits, unsigned in .* of 5 bits"
        ):
            csq.load(other, path)
        assert torch.equal(other[0].weight, before)

    def test_a_model_with_quantizers_does_not_fit_a_file_without(self, tmp_path):
        csq.save(hardened(small_net()), tmp_path / "m.safetensors")
        with pytest.raises(InputError, match="0: inputs are not quantized in the file and lsq of 8 bits"):
            csq.load(with_activations(), tmp_path / "m.safetensors")

    def test_a_model_of_another_architecture_gets_no_quantizer(self, path):
        other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        with pytest.raises(InputError, match="holds another architecture: the model has no layer 4"):
            csq.load(other, path)
        assert not hasattr(other[0], "input_quantizer")


class OwnNames(nn.Module):
    """A layer with buffers that have the names of a codec."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        for name in ("codes", "codebook", "steps", "masks"):
            self.layer.register_buffer(name, torch.randn(2))


def test_a_models_own_tensors_keep_their_names_and_values(tmp_path):
    final = hardened(OwnNames())
    csq.save(final, tmp_path / "m.safetensors")
    found = csq.load(OwnNames(), tmp_path / "m.safetensors")
    for key, value in final.state_dict().items():
        assert torch.equal(value, found.state_dict()[key]), key


def test_a_tensor_with_a_name_of_the_files_is_refused(tmp_path):
    model = nn.ModuleDict({"layer": nn.Linear(4, 3), "csq": nn.Module()})
    model["csq"].register_buffer("steps", torch.zeros(1))
    with pytest.raises(InputError, match=r"csq\.steps: is a name that the file keeps for itself"):
        csq.save(hardened(model), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cast", ["before", "after"])
def test_a_half_precision_model_loads_with_the_values_that_it_had(tmp_path, dtype, cast):
    first, last = (dtype, dtype) if cast == "before" else (torch.float32, dtype)
    final = hardened(small_net().to(first)).to(last)
    path = tmp_path / "m.safetensors"
    csq.save(final, path)
    same = csq.load(small_net().to(dtype), path)
    single = csq.load(small_net(), path)
    csq.save(single, path)  # the rounding stays known, through any number of files
    for found in (same, single, csq.load(small_net(), path)):
        for key in ("0.weight", "4.weight"):
            assert torch.equal(found.state_dict()[key].to(dtype), final.state_dict()[key])
            assert torch.equal(found.state_dict()[key].double(), final.state_dict()[key].double())
