"""The losses of a mask head that learns from boxes, as one module."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from asymaffinity.affinity import ColorAffinity, DepthGradAffinity, similarity_quantiles
from asymaffinity.edges import EdgeBits
from asymaffinity.functional import Rule, affinity_loss, dice_loss, projection_loss
from asymaffinity.grid import box_cells
from shared_core import InputError

Affinity = ColorAffinity | DepthGradAffinity
_LOOKS = 40
"""Batches of edges that are looked at for thresholds that do not fit: counting them takes a moment each
time."""


def default_affinities() -> dict[str, tuple[Affinity, float]]:
    """Colour and depth gradient, a half each: together the weight of BoxInst's one affinity."""
    return {"color": (ColorAffinity(), 0.5), "depthgrad": (DepthGradAffinity(), 0.5)}


class BoxSupLoss(nn.Module):
    """Projection loss, and an affinity loss for each modality, of masks that only boxes supervise.

    L = L_projection + min(step / warmup, 1) * sum over modalities of weight * L_affinity

    The warm-up is part of the loss: an empty mask costs nothing in the asymmetric form, so the projection
    loss has to raise the objects first. About a tenth to a third of training.

    Args:
        affinities: Name -> (affinity, weight). ``depthgrad`` takes the depth, every other one the image.
        rule: The form of the affinity loss, `asymaffinity.functional.Rule`; `BOXINST` is the baseline's.
        warmup: Steps until the affinity terms have their whole weight; 0 for none.
        join: ``and``, ``or``: one affinity of edges that all, or any, of the modalities have, with the sum of
            the weights. Where None, each has its own term.
        stride: Pixels a cell of the masks' grid.
        lean: Which implementation of the affinity loss; both give the same.
        supervision: ``boxes``: true masks among the targets of a detector are left out. ``mixed``: instances
            that have one learn from it by the dice loss, ``loss_mask``; the others from their boxes. Each
            instance weighs the same.

    Example:
        >>> crit = BoxSupLoss({"color": (ColorAffinity(), 1.0)}, warmup=0)
        >>> images = torch.rand(1, 3, 32, 32)
        >>> losses = crit(
        ...     torch.zeros(1, 8, 8), torch.tensor([[4.0, 4, 20, 24]]), torch.tensor([0]), crit.edges(images)
        ... )
        >>> sorted(losses)
        ['loss_aff_color', 'loss_prj']
    """

    step: Tensor

    def __init__(
        self,
        affinities: Mapping[str, tuple[Affinity, float]] | None = None,
        rule: Rule | None = None,
        *,
        warmup: int = 10_000,
        join: str | None = None,
        stride: int = 4,
        lean: bool = True,
        supervision: str = "boxes",
    ) -> None:
        super().__init__()
        self.affinities = dict(default_affinities() if affinities is None else affinities)
        self.rule = rule or Rule()
        self.warmup, self.join, self.stride, self.lean = warmup, join, stride, lean
        self.supervision = supervision
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.widened = 0
        """Boxes so far that no cell of the grid lay in."""
        self._said: set[str] = set()
        self._looked = 0
        if warmup < 0:
            raise InputError("expected at least 0", field="warmup", value=warmup)
        if supervision not in ("boxes", "mixed"):
            raise InputError("expected boxes or mixed", field="supervision", value=supervision)
        if join not in (None, "and", "or"):
            raise InputError("expected and, or, or none", field="join", value=join)
        for name, (affinity, weight) in self.affinities.items():
            if not 0 <= weight < float("inf"):
                raise InputError("expected a weight of at least 0", field=name, value=weight)
            if affinity.stride != stride:
                raise InputError(
                    f"expected the stride {stride} of the masks", field=name, value=affinity.stride
                )
            if (name == "depthgrad") != isinstance(affinity, DepthGradAffinity):
                raise InputError("depthgrad is the name of a DepthGradAffinity, and of no other", field=name)

    @property
    def needs_depth(self) -> bool:
        """Whether training needs a depth map beside each image. Inference never does."""
        return "depthgrad" in self.affinities

    def edges(
        self,
        images: Shaped[Tensor, "images channels height width"],
        depth: Float[Tensor, "images height width"] | None = None,
        valid: Shaped[Tensor, "images height width"] | None = None,
    ) -> dict[str, EdgeBits]:
        """Edges of each modality: once a batch, for all its instances.

        Args:
            images: RGB, bytes or floats from 0 to 1, not normalised.
            depth: The field that `DepthGradAffinity.field` names, NaN where unknown.
            valid: Pixels that are no padding, as booleans.
        """
        found: dict[str, EdgeBits] = {}
        for name, (affinity, _) in self.affinities.items():
            if isinstance(affinity, DepthGradAffinity):
                if depth is None:
                    raise InputError(
                        "the loss has a depth-gradient term: expected a depth map", field="depth"
                    )
                known = depth if valid is None else depth.masked_fill(~valid.bool(), float("nan"))
                found[name] = affinity(known)
            else:
                found[name] = affinity(images, None if valid is None else valid.bool())
            self._look_at(name, affinity, found[name], images, depth)
        if self.join is not None and len(found) > 1:
            first, *others = found.values()
            for other in others:
                first = first.joined(other, self.join)  # type: ignore[arg-type] checked above
            return {"joined": first}
        return found

    def weights(self) -> dict[str, float]:
        """The weight of each affinity term."""
        if self.join is not None and len(self.affinities) > 1:
            return {"joined": sum(weight for _, weight in self.affinities.values())}
        return {name: weight for name, (_, weight) in self.affinities.items()}

    def warmth(self, step: int) -> float:
        """The factor of the affinity terms at a step."""
        return 1.0 if self.warmup == 0 else min(step / self.warmup, 1.0)

    def forward(
        self,
        mask_logits: Float[Tensor, "instances h w"],
        boxes: Float[Tensor, "instances 4"],
        image_index: Int[Tensor, " instances"],
        edges: Mapping[str, EdgeBits],
        step: int | None = None,
        masks: Shaped[Tensor, "instances h w"] | None = None,
    ) -> dict[str, Tensor]:
        """The losses, to be added up.

        Args:
            mask_logits: Masks on the grid.
            boxes: x0, y0, x1, y1 in pixels.
            image_index: To which image each mask belongs.
            edges: As `edges` gives them.
            step: Of the warm-up; where None, calls in training mode are counted (the buffer `step`).
            masks: With ``mixed`` supervision the true masks on the grid, as booleans; one without a cell is
                not known.

        Returns:
            ``loss_prj`` and ``loss_aff_<name>`` of each modality, weighted; with ``mixed`` supervision
            ``loss_mask`` beside them. Exactly 0 without instances.
        """
        if step is None:
            step = int(self.step)
            if self.training:
                self.step += 1
        cells, widened = box_cells(boxes, (mask_logits.shape[1], mask_logits.shape[2]), self.stride)
        self.widened += widened
        if self.supervision == "boxes":
            losses = {"loss_prj": projection_loss(mask_logits, cells)}
            return losses | self.affinity_terms(mask_logits, cells, image_index, edges, step)
        known = torch.zeros_like(image_index, dtype=torch.bool)
        if masks is not None:
            known = masks.flatten(1).any(1)
        boxed = ~known
        losses = {"loss_prj": projection_loss(mask_logits[boxed], cells[boxed])}
        losses |= self.affinity_terms(mask_logits[boxed], cells[boxed], image_index[boxed], edges, step)
        share = known.float().mean() if len(known) else 1.0
        losses = {name: value * (1 - share) for name, value in losses.items()}
        truth = mask_logits[known] if masks is None else masks[known].float()
        return losses | {"loss_mask": share * dice_loss(mask_logits[known], truth)}

    def affinity_terms(
        self,
        mask_logits: Float[Tensor, "instances h w"],
        cells: Int[Tensor, "instances 4"],
        image_index: Int[Tensor, " instances"],
        edges: Mapping[str, EdgeBits],
        step: int,
    ) -> dict[str, Tensor]:
        """The affinity losses alone, for boxes that are in cells already."""
        warmth = self.warmth(step)
        losses = {}
        for name, weight in self.weights().items():
            if name not in edges:
                raise InputError(f"expected edges of {', '.join(self.weights())}", field="edges", value=name)
            value = affinity_loss(mask_logits, edges[name], cells, image_index, self.rule, lean=self.lean)
            losses[f"loss_aff_{name}"] = value * (weight * warmth)
        return losses

    def _look_at(
        self, name: str, affinity: Affinity, edges: EdgeBits, images: Any, depth: Tensor | None
    ) -> None:
        """Say once if a threshold keeps no edge of a batch, or all: it fits the unit of theta badly."""
        if name in self._said or self._looked >= _LOOKS:
            return
        self._looked += 1
        share = edges.share()
        if 0 < share < 0.999:
            return
        self._said.add(name)
        if isinstance(affinity, DepthGradAffinity):
            features = affinity.features(depth)[0] if depth is not None else None
        else:
            features = affinity.features(images)
        if features is None:
            return
        low, half, high = similarity_quantiles(features, affinity.theta, affinity.kernel, affinity.dilation)
        warnings.warn(
            f"{name}: {'no edge' if share == 0 else 'nearly every edge'} of a batch is kept. Similarities "
            f"are {low:.3f}, {half:.3f}, {high:.3f} at the 10th, 50th and 90th percentile and the threshold "
            f"is {affinity.thresh:g}: theta = {affinity.theta:g} may be in another unit",
            UserWarning,
            stacklevel=3,
        )
