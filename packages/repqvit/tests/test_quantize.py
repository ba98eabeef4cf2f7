"""The whole method on every kind of host model."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import hosted_models
import pytest
import torch
from hosted_models import MODELS, build, images, logits
from torch import nn

import repqvit
from repqvit import calibrate, quantized, tracing
from repqvit.layers import AttentionQuantizers, QuantConv2d, QuantLinear
from repqvit.quantizers import Quantizer
from repqvit.recipes import RECIPES, Recipe
from shared_core import InputError


@pytest.fixture(params=list(MODELS))
def name(request) -> str:
    return request.param


def wired(name):
    model = quantized.prepared_copy(build(name))
    x = images(name)
    return model, x, tracing.trace(model, lambda m: m(x[:1]))


@torch.no_grad()
def test_explicit_attention_computes_the_same_function(name):
    model, x, _ = wired(name)
    torch.testing.assert_close(logits(model(x)), logits(build(name)(x)), rtol=1e-4, atol=1e-5)


def test_wiring_finds_every_site_and_attention(name):
    _, _, wiring = wired(name)
    _, _, sites, changeable, attentions = MODELS[name]
    assert len(wiring.sites) == sites
    assert sum(not site.obstacle for site in wiring.sites) == changeable
    assert len(wiring.attentions) == attentions
    assert wiring.floating == []
    assert any(site.padded for site in wiring.sites) == name.endswith("padded")


@torch.no_grad()
def test_reparameterized_network_is_the_same_function_in_floating_point(name):
    """Quantizers off: only the algebra acts, at padded sizes and for three linears on one LayerNorm, too."""
    model, x, wiring = wired(name)
    expected = logits(model(x))
    recipe = Recipe(a_bits=4)
    calibrate.install(model, wiring, recipe)
    calibrate.observe_norms(model, wiring, [lambda m: m(x)])
    for site in wiring.sites:
        if not site.obstacle:
            calibrate.reparameterize(model, site, recipe)
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.state = "off"
    changed = logits(model(x))
    assert (changed - expected).abs().max() <= 1e-4 * expected.abs().max()
    changed_sites = [s for s in wiring.sites if not s.obstacle]
    norms = [model.get_submodule(s.norm) for s in changed_sites]
    original = build(name)
    assert all(
        not torch.equal(n.weight, original.get_submodule(s.norm).weight)
        for n, s in zip(norms, changed_sites, strict=True)
    )


@torch.no_grad()
@pytest.mark.parametrize("order", ["fp-first", "official"])
def test_every_quantizer_acts_and_every_activation_scale_is_one_number(name, order):
    x = images(name)
    q = repqvit.quantize(build(name), x, replace(RECIPES["repqvit"], order=order))
    assert len(q.report.changed_sites) == MODELS[name][3]
    activations = [m for m in q.modules() if isinstance(m, Quantizer)]
    for quantizer in activations:
        quantizer.calls = 0
    output = logits(q(x))
    assert torch.isfinite(output).all()
    assert all(m.calls > 0 and m.scale.numel() == 1 and m.zero_point.numel() == 1 for m in activations)
    attentions = [m for m in q.modules() if isinstance(m, AttentionQuantizers)]
    assert len(attentions) == MODELS[name][4]
    assert all(m.softmax.calls == 1 for m in attentions)
    layers = [m for m in q.modules() if isinstance(m, QuantLinear | QuantConv2d)]
    assert all(int(m.quantized.codes.max()) <= 15 and m.weight[0].unique().numel() <= 16 for m in layers)
    assert not any(type(m) in (nn.Linear, nn.Conv2d) for m in q.modules())


@torch.no_grad()
def test_at_8_bits_uniform_outputs_are_close_to_the_floating_point_model(name):
    model, x = build(name), images(name)
    recipe = replace(RECIPES["repqvit"], w_bits=8, a_bits=8, softmax="uniform")
    q = repqvit.quantize(model, x, recipe)
    expected, output = logits(model(x)), logits(q(x))
    sqnr = 10 * torch.log10(expected.square().sum() / (output - expected).square().sum())
    assert sqnr > 15


@torch.no_grad()
def test_values_after_each_quantizer_are_at_most_2_to_the_b():
    x = images("timm-vit")
    q = repqvit.quantize(build("timm-vit"), x, "repqvit-strict")
    seen: dict[str, int] = {}
    for key, module in q.named_modules():
        if isinstance(module, Quantizer):
            module.register_forward_hook(
                lambda m, a, out, key=key: seen.__setitem__(key, out.unique().numel() - 2**m.bits)
            )
    q(x)
    assert seen
    assert max(seen.values()) <= 0


@torch.no_grad()
def test_weight_ranges_are_searched_again_after_the_change():
    model, x = build("timm-vit"), images("timm-vit")
    q = repqvit.quantize(model, x, replace(RECIPES["repqvit"], order="official"))
    plain = repqvit.quantize(model, x, "channelwise")
    for key in ("blocks.0.attn.qkv", "blocks.1.mlp.fc1"):
        changed, before = (m.model.get_submodule(key).quantized.scale for m in (q, plain))
        assert not torch.allclose(changed, before)
        weight = q.model.get_submodule(key).weight
        assert (weight - q.model.get_submodule(key).quantized.dequantize()).abs().max() == 0


@torch.no_grad()
def test_fp_first_order_is_invariant_to_a_rescaling_that_preserves_the_function():
    """Stress: channels of LayerNorm outputs rescaled by g, the next weights by 1/g. The merged ratio undoes
    it."""
    model, x = build("timm-vit"), images("timm-vit", 16)
    stressed = copy.deepcopy(model)
    factors = torch.exp(1.5 * torch.randn(32))
    for block in stressed.blocks:
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            norm.weight.mul_(factors)
            norm.bias.mul_(factors)
            linear.weight.div_(factors)
    expected = model(x)
    torch.testing.assert_close(stressed(x), expected, rtol=1e-3, atol=1e-3)

    def error(recipe):
        return (repqvit.quantize(stressed, x, recipe)(x) - expected).square().mean()

    reference = (repqvit.quantize(model, x, "repqvit")(x) - expected).square().mean()
    assert error("repqvit") < 2 * reference
    assert error("repqvit") < 0.5 * error("percentile-mse")


@torch.no_grad()
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_batches_in_lockstep_give_the_single_batch_result(recipe):
    model, x = build("timm-vit"), images("timm-vit", 9)
    whole = repqvit.quantize(model, x, recipe)
    parts = repqvit.quantize(model, [x[:4], x[4:5], x[5:]], recipe)
    scales = [{k: v for k, v in m.state_dict().items() if "scale" in k} for m in (whole, parts)]
    for key, value in scales[0].items():
        torch.testing.assert_close(scales[1][key], value, rtol=1e-4, atol=1e-7, msg=key)
    torch.testing.assert_close(parts(x), whole(x), rtol=1e-2, atol=2e-2)


@torch.no_grad()
def test_calibration_leaves_the_model_and_the_global_generator_alone():
    model, x = build("timm-vit").train(), images("timm-vit")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (repqvit.quantize(model, x) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not first.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(first(x), second(x))


@torch.no_grad()
def test_save_and_load_reproduce_the_model_bit_for_bit(name, tmp_path):
    model, x = build(name), images(name)
    q = repqvit.quantize(model, x, w_bits=3, a_bits=5)
    q.save(tmp_path / "q.safetensors")
    fresh = build(name)
    for p in fresh.parameters():
        nn.init.normal_(p)
    again = repqvit.load(fresh, tmp_path / "q.safetensors")
    assert torch.equal(logits(again(x)), logits(q(x)))
    assert str(again.report) == str(q.report)
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "repqvit"])
def test_every_recipe_saves_and_loads(recipe, tmp_path):
    model, x = build("timm-swin-padded"), images("timm-swin-padded")
    q = repqvit.quantize(model, x, recipe)
    q.save(tmp_path / "q.safetensors")
    assert torch.equal(repqvit.load(model, tmp_path / "q.safetensors")(x), q(x))


def test_weights_take_their_width_on_disk(tmp_path):
    import timm
    from safetensors import safe_open

    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10)
    x = torch.randn(8, 3, 64, 64)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    total = sum(p.numel() for p in model.parameters())
    for bits in (3, 4, 8):
        path = tmp_path / f"{bits}.safetensors"
        repqvit.quantize(model, x, w_bits=bits, a_bits=8).save(path)
        floating = 4 * (total - weights)
        assert path.stat().st_size < weights * bits / 8 + 1.1 * floating + 200_000
        assert path.stat().st_size < (bits / 32 + 0.02) * 4 * total
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            sizes = {key: value.numel() for key, value in tensors.items() if value.is_floating_point()}
        assert max(sizes.values()) <= model.pos_embed.numel()


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


def swin_v2():
    from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlockV2

    return SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], block=SwinTransformerBlockV2)


def with_nan():
    model = build("timm-vit")
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
    return model


def with_shared_consumer():
    """A LayerNorm whose output also goes around the linear layer."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.norm(x.flatten(2).transpose(1, 2))
            return y + self.fc(y)

    return nn.Sequential(nn.Conv2d(3, 8, 8, 8), Block())


