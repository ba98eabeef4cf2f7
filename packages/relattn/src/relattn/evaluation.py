"""Long evaluations: finished examples are on disk at once, and a killed run goes on where it stopped."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relattn.examples import Example, MethodSummary
from relattn.metrics import Interval, score_summary, summarize_scores
from shared_core import InputError
from shared_core.files import write_bytes, write_json

ScoreSummary = Callable[[Example, str], Mapping[str, float]]
"""An example and its summary to metrics."""

Summarize = Callable[[Sequence[str], Sequence[tuple[str, ...]]], Sequence[MethodSummary]]
"""Documents and controls to summaries, one a document."""


@dataclass(frozen=True)
class Finished:
    """One example's line in the results file.

    Attributes:
        id: The example's.
        document_id: The document's.
        example: Hash of document, control and references: an equal id alone does not make an equal example.
        summary: What the method wrote.
        weight: Its steering weight; None where it has none.
        scores: Its metrics.
        seconds: Its share of its batch's time.
        warnings: Truncation, phrases that do not occur, and the like.
    """

    id: str
    document_id: str
    example: str
    summary: str
    weight: float | None
    scores: dict[str, float]
    seconds: float
    warnings: tuple[str, ...] = ()


def evaluate(
    examples: Sequence[Example],
    summarize: Summarize,
    results: str | Path,
    settings: Mapping[str, Any],
    *,
    score: ScoreSummary = score_summary,
    batch_size: int = 8,
    resume: bool = False,
    on_done: Callable[[int], None] | None = None,
) -> list[Finished]:
    """Summarize and score examples; `results` gets a line for each as soon as its batch is done.

    Args:
        examples: What to summarize.
        summarize: The method.
        results: A JSON Lines file. Beside it, NAME.settings.json records the settings.
        settings: What the summaries depend on: model, method, decoding, and where the data come from.
            Resuming checks that they are the same.
        score: What to measure; all of `relattn.metrics` by default.
        batch_size: Examples a call of `summarize`.
        resume: Keep what the file holds, by id, and do the rest.
        on_done: Called with the number of finished examples, after each batch.

    Returns:
        One line for each example, in the order of `examples`.

    Raises:
        InputError: The file exists and `resume` is off; it was written with other settings, or about another
            example of the same id; or it is damaged elsewhere than in its last line (which a killed run may
            leave cut; it is dropped).
    """
    if batch_size < 1:
        raise InputError("expected 1 or more", field="batch_size", value=batch_size)
    file = Path(results)
    done = _start(file, settings, resume)
    for example in examples:
        if example.id in done and done[example.id].example != _hash(example):
            raise InputError(
                f"was written about other data: the example {example.id!r} has another document, control or"
                " reference there",
                file=file,
            )
    todo = [example for example in examples if example.id not in done]
    if on_done is not None:
        on_done(len(examples) - len(todo))
    with file.open("a", encoding="utf-8") as lines:
        for start in range(0, len(todo), batch_size):
            for finished in _batch(todo[start : start + batch_size], summarize, score):
                done[finished.id] = finished
                lines.write(_line(finished))
            lines.flush()
            os.fsync(lines.fileno())
            if on_done is not None:
                on_done(len(examples) - len(todo) + min(start + batch_size, len(todo)))
    return [done[example.id] for example in examples]


def report(finished: Sequence[Finished]) -> dict[str, Interval]:
    """Each metric's mean with its 95 % bootstrap interval over documents."""
    return summarize_scores([line.scores for line in finished], [line.document_id for line in finished])


def _start(file: Path, settings: Mapping[str, Any], resume: bool) -> dict[str, Finished]:
    """What is finished already; the file holds exactly that when this returns."""
    record = file.with_name(f"{file.name}.settings.json")
    plain = json.loads(json.dumps(settings))
    if not file.exists():
        write_json(record, plain)
        write_bytes(file, b"")
        return {}
    if not resume:
        raise InputError("is there already: give --resume to go on with it, or another place", file=file)
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else None
    if before != plain:
        changed = [
            name for name in {**plain, **(before or {})} if (before or {}).get(name) != plain.get(name)
        ]
        raise InputError(f"was written with other settings ({', '.join(sorted(changed))})", file=file)
    finished = list(_read(file))
    write_bytes(file, "".join(map(_line, finished)).encode())
    return {line.id: line for line in finished}


def read_results(file: str | Path) -> list[Finished]:
    """The finished examples of a results file.

    Raises:
        InputError: The file is missing or damaged.
    """
    return list(_read(Path(file)))


def _read(file: Path) -> Iterator[Finished]:
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            yield Finished(**{**row, "warnings": tuple(row["warnings"])})
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
            if number == len(lines):  # no newline behind it: the run was killed while it wrote this line
                return
            raise InputError("is not a line of an evaluation", file=file, field=f"line {number}") from error


def _line(finished: Finished) -> str:
    return json.dumps(vars(finished), ensure_ascii=False, allow_nan=False) + "\n"


def _batch(examples: Sequence[Example], summarize: Summarize, score: ScoreSummary) -> list[Finished]:
    begin = time.perf_counter()
    summaries = summarize([e.document for e in examples], [e.control for e in examples])
    seconds = (time.perf_counter() - begin) / len(examples)
    return [
        Finished(e.id, e.document_id, _hash(e), s.text, s.weight, dict(score(e, s.text)), seconds, s.warnings)
        for e, s in zip(examples, summaries, strict=True)
    ]


def _hash(example: Example) -> str:
    return hashlib.sha256(json.dumps(asdict(example)).encode()).hexdigest()[:16]
