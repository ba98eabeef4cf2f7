import math
from collections import OrderedDict
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from repqvit import quantize
from repqvit.evaluation import compare, evaluate, latency, logits_of, norm_ranges
from repqvit.inspection import compare_norms, tensor_rows
from repqvit.quantized import QuantizedModel
from shared_core import InputError, metrics


def decibels(exact: Tensor, near: Tensor) -> float:
    """Signal to noise, from its definition."""
    noise = (exact.double() - near.double()).square().sum().item()
    return 10 * math.log10(exact.double().square().sum().item() / noise) if noise else math.inf


def pixels(count: int = 8, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=7).eval()


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, QuantizedModel]:
    model = small_vit()
    return model, quantize(model, pixels(), w_bits=4, a_bits=4)


class Scores(nn.Module):
    """The first values of each image as scores, times a factor."""

    def __init__(self, classes: int, factor: float = 1.0) -> None:
        super().__init__()
        self.classes = classes
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x.flatten(1)[:, : self.classes]


# evaluate


def test_accuracy_by_hand():
    scores = torch.tensor([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [9, 4, 5, 6, 7, 1]])
    labels = torch.tensor([0, 0, 1])  # the first, the last, and the fifth of six
    found = evaluate(Scores(6), [(scores, labels)], topk=(1, 2, 5, 7))
    assert found.images == 3
    assert found.accuracy["top1"] == pytest.approx(1 / 3)
    assert found.accuracy["top2"] == pytest.approx(1 / 3)
    assert found.accuracy["top5"] == pytest.approx(2 / 3)
    assert set(found.accuracy) == {"top1", "top2", "top5"}  # of 6 classes there is no top 7
    assert found.agreement is None


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    noise=st.floats(0.01, 2),
    seed=st.integers(0, 99),
)
def test_streaming_gives_what_all_images_at_once_give(sizes: list[int], noise: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(sum(sizes), 8, generator=generator)
    labels = torch.randint(0, 8, (sum(sizes),), generator=generator)

    class Noisy(Scores):
        def forward(self, x: Tensor) -> Tensor:
            return x + noise * torch.sin(37 * x)

    data = list(zip(images.split(sizes), labels.split(sizes), strict=True))
    found = evaluate(Noisy(8), data, Scores(8))
    approx = Noisy(8)(images)
    assert found.images == len(images)
    assert found.accuracy == pytest.approx(metrics.classification(approx, labels))
    assert found.reference_accuracy == pytest.approx(metrics.classification(images, labels))
    assert found.agreement == pytest.approx(metrics.agreement(approx, images))
    assert found.sqnr_db == pytest.approx(decibels(images, approx), rel=1e-6)


def test_a_model_against_itself_agrees_without_noise(pair: tuple[nn.Module, QuantizedModel]):
    model, quantized = pair
    found = evaluate(model, [pixels()], model)
    assert (found.agreement, found.sqnr_db, found.accuracy) == (1.0, math.inf, {})
    noisy = evaluate(quantized, [pixels()], model).sqnr_db
    assert noisy is not None
    assert 0 < noisy < 60


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, None),
        lambda x: {"loss": None, "logits": x},
        lambda x: OrderedDict(out=x),
        lambda x: SimpleNamespace(logits=x),
        lambda x: transformers.modeling_outputs.ImageClassifierOutput(logits=x),
    ],
)
def test_scores_are_found_in_every_kind_of_output(wrap: Any):
    scores = torch.randn(2, 3)
    assert logits_of(wrap(scores)) is scores


def test_an_output_without_scores_is_refused():
    with pytest.raises(InputError, match=r"expected as the model's output a tensor, .* \(got 'int'\)"):
        logits_of(3)


def test_a_mapping_is_the_keyword_arguments_of_forward():
    found = evaluate(Scores(4), [({"x": torch.eye(4)}, torch.arange(4))])
    assert found.accuracy["top1"] == 1


