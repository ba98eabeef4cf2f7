"""Backbones against torchvision's networks and a literal attention."""

from __future__ import annotations

import pytest
import tiny
import torch
import torchvision
from torch import nn

from kdcicam.backbones import LEAK, VGG16, NonLocalBlock, as_map, build_backbone
from kdcicam.model import CICAM
from shared_core import InputError


def test_a_non_local_block_is_the_literal_attention():
    block, x = NonLocalBlock(16).eval(), torch.randn(2, 16, 3, 5)
    nn.init.normal_(block.norm.weight)
    nn.init.normal_(block.norm.bias)
    q, k, v = (conv(x).flatten(2) for conv in (block.query, block.key, block.value))
    assert q.shape[1] == 2
    attention = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k), 2)
    mixed = torch.einsum("bcm,bnm->bcn", v, attention).view_as(x)
    torch.testing.assert_close(block(x), x + block.norm(block.out(mixed)))


def test_it_is_the_identity_at_the_start():
    block, x = NonLocalBlock(8), torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x), x)


def test_one_image_with_a_map_of_one_cell_is_refused_in_training():
    block = NonLocalBlock(8)
    with pytest.raises(InputError, match="batch_size: a batch of one image with a map of 1x1"):
        block(torch.randn(1, 8, 1, 1))
    assert block.eval()(torch.randn(1, 8, 1, 1)).shape == (1, 8, 1, 1)


def test_vgg16_at_the_start_is_torchvisions_with_leaky_activations_and_without_pool5():
    state = torchvision.models.vgg16(weights=None).state_dict()
    ours = VGG16().eval()
    ours.load_pretrained(state)
    theirs = torchvision.models.vgg16(weights=None)
    theirs.load_state_dict(state)
    layers = [nn.LeakyReLU(LEAK) if isinstance(m, nn.ReLU) else m for m in theirs.features[:-1]]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), nn.Sequential(*layers)(x))
    assert [m.norm.num_features for m in ours.modules() if isinstance(m, NonLocalBlock)] == [
        128,
        256,
        512,
        512,
    ]


def test_the_imagenet_variant_has_1024_channels_and_one_block_less():
    ours = VGG16("imagenet", width=4)
    assert [m.norm.num_features for m in ours.modules() if isinstance(m, NonLocalBlock)] == [16, 32, 32]
    assert [m.out_channels for m in ours.extra if isinstance(m, nn.Conv2d)] == [64, 64]
    assert ours(torch.randn(1, 3, 32, 32)).shape == (1, 64, 2, 2)
    assert not any(isinstance(m, NonLocalBlock) for m in VGG16(non_local=False, width=4).modules())


def test_vgg16_maps_are_14x14_at_224():
    assert CICAM("vgg16", 4, width=2).map_size == (14, 14)


def test_other_weights_are_refused():
    with pytest.raises(InputError, match="weights: these are not VGG16's"):
        VGG16(width=4).load_pretrained(torchvision.models.vgg11(weights=None).features.state_dict())


def test_inception_is_torchvisions_up_to_mixed_6e():
    theirs = torchvision.models.inception_v3(
        weights=None, init_weights=False, aux_logits=False, transform_input=False
    ).eval()
    ours = build_backbone("inception_v3").eval()
    ours.load_pretrained(theirs.state_dict())
    seen = {}
    theirs.Mixed_6e.register_forward_hook(lambda module, given, out: seen.update(out=out))
    x = torch.randn(1, 3, 299, 299)
    with torch.no_grad():
        feature = ours(x)
        theirs(x)
    torch.testing.assert_close(feature, seen["out"])
    assert feature.shape == (1, 768, 17, 17)
    assert list(ours.non_local) == ["Mixed_5d", "Mixed_6e"]
    nn.init.ones_(ours.non_local["Mixed_5d"].norm.weight)  # it begins as identity
    with torch.no_grad():
        assert not torch.allclose(ours(x), feature)


@pytest.mark.parametrize(
    ("name", "options", "channels", "side"),
    [
        ("test_resnet", {}, 96, 2),
        ("timm/test_resnet", {"out_index": -2}, 192, 4),
        ("test_vit", {"img_size": 64}, 64, 4),
        ("test_vit2", {"img_size": 64}, None, 4),
    ],
)
def test_timm_models_give_maps_and_tokens_become_a_grid(name, options, channels, side):
    import timm

    if not timm.is_model(name.removeprefix("timm/")):
        pytest.skip(f"timm has no {name}")
    model = CICAM(name, 3, image_size=64, **options)
    assert model.map_size == (side, side)
    assert channels is None or model.channels == channels
    out = model(torch.randn(2, 3, 64, 64))
    assert out.cam.shape == (2, 3, side, side)


def test_tokens_are_laid_out_row_by_row_after_the_class_token():
    tokens = torch.arange(7.0).view(1, 7, 1)
    assert as_map(tokens, None, (32, 48))[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert as_map(tokens, 1, (32, 48)).shape == (1, 1, 2, 3)
    with pytest.raises(InputError, match=r"no grid .* say how many come before .* \(got 7\)"):
        as_map(tokens, 0, (32, 48))


def test_what_is_no_map_is_refused():
    with pytest.raises(InputError, match=r"backbone: expected a map .* \(got \(1, 6\)\)"):
        CICAM(nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 6)), 3, image_size=24)


def test_names_that_are_none():
    with pytest.raises(InputError, match=r"timm has no such model; it has .*resnet"):
        build_backbone("resnet_19")
    with pytest.raises(InputError, match="backbone: the module has no nothing"):
        build_backbone("tiny:nothing")
    with pytest.raises(InputError, match="gives int, expected a module"):
        build_backbone("builtins:int")
    assert CICAM("tiny:backbone", 3, image_size=24).map_size == (6, 6)
    assert CICAM(tiny.backbone(), 3, image_size=24).map_size == (6, 6)
