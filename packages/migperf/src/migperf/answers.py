"""Answers of `migperf recommend`: the jobs' file and the tables' folders in, what is printed out."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from migperf import confirming, exports
from migperf.backends import Backend
from migperf.errors import DataError
from migperf.fleet import Gpu, recommend_fleet
from migperf.jobs import read_jobs
from migperf.mixes import Objective
from migperf.plans import current
from migperf.recommendation import plain
from migperf.recommender import recommend, require_feasible
from migperf.records import Record, read
from migperf.tables import Table, official_a100, table_from_records

OFFICIAL = "official-a100"


def table_of(name: str) -> tuple[Table, list[Record]]:
    """Return a table with the records it was made of; the official figures have none."""
    if name == OFFICIAL:
        return official_a100(), []
    records = read(name)
    return table_from_records(records), records


def single(
    jobs: Path,
    backend: Backend,
    table: str,
    *,
    objective: Objective,
    predict: bool,
    legacy_driver: bool,
    output: str,
    confirm: bool,
    folder: Path | None,
    **measurement: Any,
) -> Iterator[str]:
    """Yield what is printed of a recommendation for one device.

    Raises:
        GeometryError: No geometry carries all jobs; raised after the answer was given.
        DataError: The confirmation could not conclude; likewise.
    """
    known, records = table_of(table)
    mix = read_jobs(jobs)
    answer = recommend(backend, mix, known, objective=objective, predict=predict, legacy_driver=legacy_driver)
    found: dict[str, Any] = answer.as_dict()
    confirmation = None
    if output == "text":
        yield answer.text()
    if confirm:
        confirmation = confirming.confirm_run(backend, answer, records, folder=folder, **measurement)
        found |= {"confirmation": plain(confirmation), "holds": confirmation.holds}
        if output == "text":
            yield confirming.text(confirmation)
    if output == "json":
        yield json.dumps(found, indent=2)
    elif output == "mig-parted":
        yield exports.mig_parted(answer.geometry).rstrip("\n")
    elif output == "k8s":
        yield exports.kubernetes(answer.geometry).rstrip("\n")
    require_feasible(answer)
    if confirmation is not None and confirmation.problems:
        raise DataError(f"nothing can be concluded: {'; '.join(confirmation.problems)}")


def fleet(
    jobs: Path, backends: Sequence[Backend], tables: Sequence[str], *, predict: bool, json: bool
) -> str:
    """Return what is printed of a plan for several devices."""
    from json import dumps

    known = {name: table_of(name)[0] for name in dict.fromkeys(tables)}
    names = [backend.spec for backend in backends]
    unique = [f"{name}#{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    gpus = [
        Gpu(name, backend, known[table], current(backend))
        for name, backend, table in zip(unique, backends, tables, strict=True)
    ]
    plan = recommend_fleet(gpus, read_jobs(jobs), predict=predict)
    return dumps(plan.as_dict(), indent=2) if json else plan.text()