def test_both_models_run_in_evaluation_mode_and_get_their_mode_back():
    class Watched(Scores):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return super().forward(x)

    model, reference = Watched(4).train(), Watched(4).eval()
    evaluate(model, [torch.eye(4)], reference)
    assert model.training
    assert not reference.training


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "there is no image to evaluate on"),
        ([(torch.eye(4), torch.tensor([0, 1, 2, 4]))], "labels: expected 0 to 3, got 0 to 4"),
        ([(torch.eye(4), torch.tensor([0, 1]))], "labels must be integers, one for each of 4 images"),
        ([(torch.eye(4), torch.ones(4))], "labels must be integers"),
        ([torch.full((2, 4), math.nan)], "the outputs of Scores must be finite"),
    ],
)
def test_data_that_cannot_be_judged_get_one_clear_line(data: list, message: str):
    with pytest.raises(InputError, match=message):
        evaluate(Scores(4), data)


def test_labels_of_a_detector_are_refused():
    with pytest.raises(InputError, match=r"labels need a classifier with outputs \(images, classes\)"):
        evaluate(nn.Identity(), [(torch.zeros(2, 5, 3), torch.zeros(2, dtype=torch.long))])


# compare


def test_a_layers_row_is_its_output_noise_measured_by_hand(pair: tuple[nn.Module, QuantizedModel]):
    model, quantized = pair
    outputs: list[Tensor] = []
    for each in (model, quantized.model):
        layer = each.get_submodule("blocks.1.mlp.fc1")
        handle = layer.register_forward_hook(lambda m, args, out: outputs.append(out))
        each(pixels(seed=5))
        handle.remove()
    exact, near = outputs
    row = next(r for r in compare(model, quantized, pixels(seed=5)) if r.name == "blocks.1.mlp.fc1")
    assert row.kind == "linear"
    assert row.sqnr_db == pytest.approx(decibels(exact, near), abs=1e-3)
    cosine = torch.cosine_similarity(exact.flatten(), near.flatten(), dim=0).item()
    assert row.cosine == pytest.approx(cosine, abs=1e-5)


def test_several_batches_are_compared_as_one(pair: tuple[nn.Module, QuantizedModel]):
    model, quantized = pair
    whole = compare(model, quantized, pixels())
    parts = compare(model, quantized, pixels().split(3))
    assert [r.name for r in whole] == [r.name for r in parts]
    assert [r.sqnr_db for r in parts] == pytest.approx([r.sqnr_db for r in whole], abs=1e-3)


def test_layernorm_outputs_are_left_out_and_all_else_is_there(pair: tuple[nn.Module, QuantizedModel]):
    rows = compare(*pair, pixels())
    names = {row.name: row.kind for row in rows}
    assert not any("norm" in name for name in names)
    assert names["patch_embed.proj"] == "convolution"
    assert names["blocks.0.attn.qkv"] == names["head"] == "linear"
    assert names["blocks.0.attn"] == "attention"
    assert names["blocks.0"] == "block"
    assert rows[-1].name == rows[-1].kind == "output"


def test_more_bits_leave_less_noise_in_every_block():
    model = small_vit()
    noise = []
    for bits in (3, 8):
        rows = compare(model, quantize(model, pixels(), w_bits=bits, a_bits=bits), pixels())
        noise.append([row.sqnr_db for row in rows if row.kind in ("block", "output")])
    for coarse, fine in pairwise(noise):
        assert all(c < f for c, f in zip(coarse, fine, strict=True))


def hugging_face_swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        num_labels=3,
    )
    return transformers.SwinForImageClassification(config)


