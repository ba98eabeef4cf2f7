"""Which parameters an optimizer may decay, for CSQ and for all that is compared with it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from csq.parametrization import bit_layers
from shared_core import InputError


def param_groups(model: nn.Module, weight_decay: float = 5e-4) -> list[dict[str, Any]]:
    """Two groups for an optimizer: gates, planes, masks, scales and steps without decay, all else with it.

    Decay pulls a gate towards 0, which is indecision between 0 and 1 (the official code decays everything),
    and a step, learned as its logarithm, towards 1. PACT's clipping values decay, as their paper has it.
    Of the rest, frozen parameters are left out. Modules name what does not decay in their `undecayed`.
    """
    free = {
        id(parameter): parameter
        for module in model.modules()
        for name in getattr(module, "undecayed", ())
        if isinstance(parameter := getattr(module, name, None), nn.Parameter)
    }
    rest = [p for p in model.parameters() if id(p) not in free and p.requires_grad]
    return [
        {"params": rest, "weight_decay": weight_decay},
        {"params": list(free.values()), "weight_decay": 0.0},
    ]


def check_param_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Warn where an optimizer decays gates; refuse one that does not hold them.

    Raises:
        InputError: gates are in no group, as when the optimizer was made before `csq.parametrize`.
    """
    gates = {id(p) for planes in bit_layers(model).values() for p in planes.parameters()}
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    missing = len(gates - held.keys())
    if missing:
        raise InputError(
            f"{missing} of {len(gates)} gate tensors are in no group; make the optimizer after "
            "csq.parametrize, from csq.param_groups(model)",
            field="optimizer",
        )
    decayed = sum(bool(held[gate].get("weight_decay")) for gate in gates)
    if decayed:
        warnings.warn(
            f"{decayed} gate tensors are in a group with weight decay, which pulls gates towards indecision; "
            "make the optimizer from csq.param_groups(model)",
            stacklevel=2,
        )
