"""Which neighbouring cells look alike: by colour, by depth gradient, or by any features."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from asymaffinity.edges import EdgeBits, alike, check_window, distances
from asymaffinity.grid import grid_size, to_grid
from shared_core import InputError


@dataclass(frozen=True)
class ColorAffinity:
    """Edges between cells of like colour: exp(-|LAB_i - LAB_j| / theta) >= thresh (BoxInst, equation 4).

    Args:
        theta: Distance in LAB (L from 0 to 100) at which the similarity is 1/e.
        thresh: 0.3 as in BoxInst's released configuration; its paper's best row has 0.1.
        stride: Pixels a cell.
        kernel: Side of the window of neighbours in cells, odd.
        dilation: Cells from one neighbour to the next.

    >>> image = torch.zeros(1, 3, 16, 16)
    >>> ColorAffinity()(image).share()
    1.0
    """

    theta: float = 2.0
    thresh: float = 0.3
    stride: int = 4
    kernel: int = 3
    dilation: int = 2

    def __post_init__(self) -> None:
        _check(self.theta, self.thresh, self.kernel, self.dilation)

    def __call__(
        self,
        images: Shaped[Tensor, "images channels height width"],
        valid: Bool[Tensor, "images height width"] | None = None,
    ) -> EdgeBits:
        """Edges of images.

        Args:
            images: RGB, or grey of one channel; bytes, or floats from 0 to 1, not normalised.
            valid: Pixels that are image and not padding; where None all.

        Raises:
            InputError: The images are of another kind or range.
        """
        return alike(
            self.features(images),
            self.theta,
            self.thresh,
            None if valid is None else middle(valid, self.stride),
            kernel=self.kernel,
            dilation=self.dilation,
        )

    def features(
        self, images: Shaped[Tensor, "images channels height width"]
    ) -> Float[Tensor, "images 3 h w"]:
        """Mean colour of each cell in CIE LAB."""
        pooled = to_grid(unit_range(images), self.stride)
        if pooled.shape[1] == 1:
            pooled = pooled.expand(-1, 3, -1, -1)
        return lab(pooled)


@dataclass(frozen=True)
class DepthGradAffinity:
    """Edges between cells of like depth gradient: exp(-|g_i - g_j| / theta) >= thresh.

    The inverse depth (disparity) of any plane is affine in the image's coordinates, so its gradient is one
    vector for each flat surface: zero for what faces the camera, a constant on the road. An object that
    touches the ground has its depth there, and another gradient. How AsyInst computes it could not be read;
    this is a reconstruction.

    Args:
        theta: Distance of gradients at which the similarity is 1/e, in units of `normalize`.
        thresh: Similarity from which an edge is kept.
        field: What is differentiated: ``disparity`` (inverse depth), ``depth`` or ``log_depth``.
        normalize: What frees theta of units. ``spread``: the slope of a ramp from the 5th to the 95th
            percentile of the field over the image's height. ``median``: the median length of the gradients
            that are not nearly zero. ``none``: gradients a pixel, as they are.
        min_valid: Share of a cell's pixels that must have a gradient; others take no part in its mean.
        stride: Pixels a cell.
        kernel: Side of the window of neighbours in cells, odd.
        dilation: Cells from one neighbour to the next.
    """

    theta: float = 1.0
    thresh: float = 0.5
    field: str = "disparity"
    normalize: str = "spread"
    min_valid: float = 0.5
    stride: int = 4
    kernel: int = 3
    dilation: int = 2

    def __post_init__(self) -> None:
        _check(self.theta, self.thresh, self.kernel, self.dilation)
        for name, known in (
            ("field", ("disparity", "depth", "log_depth")),
            ("normalize", ("spread", "median", "none")),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"expected one of {', '.join(known)}", field=name, value=getattr(self, name))
        if not 0 < self.min_valid <= 1:
            raise InputError("expected a share above 0", field="min_valid", value=self.min_valid)

    def __call__(self, field: Float[Tensor, "images height width"]) -> EdgeBits:
        """Edges of images.

        Args:
            field: What `self.field` says, as `asymaffinity.depth.to_field` makes it; NaN where not known.
        """
        gradient, valid = self.features(field)
        return alike(
            gradient, self.theta, self.thresh, valid, both=True, kernel=self.kernel, dilation=self.dilation
        )

    def features(
        self, field: Float[Tensor, "images height width"]
    ) -> tuple[Float[Tensor, "images 2 h w"], Bool[Tensor, "images h w"]]:
        """Normalised gradient of each cell (by x, by y), and which cells have one."""
        mean, valid = cell_gradient(field, self.stride, self.min_valid)
        if self.normalize == "none":
            return mean, valid
        scales = [
            _spread(values) if self.normalize == "spread" else _median(vectors, valid_)
            for values, vectors, valid_ in zip(field, mean, valid, strict=True)
        ]
        return mean / torch.stack(scales)[:, None, None, None] if scales else mean, valid


@dataclass(frozen=True)
class FeatureAffinity:
    """Edges between cells of like features of any kind: exp(-|f_i - f_j| / theta) >= thresh.

    Args:
        theta: Distance at which the similarity is 1/e, in the features' unit.
        thresh: Similarity from which an edge is kept.
        kernel: Side of the window of neighbours in cells, odd.
        dilation: Cells from one neighbour to the next.
    """

    theta: float
    thresh: float = 0.5
    kernel: int = 3
    dilation: int = 2

    def __post_init__(self) -> None:
        _check(self.theta, self.thresh, self.kernel, self.dilation)

    def __call__(
        self,
        features: Float[Tensor, "images channels h w"],
        valid: Bool[Tensor, "images h w"] | None = None,
    ) -> EdgeBits:
        """Edges of features on the grid of the masks; `valid`: cells that may be an edge's end."""
        return alike(
            features, self.theta, self.thresh, valid, both=True, kernel=self.kernel, dilation=self.dilation
        )


