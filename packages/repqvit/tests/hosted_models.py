"""Small models of every supported library, with random weights and LayerNorm parameters that are not
trivial."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

HF = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def _timm(name: str, **kwargs: object) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=5, **kwargs)


def _timm_vit() -> nn.Module:
    return _timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)


def _timm_deit_distilled() -> nn.Module:
    return _timm(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4
    )


def _timm_swin() -> nn.Module:
    return _timm(
        "swin_tiny_patch4_window7_224",
        img_size=40,
        patch_size=2,
        window_size=7,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
    )


def _timm_beit() -> nn.Module:
    return _timm("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts the head at zero
    return model


def _torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([2, 2], 16, [2, 2], [2, 4], [7, 7], num_classes=5)


def _hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**HF, num_labels=5))


def _hf_deit() -> nn.Module:
    from transformers import DeiTConfig, DeiTForImageClassification

    return DeiTForImageClassification(DeiTConfig(**HF, num_labels=5))


def _hf_swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=40,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=7,
        num_labels=5,
    )
    return SwinForImageClassification(config)


def _hf_yolos() -> nn.Module:
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(**{**HF, "image_size": [32, 32]}, num_detection_tokens=6, num_labels=5)
    return YolosForObjectDetection(config)


# name -> (builder, image size, LayerNorm sites, sites that can be reparameterized, attentions)
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, int, int]] = {
    "timm-vit": (_timm_vit, 32, 5, 4, 2),
    "timm-deit-distilled": (_timm_deit_distilled, 32, 5, 4, 2),
    "timm-swin-padded": (_timm_swin, 40, 9, 9, 4),
    "timm-beit": (_timm_beit, 32, 5, 4, 2),
    "torchvision-vit": (_torchvision_vit, 32, 5, 4, 2),
    "torchvision-swin-padded": (_torchvision_swin, 40, 9, 9, 4),
    "hf-vit": (_hf_vit, 32, 5, 4, 2),
    "hf-deit": (_hf_deit, 32, 5, 4, 2),
    "hf-swin-padded": (_hf_swin, 40, 9, 9, 4),
    "hf-yolos": (_hf_yolos, 32, 5, 4, 2),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.2, 3)
                module.bias.normal_()
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_(0, 0.1)
    return model


def images(name: str, count: int = 8) -> torch.Tensor:
    size = MODELS[name][1]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def logits(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits
