"""Backbones: what turns images into a feature map [B, C, h, w].

VGG16 and InceptionV3 as NL-CCAM (WACV 2020) and the paper have them, any timm model, or a module of one's
own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shared_core import InputError, named
from shared_core.errors import needs_extra

LEAK = 0.2
"""Slope of LeakyReLU below zero."""

VGG_VARIANTS = {"vgg16": "cub", "vgg16-imagenet": "imagenet"}


class NonLocalBlock(nn.Module):
    """Self-attention over the cells of a map, added to it; the map itself at the start.

    query and key are 1x1 convolutions to an eighth of the channels, value to all; attention is a softmax over
    the keys of q^T k, not scaled; a 1x1 convolution and a BatchNorm with weight and bias of zero follow.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 8)
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels h w"]:
        """Return x + BN(conv(value attention^T))."""
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            raise InputError(
                "a batch of one image with a map of 1x1 has nothing to normalize by: "
                "use more images a batch or larger ones",
                field="batch_size",
                value=1,
            )
        # softmax(q^T k) v with scale 1; torch fuses it, so that the [cells, cells] matrix need not be kept.
        query, key, value = (
            part.flatten(2).transpose(1, 2) for part in (self.query(x), self.key(x), self.value(x))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return x + self.norm(self.out(mixed.transpose(1, 2).reshape(x.shape)))


class VGG16(nn.Module):
    """VGG16's convolutions without its fifth pool, with LeakyReLU(0.2) and non-local blocks.

    Variant ``cub``: blocks after pool2, pool3, pool4 and conv5_3; 512 channels. ``imagenet``: the one after
    pool2 is left out and two 3x3 convolutions 512 -> 1024 -> 1024 follow; 1024 channels. The map is a
    sixteenth of the image: 14x14 at 224.

    Args:
        variant: Which.
        non_local: False leaves the blocks out: plain CAM.
        width: Channels of the first stage; 64 is VGG16, less makes a small one for tests.
    """

    def __init__(
        self, variant: Literal["cub", "imagenet"] = "cub", *, non_local: bool = True, width: int = 64
    ) -> None:
        super().__init__()
        if variant not in VGG_VARIANTS.values():
            raise InputError("expected cub or imagenet", field="variant", value=variant)
        widths, depths = [width, 2 * width, 4 * width, 8 * width, 8 * width], [2, 2, 3, 3, 3]
        stages, before = [], 3
        for number, (channels, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.LeakyReLU(LEAK, inplace=True)]
                before = channels
            if number < 5:
                layers.append(nn.MaxPool2d(2, 2))
            if non_local and number > (1 if variant == "cub" else 2):
                layers.append(NonLocalBlock(channels))
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.extra = nn.Sequential()
        if variant == "imagenet":
            for _ in range(2):
                self.extra.append(nn.Conv2d(before, 16 * width, 3, padding=1))
                self.extra.append(nn.LeakyReLU(LEAK, inplace=True))
                before = 16 * width
        self.channels = before
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                nn.init.kaiming_normal_(module.weight, a=LEAK, nonlinearity="leaky_relu")
                nn.init.zeros_(module.bias) if module.bias is not None else None

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels h w"]:
        """Return the map of the last convolution."""
        return self.extra(self.stages(x))

    def load_pretrained(self, state: Mapping[str, Tensor]) -> None:
        """Copy the 13 convolutions of torchvision's (or any) VGG16 without BatchNorm, in their order.

        Raises:
            InputError: Their shapes are others.
        """
        ours = [m for stage in self.stages for m in _children(stage) if isinstance(m, nn.Conv2d)]
        weights = [key for key, value in state.items() if value.ndim == 4]
        shapes = [tuple(state[key].shape) for key in weights]
        if shapes != [tuple(conv.weight.shape) for conv in ours]:
            raise InputError(
                "these are not VGG16's: expected 13 convolutions of its shapes", field="weights", value=shapes
            )
        with torch.no_grad():
            for conv, key in zip(ours, weights, strict=True):
                conv.weight.copy_(state[key])
                assert conv.bias is not None
                conv.bias.copy_(state[key.removesuffix("weight") + "bias"])


class InceptionV3(nn.Module):
    """torchvision's InceptionV3 up to Mixed_6e: 768 channels, 17x17 at 299, with non-local blocks.

    Needs ``pip install 'kdcicam[images]'``. The paper's text does not say where its blocks stand; here they
    follow Mixed_5d (288 channels) and Mixed_6e.

    Args:
        non_local: False leaves the blocks out.
    """

    def __init__(self, *, non_local: bool = True) -> None:
        super().__init__()
        with needs_extra("images", "kdcicam"):
            from torchvision.models import inception_v3
        whole = inception_v3(weights=None, aux_logits=False, init_weights=False, transform_input=False)
        self.stages = nn.ModuleDict()
        for name, child in whole.named_children():
            self.stages[name] = child
            if name == "Mixed_6e":
                break
        blocks = {"Mixed_5d": NonLocalBlock(288), "Mixed_6e": NonLocalBlock(768)} if non_local else {}
        self.non_local = nn.ModuleDict(blocks)
        self.channels = 768

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels h w"]:
        """Return the map of Mixed_6e."""
        for name, stage in self.stages.items():
            x = stage(x)
            if name in self.non_local:
                x = self.non_local[name](x)
        return x

    def load_pretrained(self, state: Mapping[str, Tensor]) -> None:
        """Copy what torchvision's InceptionV3 has under the same names; its later layers are passed over.

        Its published weights expect the image in -1..1; with ImageNet's mean and deviation the first
        convolution adapts in training.

        Raises:
            InputError: A tensor is missing or has another shape.
        """
        ours = self.stages.state_dict()
        lacking = [key for key, value in ours.items() if key not in state or state[key].shape != value.shape]
        if lacking:
            raise InputError(
                "these are not InceptionV3's: lacks this tensor", field="weights", value=lacking[0]
            )
        self.stages.load_state_dict({key: state[key] for key in ours})


class TimmBackbone(nn.Module):
    """A timm model as a backbone: the last map of its ``features_only`` form, or else its tokens as a grid.

    Needs ``pip install 'kdcicam[timm]'``.

    Args:
        name: timm's name of the model.
        pretrained: Fetch its published weights (through timm, from a hub).
        out_index: Which of the maps that features_only gives; -1 is the last.
        options: More for timm.create_model, such as img_size.
    """

    def __init__(self, name: str, *, pretrained: bool = False, out_index: int = -1, **options: Any) -> None:
        super().__init__()
        with needs_extra("timm", "kdcicam"):
            import timm
        if not timm.is_model(name):
            close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5]) or "see timm.list_models()"
            raise InputError(f"timm has no such model; it has {close}", field="backbone", value=name)
        whole = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        if getattr(whole, "num_prefix_tokens", None) is not None or out_index == -1:
            self.model, self.out_index = whole, None
        else:
            self.model = timm.create_model(name, pretrained=pretrained, features_only=True, **options)
            self.out_index = out_index
        self.prefix = int(getattr(whole, "num_prefix_tokens", 0) or 0)
        self.channels_last = getattr(whole, "output_fmt", "NCHW") == "NHWC"

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels h w"]:
        """Return the model's map."""
        if self.out_index is not None:
            return self.model(x)[self.out_index]
        forward: Any = self.model.forward_features
        feature = forward(x)
        if feature.ndim == 4 and self.channels_last:
            feature = feature.permute(0, 3, 1, 2)
        return as_map(feature, self.prefix, (x.shape[2], x.shape[3]))


