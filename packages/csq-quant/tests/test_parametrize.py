"""Any model goes in and keeps its class and forward; what cannot be quantized is named."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
import torchvision
import transformers
from hosted_models import optimizer_for, small_net, unchecked
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import csq
from csq import rivals
from shared_core import InputError


def rounded_copy(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for name in names:
        weight = state[name]
        top = weight.abs().max()
        state[name] = (weight / top * 255).round() / 255 * top
    return state


def check_host(model: nn.Module, inputs: dict[str, torch.Tensor], weights: list[str]) -> None:
    """Same class, and the outputs of the model whose weights are rounded to 8 bits."""
    model.eval()
    kind = type(model)
    layers = {name: type(module) for name, module in model.named_modules()}
    plain_state = rounded_copy(model, weights)
    csq.parametrize(model)
    assert type(model) is kind
    for name, module in model.named_modules():
        if name in layers:
            assert isinstance(module, layers[name])
    keys = {key for key in plain_state if key not in model.state_dict()}
    assert keys == set(weights)
    with torch.no_grad():
        soft = model(**inputs)
        final = csq.harden(model)
        assert type(final) is kind
        assert {name: type(module) for name, module in final.named_modules()} == layers
        final.load_state_dict(plain_state)  # same keys and shapes as before
        hard = final(**inputs)
    first = soft if isinstance(soft, torch.Tensor) else soft[0]
    second = hard if isinstance(hard, torch.Tensor) else hard[0]
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def layer_weights(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding, transformers.pytorch_utils.Conv1D)
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)]


def test_torchvision_model():
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=5)
    check_host(model, {"x": torch.randn(2, 3, 32, 32)}, layer_weights(model))


def test_torchvision_vit_with_packed_attention():
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3)
    with torch.no_grad():
        model.heads.head.weight.normal_(0, 0.1)  # torchvision starts it at zero
    packed = [key for key in model.state_dict() if key.endswith("in_proj_weight")]
    assert len(packed) == 2
    check_host(model, {"x": torch.randn(2, 3, 16, 16)}, layer_weights(model) + packed)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_timm_models(name):
    options = {"depth": 1, "img_size": 32} if "vit" in name else {"depths": (1, 1, 1, 1)}
    model = timm.create_model(name, num_classes=4, **options)
    check_host(model, {"x": torch.randn(2, 3, 32, 32)}, layer_weights(model))


def test_transformers_gpt2_has_conv1d_layers_and_a_tied_head():
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.arange(6).view(1, 6)
    csq.parametrize(model)
    names = list(csq.bit_layers(model))
    assert "transformer.h.0.attn.c_attn" in names
    assert "transformer.wte" in names
    assert "lm_head" not in names  # the same weight as wte
    assert model.lm_head.parametrizations.weight[0] is model.transformer.wte.parametrizations.weight[0]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert csq.bit_layers(model)["transformer.wte"].positive.grad.ne(0).any()
    final = csq.harden(model)
    assert final.lm_head.weight is final.transformer.wte.weight
    counted = sum(layer.weights for layer in final.report.layers)
    kinds = (nn.Embedding, transformers.pytorch_utils.Conv1D)
    unique = sum(m.weight.numel() for m in final.modules() if isinstance(m, kinds))
    assert counted == unique


def test_weights_are_computed_once_a_block_under_torchs_own_cache():
    """A layer that runs several times, as in a recurrent loop, need not add up its planes each time."""
    layer = csq.parametrize(nn.Linear(4, 4), 3)
    planes, x = csq.bit_layers(layer)["weight"], torch.randn(2, 4)
    calls = []
    planes.register_forward_hook(lambda *_: calls.append(1))
    layer(layer(x)).sum().backward()
    expected, count = planes.positive.grad.clone(), len(calls)
    planes.zero_grad()
    with nn.utils.parametrize.cached():
        layer(layer(x)).sum().backward()
    assert (count, len(calls) - count) == (2, 1)
    torch.testing.assert_close(planes.positive.grad, expected)


def test_transformers_vit():
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(image_size=16, patch_size=8, **size)
    model = transformers.ViTForImageClassification(config)
    check_host(model, {"pixel_values": torch.randn(2, 3, 16, 16)}, layer_weights(model))


def test_all_layer_kinds_are_taken_first_and_last_included():
    model = nn.ModuleDict(
        {
            "c1": nn.Conv1d(2, 2, 3), "c2": nn.Conv2d(2, 2, 3), "c3": nn.Conv3d(2, 2, 3),
            "t1": nn.ConvTranspose1d(2, 2, 3), "t2": nn.ConvTranspose2d(2, 2, 3),
            "t3": nn.ConvTranspose3d(2, 2, 3),
            "linear": nn.Linear(2, 2), "table": nn.Embedding(3, 2), "bag": nn.EmbeddingBag(3, 2),
            "attention": nn.MultiheadAttention(4, 2, kdim=3, vdim=5), "norm": nn.LayerNorm(2),
        }
    )  # fmt: skip
    csq.parametrize(model)
    separate = {f"attention.{name}_proj_weight" for name in "qkv"}
    assert set(csq.bit_layers(model)) == (set(model) - {"attention", "norm"}) | separate | {
        "attention.out_proj"
    }


def test_skip_and_select_leave_layers_as_they_are():
    model = csq.parametrize(small_net(), skip=["4"])
    assert list(csq.bit_layers(model)) == ["0"]
    assert isinstance(model[4].weight, nn.Parameter)
    linear = csq.parametrize(small_net(), select=lambda name, module: isinstance(module, nn.Linear))
    assert list(csq.bit_layers(linear)) == ["4"]
    with pytest.raises(InputError, match=r"skip: matches no layer; the layers are 0, 4.*got 'head.\*'"):
        csq.parametrize(small_net(), skip=["head.*"])


def test_wrappers_are_seen_through():
    model = csq.parametrize(small_net())
    assert list(csq.bit_layers(nn.DataParallel(model))) == ["0", "4"]
    assert list(csq.bit_layers(torch.compile(model))) == ["0", "4"]


class TestBadInput:
    @pytest.mark.parametrize("n_bits", [0, 9, True])
    def test_planes_outside_one_to_eight(self, n_bits):
        with pytest.raises(InputError, match="n_bits: expected a whole number from 1 to 8"):
            csq.parametrize(small_net(), n_bits)

    def test_twice(self):
        model = csq.parametrize(small_net())
        with pytest.raises(InputError, match="parametrized already"):
            csq.parametrize(model)

    def test_other_parametrization(self):
        model = nn.Sequential(weight_norm(nn.Linear(2, 2)))
        with pytest.raises(InputError, match="0: has another parametrization"):
            csq.parametrize(model)

    def test_nothing_to_quantize(self):
        with pytest.raises(InputError, match="has no Conv, Linear or Embedding layer"):
            csq.parametrize(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
        with pytest.raises(InputError, match="leaves no layer"):
            csq.parametrize(small_net(), skip=["*"])

    def test_weights_that_have_no_planes_are_all_named_and_the_model_is_left(self):
        model = nn.ModuleDict(
            {
                "fine": nn.Linear(2, 2), "zero": nn.Linear(2, 2), "nan": nn.Linear(2, 2),
                "frozen": nn.Linear(2, 2),
                "norm": nn.Embedding(3, 2, max_norm=1.0), "sparse": nn.Embedding(3, 2, sparse=True),
                "meta": nn.Linear(2, 2, device="meta"),
            }
        )  # fmt: skip
        with torch.no_grad():
            model["zero"].weight.zero_()
            model["nan"].weight[0, 0] = torch.nan
        model["frozen"].weight.requires_grad_(False)
        with pytest.raises(InputError, match="cannot be quantized") as caught:
            csq.parametrize(model)
        text = str(caught.value)
        for words in (
            "zero: its weight is all zero", "nan: its weight has NaN", "frozen: its weight is frozen",
            "norm: max_norm rewrites", "sparse: sparse gradients", "meta: its weight is on the meta device",
        ):  # fmt: skip
            assert words in text
        assert "fine" not in text
        assert "\n" not in text
        assert csq.bit_layers(model) == {}

    def test_a_layer_that_is_the_whole_model_is_named_by_its_class(self):
        layer = nn.Linear(2, 2)
        with torch.no_grad():
            layer.weight[0, 0] = torch.nan
        with pytest.raises(InputError, match="cannot be quantized; Linear: its weight has NaN"):
            csq.parametrize(layer)

    @pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
    def test_weights_that_hooks_compute_are_named_and_the_model_is_left(self):
        model = nn.ModuleDict({"fine": nn.Linear(2, 2), "normed": nn.utils.weight_norm(nn.Linear(2, 2))})
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(InputError, match="normed: its weight is no parameter, but computed from others"):
            csq.parametrize(model)
        assert type(model["fine"]) is nn.Linear
        assert list(model.state_dict()) == list(before)
        csq.parametrize(model, skip=["normed"])
        assert list(csq.bit_layers(model)) == ["fine"]

    def test_an_error_half_way_leaves_the_model_as_it_was(self, monkeypatch):
        model = nn.ModuleDict(
            {"attention": nn.MultiheadAttention(4, 2, kdim=3, vdim=5), "last": nn.Linear(2, 2)}
        )
        before, optimizer = dict(model.named_parameters()), torch.optim.SGD(model.parameters(), lr=0.1)
        register = torch.nn.utils.parametrize.register_parametrization

        def fail_at_last(module, *arguments, **options):
            if module is model["last"]:
                raise MemoryError
            register(module, *arguments, **options)

        monkeypatch.setattr(torch.nn.utils.parametrize, "register_parametrization", fail_at_last)
        with pytest.raises(MemoryError):
            csq.parametrize(model)
        assert type(model["attention"]) is nn.MultiheadAttention
        after = dict(model.named_parameters())
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)
        assert csq.bit_layers(model) == {}
        monkeypatch.undo()
        csq.parametrize(model)
        csq.check_param_groups(model, torch.optim.SGD(csq.param_groups(model), lr=0.1))
        with pytest.raises(InputError, match="are in no group"):
            csq.check_param_groups(model, optimizer)

    @pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
    def test_lazy_layers(self):
        with pytest.raises(InputError, match="no shape yet"):
            csq.parametrize(nn.Sequential(nn.LazyLinear(3)))

    def test_unknown_options(self):
        for option in ({"init": "random"}, {"mask": "none"}):
            with pytest.raises(InputError, match="expected"):
                unchecked(csq.parametrize)(small_net(), **option)
        with pytest.raises(InputError, match="gate_init: expected a number above 0"):
            csq.parametrize(small_net(), gate_init=0.0)
        with pytest.raises(InputError, match=r"expected a torch\.nn\.Module"):
            unchecked(csq.parametrize)("resnet18")


class TestOptimizerGroups:
    def test_every_parameter_is_in_one_group_and_gates_are_not_decayed(self):
        model = csq.parametrize(small_net())
        decayed, free = csq.param_groups(model, 0.01)
        assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
        assert len(free["params"]) == 2 * 4
        everything = [*decayed["params"], *free["params"]]
        assert {id(p) for p in everything} == {id(p) for p in model.parameters()}
        assert len(everything) == len(set(map(id, everything)))
        assert {id(model[1].weight), id(model[0].bias)} <= {id(p) for p in decayed["params"]}

    @pytest.mark.parametrize(
        ("make", "free_names"),
        [
            (lambda weight: rivals.LsqWeight(weight, 2), {"log_step"}),
            (rivals.BsqWeight, {"planes", "log_scale"}),
            (lambda weight: rivals.SteWeight(2), set()),
        ],
    )
    def test_rivals_learn_their_scales_without_decay_too(self, make, free_names):
        model = rivals.attach(small_net(), lambda _, weight: make(weight))
        decayed, free = csq.param_groups(model, 0.01)
        names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
        assert {names[id(p)] for p in free["params"]} == free_names
        assert not {names[id(p)] for p in decayed["params"]} & free_names
        assert len(free["params"]) == 2 * len(free_names)
        assert len(decayed["params"]) + len(free["params"]) == len(names)

    def test_what_is_frozen_is_in_no_group(self):
        model = csq.parametrize(small_net())
        model[1].weight.requires_grad_(False)
        assert all(p is not model[1].weight for g in csq.param_groups(model) for p in g["params"])

    def test_decayed_gates_are_warned_of(self):
        model = csq.parametrize(small_net())
        with pytest.warns(UserWarning, match="8 gate tensors are in a group with weight decay"):
            csq.check_param_groups(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            csq.check_param_groups(model, optimizer_for(model))

    def test_an_optimizer_made_too_early_is_refused(self):
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        csq.parametrize(model)
        with pytest.raises(InputError, match="8 of 8 gate tensors are in no group"):
            csq.check_param_groups(model, optimizer)
