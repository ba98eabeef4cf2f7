"""torchvision's image transform, with edges made from what it resizes.

`GeneralizedRCNNTransform` normalises, resizes and pads images. The edges have to be those of the same resized
image, before normalisation, with the padding invalid; depth goes through the same resize.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from asymaffinity.affinity import middle
from asymaffinity.edges import EdgeBits
from asymaffinity.grid import grid_size
from asymaffinity.losses import BoxSupLoss
from shared_core import InputError

ASPECT = 0.02
"""How far the aspect of a depth map may be from that of its image, as a share."""


class BoxSupTransform(GeneralizedRCNNTransform):
    """torchvision's transform that also makes edges: `edges` after a call in training.

    Args:
        criterion: Whose edges.
        bottom: Last rows of each image that are no edge's neighbour; 10 for COCO in BoxInst.
        options: As of torchvision's class.
    """

    def __init__(self, criterion: BoxSupLoss, *options: Any, bottom: int = 0, **named: Any) -> None:
        super().__init__(*options, **named)
        object.__setattr__(self, "criterion", criterion)  # the model holds it as a module; it is lent here
        self.bottom = bottom
        self.edges: dict[str, EdgeBits] = {}
        self.grid = (0, 0)
        """Cells of the masks' grid over the last batch."""
        self.masks: list[Tensor] | None = None
        """With mixed supervision the true masks of each image of the last batch, on the grid."""
        self._said = False

    @classmethod
    def like(cls, transform: GeneralizedRCNNTransform, criterion: BoxSupLoss, bottom: int) -> BoxSupTransform:
        """The same transform with edges."""
        return cls(
            criterion,
            transform.min_size,
            transform.max_size,
            transform.image_mean,
            transform.image_std,
            transform.size_divisible,
            transform.fixed_size,
            bottom=bottom,
        )

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """Normalise, resize, pad, and in training make edges.

        Masks among the targets are left out, unless the criterion's supervision is mixed.
        """
        depths: list[Tensor | None] = [t.get("depth") for t in targets or [{}] * len(images)]
        if targets is not None:
            check_depths(images, depths)
            targets = [{k: v for k, v in t.items() if k in self._wanted(t)} for t in targets]
        batch, moved = super().forward(images, targets)
        height, width = batch.tensors.shape[2:]
        self.edges, self.grid = {}, grid_size(height, width, self.criterion.stride)  # type: ignore[arg-type]
        self.masks = None
        if self.training and moved is not None:
            self.edges = self._edges(batch, depths)
            if self.criterion.supervision == "mixed":  # type: ignore[union-attr] set past Module
                self.masks = [self._on_grid(target) for target in moved]
        return batch, moved

    def _wanted(self, target: dict[str, Tensor]) -> set[str]:
        """Names of what the detector gets of a target."""
        mixed = self.criterion.supervision == "mixed"  # type: ignore[union-attr]
        if "masks" in target and not mixed and self.training and not self._said:
            self._said = True
            warnings.warn(
                "masks among the targets are left out: boxes supervise. To learn from the masks that there "
                "are, BoxSupLoss(..., supervision='mixed')",
                UserWarning,
                stacklevel=4,
            )
        return set(target) - {"depth"} - (set() if mixed else {"masks"})

    def _on_grid(self, target: dict[str, Tensor]) -> Tensor:
        """True masks of an image at the middle of each cell; none where the target has none."""
        made = target["boxes"].new_zeros(len(target["boxes"]), *self.grid, dtype=torch.bool)
        if "masks" in target:
            found = middle(target.pop("masks").bool(), self.criterion.stride)  # type: ignore[arg-type]
            made[:, : found.shape[1], : found.shape[2]] = found[:, : made.shape[1], : made.shape[2]]
        return made

    def _edges(self, batch: ImageList, depths: list[Tensor | None]) -> dict[str, EdgeBits]:
        mean, std = (
            torch.as_tensor(values, dtype=batch.tensors.dtype, device=batch.tensors.device)[:, None, None]
            for values in (self.image_mean, self.image_std)
        )
        pixels = (batch.tensors.detach() * std + mean).clamp(0, 1)
        height, width = pixels.shape[2:]
        valid = torch.zeros(len(pixels), height, width, dtype=torch.bool, device=pixels.device)
        for mask, (rows, columns) in zip(valid, batch.image_sizes, strict=True):
            mask[: max(0, rows - self.bottom), :columns] = True
        criterion: BoxSupLoss = self.criterion  # type: ignore[assignment] set past Module
        depth = None
        if criterion.needs_depth:
            depth = torch.full((len(pixels), height, width), float("nan"), device=pixels.device)
            for n, (values, (rows, columns)) in enumerate(zip(depths, batch.image_sizes, strict=True)):
                if values is None:
                    raise InputError(
                        "the loss has a depth-gradient term: expected `depth` in each target", field="targets"
                    )
                depth[n, :rows, :columns] = resize_field(values.to(pixels.device), (rows, columns))
        return criterion.edges(pixels, depth, valid)

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Back to the images' own size. Masks are pasted into ``mask_boxes`` where a result has them."""
        if self.training:
            return result
        for found, small, large in zip(result, image_shapes, original_image_sizes, strict=True):
            found["boxes"] = resize_boxes(found["boxes"], small, large)  # type: ignore[arg-type] a size
            if "mask_boxes" in found:
                boxes = resize_boxes(found.pop("mask_boxes"), small, large)  # type: ignore[arg-type]
                found["masks"] = paste_masks_in_image(found["masks"], boxes, large)
            elif "mask_logits" in found:
                found["masks"] = full_masks(found.pop("mask_logits"), small, large)
        return result