X = images("timm-vit")


@pytest.mark.parametrize(
    ("model", "calibration", "kwargs", "message"),
    [
        (lambda: build("timm-vit"), X[:0], {}, "calibration set is empty"),
        (lambda: build("timm-vit"), [], {}, "calibration set is empty"),
        (lambda: build("timm-vit"), X * float("nan"), {}, "calibration images must be finite"),
        (lambda: build("timm-vit"), X.to(torch.uint8), {}, "floating point, preprocessed"),
        (lambda: build("timm-vit"), torch.arange(8.0), {}, "were labels passed"),
        (lambda: build("timm-vit"), {"labels": torch.arange(8)}, {}, "no image tensor"),
        (lambda: build("timm-vit"), X, {"w_bits": 1}, "w_bits must be an integer from 2 to 8, got 1"),
        (lambda: build("timm-vit"), X, {"a_bits": 9}, "a_bits must be an integer from 2 to 8, got 9"),
        (lambda: build("timm-vit"), X, {"recipe": "gptq"}, "unknown recipe 'gptq'; known: repqvit"),
        (with_nan, X, {}, r"blocks\.0\.mlp\.fc1\.weight: weights must be finite"),
        (resnet, X, {}, "no LayerNorm to reparameterize: looked for"),
        (with_shared_consumer, X, {}, "its output also goes to add"),
        (swin_v2, X, {}, "attention must call scaled_dot_product_attention"),
    ],
)
def test_bad_input_gets_one_clear_line(model, calibration, kwargs, message):
    with pytest.raises(InputError, match=message) as error:
        repqvit.quantize(model(), calibration, **kwargs)
    assert "\n" not in str(error.value)


