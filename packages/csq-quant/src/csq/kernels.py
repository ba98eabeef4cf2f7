"""The two loops over bit planes: what runs in every step of training, plainly and compiled.

Planes are `(planes, weights)` here; results are written where the caller wants them. The compiled kernels are
the same formulas in one pass over memory, made by torch.compile for all shapes, a dozen times at most.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from shared_core import InputError

Kernel = Callable[..., None]

WORTH_COMPILING = 1_000_000
"""Weights from which `auto` compiles: below, a run is over before the compiler's seconds come back."""
VARIANTS = 64
"""How often a kernel may be compiled, at most; a dozen are seen."""
VARIABLE = "CSQ_KERNEL"


def choose(kernel: str, weights: int, device: torch.device) -> bool:
    """Whether to use the compiled kernels for so many weights.

    Raises:
        InputError: an unknown choice, in the argument or in CSQ_KERNEL.
    """
    known = ("auto", "eager", "compiled")
    if kernel not in known:
        raise InputError(f"expected {', '.join(known)}", field="kernel", value=kernel)
    if kernel == "auto":
        kernel = os.environ.get(VARIABLE, "auto")
        if kernel not in known:
            raise InputError(f"expected {', '.join(known)}", field=VARIABLE, value=kernel)
    if kernel == "auto":
        return weights >= WORTH_COMPILING and has_compiler(device.type)
    return kernel == "compiled"


@cache
def has_compiler(device_type: str) -> bool:
    """Whether torch.compile finds what it needs: a C++ compiler on the CPU, Triton elsewhere."""
    if device_type == "cpu":
        names = (os.environ.get("CXX"), "g++", "clang++")
        return any(shutil.which(name) for name in names if name)
    return importlib.util.find_spec("triton") is not None


def forward(compiled: bool) -> Kernel:
    """The kernel that adds planes into a weight."""
    return _fused(add_planes_fused, add_planes) if compiled and _usable() else add_planes


def backward(compiled: bool) -> Kernel:
    """The kernel that writes the gradients of planes."""
    return _fused(plane_gradients_fused, plane_gradients) if compiled and _usable() else plane_gradients


def add_planes(
    positive: Tensor, negative: Tensor, factors: Tensor, temperature: Tensor, total: Tensor
) -> None:
    """Add Σ_b factor_b [sigmoid(β m_p^b) - sigmoid(β m_n^b)] to total."""
    bits = torch.mul(positive, temperature).sigmoid_()
    bits.sub_(torch.mul(negative, temperature).sigmoid_())
    total.addmv_(bits.T, factors)


def plane_gradients(
    positive: Tensor,
    negative: Tensor,
    factors: Tensor,
    temperature: Tensor,
    upstream: Tensor,
    d_positive: Tensor,
    d_negative: Tensor,
    inner: Tensor,
) -> None:
    """Write ±factor_b p(1-p) G into d_positive and d_negative, and Σ_i (p_i - q_i) G_i into inner."""
    p = torch.mul(positive, temperature).sigmoid_()
    q = torch.mul(negative, temperature).sigmoid_()
    slope = torch.outer(factors, upstream)
    torch.ops.aten.sigmoid_backward.grad_input(slope, p, grad_input=d_positive)
    torch.ops.aten.sigmoid_backward.grad_input(slope.neg_(), q, grad_input=d_negative)
    inner.copy_(p.sub_(q) @ upstream)


def add_planes_fused(
    positive: Tensor, negative: Tensor, factors: Tensor, temperature: Tensor, total: Tensor
) -> None:
    """`add_planes` in the form from which the compiler makes one loop."""
    bits = torch.sigmoid(positive * temperature) - torch.sigmoid(negative * temperature)
    total.add_((factors[:, None] * bits).sum(0))


def plane_gradients_fused(
    positive: Tensor,
    negative: Tensor,
    factors: Tensor,
    temperature: Tensor,
    upstream: Tensor,
    d_positive: Tensor,
    d_negative: Tensor,
    inner: Tensor,
) -> None:
    """`plane_gradients` in the form from which the compiler makes one loop."""
    p, q = torch.sigmoid(positive * temperature), torch.sigmoid(negative * temperature)
    slope = factors[:, None] * upstream
    d_positive.copy_(p * (1 - p) * slope)
    d_negative.copy_(q * (q - 1) * slope)
    inner.copy_(((p - q) * upstream).sum(1))


_failed = False
"""Set for the rest of the process where the compiler failed once."""


def _usable() -> bool:
    # Inside a user's own torch.compile the plain formulas are traced, and fused with the rest.
    return not _failed and not torch.compiler.is_compiling()


@cache
def _compile(kernel: Kernel) -> Kernel:
    return torch.compile(kernel, dynamic=True, fullgraph=True)


def _fused(kernel: Kernel, plain: Kernel) -> Kernel:
    def run(*arguments: Tensor) -> None:
        global _failed
        try:
            _run_compiled(kernel, arguments)
        except (
            Exception
        ) as error:  # whatever a compiler's tool chain raises: the plain kernel needs none of it
            _failed = True
            logging.getLogger("csq").debug("compiling failed", exc_info=error)
            warnings.warn(
                f"the compiled kernel is not available ({type(error).__name__}); the plain one is used, which"
                f" takes more time. {VARIABLE}=eager silences this",
                stacklevel=2,
            )
            plain(*arguments)

    return run


def _run_compiled(kernel: Kernel, arguments: tuple[Tensor, ...]) -> None:
    try:
        _compile(kernel)(*arguments)
    except Exception as error:
        if type(error).__name__ != "FailOnRecompileLimitHit":
            raise
        # One plane or many, at the start of memory or within, few weights or many: each is compiled apart,
        # which in a large model is more than torch's limit of 8.
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            _compile(kernel)(*arguments)
