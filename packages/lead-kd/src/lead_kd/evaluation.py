"""Measures of runs against judgements, by ir-measures, with each query's value and paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared_core import InputError

DEFAULT = ("RR@10", "nDCG@10", "R@100", "AP@1000")


@dataclass(frozen=True)
class Measured:
    """What a run reached.

    Attributes:
        mean: Measure -> mean over all judged queries; a query without results counts as 0.
        per_query: Measure -> query -> value.
    """

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same queries.

    Attributes:
        difference: Mean of second minus first.
        low: End of the bootstrap interval (95 %).
        high: Its other end.
        p_value: Of a two-sided paired randomization test.
        wins: Queries where the second is better.
        losses: Queries where it is worse.
    """

    difference: float
    low: float
    high: float
    p_value: float
    wins: int
    losses: int


def measure(
    qrels: Mapping[str, Mapping[str, int]],
    run: Mapping[str, Mapping[str, float]],
    measures: Sequence[str] = DEFAULT,
    rel: int = 1,
) -> Measured:
    """Measure a run.

    Args:
        qrels: Query -> passage -> grade. Queries without a relevant passage are left out.
        run: Query -> passage -> score.
        measures: ir-measures' names, such as RR@10, nDCG@10, R@100, AP@1000.
        rel: Least grade that is relevant, for measures that know no grades; TREC Deep Learning's passages
            use 2. nDCG uses grades as they are.

    Raises:
        InputError: A measure's name is unknown, or no query is judged.

    >>> measure({"q": {"a": 1}}, {"q": {"b": 2.0, "a": 1.0}}, ["RR@10"]).mean
    {'RR@10': 0.5}
    """
    import ir_measures

    parsed = {name: _parse(name, rel) for name in measures}
    judged = {
        query: dict(grades)
        for query, grades in qrels.items()
        if any(grade >= rel for grade in grades.values())
    }
    if not judged:
        raise InputError(f"no query has a passage of grade {rel} or more", field="qrels")
    per_query: dict[str, dict[str, float]] = {name: dict.fromkeys(judged, 0.0) for name in measures}
    names = {str(value): name for name, value in parsed.items()}
    scored = {query: dict(run[query]) for query in judged if run.get(query)}
    if scored:
        for found in ir_measures.iter_calc(list(parsed.values()), judged, scored):
            if found.query_id in judged:
                per_query[names[str(found.measure)]][found.query_id] = float(found.value)
    mean = {name: float(np.mean(list(values.values()))) for name, values in per_query.items()}
    return Measured(mean, per_query)


def _parse(name: str, rel: int) -> Any:
    import ir_measures

    try:
        found = ir_measures.parse_measure(name)
        if rel != 1 and "rel" in found.SUPPORTED_PARAMS and "rel" not in found.params:
            found = found(rel=rel)
        return found
    except (ValueError, NameError, SyntaxError, KeyError) as error:
        raise InputError(
            "expected a name that ir-measures knows, such as nDCG@10", field="measure", value=name
        ) from error


def compare(
    first: Mapping[str, float], second: Mapping[str, float], *, resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Compare two runs by one measure, query by query.

    Args:
        first: Query -> value.
        second: The same queries.
        resamples: Of the randomization test and of the bootstrap.
        seed: Of both.

    Raises:
        InputError: The queries differ, or there are fewer than two.
    """
    if first.keys() != second.keys() or len(first) < 2:
        raise InputError(
            "expected two runs over the same two or more queries", value=(len(first), len(second))
        )
    differences = np.array([second[query] - first[query] for query in first])
    random = np.random.default_rng(seed)
    mean = float(differences.mean())
    hits, means = 0, []
    for size in _chunks(resamples, max(1, 2**24 // len(differences))):
        signs = random.choice((-1.0, 1.0), (size, len(differences)))
        hits += int((np.abs((signs * differences).mean(1)) >= abs(mean) - 1e-12).sum())
        drawn = random.integers(len(differences), size=(size, len(differences)))
        means.append(differences[drawn].mean(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Comparison(
        mean,
        float(low),
        float(high),
        (hits + 1) / (resamples + 1),
        int((differences > 0).sum()),
        int((differences < 0).sum()),
    )


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