def test_a_batch_of_file_names_is_refused():
    # Not through `quantize`: under test the type checks of its signature would speak first.
    with pytest.raises(InputError, match="a calibration batch must be a tensor"):
        quantized._images("a.jpg")


def test_a_quantized_model_is_not_quantized_again():
    q = repqvit.quantize(build("timm-vit"), X)
    for again in (q, q.model):
        with pytest.raises(InputError, match="already quantized"):
            repqvit.quantize(again, X)


def test_wrappers_are_taken_off():
    q = repqvit.quantize(torch.compile(nn.DataParallel(build("timm-vit"))), X)
    with torch.no_grad():
        assert torch.equal(q(X), repqvit.quantize(build("timm-vit"), X)(X))


def test_half_precision_weights_are_calibrated_in_float32():
    model = build("timm-vit").half()
    q = repqvit.quantize(model, X)
    assert model.head.weight.dtype == torch.float16
    assert all(t.dtype == torch.float32 for t in q.state_dict().values() if t.is_floating_point())


def test_unlikely_calibration_images_draw_a_warning():
    model = build("timm-vit")
    with pytest.warns(UserWarning, match="7 calibration images are few"):
        repqvit.quantize(model, X[:7])
    with pytest.warns(UserWarning, match="look like 0..255 values"):
        repqvit.quantize(model, 255 * X.sigmoid())
    with pytest.warns(UserWarning, match="look like images that were not normalised"):
        repqvit.quantize(model, X.sigmoid())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repqvit.quantize(model, X)


