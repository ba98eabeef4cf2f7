from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from rlogist.extractors import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EncoderExtractor,
    NormalizationWarning,
    load_extractor,
)
from rlogist.stain import StainExtractor, optical_density, separate_stains
from shared_core import InputError


@pytest.fixture(scope="module")
def resnet() -> EncoderExtractor:
    return load_extractor("resnet50", pretrained=False)


@pytest.fixture
def patches() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3)).astype(np.uint8)


def test_the_default_is_resnet50_up_to_stage_3_averaged(resnet, patches):
    assert resnet.dim == 1024
    assert sum(p.numel() for p in resnet.encoder.parameters()) == pytest.approx(8.54e6, abs=5e3)
    whole = timm.create_model("resnet50").eval()
    whole.load_state_dict(resnet.encoder.model.state_dict(), strict=False)
    x = torch.from_numpy(patches).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    with torch.no_grad():
        x = whole.maxpool(whole.act1(whole.bn1(whole.conv1(x))))
        expected = whole.layer3(whole.layer2(whole.layer1(x))).mean(dim=(2, 3))
    torch.testing.assert_close(resnet(patches), expected, rtol=1e-4, atol=1e-5)


def test_two_runs_agree_bit_for_bit_though_someone_turned_training_on(resnet, patches):
    first = resnet(patches)
    resnet.encoder.train()
    assert torch.equal(resnet(patches), first)
    assert torch.equal(load_extractor("resnet50", pretrained=False)(patches), first)


def test_batches_give_what_one_pass_gives(resnet, patches):
    small = EncoderExtractor(resnet.encoder, "resnet50", batch_size=2)
    torch.testing.assert_close(small(patches), resnet(patches), rtol=1e-4, atol=1e-5)
    assert resnet(patches[:0]).shape == (0, 1024)


def test_the_fingerprint_tells_weights_and_preparation_apart(resnet):
    same = load_extractor("resnet50", pretrained=False)
    other = load_extractor("resnet50", pretrained=False, seed=1)
    prepared = EncoderExtractor(resnet.encoder, "resnet50", mean=(0.5, 0.5, 0.5))
    assert same.fingerprint == resnet.fingerprint
    assert len({resnet.fingerprint, other.fingerprint, prepared.fingerprint}) == 3


def test_the_fingerprint_does_not_depend_on_how_tensors_are_printed():
    # On a GPU they are printed with their device; features extracted there are read on a CPU too.
    first = load_extractor("timm/test_resnet", pretrained=False).fingerprint
    torch.set_printoptions(precision=2)
    try:
        assert load_extractor("timm/test_resnet", pretrained=False).fingerprint == first
    finally:
        torch.set_printoptions(profile="default")


def test_making_an_extractor_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    load_extractor("timm/test_resnet", pretrained=False)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_any_timm_encoder(patches):
    found = load_extractor("timm/deit_tiny_patch16_224", pretrained=False)
    assert found(patches).shape == (5, found.dim) == (5, 192)
    assert found.input_size == 224  # its position embedding has a fixed size


def test_any_transformers_encoder(tmp_path, patches):
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
    )
    model = transformers.ViTModel(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.warns(NormalizationWarning, match="ImageNet's mean and deviation are used"):
        assert torch.equal(load_extractor(f"hf/{tmp_path}")._mean.flatten(), torch.tensor(IMAGENET_MEAN))
    transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5] * 3).save_pretrained(tmp_path)
    found = load_extractor(f"hf/{tmp_path}")
    assert torch.equal(found._mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert found.input_size == 32
    small = patches[:, :32, :32]
    x = (torch.from_numpy(np.array(small)).permute(0, 3, 1, 2) / 255 - found._mean) / found._std
    with torch.no_grad():
        torch.testing.assert_close(found(small), model(pixel_values=x).pooler_output)


def test_weights_come_from_a_file_and_must_fit(tmp_path, patches):
    source = load_extractor("timm/test_resnet", pretrained=False, seed=5)
    path = tmp_path / "w.safetensors"
    save_file(source.encoder.state_dict() | {"head.weight": torch.zeros(2, 2)}, path)
    assert torch.equal(load_extractor("timm/test_resnet", weights=path)(patches), source(patches))
    with pytest.raises(InputError, match=r"does not fit the encoder: \d+ tensors missing"):
        load_extractor("timm/test_vit", weights=path)
    path.write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"not a whole \.safetensors file"):
        load_extractor("timm/test_resnet", weights=path)
    with pytest.raises(InputError, match="there is no such file"):
        load_extractor("timm/test_resnet", weights=tmp_path / "none")


def test_weights_that_cannot_be_fetched_say_what_to_do(monkeypatch):
    def offline(*_, **options):
        raise OSError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"cannot be had \(no route to the hub\): give a file \(--weights\)"):
        load_extractor("timm/test_resnet")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet5", "expected resnet50, stain"),
        ("timm/no_such", "timm has no such model"),
        ("no_module_here:make", "there is no such module here"),
    ],
)
def test_unknown_names_are_refused(name, words):
    with pytest.raises(InputError, match=words):
        load_extractor(name)


def test_a_device_that_is_not_there_and_weights_of_a_fixed_extractor_are_told(tmp_path):
    for device in ("cuda:99", "no-device"):
        with pytest.raises(InputError, match="device: cannot be used here"):
            load_extractor("timm/test_resnet", pretrained=False, device=device)
    with pytest.raises(InputError, match="stain is fixed and has no weights"):
        load_extractor("stain", weights=tmp_path / "w")


def test_a_callable_of_the_users_own(monkeypatch):
    monkeypatch.setitem(
        __import__("sys").modules,
        "own_encoders",
        SimpleNamespace(good=lambda device, batch_size: StainExtractor(), bad=lambda device, batch_size: 3),
    )
    assert load_extractor("own_encoders:good").dim == 36
    with pytest.raises(InputError, match="expected a callable with name, dim and fingerprint"):
        load_extractor("own_encoders:bad")


def test_an_encoder_without_vectors_is_refused():
    with pytest.raises(InputError, match=r"own: expected an encoder that gives \(batch, dim\)"):
        EncoderExtractor(nn.Flatten(0), "own")


def test_stains_that_were_mixed_are_separated_again():
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0, 0.5, (1, 2, 8, 8)).astype(np.float32)
    vectors = np.array([(0.650, 0.704, 0.286), (0.072, 0.990, 0.105)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    density = torch.from_numpy(np.einsum("bsij,sc->bcij", amounts, vectors).astype(np.float32))
    stains = separate_stains(density)
    np.testing.assert_allclose(stains[:, :2].numpy(), amounts, atol=1e-5)
    np.testing.assert_allclose(stains[:, 2].numpy(), 0, atol=1e-5)
    light = np.round(255 * 10 ** -density.numpy()).astype(np.uint8).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(optical_density(light).numpy(), density.numpy(), atol=0.02)


def test_stain_features_do_not_depend_on_the_batch_and_see_texture(patches):
    extractor = StainExtractor()
    together = extractor(patches)
    assert together.shape == (5, extractor.dim)
    for i in range(5):
        torch.testing.assert_close(extractor(patches[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-6)
    flat = np.full((1, 64, 64, 3), 200, np.uint8)
    assert torch.isfinite(extractor(flat)).all()
    assert torch.isfinite(extractor(np.zeros((1, 50, 50, 3), np.uint8))).all()
    coarse = np.kron(patches[:, ::4, ::4], np.ones((1, 4, 4, 1), np.uint8))  # the same colours, larger grains
    assert (extractor(coarse) - together).abs().max() > 0.1
