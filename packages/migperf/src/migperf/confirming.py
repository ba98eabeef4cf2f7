"""Confirming: the recommended geometry with all its jobs at once, beside what was expected of it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from migperf import measuring, sweeps
from migperf.backends import Backend
from migperf.loads import CLOSED, Load, Poisson
from migperf.parts import name_of
from migperf.recommendation import Confirmation, Placed, Recommendation, confirm
from migperf.records import Record, Writer
from migperf.tables import batch_of, offered_rate, workload_key
from migperf.workloads import Workload, from_spec
from shared_core import InputError


def confirm_run(
    backend: Backend,
    recommendation: Recommendation,
    records: Sequence[Record],
    *,
    duration: float = 10.0,
    repeats: int = 3,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    model: Any = None,
    partition: sweeps.Partition = sweeps.cut,
) -> Confirmation:
    """Run a recommendation with all jobs together and compare it with what was expected.

    Each inference job is asked at its rate, by Poisson arrivals, the way its cell was measured: whole
    batches, or single items of which the server takes as many as its batch. Training runs as fast as it can.

    Args:
        backend: The device.
        recommendation: What to run.
        records: Those that the table was made of: they know how a workload is made.
        duration: Seconds of each window.
        repeats: How often.
        seed: Of the arrivals.
        folder: Where the records are kept; None keeps nothing.
        model: For simulated devices.
        partition: Cuts the device for the length of a block.

    Raises:
        InputError: No job was placed, or the records do not know a workload (the official figures are none).
    """
    if not recommendation.placed:
        raise InputError("no job was placed: there is nothing to confirm", field="jobs")
    of_instance = {one.instance: one for one in recommendation.placed}
    work = {name: _work(one, records, seed + i) for i, (name, one) in enumerate(of_instance.items())}
    writer = None if folder is None else Writer(folder, backend.simulated)
    found: list[Record] = []
    for repeat in range(repeats):
        with partition(backend, str(recommendation.geometry)) as instances:
            busy = [one for one in instances if name_of(one) in work]
            chosen = [work[name_of(one)] for one in busy]
            result = measuring.run(
                [workload for workload, _ in chosen], busy, backend, [load for _, load in chosen],
                duration, 1, cell=f"confirm {recommendation.geometry}", first_repeat=repeat, model=model,
            )  # fmt: skip
        found += result.records
        if writer is not None:
            writer.append(result.records, result.raws)
    return confirm(recommendation, found)


def _work(one: Placed, records: Sequence[Record], seed: int) -> tuple[Workload, Load]:
    known = [record for record in records if workload_key(record.workload) == one.workload]
    if not known:
        raise InputError("no record knows how this workload is made", field=one.job, value=one.workload)
    spec: Mapping[str, Any] = known[0].workload
    workload = replace(from_spec(spec), batch=one.batch)
    if one.rate is None:
        return workload, CLOSED
    whole_batches = any(
        offered_rate(record) is not None and batch_of(record) == one.batch
        and int(record.load.get("collect") or 1) == 1
        for record in known
    )  # fmt: skip
    if one.batch == 1 or whole_batches:
        return workload, Poisson(one.rate / one.batch, seed=seed)
    return replace(workload, batch=1), Poisson(one.rate, seed=seed, collect=one.batch)


def text(confirmation: Confirmation) -> str:
    """Return it as lines for a person."""
    lines = []
    for one in confirmation.compared:
        measured = "nothing" if one.measured is None else f"{one.measured:.4g}"
        expected = "?" if one.expected is None else f"{one.expected.middle:.4g}"
        kept = {True: ", objective kept", False: ", objective NOT kept", None: ""}[one.kept]
        lines.append(
            f"  {one.instance}: {one.job}: {one.what} {measured}, expected {expected}: {one.verdict}{kept}"
        )
    lines += [f"  no conclusion: {problem}" for problem in confirmation.problems]
    verdict = {True: "the recommendation holds", False: "the recommendation does NOT hold",
               None: "nothing can be concluded"}[confirmation.holds]  # fmt: skip
    return "\n".join(["all jobs together:", *lines, f"  {verdict}"])