@pytest.mark.parametrize(
    ("make", "attention", "block"),
    [
        (
            lambda: VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=3),
            "encoder.layers.encoder_layer_1.self_attention",
            "encoder.layers.encoder_layer_1",
        ),
        (hugging_face_swin, "swin.encoder.layers.1.blocks.0.attention", "swin.encoder.layers.1.blocks.0"),
    ],
)
def test_layers_are_matched_in_every_library(make: Any, attention: str, block: str):
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    rows = {row.name: row for row in compare(model, quantize(model, pixels(), w_bits=8, a_bits=8), pixels())}
    assert rows[attention].kind == "attention"
    assert rows[block].kind == "block"
    assert rows[block].sqnr_db > 20


def test_another_model_as_the_reference_is_refused(pair: tuple[nn.Module, QuantizedModel]):
    with pytest.raises(
        InputError, match=r"the reference is another model: it has no layer patch_embed\.proj"
    ):
        compare(VisionTransformer(32, 16, 2, 2, 32, 64), pair[1], pixels())
    other_head = timm.create_model("test_vit", img_size=32, num_classes=5)
    with pytest.raises(InputError, match="another model: the outputs of head differ in number or shape"):
        compare(other_head, pair[1], pixels())
    with pytest.raises(InputError, match="there is no image to compare on"):
        compare(*pair, [])


# Ranges, rows, latency


def test_channel_ranges_by_hand():
    norm = nn.LayerNorm(3)
    x = torch.tensor([[[1.0, 2.0, 6.0], [3.0, 0.0, 0.0]]])
    low, high = norm_ranges(nn.Sequential(norm), ["0"], x)["0"]
    rows = norm(x).detach()[0]
    assert torch.equal(low, rows.amin(0))
    assert torch.equal(high, rows.amax(0))


def test_reparameterization_evens_out_channels_of_very_different_range():
    model = small_vit()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm) and name != "norm":
                module.weight.mul_(torch.logspace(-1, 1, len(module.weight)))
    quantized = quantize(model, pixels(16), w_bits=8, a_bits=8)
    for ranges in compare_norms(model, quantized, pixels(16)):
        assert ranges.spread_before > 5
        assert ranges.spread_after < 1.5


def test_padded_swin_ranges_are_those_that_the_linear_layers_read():
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=40, patch_size=4, window_size=4, embed_dim=16, depths=(1,),
        num_heads=(2,), num_classes=3,
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.layers[0].blocks[0].norm1.bias.add_(torch.linspace(-3, 3, 16))
    quantized = quantize(model, pixels(8, 40), w_bits=8, a_bits=8)
    linear = quantized.model.get_submodule("layers.0.blocks.0.attn.qkv")
    assert linear.input_shift is not None  # the case at hand: 10 patches in windows of 4
    ranges = next(r for r in compare_norms(model, quantized, pixels(8, 40)) if r.site.padded)
    scale, zero_point = float(ranges.quantizer.scale), float(ranges.quantizer.zero_point)
    low, high = (end / scale + zero_point for end in ranges.after)
    assert low.median() == pytest.approx(0, abs=15)  # codes 0..255 cover the range of each channel
    assert high.median() == pytest.approx(255, abs=15)


def test_a_row_for_every_quantized_tensor(pair: tuple[nn.Module, QuantizedModel]):
    quantized = pair[1]
    rows = tensor_rows(quantized)
    reported = quantized.report.layers
    assert sorted((r.name, r.role, r.bits, r.scales) for r in rows) == sorted(
        (r.name, r.role, r.bits, r.scales) for r in reported
    )
    assert all(row.scales == 1 for row in rows if row.role != "weight")
    softmax = next(row for row in rows if row.role == "softmax")
    assert softmax.form == "LogSqrt2"
    assert all(0 <= row.zero_point[0] <= row.zero_point[1] < 2**row.bits for row in rows)


def test_models_take_turns_when_they_are_timed():
    calls = []

    class Counted(Scores):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(self.classes)
            return super().forward(x)

    times = latency([Counted(3), Counted(4)], torch.eye(4), repeats=5, warmup=2)
    assert calls == [3, 4] * 7
    assert all(0 < each.p50_ms <= each.p90_ms for each in times)
