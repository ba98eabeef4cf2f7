"""The run of a proof: collects numbers, then writes and prints the record."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

import numpy as np

from shared_core.errors import InputError
from shared_core.files import make_folder, write_json
from shared_core.proof.environment import peak_memory_bytes, versions
from shared_core.proof.record import FILE_NAME, Claim, Metric, ProofRecord
from shared_core.proof.table import show


class ProofRun:
    """Collects the numbers of a proof, and writes and prints them at the end.

    Use it as a context manager around the work: it measures wall time and peak memory. The verdict is
    computed from the claims. Nothing is written before `finish`, so an interrupted run leaves the previous
    proof.json whole.

    Args:
        package: The package, which is also the method's name in `methods`.
        version: The package's version.
        source: The paper.
        data: What the numbers were measured on, in words or as fields.
        seeds: The seeds, in the order in which values are added.
        out: Folder of proof.json and the pictures; made if missing.
        quick: Whether this is the shortened run.
        command: The command that does the same at full scale.
        names: Distributions whose versions are recorded; where None, those that the package and
            shared-core declare and that the run imported.

    Raises:
        InputError: The folder cannot be made or written to, or there is no seed or one twice.
    """

    def __init__(
        self,
        *,
        package: str,
        version: str,
        source: str,
        data: str | Mapping[str, Any],
        seeds: Sequence[int],
        out: str | os.PathLike[str],
        quick: bool = False,
        command: str = "",
        names: Sequence[str] | None = None,
    ) -> None:
        self.package = package
        self.version = version
        self.source = source
        self.data = data if isinstance(data, str) else dict(data)
        self.seeds = [int(seed) for seed in seeds]
        self.out = Path(out)
        self.quick = quick
        self.command = command
        self.methods: dict[str, dict[str, list[float]]] = {}
        self._names = names
        self._metrics: dict[str, Metric] = {}
        self._claims: list[Claim] = []
        self._pictures: list[str] = []
        self._notes: list[str] = []
        self._meaning = ""
        self._details: dict[str, Any] = {}
        self._started: float | None = None
        self._wall: float | None = None
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError("expected one or more different seeds", field="seeds", value=self.seeds)
        make_folder(self.out)

    def __enter__(self) -> "ProofRun":
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wall = self._elapsed()

    def metric(
        self,
        name: str,
        label: str | None = None,
        higher_is_better: bool = True,
        unit: str = "",
        fmt: str = ".3f",
        measured: bool = False,
    ) -> None:
        """Declare a metric, in the order of the table.

        Args:
            name: Its key in `methods`.
            label: Its name for people; `name` where None.
            higher_is_better: Which way is better.
            unit: Shown beside the label.
            fmt: Format of a number, as for `format`.
            measured: Whether it is a time or a rate of this machine, which no other run repeats exactly.
        """
        if name in self._metrics:
            raise ValueError(f"metric {name!r} is declared twice")
        format(0.0, fmt)  # a wrong format shows here and not after the run
        self._metrics[name] = Metric(name, label or name, bool(higher_is_better), unit, fmt, measured)

    def add(self, method: str, metric: str, value: SupportsFloat) -> None:
        """Append the value of the next seed. The method that is proved is named like the package."""
        if metric not in self._metrics:
            raise ValueError(f"metric {metric!r} is not declared: one of {list(self._metrics)}")
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{method}, {metric}: expected a finite number, got {number}")
        values = self.methods.setdefault(method, {}).setdefault(metric, [])
        if len(values) == len(self.seeds):
            raise ValueError(
                f"{method}, {metric}: there is a value for each of the {len(values)} seeds already"
            )
        values.append(number)

    def claim(self, text: str, *, rule: str, holds: bool | np.bool, reason: str) -> None:
        """State a claim.

        Args:
            text: One sentence that can be wrong.
            rule: The rule that decides it, fixed before the numbers were seen.
            holds: What the rule says of the numbers.
            reason: The numbers that made it say so.
        """
        self._claims.append(Claim(text, rule, bool(holds), reason))

    @property
    def claims(self) -> list[Claim]:
        """The claims so far, in order."""
        return list(self._claims)

    def meaning(self, text: str) -> None:
        """Say what the verdicts come to for somebody who would use the method, in a sentence or two.

        It opens the report. It has to fit the numbers, so it is made of them, and said once they are there.
        """
        self._meaning = text

    def picture(self, name: str) -> Path:
        """Record a picture and give the path to save it at, in the folder `out`."""
        file = name if Path(name).suffix else f"{name}.png"
        if Path(file).name != file:
            raise ValueError(f"expected a plain file name, got {name!r}")
        if file not in self._pictures:
            self._pictures.append(file)
        return self.out / file

    def note(self, text: str) -> None:
        """Add a sentence for the reader of the report."""
        self._notes.append(text)

    def detail(self, key: str, obj: Any) -> None:
        """Add anything that JSON can hold under "details"."""
        self._details[key] = obj

    def finish(self) -> int:
        """Write proof.json, print the table and give the exit code: 0 where all claims hold, else 1.

        Raises:
            ValueError: There is no claim or no meaning, or a value, method or picture is missing.
        """
        record = self._record()
        write_json(self.out / FILE_NAME, asdict(record))
        show(record)
        print(f"written: {self.out / FILE_NAME}")
        return 0 if record.holds else 1

    def _record(self) -> ProofRecord:
        wall = self._elapsed() if self._wall is None else self._wall
        self._check_complete()
        return ProofRecord(
            package=self.package,
            version=self.version,
            claim=" ".join(claim.text for claim in self._claims),
            source=self.source,
            data=self.data,
            rule=" ".join(claim.rule for claim in self._claims),
            holds=all(claim.holds for claim in self._claims),
            seeds=self.seeds,
            methods=self.methods,
            wall_seconds=wall,
            peak_memory_bytes=peak_memory_bytes(),
            versions=versions(self.package, self._names),
            quick=self.quick,
            claims=self._claims,
            metrics=list(self._metrics.values()),
            pictures=self._pictures,
            notes=self._notes,
            details=self._details,
            command=self.command,
            meaning=self._meaning,
        )

    def _check_complete(self) -> None:
        problems = [] if self._claims else ["there is no claim"]
        if not self._meaning:
            problems.append("nobody says what it means")
        if self.package not in self.methods:
            problems.append(f"methods lack {self.package!r}, the method itself")
        used = {metric for values in self.methods.values() for metric in values}
        problems += [f"metric {name!r} has no value" for name in self._metrics if name not in used]
        problems += [
            f"{method}, {metric}: {len(values)} values for {len(self.seeds)} seeds"
            for method, metrics in self.methods.items()
            for metric, values in metrics.items()
            if len(values) != len(self.seeds)
        ]
        problems += [
            f"picture {file} is not there" for file in self._pictures if not (self.out / file).is_file()
        ]
        if problems:
            raise ValueError("the proof is not complete: " + "; ".join(problems))

    def _elapsed(self) -> float:
        if self._started is None:
            raise ValueError("a ProofRun measures from where it is entered: use it in a with statement")
        return time.perf_counter() - self._started
