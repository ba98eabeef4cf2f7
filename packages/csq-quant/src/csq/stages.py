"""The stages of training that a run's settings stand for."""

from __future__ import annotations

from typing import Any

from torch import nn

from csq.methods import (
    BsqFinetuneStage,
    BsqStage,
    CsqStage,
    HawqStage,
    Method,
    RandomStage,
    Stage,
    UniformStage,
)
from csq.settings import Settings


def default_lambda(steps: int) -> float:
    """Return λ for a search of so many steps.

    A power law through 0.3 at 420 steps, measured on digits, and 0.01 at the 117,000 steps of the official
    CIFAR recipe; at most 0.5. What the search misses, `on_miss="settle"` closes.
    """
    return min(0.5, 0.3 * (420 / steps) ** 0.6)


def method_for(settings: Settings, steps: int, normalized: bool) -> Method:
    """Return the stages of a run.

    Args:
        settings: What was asked for.
        steps: Of the whole run.
        normalized: Whether the model has BatchNorm, which permits the official start from scratch.
    """
    first, bits = settings.first_share, settings.target_bits
    rest = 1 - first
    shared: dict[str, Any] = {
        "act_bits": settings.act_bits,
        "act_method": settings.act_method,
        "skip": settings.skip,
    }
    trained = settings.weights is not None or first > 0 or not normalized
    init = settings.init if settings.init != "auto" else "pretrained" if trained else "scratch"
    stages: tuple[Stage, ...]
    match settings.method:
        case "float":
            stages = (Stage("train", 1.0),)
        case "csq" | "csq-uniform":
            uniform = settings.method == "csq-uniform"
            stage = CsqStage(
                "csq",
                rest,
                target_bits=None if uniform else bits,
                n_bits=int(bits) if uniform else settings.n_bits,
                init=init,
                lam=default_lambda(round(rest * steps)) if settings.lam is None else settings.lam,
                budget=settings.budget,
                search=settings.search,
                finetune=settings.finetune,
                contiguous=settings.contiguous,
                **shared,
            )
            stages = (stage,)
        case "lsq" | "ste":
            stages = (UniformStage("train", rest, bits=int(bits), quantizer=settings.method, **shared),)
        case "hawq":
            stages = (HawqStage("train", rest, target_bits=bits, **shared),)
        case "random":
            stages = (RandomStage("train", rest, target_bits=bits, **shared),)
        case "bsq":
            searching = 0.55 * rest
            stages = (
                BsqStage("search", searching, alpha=settings.alpha, **shared),
                BsqFinetuneStage("finetune", rest - searching, lr=0.3, skip=settings.skip),
            )
    return Method(settings.method, ((Stage("float", first),) if first else ()) + stages)


def has_batchnorm(model: nn.Module) -> bool:
    """Return whether a model has BatchNorm."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
