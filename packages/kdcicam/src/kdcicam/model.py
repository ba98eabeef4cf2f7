"""CI-CAM: a classifier with a context pool whose maps are freed of what only comes along with the object."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kdcicam import functional
from kdcicam.backbones import build_backbone, default_image_size
from kdcicam.functional import LAST_RANKS, Combination
from shared_core import InputError
from shared_core.named import in_one_line


@dataclass(frozen=True)
class CICAMOutput:
    """What a forward pass gives. Maps are made when they are asked for: logits need none.

    ``logits`` and ``cam`` are those of the de-biased branch, which everything reported comes from;
    ``logits_raw`` and ``cam_raw`` those of the context-free branch.
    """

    logits: Float[Tensor, "batch classes"]
    logits_raw: Float[Tensor, "batch classes"]
    feature: Float[Tensor, "batch channels h w"]
    """f', after the intervention."""
    feature_raw: Float[Tensor, "batch channels h w"]
    """f, of the backbone."""
    weight: Float[Tensor, "classes channels"] = field(repr=False)
    """W, shared by both branches."""
    version: int = field(repr=False, default=-1)
    """Of W at the forward pass: maps that are made later would silently be those of other weights."""

    @cached_property
    def cam(self) -> Float[Tensor, "batch classes h w"]:
        """M' of all classes, without the bias."""
        return functional.class_maps(self.feature, self.weight)

    @cached_property
    def cam_raw(self) -> Float[Tensor, "batch classes h w"]:
        """M of all classes, without the bias."""
        return functional.class_maps(self.feature_raw, self.weight)

    @property
    def predicted(self) -> Int[Tensor, " batch"]:
        """y, the top class of the context-free branch: whose context the pool gives."""
        return self.logits_raw.argmax(1)

    def combined(
        self, combine: Combination = "quadratic", last: int = LAST_RANKS, *, raw: bool = False
    ) -> Float[Tensor, "batch h w"]:
        """The combinational map of the de-biased branch, or of the context-free one (NL-CCAM's)."""
        feature, logits = (self.feature_raw, self.logits_raw) if raw else (self.feature, self.logits)
        return functional.combinational_map(feature, logits, self.weight, combine, last)


@dataclass(frozen=True)
class Localization:
    """Boxes xyxy [B, 4] in pixels of `maps`; where not `found`, the map showed nothing: the whole image."""

    boxes: Int[Tensor, "batch 4"]
    found: Bool[Tensor, " batch"]
    classes: Int[Tensor, "batch top"]
    scores: Float[Tensor, "batch top"]
    maps: Float[Tensor, "batch height width"]


