"""Make the attention of the host libraries explicit, so that its operands can be quantized.

After `prepare` every attention of a supported model calls `torch.nn.functional.scaled_dot_product_attention`
on the outputs of `nn.Linear` modules, whichever library it comes from:

- timm: the `fused_attn` switch of each attention module selects that call; a bias kept in pieces beside `qkv`
  (BEiT, EVA) moves into it;
- transformers: the `sdpa` attention implementation is that call;
- torchvision: `nn.MultiheadAttention` (ViT) and `ShiftedWindowAttention` (Swin) read projection weights as
  plain parameters; modules with the same function take their place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def prepare(model: nn.Module) -> nn.Module:
    """Change the model in place as described above; its function stays the same up to float rounding.

    Returns the model (another module where the model itself is one that is replaced).
    """
    for module in model.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = True  # pyright: ignore[reportArgumentType]  # torch's types know modules only
        _join_qkv_bias(module)
    if hasattr(model, "set_attn_implementation") and getattr(model, "_supports_sdpa", False):
        model.set_attn_implementation("sdpa")  # pyright: ignore[reportCallIssue]  # a transformers model
    for name, module in list(model.named_modules()):
        replacement = _replacement(module)
        if replacement is not None:
            set_submodule(model, name, replacement)
    return model


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _replacement(module: nn.Module) -> nn.Module | None:
    if type(module) is nn.MultiheadAttention:
        return SelfAttention(module)
    # Recognised by name: a model that has the class has torchvision loaded, others need not.
    if (
        type(module).__module__.startswith("torchvision.")
        and type(module).__name__ == "ShiftedWindowAttention"
    ):
        return ShiftedWindowSelfAttention(module)
    return None


def _join_qkv_bias(module: nn.Module) -> None:
    """Give timm's `qkv` the bias that its attention keeps beside it as q_bias, k_bias (zero) and v_bias."""
    pieces: list[Any] = [getattr(module, name, None) for name in ("q_bias", "k_bias", "v_bias")]
    qkv = getattr(module, "qkv", None)
    if isinstance(qkv, nn.Linear) and qkv.bias is None and all(isinstance(p, Tensor) for p in pieces):
        qkv.bias = nn.Parameter(torch.cat([p.detach() for p in pieces]))
        module.q_bias = module.k_bias = module.v_bias = None  # pyright: ignore[reportArgumentType]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` for query = key = value, with a fused `qkv` Linear and a `proj` Linear."""

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        if source.in_proj_weight is None or source.bias_k is not None or source.add_zero_attn:
            raise ValueError(
                "nn.MultiheadAttention with kdim/vdim, add_bias_kv or add_zero_attn is not supported: "
                "the paper's method is defined for plain self-attention"
            )
        self.num_heads = source.num_heads
        self.batch_first = source.batch_first
        self.qkv = _linear(source.in_proj_weight, source.in_proj_bias)
        self.proj = _linear(source.out_proj.weight, source.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Batched self-attention. Attention weights are not returned (second result None)."""
        if query is not key or key is not value:
            raise ValueError(
                "cross-attention through nn.MultiheadAttention is not supported, only self-attention"
            )
        x = query if self.batch_first else query.transpose(0, 1)
        batch, tokens, channels = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mask = self._mask(attn_mask, key_padding_mask, batch, tokens, x.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal and mask is None)
        out = self.proj(out.transpose(1, 2).reshape(batch, tokens, channels))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _mask(
        self,
        attn: Tensor | None,
        padding: Tensor | None,
        batch: int | torch.SymInt,  # symbolic under torch.export
        tokens: int | torch.SymInt,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """One additive mask. In nn.MultiheadAttention True means "do not attend", unlike in SDPA."""

        def additive(mask: Tensor) -> Tensor:
            if mask.dtype != torch.bool:
                return mask
            return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))

        parts = []
        if attn is not None:
            attn = additive(attn)
            parts.append(attn if attn.ndim == 2 else attn.view(batch, self.num_heads, tokens, tokens))
        if padding is not None:
            parts.append(additive(padding).view(batch, 1, 1, tokens))
        return sum(parts[1:], parts[0]) if parts else None


class ShiftedWindowSelfAttention(nn.Module):
    """torchvision's `ShiftedWindowAttention` (Swin v1) with its `qkv` and `proj` called as modules."""

    relative_position_bias: Tensor

    def __init__(self, source: Any) -> None:  # Any: torchvision's class, and torchvision may be absent
        super().__init__()
        self.window_size: list[int] = list(source.window_size)
        self.shift_size: list[int] = list(source.shift_size)
        self.num_heads: int = source.num_heads
        self.qkv: nn.Linear = source.qkv
        self.proj: nn.Linear = source.proj
        with torch.no_grad():
            position_bias = source.get_relative_position_bias().detach().clone()
        self.register_buffer("relative_position_bias", position_bias)

    def forward(self, x: Float[Tensor, "batch height width channels"]) -> Tensor:
        """Attend within the shifted windows of a feature map; the result has the shape of x."""
        _, height, width, _ = x.shape
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        batch, padded_height, padded_width, channels = x.shape
        # A window that covers the whole map leaves nothing to shift to.
        shift = [
            0 if size >= extent else step
            for size, extent, step in zip(
                self.window_size, (padded_height, padded_width), self.shift_size, strict=True
            )
        ]
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), dims=(1, 2))
        grid = (padded_height // rows, padded_width // columns)
        windows = x.view(batch, grid[0], rows, grid[1], columns, channels).transpose(2, 3)
        windows = windows.reshape(-1, rows * columns, channels)

        q, k, v = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.relative_position_bias
        if any(shift):
            regions = self._region_mask(padded_height, padded_width, shift, x)
            bias = (bias + regions[:, None]).repeat(batch, 1, 1, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out = self.proj(out.transpose(1, 2).flatten(2))

        out = out.view(batch, grid[0], grid[1], rows, columns, channels).transpose(2, 3)
        out = out.reshape(batch, padded_height, padded_width, channels)
        if any(shift):
            out = torch.roll(out, (shift[0], shift[1]), dims=(1, 2))
        return out[:, :height, :width].contiguous()

    def _region_mask(
        self, height: int, width: int, shift: list[int], like: Tensor
    ) -> Float[Tensor, "windows tokens tokens"]:
        """-100 between tokens of one window that the cyclic shift brought from different parts of the map.

        Elsewhere 0: the mask is added to the logits.
        """

        def part(extent: int, size: int, step: int) -> Tensor:
            position = torch.arange(extent, device=like.device)
            return (position >= extent - size).long() + (position >= extent - step).long() * (step > 0)

        rows, columns = self.window_size
        region = part(height, rows, shift[0])[:, None] * 3 + part(width, columns, shift[1])
        region = (
            region.view(height // rows, rows, width // columns, columns)
            .transpose(1, 2)
            .flatten(2)
            .flatten(0, 1)
        )
        different = region[:, :, None] != region[:, None, :]
        return torch.zeros_like(different, dtype=like.dtype).masked_fill(different, -100.0)
