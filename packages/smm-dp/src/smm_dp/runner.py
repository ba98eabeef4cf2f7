"""A whole round in one process: vectors, or a file of them, in; a private sum out."""

import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float64

from shared_core import InputError
from shared_core.files import atomic_path
from smm_dp.calibration import calibrate, check_modulus, squared_norm
from smm_dp.ledger import PrivacyLedger
from smm_dp.mechanism import Accounting, SkellamMixture
from smm_dp.randomness import secure_source
from smm_dp.report import REPORT_FILES, privacy_report, write_report
from smm_dp.secure_aggregation import AggregationPlan, aggregate_in_process

if TYPE_CHECKING:
    pass

_DENSE = 24  # up to so many participants everybody is everybody's neighbour


def secure_round(
    mechanism: SkellamMixture,
    vectors: Mapping[str, Float[np.ndarray, " dim"]],
    ledger: PrivacyLedger,
    *,
    round_id: str = "0",
    dropped: frozenset[str] = frozenset(),
    least: int | None = None,
) -> tuple[Float64[np.ndarray, " dim"], tuple[str, ...]]:
    """Charge the ledger, then encode, aggregate securely and decode one round with cryptographic noise.

    Args:
        mechanism: The mechanism of the round.
        vectors: Vector of each participant, by name.
        ledger: Charged before anything leaves a participant; stays charged if the round is given up.
        round_id: Public name of the round.
        dropped: Those who vanish before their masked vector arrives.
        least: Fewest participants to finish; all where None. Their noise must be what the ledger's rounds
            state.

    Returns:
        The estimated sum of those who finished, and their names.

    Raises:
        BudgetExceeded: Before anything was sent.
        AggregationAborted: Too few finished.
        InputError: A vector is unusable; names the participant. Or the mechanism is not what the ledger's
            rounds state; nothing was charged then.
    """
    ledger.check(mechanism)
    names = tuple(vectors)
    degree = None if len(names) <= _DENSE else 16
    reach = len(names) - 1 if degree is None else degree
    least = len(names) if least is None else least
    plan = AggregationPlan(
        names, mechanism.padded_dim, mechanism.modulus_bits, reach // 2 + 1, round_id, degree, max(2, least)
    )
    if least * float(mechanism.mu_each) < ledger.round_privacy.mu * (1 - 1e-12):
        raise InputError(
            f"{least} participants add noise of mu {least * float(mechanism.mu_each):.6g}, the "
            "ledger's rounds state "
            f"{ledger.round_privacy.mu:.6g}",
            field="least",
        )
    kind = ledger.round_privacy
    constant = kind.effective_rate < 1 or kind.adjacency == "add-remove"
    if constant and not mechanism.participants == len(names) == least:
        raise InputError(
            "amplification by sampling and add-remove adjacency need one constant total noise: the mechanism "
            f"shares it among {mechanism.participants}, {len(names)} take part and {least} suffice",
            field="least",
            value=least,
        )
    ledger.charge()
    residues = {name: mechanism.encode(vector, participant=name) for name, vector in vectors.items()}
    total, finished = aggregate_in_process(plan, residues, drop_before_masking=dropped)
    return mechanism.decode(total), finished


def read_vectors(path: Path) -> Float64[np.ndarray, "n dim"]:
    """Read one vector a row from .npy or comma-separated text.

    Raises:
        InputError: The file is no table of numbers; names the row of a number that is not finite.
    """
    if not path.is_file():
        raise InputError("is no file, expected .npy or comma-separated text", file=path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an empty text, which is refused below
            rows = (
                np.load(path, allow_pickle=False)
                if path.suffix == ".npy"
                else np.loadtxt(path, delimiter=",", ndmin=2)
            )
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"is no table of numbers: {error}", file=path) from error
    if not isinstance(rows, np.ndarray):
        raise InputError("is an archive of arrays, expected one array", file=path)
    if rows.ndim != 2 or rows.dtype.kind not in "fiu" or 0 in rows.shape:
        raise InputError(
            f"expected a table, one row a participant, found shape {rows.shape} of {rows.dtype}", file=path
        )
    bad = np.argwhere(~np.isfinite(rows))
    if bad.size:
        row, column = bad[0]
        raise InputError(
            f"the value of row {row}, column {column} is not finite",
            file=path,
            value=float(rows[row, column]),
        )
    return rows.astype(np.float64)


def aggregate_file(
    path: Path,
    epsilon: float,
    delta: float,
    scale: float,
    norm: float,
    out: Path,
    *,
    bits: int | None,
    accounting: Accounting,
    ledger: Path | None,
    mean: bool,
) -> list[Path]:
    """Release the private sum or mean of a file's vectors; write it and the privacy report to `out`.

    The noise is calibrated for one release within (epsilon, delta): a second release with the same ledger is
    stopped.
    """
    rows = read_vectors(path)
    clip = squared_norm(scale, norm)
    found = calibrate(
        epsilon,
        delta,
        clip,
        scale,
        1.0,
        1,
        accounting,
        dim=rows.shape[1],
        participants=len(rows),
        modulus_bits=bits,
        population=len(rows),
    )
    check_modulus(found.mu_total, found.modulus_bits, participants=len(rows))
    mechanism = SkellamMixture(
        rows.shape[1],
        clip,
        scale,
        found.modulus_bits,
        found.mu_total,
        len(rows),
        found.coordinate_bound,
        accounting,
        rotation_seed=int(secure_source().octets(4).view(np.uint32)[0]),
    )
    out.mkdir(parents=True, exist_ok=True)
    for name in ("result.npy", *REPORT_FILES):  # before anything is charged
        if (out / name).is_dir() or not os.access(out, os.W_OK):
            raise InputError("cannot be written; nothing was released", file=out / name)
    book = PrivacyLedger(ledger, epsilon, delta, found.round_privacy)
    total, _ = secure_round(mechanism, {f"row {i}": row for i, row in enumerate(rows)}, book)
    result = total / len(rows) if mean else total
    with atomic_path(out / "result.npy") as temporary:
        np.save(temporary, result)
    report = privacy_report(
        mechanism,
        found.round_privacy,
        book.rounds,
        delta,
        sampler=secure_source().label,
        secure_source=True,
        aggregation="Z_m secure aggregation of all parties in one process: whoever runs it sees every vector",
        notes=(f"Clipping leaves about {found.shrinkage:.1%} of a vector of norm {norm:g}.",),
    )
    return [out / "result.npy", *write_report(report, out)]
