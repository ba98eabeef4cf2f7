"""RepQ-ViT: post-training quantization of vision transformers by scale reparameterization (ICCV 2023).

    quantized = repqvit.quantize(model, calibration_images, w_bits=4, a_bits=4)

Li, Xiao, Yang, Gu: "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers",
ICCV 2023, arXiv 2212.08254.
"""

from repqvit.checkpoint import load
from repqvit.quantized import QuantizedModel, quantize
from repqvit.recipes import RECIPES, Recipe
from repqvit.reparameterize import reparameterize_layernorm

__all__ = ["quantize", "QuantizedModel", "load", "Recipe", "RECIPES", "reparameterize_layernorm"]