class OwnBackbone(nn.Module):
    """A module of the user's: its result is a map, or tokens that become one.

    Args:
        module: From images [B, 3, H, W] to a map [B, C, h, w] or tokens [B, N, C].
        prefix: Tokens before those of the image (a class token).
    """

    def __init__(self, module: nn.Module, prefix: int | None = None) -> None:
        super().__init__()
        self.module = module
        self.prefix = prefix

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels h w"]:
        """Return the module's map."""
        return as_map(self.module(x), self.prefix, (x.shape[2], x.shape[3]))


def as_map(feature: Any, prefix: int | None, image: tuple[int, int]) -> Float[Tensor, "batch channels h w"]:
    """A map as it is; tokens [B, prefix + h w, C] reshaped to the grid whose sides are as the image's.

    Args:
        feature: What a backbone gave.
        prefix: Tokens to leave out in front; None finds out whether there is one.
        image: Height and width of the image.

    Raises:
        InputError: It is neither, or no grid of this aspect has as many cells.
    """
    if isinstance(feature, Tensor) and feature.ndim == 4:
        return feature
    if not (isinstance(feature, Tensor) and feature.ndim == 3):
        shape = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
        raise InputError(
            "expected a map [batch, channels, h, w] or tokens [batch, n, channels]",
            field="backbone",
            value=shape,
        )
    for skipped in (0, 1) if prefix is None else (prefix,):
        cells = feature.shape[1] - skipped
        h = round(math.sqrt(cells * image[0] / image[1]))
        if h > 0 and cells % h == 0 and abs(cells // h * image[0] - h * image[1]) < max(image):
            return feature[:, skipped:].transpose(1, 2).unflatten(2, (h, cells // h))
    raise InputError(
        f"its tokens make no grid with the sides of an image of {image[0]}x{image[1]}; "
        "say how many come before the image's (prefix)",
        field="backbone",
        value=feature.shape[1],
    )


def build_backbone(spec: str | nn.Module, **options: Any) -> nn.Module:
    """Make a backbone.

    Args:
        spec: ``vgg16``, ``vgg16-imagenet``, ``inception_v3``, a timm name (``resnet18`` or
            ``timm/resnet18``), ``module:callable`` that returns a module, or a module.
        options: For the backbone's class.

    Raises:
        InputError: There is no such backbone.
    """
    if isinstance(spec, nn.Module):
        known = isinstance(spec, VGG16 | InceptionV3 | TimmBackbone | OwnBackbone)
        return spec if known else OwnBackbone(spec, **options)
    if spec in VGG_VARIANTS:
        return VGG16("cub" if spec == "vgg16" else "imagenet", **options)
    if spec == "inception_v3":
        return InceptionV3(**options)
    if ":" in spec:
        return OwnBackbone(_called(spec), **options)
    return TimmBackbone(spec.removeprefix("timm/"), **options)


def _called(spec: str) -> nn.Module:
    made = named.made(spec, "backbone")
    if not isinstance(made, nn.Module):
        raise InputError(f"gives {type(made).__name__}, expected a module", field="backbone", value=spec)
    return made


def default_image_size(spec: str | nn.Module) -> int:
    """Side of the crop that the paper uses: 299 for InceptionV3, else 224."""
    return 299 if spec == "inception_v3" or isinstance(spec, InceptionV3) else 224


def _children(stage: nn.Module) -> list[nn.Module]:
    return list(stage.children())