class CICAM(nn.Module):
    """Class activation maps with causal intervention, on any backbone (arXiv 2301.01060, section 3).

    Args:
        backbone: See `kdcicam.backbones.build_backbone`.
        num_classes: K.
        map_size: Height and width of the backbone's map; found by one pass over an image of
            `image_size` where None.
        image_size: Side of the images, 299 for InceptionV3 and 224 else.
        update_rate: lambda of the pool's update.
        combine: How class maps make the map that is boxed; ``quadratic`` is the paper's for CUB and ``sum_1``
            for ImageNet.
        last: n of ``sum_1`` and ``mean``; at most K.
        context: False leaves the intervention out: both branches are the context-free one (NL-CCAM).
        backbone_options: For the backbone.

    Attributes:
        pool: Q [K, h, w], a buffer that is saved with the weights. Never has a gradient.

    >>> _ = torch.manual_seed(0)
    >>> model = CICAM(nn.Conv2d(3, 8, 4, 4), num_classes=5, image_size=32).eval()
    >>> out = model(torch.zeros(2, 3, 32, 32))
    >>> out.logits.shape, out.cam.shape, model.pool.shape
    (torch.Size([2, 5]), torch.Size([2, 5, 8, 8]), torch.Size([5, 8, 8]))
    """

    pool: Tensor

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int,
        map_size: int | tuple[int, int] | None = None,
        *,
        image_size: int | None = None,
        update_rate: float = 0.01,
        combine: Combination = "quadratic",
        last: int | None = None,
        context: bool = True,
        **backbone_options: Any,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise InputError("expected at least one class", field="num_classes", value=num_classes)
        last = min(LAST_RANKS, num_classes) if last is None else last
        functional.rank_weights(num_classes, combine, last)  # raises where there is nothing to combine
        self.image_size = image_size or default_image_size(backbone)
        self.backbone = build_backbone(backbone, **backbone_options)
        channels, found = _map_shape(self.backbone, self.image_size)
        if map_size is not None and found != (size := _pair(map_size)):
            raise InputError(
                f"the backbone's map is {found[0]}x{found[1]} at images of {self.image_size}",
                field="map_size",
                value=size,
            )
        self.num_classes, self.channels, self.map_size = num_classes, channels, found
        self.update_rate, self.last, self.context = update_rate, last, context
        self.combine: Combination = combine
        self.classifier = nn.Linear(channels, num_classes)
        self.context_conv = nn.Conv2d(num_classes, channels, 1)  # only its weight and bias are used
        self.debiased = nn.Identity()
        """Gives f' to hooks, such as those of pytorch-grad-cam."""
        if not context:
            self.context_conv.requires_grad_(False)
        self.register_buffer("pool", torch.zeros(num_classes, *found))
        self.skipped_updates = 0
        """Updates left out because a map was not finite, as after an overflow under mixed precision."""
        self.spec: dict[str, Any] = {
            "backbone": backbone if isinstance(backbone, str) else None,
            "num_classes": num_classes,
            "image_size": self.image_size,
            "update_rate": update_rate,
            "combine": combine,
            "last": last,
            "context": context,
            "backbone_options": backbone_options,
        }

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> CICAMOutput:
        """Both branches. The context is that of the network's own prediction, in training too.

        Raises:
            InputError: The map has another size than the pool.
        """
        feature = self.backbone(images)
        self._check_map(feature, images)
        logits_raw = self.classifier(feature.mean((2, 3)))
        if not self.context:
            return CICAMOutput(logits_raw, logits_raw, feature, feature, *self._shared())
        weight, bias = self.context_conv.weight[:, :, 0, 0], self.context_conv.bias
        assert bias is not None
        debiased = functional.intervene(feature, self.pool, logits_raw.argmax(1), weight, bias)
        debiased = self.debiased(debiased)
        logits = self.classifier(debiased.mean((2, 3)))
        return CICAMOutput(logits, logits_raw, debiased, feature, *self._shared())

    def _shared(self) -> tuple[Tensor, int]:
        weight = self.classifier.weight
        return weight, -1 if weight.is_inference() else weight._version

    def raw_logits(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """The context-free branch alone: backbone and classifier, as the teachers' auxiliary terms use it."""
        return self.classifier(self.backbone(images).mean((2, 3)))

    @torch.no_grad()
    def update_pool(self, out: CICAMOutput, labels: Int[Tensor, " batch"]) -> Int[Tensor, ""]:
        """Take the images that the context-free branch gets right into the pool.

        Call it once a step, after the forward pass and before ``optimizer.step()``. In several processes
        the sums are added up over all first.

        Returns:
            How many images of this process were right.

        Raises:
            InputError: Labels are no whole numbers 0 to K - 1, or the weights have changed since.
        """
        check_labels(labels, self.num_classes)
        if out.version not in (-1, out.weight._version):
            raise InputError(
                "the weights have changed since the forward pass: call update_pool before optimizer.step()",
                field="out",
            )
        predicted = out.predicted
        maps = functional.class_maps(out.feature_raw.detach(), out.weight.detach(), labels)
        sums = functional.class_sums(maps, labels, predicted, self.num_classes)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        if bool(sums.isfinite().all()):
            self.pool.copy_(functional.updated_pool(self.pool.float(), sums, self.update_rate))
        else:
            self.skipped_updates += 1
        return (predicted == labels).sum()

    @property
    def classes_in_pool(self) -> int:
        """Classes that the pool has a context of; a class that was never predicted right has none."""
        return int(self.pool.flatten(1).any(1).sum())

    @torch.no_grad()
    def localize(
        self,
        images: Float[Tensor, "batch 3 height width"],
        threshold: float = 0.14,
        topk: int = 5,
        size: tuple[int, int] | None = None,
        mode: str = "official",
    ) -> Localization:
        """Class, score and one box for each image, from the de-biased branch.

        Args:
            images: Normalized as in training. The model must be in evaluation mode.
            threshold: Of the box, as a share of the map's maximum.
            topk: Classes to name.
            size: Height and width that maps and boxes are for; the images' where None.
            mode: Box extractor, ``official`` or ``contour``.
        """
        from kdcicam.boxes import boxes_from_map

        if self.training:
            raise InputError("call model.eval() first: BatchNorm must not see one image's statistics")
        out = self(images)
        maps = functional.upsampled(out.combined(self.combine, self.last), size or _size(images))  # type: ignore[arg-type]
        found = [boxes_from_map(one, threshold, mode) for one in maps.cpu().numpy()]  # type: ignore[arg-type]
        scores, classes = out.logits.float().softmax(1).topk(min(topk, self.num_classes))
        return Localization(
            torch.tensor([list(one.box) for one in found]).reshape(-1, 4),
            torch.tensor([one.found for one in found], dtype=torch.bool),
            classes,
            scores,
            maps,
        )

    def _check_map(self, feature: Tensor, images: Tensor) -> None:
        if feature.shape[2:] != self.pool.shape[1:]:
            ours, theirs = ("x".join(map(str, t.shape[-2:])) for t in (self.pool, feature))
            raise InputError(
                f"the pool is {ours} (images of {self.image_size}); "
                f"images of {images.shape[2]}x{images.shape[3]} give maps of {theirs}: resize the images, "
                "or model.resize_pool",
                field="images",
            )

    @torch.no_grad()
    def resize_pool(self, image_size: int) -> None:
        """Go on with images of another size: the pool is interpolated to their maps and normalized anew."""
        _, found = _map_shape(self.backbone, image_size)
        resized = nn.functional.interpolate(
            self.pool[None].float(), found, mode="bilinear", align_corners=False
        )
        self.pool = functional.normalize_maps(resized[0]).to(self.pool)
        self.map_size, self.image_size = found, image_size
        self.spec |= {"image_size": image_size}


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise where labels are not whole numbers from 0 to num_classes - 1.

    Raises:
        InputError: Says what was found.
    """
    if labels.dtype.is_floating_point or labels.dtype is torch.bool:
        raise InputError("expected whole numbers", field="labels", value=str(labels.dtype))
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        low, high = int(labels.min()), int(labels.max())
        raise InputError(f"expected 0 to {num_classes - 1}", field="labels", value=f"{low} to {high}")


@torch.no_grad()
def _map_shape(backbone: nn.Module, image_size: int) -> tuple[int, tuple[int, int]]:
    training = backbone.training
    first = next(backbone.parameters(), torch.empty(0))
    try:
        sample = torch.zeros(1, 3, image_size, image_size, device=first.device, dtype=first.dtype)
        feature = backbone.eval()(sample)
    except InputError:
        raise
    except (RuntimeError, AssertionError, AttributeError, ValueError) as error:  # of the user's, or timm's
        raise InputError(
            f"gives no map of an image of {image_size}x{image_size}: {in_one_line(error)}", field="backbone"
        ) from error
    finally:
        backbone.train(training)
    return feature.shape[1], (feature.shape[2], feature.shape[3])


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]
