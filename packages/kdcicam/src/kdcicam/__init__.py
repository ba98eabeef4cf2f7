"""Weakly-supervised object localization by causal intervention and two teachers (KD-CI-CAM, KG-CI-CAM).

    model = kdcicam.CICAM("vgg16", num_classes=200)
    out = model(images)                  # out.logits, out.cam; out.logits_raw, out.cam_raw
    model.update_pool(out, labels)       # once a training step
    found = model.eval().localize(images, threshold=0.14)

Shao, Luo, Gao, Yang, Xiao: "Knowledge-guided Causal Intervention for Weakly-supervised Object Localization",
IEEE TKDE 36(11), 2024, arXiv 2301.01060; CI-CAM: ACM MM 2021.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import lazy_names

if TYPE_CHECKING:
    from kdcicam.boxes import boxes_from_map
    from kdcicam.model import CICAM, CICAMOutput

__all__ = ["CICAM", "CICAMOutput", "boxes_from_map"]

_HOME = {"CICAM": "model", "CICAMOutput": "model", "boxes_from_map": "boxes"}

_MODULES = ("functional",)

__getattr__, __dir__ = lazy_names(__name__, _HOME, _MODULES)
