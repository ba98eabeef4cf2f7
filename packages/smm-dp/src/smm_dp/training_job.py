"""A training run as the command states it: settings, checkpoint and ledger in one folder, resumed exactly."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from shared_core import InputError
from shared_core.files import write_json
from smm_dp.calibration import check_modulus
from smm_dp.experiments import Method, Setting, build, training_release
from smm_dp.ledger import BudgetExceeded, PrivacyLedger
from smm_dp.mechanism import SkellamMixture
from smm_dp.privacy import RoundPrivacy
from smm_dp.records import read_records
from smm_dp.report import privacy_report, write_report

if TYPE_CHECKING:
    import torch

_LEDGER = "ledger.json"


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


def train(job: TrainingJob, resume: bool) -> Iterator[str]:
    """Train, checkpointing after every round; yield lines for the user.

    The folder gets run.json (the settings), ledger.json (charged before every release),
    checkpoint.safetensors, result.json, and the privacy report where the method is the Skellam mixture.

    Raises:
        InputError: A setting is wrong, the folder holds another run, or its ledger and checkpoint disagree.
    """
    from smm_dp.training import FederatedTraining, accuracy, multilayer_perceptron

    method = _checked_method(job)
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
    participants = max(1, round(job.sampling_rate * len(records)))
    setting = Setting(
        job.epsilon, job.delta, training.optimizer.dim, participants, job.sampling_rate, job.rounds
    )
    checkpoint = _begin(job, resume)
    mechanism = build(method, job.scale, job.bits, setting) if method.startswith("smm-dp") else None
    ledger = _ledger(job, mechanism, participants) if isinstance(mechanism, SkellamMixture) else None
    if checkpoint.exists():
        training.resume(checkpoint)
        yield f"resumed after round {training.round}"
    paid = _paid(ledger, training.round)
    release = training_release(method, setting, job.seed, scale=job.scale, bits=job.bits)
    stopped, rates = None, []
    try:
        for result in training.rounds(release, job.rounds, ledger, paid=paid):
            rates.append((result.clip_rate, result.wrap_rate))
            training.save(checkpoint)
            if training.round % 10 == 0 or training.round == job.rounds:
                yield f"round {training.round}: accuracy {accuracy(training.model, test[0], test[1]):.3f}"
    except BudgetExceeded as error:
        stopped = str(error)
        training.save(checkpoint)
        yield stopped
    score = accuracy(training.model, test[0], test[1])
    write_json(
        job.out / "result.json",
        {**_settings(job), "accuracy": score, "rounds": training.round, "stopped": stopped},
    )
    if ledger is not None and ledger.rounds and isinstance(mechanism, SkellamMixture):
        _report(job, mechanism, ledger, rates)
        yield f"epsilon {ledger.spent().epsilon:.4f} at delta {job.delta:g} in {ledger.rounds} releases"
    yield f"accuracy {score:.3f} after {training.round} rounds"


def _checked_method(job: TrainingJob) -> Method:
    if job.method not in get_args(Method) or job.method == "cpsgd":
        raise InputError(
            "expected smm-dp, smm-dp-numeric, skellam, ddgauss, gaussian or none",
            field="--method",
            value=job.method,
        )
    for field, value, least in (("--seed", job.seed, 0), ("--hidden", job.hidden, 1)):
        if value < least:
            raise InputError(f"expected at least {least}", field=field, value=value)
    return job.method  # pyright: ignore[reportReturnType] checked above


def _settings(job: TrainingJob) -> dict:
    return json.loads(json.dumps(asdict(job), default=str))


def _begin(job: TrainingJob, resume: bool) -> Path:
    """Note the run's settings in its folder, which a resumed run must have; return its checkpoint's path."""
    job.out.mkdir(parents=True, exist_ok=True)
    checkpoint, file = job.out / "checkpoint.safetensors", job.out / "run.json"
    settings = {field: value for field, value in _settings(job).items() if field != "out"}
    if not checkpoint.exists() and not (job.out / _LEDGER).exists():
        write_json(file, settings)
        return checkpoint
    if not resume:
        raise InputError(
            "holds a run already; --resume goes on with it, another folder takes a new one", file=job.out
        )
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
    return checkpoint


def _ledger(job: TrainingJob, mechanism: SkellamMixture, participants: int) -> PrivacyLedger:
    check_modulus(mechanism.mu_total, job.bits, participants=participants)
    kind = RoundPrivacy(
        mechanism.clip,
        mechanism.mu_total,
        mechanism.coordinate_bound,
        mechanism.accounting,
        job.sampling_rate,
    )
    return PrivacyLedger(job.out / _LEDGER, job.epsilon, job.delta, kind)


def _paid(ledger: PrivacyLedger | None, rounds: int) -> int:
    """Return how many rounds to come are charged: one, where a run was killed before its checkpoint."""
    paid = 0 if ledger is None else ledger.rounds - rounds
    if paid not in (0, 1):
        raise InputError(
            f"counts {rounds + paid} releases, the checkpoint beside it has {rounds} rounds: they are not of "
            "one run",
            file=None if ledger is None else ledger.path,
        )
    return paid


def _report(
    job: TrainingJob, mechanism: SkellamMixture, ledger: PrivacyLedger, rates: list[tuple[float, float]]
) -> None:
    clip_rate, wrap_rate = np.mean(rates, axis=0).tolist() if rates else (None, None)
    report = privacy_report(
        mechanism,
        ledger.round_privacy,
        ledger.rounds,
        job.delta,
        sampler="AES-256-CTR from a seed",
        secure_source=False,
        aggregation="summed in one process (simulation)",
        clip_rate=clip_rate,
        wrap_rate=wrap_rate,
    )
    write_report(report, job.out)
