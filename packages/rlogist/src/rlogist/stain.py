"""A fixed extractor for H&E: statistics of colour and texture after separating the two stains. No weights.

Cheap enough for demonstrations on a CPU; not a replacement for a learned encoder.
"""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import avg_pool2d

# Optical density of the stains in red, green and blue (Ruifrok and Johnston 2001), of unit length.
HAEMATOXYLIN, EOSIN = (0.650, 0.704, 0.286), (0.072, 0.990, 0.105)
_SCALES = (2, 4, 8, 16)
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def optical_density(
    patches: UInt8[np.ndarray, "batch height width 3"],
) -> Float[Tensor, "batch 3 height width"]:
    """-log10 of transmitted light, with 255 as full light and 1 as the darkest that is told apart."""
    light = torch.from_numpy(np.array(patches)).permute(0, 3, 1, 2).float().clamp_min_(1.0)
    return -torch.log10(light / 255)


def separate_stains(
    density: Float[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """Amounts of haematoxylin, eosin and the rest in each pixel (Beer-Lambert's law, inverted)."""
    h, e = torch.tensor(HAEMATOXYLIN), torch.tensor(EOSIN)
    basis = torch.stack([h / h.norm(), e / e.norm(), torch.linalg.cross(h, e)])
    basis[2] /= basis[2].norm()
    return torch.einsum("bcij,cs->bsij", density, torch.linalg.inv(basis))


class StainExtractor:
    """Colour and texture statistics of a patch; 36 numbers, the same bits in every run.

    Mean, spread and quantiles of both stains, and how much of haematoxylin's and eosin's variance lies
    between successive scales (2, 4, 8, 16 pixels): many small nuclei and few large ones differ there at equal
    mean.
    """

    name = "stain"
    fingerprint = "stain-1"
    dim = 2 * (2 + len(_QUANTILES)) + 2 * (len(_SCALES) + 1) + 2 * len(_SCALES) + 4

    @torch.inference_mode()
    def __call__(self, patches: UInt8[np.ndarray, "batch height width 3"]) -> Float[Tensor, "batch dim"]:
        """Encode RGB patches of at least 16 pixels a side."""
        if not len(patches):
            return torch.empty(0, self.dim)
        density = optical_density(patches)
        stains = separate_stains(density)
        he = stains[:, :2]
        flat = he.flatten(2)
        # Sorting by NumPy and indexing is several times faster than torch's sort, and than torch.quantile.
        places = [round(q * (flat.shape[-1] - 1)) for q in _QUANTILES]
        quantiles = torch.from_numpy(np.sort(flat.numpy(), axis=-1)[..., places])
        parts = [flat.mean(-1), flat.std(-1), quantiles.flatten(1), *_bands(he)]
        parts += [stains[:, 2].mean(dim=(1, 2))[:, None], density.mean(dim=(2, 3))]
        return torch.cat(parts, dim=1)


def _bands(stains: Float[Tensor, "batch 2 height width"]) -> list[Tensor]:
    """Per scale: log of the variance between it and the next coarser one, and skewness of that difference."""
    found, finer, before = [], stains, 1
    for scale in _SCALES:
        coarser = avg_pool2d(finer, scale // before)
        factor = scale // before
        spread = coarser.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
        detail = finer[..., : spread.shape[-2], : spread.shape[-1]] - spread
        variance = detail.square().mean(dim=(2, 3))
        skew = detail.pow(3).mean(dim=(2, 3)) / (variance + 1e-8).pow(1.5)
        found += [0.25 * torch.log(variance + 1e-6), 0.25 * skew]
        finer, before = coarser, scale
    found.append(0.25 * torch.log(finer.var(dim=(2, 3), correction=0) + 1e-6))
    return found