def test_a_linear_shared_by_two_blocks_is_not_scaled_twice():
    model = build("timm-vit")
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    q = repqvit.quantize(model, X)
    obstacles = {s.norm: s.obstacle for s in q.report.sites}
    assert "is shared with another layer" in obstacles["blocks.0.norm2"]
    assert "is shared with another layer" in obstacles["blocks.1.norm2"]
    assert obstacles["blocks.0.norm1"] == ""
    model.blocks[1].mlp = model.blocks[0].mlp
    q = repqvit.quantize(model, X)
    assert "used more than once" in {s.norm: s.obstacle for s in q.report.sites}["blocks.0.norm2"]


def test_a_fallback_is_told():
    report = repqvit.quantize(build("timm-vit"), X).report
    assert "4 of 5 LayerNorm sites" in str(report)
    assert "norm is quantized per tensor: its output also goes to token selection" in str(report)


def test_an_identity_head_and_a_dead_channel_do_no_harm():
    model = build("timm-vit")
    model.head = nn.Identity()
    with torch.no_grad():
        for norm in (model.blocks[0].norm1, model.blocks[1].norm2):
            norm.weight[3] = norm.bias[3] = 0
            norm.weight[4], norm.bias[4] = 0, 7.5
    q = repqvit.quantize(model, X, w_bits=8, a_bits=8)
    with torch.no_grad():
        expected, output = model(X), q(X)
    assert torch.isfinite(output).all()
    assert (output - expected).square().mean() < 0.1 * expected.square().mean()


def test_own_widths_of_stem_norm_softmax_and_head():
    recipe = Recipe(w_bits=8, a_bits=8, norm_bits=4, softmax_bits=3, head_bits=6, stem_bits=7)
    rows = {(r.name, r.role): r.bits for r in repqvit.quantize(build("timm-vit"), X, recipe).report.layers}
    assert rows["blocks.0.attn.qkv", "input"] == 4
    assert rows["blocks.0.attn", "softmax"] == 3
    assert rows["head", "input"] == rows["head", "weight"] == 6
    assert rows["patch_embed.proj", "input"] == 7
    assert rows["blocks.0.mlp.fc2", "input"] == rows["blocks.0.mlp.fc2", "weight"] == 8


def test_loading_into_another_architecture_names_what_differs(tmp_path):
    path = tmp_path / "q.safetensors"
    repqvit.quantize(build("timm-vit"), X).save(path)
    with pytest.raises(
        InputError, match=r"another architecture than ViTForImageClassification: .* is missing"
    ):
        repqvit.load(build("hf-vit"), path)
    other = build("timm-vit")
    other.head = nn.Linear(32, 7)
    with pytest.raises(InputError, match=r"head has shape \[7, 32\], the file \[5, 32\]"):
        repqvit.load(other, path)


def test_files_of_another_kind_or_damaged_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(InputError, match="no such file"):
        repqvit.load(build("timm-vit"), tmp_path / "absent.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(InputError, match="not a quantized model of this package"):
        repqvit.load(build("timm-vit"), other)
    whole = tmp_path / "q.safetensors"
    repqvit.quantize(build("timm-vit"), X).save(whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        repqvit.load(build("timm-vit"), tmp_path / "cut.safetensors")


def test_an_error_in_one_of_several_batches_is_the_one_that_is_raised():
    with pytest.raises(RuntimeError, match="size"):
        repqvit.quantize(build("timm-swin-padded"), [images("timm-swin-padded"), torch.randn(4, 5, 40, 40)])


def test_hosted_models_cover_the_families():
    assert {n.split("-")[0] for n in hosted_models.MODELS} == {"timm", "torchvision", "hf"}


class Scaled(nn.Linear):
    """A subclass that computes something else than its class."""

    def forward(self, input):
        return 2 * super().forward(input)


def with_layer(change):
    model = build("timm-vit")
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.blocks[0].mlp, "fc1", Scaled(32, 128)), "Scaled computes something else"),
        (
            lambda m: m.blocks[0].mlp.fc1.register_forward_hook(lambda *a: None),
            "drop the layer's forward hooks",
        ),
        (lambda m: nn.utils.parametrizations.weight_norm(m.head), "remove parametrizations first"),
    ],
)
def test_layers_that_a_quantized_one_would_not_repeat_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        repqvit.quantize(with_layer(change), X)


