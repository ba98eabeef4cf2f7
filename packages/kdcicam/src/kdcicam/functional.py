"""The method as pure functions on tensors: context branch, context pool, combinational maps.

Shapes: batch B, classes K, channels C, map of h by w cells (A x A in the paper). Sections are those of
"Knowledge-guided Causal Intervention for Weakly-supervised Object Localization" (arXiv 2301.01060) and of
CI-CAM (ACM MM 2021), as the authors' released evaluation states them.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from shared_core import InputError

Combination = Literal["quadratic", "sum_1", "linear", "mean", "cam"]
COMBINATIONS = get_args(Combination)
LAST_RANKS = 20
"""How many of the least likely classes `sum_1` and `mean` subtract."""

_EPS = 1e-5  # of the train-mode BatchNorm that the authors normalize with; part of the definition


def normalize_maps(maps: Float[Tensor, "classes h w"]) -> Float[Tensor, "classes h w"]:
    """N(S): each class's map less its mean, over its deviation (biased, with 1e-5 under the root).

    What a BatchNorm over the classes gives in training mode for a batch of one. A map of zeros stays zero.
    """
    centred = maps - maps.mean((1, 2), keepdim=True)
    return centred * (centred.square().mean((1, 2), keepdim=True) + _EPS).rsqrt()


def class_sums(
    maps: Float[Tensor, "batch h w"],
    labels: Int[Tensor, " batch"],
    predicted: Int[Tensor, " batch"],
    num_classes: int,
) -> Float[Tensor, "classes h w"]:
    """S_k: the sum of the raw maps of class k over the images of class k that the up branch gets right.

    Args:
        maps: M_{i, label}: each image's raw map of its label.
        labels: The labels.
        predicted: Top-1 of the context-free branch.
        num_classes: K.
    """
    sums = maps.new_zeros((num_classes, *maps.shape[1:]), dtype=torch.float32)
    right = predicted == labels
    return sums.index_add(0, labels[right], maps[right].float())


def updated_pool(
    pool: Float[Tensor, "classes h w"], sums: Float[Tensor, "classes h w"], update_rate: float
) -> Float[Tensor, "classes h w"]:
    """Q <- N(Q + update_rate N(S)), the pool after one step.

    Q is normalized in each step, so the rate is an inverse memory of about 1/rate steps and not that of a
    plain moving average: one update from zero gives about N(S) at once.
    """
    return normalize_maps(pool + update_rate * normalize_maps(sums))


def intervene(
    feature: Float[Tensor, "batch channels h w"],
    pool: Float[Tensor, "classes h w"],
    predicted: Int[Tensor, " batch"],
    weight: Float[Tensor, "channels classes"],
    bias: Float[Tensor, " channels"],
) -> Float[Tensor, "batch channels h w"]:
    """Return f' = f + f m with the context attention m_c(p) = a_{c,y} Q_y(p) + a0_c.

    m is the 1x1 convolution of a tensor [B, K, h, w] that is zero but for channel y, the predicted class,
    where it holds the pool's map of y. Only that channel counts, so the convolution is the outer product
    of a column of its weight and one map: K times fewer products, and the tensor is never made.

    Args:
        feature: f, of the backbone.
        pool: Q.
        predicted: y, the network's own prediction.
        weight: a, of the 1x1 convolution from K to C channels.
        bias: a0, of it.
    """
    contexts = pool[predicted].to(feature.dtype).unsqueeze(1)
    columns = weight.t()[predicted].to(feature.dtype)[:, :, None, None]
    attention = torch.addcmul((1 + bias.to(feature.dtype))[None, :, None, None], columns, contexts)
    return feature * attention


def class_maps(
    feature: Float[Tensor, "batch channels h w"],
    weight: Float[Tensor, "classes channels"],
    classes: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch classes h w"] | Float[Tensor, "batch h w"]:
    """M_k = sum_c W_kc f_c, without the bias: of all classes, or of one class an image."""
    if classes is not None:
        return weighted_map(feature, weight[classes])
    return F.conv2d(feature, weight[:, :, None, None].to(feature.dtype))


def weighted_map(
    feature: Float[Tensor, "batch channels h w"], weights: Float[Tensor, "batch channels"]
) -> Float[Tensor, "batch h w"]:
    """One map an image: the channels' sum with the image's own weights."""
    return torch.einsum("bc,bchw->bhw", weights.to(feature.dtype), feature)


def rank_weights(
    num_classes: int,
    combine: Combination = "quadratic",
    last: int = LAST_RANKS,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, " ranks"]:
    """gamma_k: the weight of the k-th best class's map in the combinational map.

    - ``quadratic``: -(k/(K-1))^2. The top class has weight 0 and the last one -1: the map shows where the
      least likely classes do not respond.
    - ``sum_1``: 1 for the top; the last n ranks get -c/n with c from 0 to 2, the last most.
    - ``linear``: 1 - 2k/(K-1). ``mean``: 1 for the top, -1/n for each of the last n. ``cam``: only the top.

    Args:
        num_classes: K.
        combine: Which.
        last: n, of ``sum_1`` and ``mean``.
        device: Of the result.
        dtype: Of the result; torch's default where None.

    Raises:
        InputError: K = 1 leaves nothing to combine, or n is not 1 to K.
    """
    if combine not in COMBINATIONS:
        raise InputError(f"expected one of {', '.join(COMBINATIONS)}", field="combine", value=combine)
    if num_classes < 2 and combine != "cam":
        raise InputError(
            f"{combine} combines the maps of several classes: with one class use combine='cam'",
            field="num_classes",
            value=num_classes,
        )
    gamma = torch.zeros(num_classes, device=device, dtype=dtype)
    rank = torch.arange(num_classes, device=device).to(gamma.dtype)
    if combine == "quadratic":
        return -((rank / (num_classes - 1)) ** 2)
    if combine == "linear":
        return 1 - 2 * rank / (num_classes - 1)
    gamma[0] = 1
    if combine != "cam":
        if not 1 <= last <= num_classes:
            raise InputError(f"expected 1 to the {num_classes} classes", field="last", value=last)
        shares = torch.linspace(0, 2, last, device=device) if combine == "sum_1" else torch.ones(last)
        gamma[num_classes - last :] -= shares.to(gamma) / last
    return gamma


def combined_weights(
    logits: Float[Tensor, "batch classes"],
    weight: Float[Tensor, "classes channels"],
    combine: Combination = "quadratic",
    last: int = LAST_RANKS,
) -> Float[Tensor, "batch channels"]:
    """sum_k gamma_k W_{r_k}: the classifier's rows, combined by each image's own ranking of the classes.

    Ties rank the class of the lower number first.
    """
    gamma = rank_weights(logits.shape[1], combine, last, device=weight.device, dtype=weight.dtype)
    ranking = logits.detach().argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(logits, dtype=weight.dtype).scatter_(1, ranking, gamma.expand_as(logits)) @ weight


def combinational_map(
    feature: Float[Tensor, "batch channels h w"],
    logits: Float[Tensor, "batch classes"],
    weight: Float[Tensor, "classes channels"],
    combine: Combination = "quadratic",
    last: int = LAST_RANKS,
) -> Float[Tensor, "batch h w"]:
    """sum_k gamma_k M_{r_k}, the map that is boxed, at the feature's size and not shifted.

    The rows of the classifier are combined first, then one map is made; the K maps never are. The ranking is
    the network's own: labels have no part in the map.
    """
    return weighted_map(feature, combined_weights(logits, weight, combine, last))


def upsampled(maps: Float[Tensor, "batch h w"], size: tuple[int, int]) -> Float[Tensor, "batch height width"]:
    """Each map less its minimum, then bilinear (align_corners=False) at the size of the image."""
    shifted = maps - maps.amin((1, 2), keepdim=True)
    return F.interpolate(shifted[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
