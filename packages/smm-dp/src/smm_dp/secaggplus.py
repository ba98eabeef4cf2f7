"""Flower's stock SecAgg+ as a carrier of residues, with a warning: its masks are weak.

Its mask streams come from NumPy's RandomState seeded with a key folded to 32 bits, and never take the largest
residue (flwr 1.41, flower issue 7522). Whoever tries 2^32 seeds unmasks a client. `smm_dp.flower` does
not use it.
"""

import warnings
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt32

from shared_core import InputError
from smm_dp.packing import centre, check_residues, wrap

WARNING = (
    "Flower's SecAgg+ masks are drawn from 32-bit seeds (flwr 1.41, flower issue 7522): it does not "
    "hide vectors "
    "from a server that tries all seeds. Use smm_dp.flower for secure aggregation"
)


class WeakMasksWarning(UserWarning):
    """Secure aggregation was asked for that is not secure."""


def secaggplus_settings(bits: int, participants: int) -> dict[str, Any]:
    """Return arguments for `flwr.server.workflow.SecAggPlusWorkflow` under which integers stay exact; warns.

    Quantization then has step 1 over the centred residues, and the modulus exceeds every possible sum.

    Args:
        bits: b of the mechanism.
        participants: Most clients in a round.

    Raises:
        InputError: Sums need more than Flower's 32 bits.
    """
    warnings.warn(WARNING, WeakMasksWarning, stacklevel=2)
    modulus = 1 << bits
    need = (participants * modulus).bit_length()
    if need > 31:
        raise InputError(
            f"{participants} residues of {bits} bits need {need} bits, SecAgg+ sums in 31",
            field="bits",
            value=bits,
        )
    return {
        "clipping_range": modulus / 2,
        "quantization_range": modulus,
        "modulus_range": 1 << need,
        "max_weight": 1,
    }


def to_secaggplus(residues: UInt32[np.ndarray, " d"], bits: int) -> Float64[np.ndarray, " d"]:
    """Return what a client hands to `secaggplus_mod`, with num_examples = max_weight: floats."""
    check_residues(residues, residues.size, bits)
    return centre(residues, bits).astype(np.float64)


def from_secaggplus(mean: Float64[np.ndarray, " d"], count: int, bits: int) -> UInt32[np.ndarray, " d"]:
    """Return the sum modulo 2^bits from the mean that SecAgg+ gives the server.

    Raises:
        InputError: The numbers are not integers: something rounded or weighted them on the way.
    """
    total = mean * count
    nearest = np.rint(total)
    if np.abs(total - nearest).max(initial=0.0) > 1e-3:
        raise InputError(
            "the sum is not made of integers: check clipping, quantization and weights", field="mean"
        )
    return wrap(nearest.astype(np.int64), bits)
