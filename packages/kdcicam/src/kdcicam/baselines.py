"""Other ways to a map from the same network, so that only the map differs.

CAM and NL-CCAM read the context-free branch, CI-CAM the de-biased one; Grad-CAM comes from pytorch-grad-cam.
Where labels are given, CAM and Grad-CAM show the label's class, as the field's evaluation does for GT-known
and MaxBoxAcc (a class that is predicted right is the label's); the combinational maps are free of labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kdcicam import functional
from kdcicam.model import CICAM, CICAMOutput
from shared_core import InputError
from shared_core.errors import needs_extra

MapMaker = Callable[
    [CICAM, CICAMOutput, Tensor, Tensor | None],
    tuple[Float[Tensor, "batch height width"], Float[Tensor, "batch classes"]],
]
"""From a model, its output, the images and their labels (None: not known) to maps at the images' size, and
the logits that belong to them."""


def ci_cam(
    model: CICAM, out: CICAMOutput, images: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The method's own: combinational map and class of the de-biased branch."""
    return _large(out.combined(model.combine, model.last), images), out.logits


def nl_ccam(
    model: CICAM, out: CICAMOutput, images: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Combinational map and class of the context-free branch."""
    return _large(out.combined(model.combine, model.last, raw=True), images), out.logits_raw


def cam(
    model: CICAM, out: CICAMOutput, images: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """CAM: the map of the context-free branch's top class, or of the label."""
    classes = out.predicted if labels is None else labels
    return _large(functional.class_maps(out.feature_raw, out.weight, classes), images), out.logits_raw


def grad_cam(
    model: CICAM, out: CICAMOutput, images: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Grad-CAM of the context-free branch's top class, or of the label, at the backbone's map."""
    return grad_cam_maps(model, images, out.predicted if labels is None else labels), out.logits_raw


BASELINES: dict[str, MapMaker] = {"ci-cam": ci_cam, "nl-ccam": nl_ccam, "cam": cam, "grad-cam": grad_cam}


class LogitsView(nn.Module):
    """A model as pytorch-grad-cam and others of its kind want it: images in, one tensor of logits out.

    Args:
        model: Seen in evaluation mode.
        raw: The context-free branch; else the de-biased one.

    Attributes:
        target_layers: What to hook: the backbone's map, or the de-biased one (`model.debiased`).
    """

    def __init__(self, model: CICAM, *, raw: bool = False) -> None:
        super().__init__()
        self.model, self.raw = model, raw
        self.target_layers: list[nn.Module] = [model.backbone if raw else model.debiased]

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Return the branch's logits."""
        return self.model.raw_logits(images) if self.raw else self.model(images).logits


def grad_cam_maps(
    model: CICAM,
    images: Float[Tensor, "batch 3 height width"],
    classes: Int[Tensor, " batch"],
    *,
    raw: bool = True,
) -> Float[Tensor, "batch height width"]:
    """Maps of pytorch-grad-cam's GradCAM, scaled to 0 to 1 by it, at the images' size.

    Needs ``pip install 'kdcicam[grad-cam]'``.

    Args:
        model: In evaluation mode.
        images: Normalized.
        classes: Whose map.
        raw: Of the context-free branch; else of the de-biased one.
    """
    with needs_extra("grad-cam", "kdcicam"):
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    if model.training:
        raise InputError("call model.eval() first", field="model")
    view = LogitsView(model, raw=raw)
    targets: Any = [ClassifierOutputTarget(int(k)) for k in classes]
    needed = {name: parameter.grad for name, parameter in model.named_parameters()}
    with torch.enable_grad(), GradCAM(view, view.target_layers) as maker:
        maps = maker(input_tensor=images.detach().clone(), targets=targets)
    for name, parameter in model.named_parameters():  # it runs backward: leave gradients as they were
        parameter.grad = needed[name]
    return torch.from_numpy(maps).to(images.device)


def _large(maps: Tensor, images: Tensor) -> Tensor:
    return functional.upsampled(maps, (images.shape[2], images.shape[3]))
