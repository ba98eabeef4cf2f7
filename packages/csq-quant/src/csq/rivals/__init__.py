"""Methods that CSQ is compared with, on the same layers and counted in the same way."""

from csq.rivals.allocation import cheapest_allocation, random_allocation
from csq.rivals.attach import Rival, attach, detach, hard_layers, harden, rival_layers, weights
from csq.rivals.bsq import BsqWeight, bsq_penalty
from csq.rivals.hessian import hessian_traces, sensitivities
from csq.rivals.lsq import LsqWeight, lsq_quantize
from csq.rivals.ste import SteWeight

__all__ = [
    "Rival",
    "attach",
    "detach",
    "harden",
    "hard_layers",
    "rival_layers",
    "weights",
    "SteWeight",
    "LsqWeight",
    "lsq_quantize",
    "BsqWeight",
    "bsq_penalty",
    "hessian_traces",
    "sensitivities",
    "cheapest_allocation",
    "random_allocation",
]