def lab(rgb: Float[Tensor, "images 3 h w"]) -> Float[Tensor, "images 3 h w"]:
    """RGB from 0 to 1 (sRGB) as CIE LAB under D65: L from 0 to 100. By OpenCV, on the CPU.

    OpenCV's own transfer curve for floats is a table that is off by up to 0.3 in LAB, so it gets linear
    light.

    >>> lab(torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1)).flatten().round().tolist()
    [53.0, 80.0, 67.0]
    """
    light = rgb.detach().float()
    light = torch.where(light > 0.04045, ((light + 0.055) / 1.055) ** 2.4, light / 12.92)
    arrays = light.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    made = [torch.from_numpy(cv2.cvtColor(array, cv2.COLOR_LRGB2LAB)) for array in arrays]
    if not made:
        return rgb.new_zeros(rgb.shape)
    return torch.stack(made).permute(0, 3, 1, 2).contiguous().to(rgb.device)


def unit_range(
    images: Shaped[Tensor, "images channels height width"],
) -> Float[Tensor, "images channels height width"]:
    """Images as floats from 0 to 1.

    Raises:
        InputError: They have neither one nor three channels, or are of another range.
    """
    if images.shape[1] not in (1, 3):
        raise InputError("expected 3 channels, or 1 of grey", field="images", value=images.shape[1])
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    if not images.is_floating_point():
        raise InputError(
            "expected bytes or floats from 0 to 1; divide 16-bit images by 65535",
            field="images",
            value=images.dtype,
        )
    images = images.float()
    if images.numel():
        low, high = images.aminmax()
        if not (float(low) >= -1e-3 and float(high) <= 1 + 1e-3):
            hint = "; is the image normalised already?" if float(low) < 0 else "; divide bytes by 255"
            raise InputError(
                f"expected values from 0 to 1{hint}",
                field="images",
                value=f"{float(low):.3g} to {float(high):.3g}",
            )
        if float(low) < 0 or float(high) > 1:
            images = images.clamp(0, 1)
    return images