def test_a_transposed_norm_output_is_no_site_even_where_sizes_agree():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mix = nn.LayerNorm(16), nn.Linear(16, 16)
            self.norm2, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x):
            x = x.flatten(2).transpose(1, 2)
            x = x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
            return x + self.fc(self.norm2(x))

    model = nn.Sequential(nn.Conv2d(3, 16, 8, 8), Mixer()).eval()
    wiring = tracing.trace(model, lambda m: m(torch.randn(1, 3, 32, 32)))
    assert [site.norm for site in wiring.sites] == ["1.norm2"]


@pytest.mark.parametrize("late", [True, False])
def test_batches_that_take_different_ways_through_the_model_are_refused(late):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, self.extra = build("timm-vit"), nn.Linear(5, 5)

        def forward(self, x):
            y = self.vit(x)
            return self.extra(y) if len(x) > 4 else y

    model = Branching().eval()
    batches = [X[:4], torch.cat([X, X])[:9]] if late else [torch.cat([X, X])[:9], X[:4]]

    q = quantized.prepared_copy(model)
    wiring = tracing.trace(q, lambda m: m(torch.cat([X, X])[:9]))
    calibrate.install(q, wiring, Recipe())
    with pytest.raises(ValueError, match="different ways through the model"):
        calibrate.calibrate(q, wiring, Recipe(), [lambda m, b=b: m(b) for b in batches])


@torch.no_grad()
def test_parameters_loaded_in_place_are_the_ones_in_use():
    model = build("timm-vit")
    first, second = (repqvit.quantize(model, x) for x in (X, 3 * X + 1))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(X), first(X))


@torch.no_grad()
def test_a_data_loader_with_labels_calibrates():
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, torch.zeros(len(X), dtype=torch.long)), batch_size=4
    )
    by_loader = repqvit.quantize(build("timm-vit"), loader)
    assert torch.equal(by_loader(X), repqvit.quantize(build("timm-vit"), [X[:4], X[4:]])(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_calibration_images_of_any_precision_are_taken(dtype):
    q = repqvit.quantize(build("timm-vit").to(dtype), X.to(dtype))
    assert q.head.weight.dtype == torch.float32


def test_heads_whose_outputs_are_averaged_take_head_bits():
    q = repqvit.quantize(build("timm-deit-distilled"), X, Recipe(head_bits=8))
    bits = {r.name: r.bits for r in q.report.layers if r.role == "weight"}
    assert bits["head"] == bits["head_dist"] == 8
    assert bits["blocks.0.mlp.fc1"] == 4


def test_layers_that_stay_in_floating_point_are_told():
    model = build("timm-vit")
    model.unused = nn.Linear(3, 3)
    report = repqvit.quantize(model, X).report
    assert report.floating == ["unused"]
    assert "unused stays in floating point" in str(report)


def test_images_that_were_not_normalised_for_a_transformers_model_draw_a_warning():
    with pytest.warns(UserWarning, match="not normalised"):
        repqvit.quantize(build("hf-vit"), X.sigmoid())


def test_a_model_with_unset_weights_can_be_loaded_into(tmp_path):
    repqvit.quantize(build("timm-vit"), X).save(tmp_path / "q.safetensors")
    fresh = build("timm-vit")
    with torch.no_grad():
        fresh.head.weight.fill_(float("nan"))
    assert torch.isfinite(repqvit.load(fresh, tmp_path / "q.safetensors")(X)).all()


def test_an_interrupted_save_leaves_the_older_file_whole(tmp_path, monkeypatch):
    q, path = repqvit.quantize(build("timm-vit"), X), tmp_path / "q.safetensors"
    q.save(path)
    before = path.read_bytes()

    def half(tensors, target, metadata):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("repqvit.checkpoint.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        q.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
