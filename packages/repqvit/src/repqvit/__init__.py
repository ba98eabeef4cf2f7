"""RepQ-ViT: post-training quantization of vision transformers by scale reparameterization (ICCV 2023).

    quantized = repqvit.quantize(model, calibration_images, w_bits=4, a_bits=4)

Li, Xiao, Yang, Gu: "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision
Transformers", ICCV 2023, arXiv 2212.08254.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import lazy_names

if TYPE_CHECKING:
    from repqvit.checkpoint import load
    from repqvit.evaluation import compare, evaluate
    from repqvit.onnx_export import compare_onnx, export_onnx
    from repqvit.quantized import QuantizedModel, quantize
    from repqvit.recipes import RECIPES, Recipe
    from repqvit.reparameterize import reparameterize_layernorm
    from repqvit.torchao_export import to_torchao

__all__ = [
    "quantize",
    "QuantizedModel",
    "load",
    "evaluate",
    "compare",
    "export_onnx",
    "compare_onnx",
    "to_torchao",
    "Recipe",
    "RECIPES",
    "reparameterize_layernorm",
]

# Each name is imported at first use, so that `repqvit --help` and its errors about options need no torch.
_HOME = {
    "quantize": "quantized",
    "QuantizedModel": "quantized",
    "load": "checkpoint",
    "evaluate": "evaluation",
    "compare": "evaluation",
    "export_onnx": "onnx_export",
    "compare_onnx": "onnx_export",
    "to_torchao": "torchao_export",
    "Recipe": "recipes",
    "RECIPES": "recipes",
    "reparameterize_layernorm": "reparameterize",
}


# Modules that are reached as attributes: repqvit.quantizers.UniformAffine.
_MODULES = ("calibrate", "quantizers", "ranges", "recipes", "reparameterize", "integer")

__getattr__, __dir__ = lazy_names(__name__, _HOME, _MODULES)
