"""Weakly-supervised object localization by causal intervention and two teachers (KD-CI-CAM, KG-CI-CAM).

    model = kdcicam.CICAM("vgg16", num_classes=200)
    out = model(images)                  # out.logits, out.cam; out.logits_raw, out.cam_raw
    model.update_pool(out, labels)       # once a training step, before optimizer.step()
    found = model.eval().localize(images, threshold=0.14)

Shao, Luo, Gao, Yang, Xiao: "Knowledge-guided Causal Intervention for Weakly-supervised Object Localization",
IEEE TKDE 36(11), 2024, arXiv 2301.01060; CI-CAM: ACM MM 2021.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import lazy_names

if TYPE_CHECKING:
    from kdcicam.backbones import VGG16, InceptionV3, NonLocalBlock
    from kdcicam.baselines import LogitsView
    from kdcicam.boxes import boxes_from_map, contour_boxes, official_boxes
    from kdcicam.checkpoints import load_model, save_model
    from kdcicam.data import load_images
    from kdcicam.evaluation import evaluate
    from kdcicam.flagged import FlaggedImages
    from kdcicam.losses import ClassifierLoss, Teachers, TwoTeacherLoss
    from kdcicam.metrics import PixelAveragePrecision, WSOLEvaluator
    from kdcicam.model import CICAM, CICAMOutput, Localization
    from kdcicam.settings import PRESETS, Settings
    from kdcicam.training import train

__all__ = [
    "CICAM",
    "CICAMOutput",
    "Localization",
    "NonLocalBlock",
    "VGG16",
    "InceptionV3",
    "ClassifierLoss",
    "TwoTeacherLoss",
    "Teachers",
    "boxes_from_map",
    "official_boxes",
    "contour_boxes",
    "WSOLEvaluator",
    "PixelAveragePrecision",
    "LogitsView",
    "load_images",
    "FlaggedImages",
    "Settings",
    "PRESETS",
    "train",
    "evaluate",
    "save_model",
    "load_model",
]

# Each name is imported at first use, so that `kdcicam --help` and its errors about options need no torch.
_HOME = {
    "CICAM": "model",
    "CICAMOutput": "model",
    "Localization": "model",
    "NonLocalBlock": "backbones",
    "VGG16": "backbones",
    "InceptionV3": "backbones",
    "ClassifierLoss": "losses",
    "TwoTeacherLoss": "losses",
    "Teachers": "losses",
    "boxes_from_map": "boxes",
    "official_boxes": "boxes",
    "contour_boxes": "boxes",
    "WSOLEvaluator": "metrics",
    "PixelAveragePrecision": "metrics",
    "LogitsView": "baselines",
    "load_images": "data",
    "FlaggedImages": "flagged",
    "Settings": "settings",
    "PRESETS": "settings",
    "train": "training",
    "evaluate": "evaluation",
    "save_model": "checkpoints",
    "load_model": "checkpoints",
}

# Modules that are reached as attributes: kdcicam.functional.intervene.
_MODULES = ("functional",)

__getattr__, __dir__ = lazy_names(__name__, _HOME, _MODULES)
