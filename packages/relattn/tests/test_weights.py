"""Section 3.3: the variants of w, and the module that holds what is trained."""

import json

import pytest
import torch
from tiny_models import bart_with_tokenizer, family, t5_with_tokenizer

from relattn import RelAttnConfig, RelAttnModule, Steerer
from relattn.weights import masked_mean
from shared_core import InputError

VARIANTS = ["fixed", "per_layer", "per_head", "linear"]
CONTROL, SOURCE = torch.randn(3, 6), torch.randn(3, 6)


def _config(**settings) -> RelAttnConfig:
    return RelAttnConfig(width=6, layers=2, heads=4, **settings)


@pytest.mark.parametrize("weight", VARIANTS)
def test_every_variant_starts_as_the_fixed_weight(weight):
    found = RelAttnModule(_config(weight=weight, initial_weight=0.07))(CONTROL, SOURCE)
    torch.testing.assert_close(found, torch.full((3, 2, 4), 0.07))


@pytest.mark.parametrize(
    ("weight", "number"), [("fixed", 0), ("per_layer", 2), ("per_head", 8), ("linear", 8 * 12 + 8)]
)
def test_variants_train_as_many_numbers_as_their_shape_says(weight, number):
    assert sum(p.numel() for p in RelAttnModule(_config(weight=weight)).parameters()) == number


def test_per_layer_logits_are_shared_by_heads_and_per_head_ones_are_not():
    module = RelAttnModule(_config(weight="per_layer"))
    module.logits.data = torch.tensor([[0.0], [2.0]])
    found = module(CONTROL, SOURCE)
    torch.testing.assert_close(found[0], torch.tensor([[0.5] * 4, [0.8807971] * 4]))  # sigmoid(2)
    module = RelAttnModule(_config(weight="per_head"))
    module.logits.data = torch.arange(8.0).reshape(2, 4)
    torch.testing.assert_close(module(CONTROL, SOURCE)[2], torch.arange(8.0).reshape(2, 4).sigmoid())


@pytest.mark.parametrize("control_embedding", [True, False])
def test_linear_weight_is_the_sigmoid_of_an_affine_map_of_the_means(control_embedding):
    module = RelAttnModule(_config(weight="linear", control_embedding=control_embedding))
    torch.nn.init.normal_(module.linear.weight)
    x = torch.cat([CONTROL, SOURCE], 1) if control_embedding else SOURCE
    w, b = module.linear.weight, module.linear.bias
    for row in range(3):
        for layer in range(2):
            for head in range(4):
                unit = layer * 4 + head
                expected = torch.sigmoid(w[unit] @ x[row] + b[unit])
                torch.testing.assert_close(module(CONTROL, SOURCE)[row, layer, head], expected)


def test_means_leave_pads_out():
    vectors = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [torch.nan, 99.0]]])
    assert masked_mean(vectors, torch.tensor([[True, True, False]])).tolist() == [[2.0, 4.0]]


@pytest.mark.parametrize("make", [bart_with_tokenizer, t5_with_tokenizer])
def test_linear_weights_of_a_document_alone_and_in_a_padded_batch_are_the_same(make):
    model, tokenizer = make()
    module = RelAttnModule.for_model(model, weight="linear", relevance="trained")
    torch.nn.init.normal_(module.linear.weight)
    steerer = Steerer(model, tokenizer, module=module)
    documents = ["The opera house opened.", "Farmers fear a dry summer, for the river carries little water."]
    controls = ["opera", ["dry summer", "river", "water"]]
    together = [s.weight for s in steerer.generate(documents, controls, max_new_tokens=3)]
    alone = [
        steerer.generate([d], [c], max_new_tokens=3)[0].weight
        for d, c in zip(documents, controls, strict=True)
    ]
    assert together == pytest.approx(alone, abs=1e-6)
    assert abs(together[0] - together[1]) > 1e-3


@pytest.mark.parametrize("weight", VARIANTS)
@pytest.mark.parametrize("relevance", ["fixed", "trained"])
def test_saved_modules_come_back_the_same(tmp_path, weight, relevance):
    module = RelAttnModule(_config(weight=weight, relevance=relevance, temperature="auto", smooth_sigma=None))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    module.save_pretrained(tmp_path / "new" / "folder")
    found = RelAttnModule.from_pretrained(tmp_path / "new" / "folder")
    assert found.config == module.config
    torch.testing.assert_close(found(CONTROL, SOURCE), module(CONTROL, SOURCE), rtol=0, atol=0)
    for name, value in module.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


def test_a_module_can_live_in_the_models_own_folder(tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    model, _ = bart_with_tokenizer()
    model.save_pretrained(tmp_path)
    RelAttnModule.for_model(model, weight="per_head").save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_modules_take_the_models_shapes():
    found = RelAttnModule.for_model(family("bert2bert_projected")).config
    assert (found.width, found.layers, found.heads) == (24, 2, 4)  # the encoder is wider than the decoder


def test_broken_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"relattn_config\.json: is missing"):
        RelAttnModule.from_pretrained(tmp_path)
    RelAttnModule(_config(weight="linear")).save_pretrained(tmp_path)
    config = tmp_path / "relattn_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"heads": 3}))
    with pytest.raises(InputError, match=r"relattn\.safetensors: does not hold this module's weights"):
        RelAttnModule.from_pretrained(tmp_path)
    config.write_text(json.dumps(settings | {"colour": 3}))
    with pytest.raises(InputError, match=r"relattn_config\.json: is not a RelAttnModule's configuration"):
        RelAttnModule.from_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(InputError, match=r"relattn_config\.json: is not a RelAttnModule's configuration"):
        RelAttnModule.from_pretrained(tmp_path)
    config.write_text(json.dumps(settings))
    (tmp_path / "relattn.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"relattn\.safetensors: does not hold"):
        RelAttnModule.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relevance": "cosine"}, 'relevance: expected "fixed" or "trained"'),
        ({"weight": "quadratic"}, 'weight: expected "fixed", "per_layer", "per_head" or "linear"'),
        ({"initial_weight": 1.0}, "initial_weight: expected a number between 0 and 1"),
        ({"smooth_sigma": 0.1}, "smooth_sigma: expected 0.5 or more"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        _config(**settings)


def test_shapes_and_unknown_settings_are_refused():
    with pytest.raises(InputError, match="layers: expected 1 or more"):
        RelAttnConfig(width=6, layers=0, heads=4)
    with pytest.raises(InputError, match="settings: expected one of control_embedding, half_window"):
        RelAttnModule.for_model(family("bart"), weigth="linear")
