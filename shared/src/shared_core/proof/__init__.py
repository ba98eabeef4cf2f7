"""The proof of a claim: run, record (proof.json), console table and exit code."""

from shared_core.proof.environment import peak_memory_bytes, versions
from shared_core.proof.record import (
    FILE_NAME,
    Claim,
    Metric,
    ProofRecord,
    Spread,
    load,
    paired_difference,
    spread,
)
from shared_core.proof.run import ProofRun
from shared_core.proof.table import show

__all__ = [
    "FILE_NAME",
    "Claim",
    "Metric",
    "ProofRecord",
    "ProofRun",
    "Spread",
    "load",
    "paired_difference",
    "peak_memory_bytes",
    "show",
    "spread",
    "versions",
]