def full_masks(
    logits: Float[Tensor, "instances h w"], small: tuple[int, int], large: tuple[int, int], stride: int = 4
) -> Float[Tensor, "instances 1 height width"]:
    """Probabilities at the size of the image, from logits on the grid of the padded and resized one."""
    if len(logits) == 0:
        return logits.new_zeros(0, 1, *large)
    wide = F.interpolate(logits[:, None].float(), scale_factor=stride, mode="bilinear", align_corners=False)
    wide = wide[:, :, : small[0], : small[1]]
    return torch.sigmoid(F.interpolate(wide, large, mode="bilinear", align_corners=False))


def resize_field(
    field: Float[Tensor, "height width"], size: tuple[int, int]
) -> Float[Tensor, "new_height new_width"]:
    """Resize a field with holes (NaN): bilinear over what is known, unknown where the nearest pixel is."""
    if field.shape == size:
        return field
    known = field.isfinite()
    filled = torch.where(known, field, 0)[None, None].float()
    weight = known[None, None].float()
    top, bottom = (
        F.interpolate(values, size, mode="bilinear", align_corners=False) for values in (filled, weight)
    )
    nearest = F.interpolate(weight, size, mode="nearest-exact") > 0
    values = torch.where(nearest & (bottom > 0), top / bottom.clamp(min=1e-6), float("nan"))
    return values[0, 0]


def check_depths(images: list[Tensor], depths: list[Tensor | None]) -> None:
    """Refuse depth maps of another shape than their images."""
    for n, (image, depth) in enumerate(zip(images, depths, strict=True)):
        if depth is None:
            continue
        if depth.ndim != 2:
            raise InputError("expected height, width", field=f"targets[{n}].depth", value=tuple(depth.shape))
        (h, w), (rows, columns) = image.shape[-2:], depth.shape
        if abs(rows * w / (columns * h) - 1) > ASPECT:
            raise InputError(
                f"expected the aspect of its image, {h}x{w}",
                field=f"targets[{n}].depth",
                value=f"{rows}x{columns}",
            )


def known_share(fields: Float[Tensor, "images height width"]) -> Float[Tensor, " images"]:
    """Share of each field that is known."""
    found: Bool[Tensor, "images height width"] = fields.isfinite()
    return found.flatten(1).float().mean(1)
