"""Whole runs in one process: a file of vectors in, a private sum out; a training run that can be resumed."""

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from jaxtyping import Float, Float64

from shared_core import InputError
from shared_core.files import atomic_path, write_json
from smm_dp.calibration import calibrate, check_modulus, squared_norm
from smm_dp.experiments import Method, Setting, build, training_release
from smm_dp.ledger import PrivacyLedger
from smm_dp.mechanism import Accounting, SkellamMixture
from smm_dp.privacy import RoundPrivacy
from smm_dp.randomness import secure_source
from smm_dp.records import read_records
from smm_dp.report import REPORT_FILES, privacy_report, write_report
from smm_dp.secure_aggregation import AggregationPlan, aggregate_in_process

if TYPE_CHECKING:
    import torch

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
    if ledger.round_privacy.effective_rate < 1 and not mechanism.participants == len(names) == least:
        raise InputError(
            f"amplification by sampling needs one constant total noise: the mechanism shares it among "
            f"{mechanism.participants}, {len(names)} take part and {least} suffice",
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
    try:
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
            f"the value of row {row}, column {column} is not finite", file=path, value=rows[row, column]
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


@dataclass(frozen=True)
class TrainingJob:
    """A training run, as the command states it."""

    out: Path
    data: Path | None
    method: str
    epsilon: float
    delta: float
    scale: float
    bits: int
    sampling_rate: float
    rounds: int
    hidden: int
    learning_rate: float
    seed: int


def _load(job: TrainingJob) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]":
    import torch

    if job.data is None:
        from smm_dp.proof import digits_split

        return digits_split(job.seed)
    (records, classes), (test_records, test_classes) = read_records(job.data)
    if test_records.shape[1] != records.shape[1]:
        raise InputError(
            f"training records have {records.shape[1]} values, test records {test_records.shape[1]}",
            file=job.data,
        )
    training = torch.from_numpy(records), torch.from_numpy(classes)
    return *training, torch.from_numpy(test_records), torch.from_numpy(test_classes)


def _begin(job: TrainingJob, *, resumed: bool) -> None:
    """Note the run's settings in its folder; a resumed run must have the same."""
    file = job.out / "run.json"
    settings = json.loads(json.dumps(asdict(job), default=str))
    del settings["out"]
    if not resumed:
        write_json(file, settings)
        return
    if not file.exists():
        raise InputError("has no run.json, which says what was run: start in another folder", file=job.out)
    for field, value in json.loads(file.read_text()).items():
        if settings.get(field) != value:
            raise InputError(
                f"the run was begun with {value}; resume it with the same settings",
                file=file,
                field=field,
                value=settings.get(field),
            )


def train(job: TrainingJob, resume: bool) -> Iterator[str]:
    """Train, checkpointing after every round; yield lines for the user.

    The folder gets ledger.json (charged before every release), checkpoint.safetensors, result.json, and the
    privacy report where the method is the Skellam mixture.

    Raises:
        InputError: A setting is wrong, the folder holds another run, or its ledger and checkpoint disagree.
    """
    from smm_dp.training import FederatedTraining, accuracy, multilayer_perceptron

    if job.method not in get_args(Method) or job.method == "cpsgd":
        raise InputError(
            "expected smm-dp, smm-dp-numeric, skellam, ddgauss, gaussian or none",
            field="--method",
            value=job.method,
        )
    for field, value, least in (("--seed", job.seed, 0), ("--hidden", job.hidden, 1)):
        if value < least:
            raise InputError(f"expected at least {least}", field=field, value=value)
    method: Method = job.method  # pyright: ignore[reportAssignmentType] checked above
    records, classes, *test = _load(job)
    sizes = (records.shape[1], job.hidden, int(classes.max()) + 1)
    training = FederatedTraining(
        multilayer_perceptron(sizes, job.seed),
        records,
        classes,
        job.sampling_rate,
        job.learning_rate,
        job.seed,
    )
    setting = Setting(
        job.epsilon,
        job.delta,
        training.optimizer.dim,
        max(1, round(job.sampling_rate * len(records))),
        job.sampling_rate,
        job.rounds,
    )
    job.out.mkdir(parents=True, exist_ok=True)
    checkpoint, ledger_path = job.out / "checkpoint.safetensors", job.out / "ledger.json"
    if not resume and (checkpoint.exists() or ledger_path.exists()):
        raise InputError("holds a run already: pass --resume, or another folder", file=job.out)
    _begin(job, resumed=checkpoint.exists() or ledger_path.exists())
    ledger = mechanism = None
    if method.startswith("smm-dp"):
        mechanism = build(method, job.scale, job.bits, setting)
        assert isinstance(mechanism, SkellamMixture)
        check_modulus(mechanism.mu_total, job.bits, participants=setting.participants)
        kind = RoundPrivacy(
            mechanism.clip,
            mechanism.mu_total,
            mechanism.coordinate_bound,
            mechanism.accounting,
            job.sampling_rate,
        )
        ledger = PrivacyLedger(ledger_path, job.epsilon, job.delta, kind)
    if resume and checkpoint.exists():
        training.resume(checkpoint)
        yield f"resumed after round {training.round}"
    paid = 0 if ledger is None else ledger.rounds - training.round
    if paid not in (0, 1):  # one, where a run was killed between charge and checkpoint
        raise InputError(
            f"counts {training.round + paid} releases, the checkpoint beside it has {training.round} rounds: "
            "they are not of one run",
            file=ledger_path,
        )
    release = training_release(method, setting, job.seed, scale=job.scale, bits=job.bits)
    from smm_dp.ledger import BudgetExceeded

    stopped, clip_rates, wrap_rates = None, [], []
    try:
        for result in training.rounds(release, job.rounds, ledger, paid=paid):
            clip_rates.append(result.clip_rate)
            wrap_rates.append(result.wrap_rate)
            training.save(checkpoint)
            if training.round % 10 == 0 or training.round == job.rounds:
                yield f"round {training.round}: accuracy {accuracy(training.model, test[0], test[1]):.3f}"
    except BudgetExceeded as error:
        stopped = str(error)
        training.save(checkpoint)
        yield stopped
    score = accuracy(training.model, test[0], test[1])
    outcome = {"accuracy": score, "rounds": training.round, "stopped": stopped}
    write_json(job.out / "result.json", json.loads(json.dumps(asdict(job), default=str)) | outcome)
    if ledger is not None and ledger.rounds and isinstance(mechanism, SkellamMixture):
        report = privacy_report(
            mechanism,
            ledger.round_privacy,
            ledger.rounds,
            job.delta,
            sampler="AES-256-CTR from a seed",
            secure_source=False,
            aggregation="summed in one process (simulation)",
            clip_rate=float(np.mean(clip_rates)) if clip_rates else None,
            wrap_rate=float(np.mean(wrap_rates)) if wrap_rates else None,
        )
        write_report(report, job.out)
        yield f"epsilon {ledger.spent().epsilon:.4f} at delta {job.delta:g} in {ledger.rounds} releases"
    yield f"accuracy {score:.3f} after {training.round} rounds"
