"""Instance masks learned from boxes, with an asymmetric affinity loss over colour and depth gradient.

    criterion = BoxSupLoss()                                   # colour and depth gradient, asymmetric
    model = boxsup_maskrcnn(maskrcnn_resnet50_fpn(...), criterion)
    losses = model(images, targets)                            # targets: boxes, labels, depth; no masks

Yang, Jing, Xiao, Zhao, Yuille, Li: "AsyInst: Asymmetric Affinity with DepthGrad and Color for Box-Supervised
Instance Segmentation", arXiv 2212.03517 (2022), on top of BoxInst (Tian et al., CVPR 2021). The paper has no
released code and its method section could not be read: the asymmetric formula is a reconstruction.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import lazy_names

if TYPE_CHECKING:
    from asymaffinity.affinity import ColorAffinity, DepthGradAffinity, FeatureAffinity
    from asymaffinity.condinst import CondInst
    from asymaffinity.datasets import BoxImages, cityscapes_boxes, coco_boxes
    from asymaffinity.edges import EdgeBits
    from asymaffinity.functional import BOXINST, Rule
    from asymaffinity.losses import BoxSupLoss
    from asymaffinity.mask_rcnn import boxsup_maskrcnn
    from asymaffinity.metrics import fill_ratio, mask_health, trivial_rate

__all__ = [
    "BoxSupLoss",
    "Rule",
    "BOXINST",
    "ColorAffinity",
    "DepthGradAffinity",
    "FeatureAffinity",
    "EdgeBits",
    "boxsup_maskrcnn",
    "CondInst",
    "BoxImages",
    "coco_boxes",
    "cityscapes_boxes",
    "mask_health",
    "fill_ratio",
    "trivial_rate",
]

# Each name is imported at first use, so that `asymaffinity --help` needs no torch.
_HOME = {
    "BoxSupLoss": "losses",
    "Rule": "functional",
    "BOXINST": "functional",
    "ColorAffinity": "affinity",
    "DepthGradAffinity": "affinity",
    "FeatureAffinity": "affinity",
    "EdgeBits": "edges",
    "boxsup_maskrcnn": "mask_rcnn",
    "CondInst": "condinst",
    "BoxImages": "datasets",
    "coco_boxes": "datasets",
    "cityscapes_boxes": "datasets",
    "mask_health": "metrics",
    "fill_ratio": "metrics",
    "trivial_rate": "metrics",
}

# Modules that are reached as attributes: asymaffinity.functional.projection_loss.
_MODULES = ("functional",)

__getattr__, __dir__ = lazy_names(__name__, _HOME, _MODULES)