def depth_gradient(
    field: Float[Tensor, "images height width"],
) -> tuple[Float[Tensor, "images 2 height width"], Bool[Tensor, "images height width"]]:
    """Slope of a field a pixel, by x and by y: Sobel / 8 after a mean of 3 x 3, the border repeated.

    Returns:
        The gradient, and where it is known: where no pixel of its support is NaN or infinite.

    >>> gradient, known = depth_gradient(torch.arange(7.0).repeat(7, 1)[None] * 3)
    >>> gradient[0, :, 3, 3].tolist(), bool(known.all())
    ([3.0, 0.0], True)
    """
    known = field.isfinite()
    values = torch.where(known, field, 0)[:, None]
    smooth = F.avg_pool2d(F.pad(values, (1, 1, 1, 1), mode="replicate"), 3, 1)
    gradient = F.conv2d(F.pad(smooth, (1, 1, 1, 1), mode="replicate"), _sobel(field))
    missing = F.max_pool2d((~known)[:, None].float(), 5, 1, 2)[:, 0] > 0
    return gradient, ~missing


def cell_gradient(
    field: Float[Tensor, "images height width"], stride: int, min_valid: float = 0.5
) -> tuple[Float[Tensor, "images 2 h w"], Bool[Tensor, "images h w"]]:
    """The mean of `depth_gradient` over each cell's known pixels, without making it at every pixel.

    Mean, Sobel and the mean over a cell are linear: together one window of stride + 4 pixels a side, looked
    at once a cell. Cells near a hole or at a cut border are few and made pixel by pixel.

    Returns:
        The mean gradient, 0 where fewer than the share `min_valid` of a cell's pixels have one; and where it
        is not so.
    """
    count, height, width = field.shape
    rows, columns = grid_size(height, width, stride)
    known = None if field.sum().isfinite() else field.isfinite()
    values = field if known is None else torch.where(known, field, 0)
    padded = _mirrored(values, rows * stride, columns * stride)
    smooth, slope = (
        F.conv1d(padded.new_tensor(taps).view(1, 1, -1), padded.new_full((1, 1, stride), 1 / stride),
                 padding=stride - 1)[0, 0]
        for taps in ([1 / 12, 3 / 12, 4 / 12, 3 / 12, 1 / 12], [-1 / 6, -1 / 6, 0, 1 / 6, 1 / 6])
    )  # fmt: skip
    windows = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None]
    mean = F.conv2d(padded[:, None], windows, stride=stride)[:, :, :rows, :columns]
    valid = torch.ones(count, rows, columns, dtype=torch.bool, device=field.device)
    if known is None and height >= rows * stride and width >= columns * stride:
        return mean, valid
    missing = torch.zeros_like(padded)
    if known is not None:
        missing = _mirrored((~known).to(field.dtype), rows * stride, columns * stride)
    side = stride + 4
    near = F.conv2d(missing[:, None], missing.new_ones(1, 1, side, side), stride=stride)
    special = near[:, 0, :rows, :columns] > 0
    special[:, -1] |= height < rows * stride
    special[:, :, -1] |= width < columns * stride
    image, row, column = torch.where(special)
    patches, lacking = (
        whole.unfold(1, side, stride).unfold(2, side, stride)[image, row, column]
        for whole in (padded, missing)
    )
    own, share = _patch_gradient(patches, lacking, row, column, (height, width), stride)
    enough = share >= min_valid - 1e-6
    mean[image, :, row, column] = own * enough[:, None]
    valid[image, row, column] = enough
    return mean, valid


def middle(valid: Bool[Tensor, "images height width"], stride: int) -> Bool[Tensor, "images h w"]:
    """Validity of each cell's middle pixel."""
    h, w = grid_size(valid.shape[1], valid.shape[2], stride)
    offset = stride // 2
    rows = torch.arange(h, device=valid.device) * stride + offset
    columns = torch.arange(w, device=valid.device) * stride + offset
    return valid[:, rows.clamp(max=valid.shape[1] - 1)][:, :, columns.clamp(max=valid.shape[2] - 1)]


