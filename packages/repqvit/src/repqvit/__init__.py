"""RepQ-ViT: post-training quantization of vision transformers by scale reparameterization (ICCV 2023)."""

from repqvit.quantized import QuantizedModel, quantize