def similarity_quantiles(
    features: Float[Tensor, "images channels h w"], theta: float, kernel: int = 3, dilation: int = 2
) -> list[float]:
    """10th, 50th and 90th percentile of the similarities of all edges: what to choose a threshold by."""
    reach = dilation * (kernel // 2)
    found = [
        torch.exp(-distances(features, offset) / theta).flatten()
        for offset in ((0, reach), (reach, 0), (0, dilation), (dilation, 0))
    ]
    together = torch.cat(found)
    if not together.numel():
        return [1.0, 1.0, 1.0]
    together = together[:: max(1, together.numel() // 100_000)].float()
    return torch.quantile(together, together.new_tensor([0.1, 0.5, 0.9])).tolist()


def _mirrored(values: Tensor, rows: int, columns: int) -> Tensor:
    """Two pixels more on each side, such that a mean of 3 x 3 repeats its border; at least so many + 4.

    A repeated border (f0, f0, f1) has the mean that one pixel further (f1, f0, f0) has.
    """
    height, width = values.shape[1:]
    more = (2, 2 + max(0, columns - width), 2, 2 + max(0, rows - height))
    made = F.pad(values[:, None], more, mode="replicate")[:, 0]
    made[:, 0], made[:, height + 3] = made[:, 3], made[:, height]
    made[:, :, 0], made[:, :, width + 3] = made[:, :, 3], made[:, :, width]
    return made


def _patch_gradient(
    patches: Tensor, missing: Tensor, row: Tensor, column: Tensor, size: tuple[int, int], stride: int
) -> tuple[Tensor, Tensor]:
    """Mean gradient [n, 2] and share of known pixels [n] of cells, from patches with 2 pixels around them."""
    count, side = len(patches), stride + 4
    single = torch.eye(side**2, dtype=patches.dtype, device=patches.device).view(-1, 1, side, side)
    slopes = F.conv2d(F.avg_pool2d(single, 3, 1), _sobel(patches)).flatten(1)
    gradient = (patches.flatten(1) @ slopes).view(count, 2, stride, stride)
    reached = F.max_pool2d(single, 5, 1).flatten(1)
    known = (missing.flatten(1) @ reached).view(count, stride, stride) == 0
    # A cell that is cut by the image's border repeats its last pixels.
    inner = torch.arange(stride, device=patches.device)
    down, right = (
        torch.minimum(inner, (length - 1 - start * stride)[:, None]).clamp(min=0)
        for length, start in ((size[0], row), (size[1], column))
    )
    each = torch.arange(count, device=patches.device)[:, None, None]
    gradient = gradient.permute(0, 2, 3, 1)[each, down[:, :, None], right[:, None, :]]
    known = known[each, down[:, :, None], right[:, None, :]].to(patches.dtype)
    share = known.mean((1, 2))
    return (gradient * known[..., None]).mean((1, 2)) / share.clamp(min=1e-6)[:, None], share


def _sobel(like: Tensor) -> Tensor:
    """Kernels of both directions, [2, 1, 3, 3]."""
    by_x = like.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    return torch.stack([by_x, by_x.T])[:, None]


def _spread(field: Tensor) -> Tensor:
    values = field.flatten()[:: max(1, field.numel() // 100_000)]
    values = values[values.isfinite()]
    if not values.numel():
        return field.new_ones(())
    low, high = torch.quantile(values.float(), values.new_tensor([0.05, 0.95], dtype=torch.float32))
    return _or_one(((high - low) / field.shape[0]).to(field.dtype))


def _median(vectors: Tensor, valid: Tensor) -> Tensor:
    lengths = vectors.square().sum(0).sqrt()[valid]
    if not lengths.numel():
        return vectors.new_ones(())
    sloped = lengths[lengths > 0.1 * torch.quantile(lengths.float(), 0.95)]
    return _or_one(sloped.median()) if sloped.numel() else vectors.new_ones(())


def _or_one(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _check(theta: float, thresh: float, kernel: int, dilation: int) -> None:
    check_window(kernel, dilation)
    if not theta > 0:
        raise InputError("expected a number above 0", field="theta", value=theta)
    if not 0 < thresh <= 1:
        raise InputError("expected a similarity above 0, at most 1", field="thresh", value=thresh)
