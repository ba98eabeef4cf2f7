from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from csq import experiments, methods
from csq.experiments import Outcome, Run

pytestmark = pytest.mark.filterwarnings("ignore:.*the search (kept fewer|ended at)")


def _rows(half: str, seed: int) -> set[bytes]:
    data = experiments.digits(seed, half)  # type: ignore[arg-type]
    parts = (data.train, data.validation, data.test)
    assert [len(part.labels) for part in parts] == [1000, 100, 1400]
    return {row.numpy().tobytes() for part in parts for row in part.read(torch.arange(len(part.labels)))}


def test_what_was_tuned_on_is_not_in_the_final_half_and_seeds_only_reorder_a_half() -> None:
    development, final = _rows("development", 1000), _rows("final", 0)
    assert not development & final
    assert _rows("final", 1) == final


def test_all_methods_have_two_sizes_and_the_same_steps() -> None:
    rivals = ("csq", "csq-uniform", "ste", "lsq", "hawq", "bsq", "random")
    for architecture, count in (("resnet20", 7), ("mixer", 5)):
        table = experiments.methods(architecture)  # type: ignore[arg-type]
        names = [name for name, _ in table]
        assert [names.count(name) for name in rivals[:count]] == [2] * count
        assert set(names) == {"fp32", *rivals[:count]}
    runs = experiments.plan([0, 1, 2])
    assert len(runs) == 3 * (15 + 11)
    assert {run.steps for run in runs} == {experiments.STEPS}
    assert {experiments.recipe(run).batch_size for run in runs} == {64}


@pytest.mark.parametrize(("architecture", "method"), [("resnet20", "csq"), ("mixer", "hawq")])
def test_a_short_run_measures_accuracy_and_three_sizes_at_its_target(
    architecture: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "SAMPLES", 2)  # of hawq's traces
    run = Run(architecture, method, "2 bits", 0, steps=16)  # type: ignore[arg-type]
    outcome = experiments.execute(run)
    assert 0 <= outcome.accuracy <= 1
    if method == "hawq":  # 16 steps are none for CSQ's search
        assert outcome.paper_bits == pytest.approx(2.0, rel=0.02)
    assert outcome.stored_bits < outcome.paper_bits + 2
    weights = 67_848 if architecture == "resnet20" else 15_808
    assert outcome.file_bytes > outcome.stored_bits * weights / 8
    assert outcome.run == run


@pytest.mark.usefixtures("process_server")
def test_the_same_run_gives_the_same_outcome_in_another_process() -> None:
    runs = [Run("resnet20", "lsq", "1 bit", 0, steps=6)]
    here = experiments.execute_all(runs, workers=0)
    there = experiments.execute_all(runs, workers=1)
    assert [replace(o, seconds=0.0) for o in here] == [replace(o, seconds=0.0) for o in there]


def test_runs_that_share_their_first_steps_give_what_they_give_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "SAMPLES", 2)  # of the traces, which the runs share too
    runs = [Run("mixer", "hawq", point, 0, steps=8) for point in ("1.5 bits", "2 bits")]
    together = experiments.execute_all(runs, workers=0)
    alone = [experiments.execute(run) for run in runs]
    assert [replace(o, seconds=0.0) for o in together] == [replace(o, seconds=0.0) for o in alone]


def _outcome(method: str, bits: float, accuracy: float, seed: int = 0, point: str = "") -> Outcome:
    run = Run("resnet20", method, point or f"{bits:g} bits", seed)
    return Outcome(run, accuracy, accuracy, bits, bits + 1, int(1000 * bits), {}, [], 0.0)


def test_a_difference_is_to_the_straight_line_at_the_same_size_seed_by_seed() -> None:
    outcomes = [
        _outcome("csq", 1.51, 0.90, point="1.5 bits"),
        _outcome("csq", 2.1, 0.95, point="2 bits"),
        _outcome("csq", 1.5, 0.80, 1, "1.5 bits"),
        _outcome("csq", 2.0, 0.80, 1, "2 bits"),
        *(_outcome("lsq", bits, 0.7 + 0.1 * bits) for bits in (1.0, 2.0)),
        *(_outcome("lsq", bits, 0.5, 1) for bits in (1.0, 2.0)),
    ]
    gaps = experiments.differences(outcomes, "resnet20", "lsq", "paper_bits")
    assert gaps["1.5 bits"] == pytest.approx([0.90 - 0.851, 0.3])
    assert gaps["2 bits"] == pytest.approx([0.95 - 0.9, 0.3])  # beyond the end: that of the end
    assert experiments.differences(outcomes, "resnet20", "lsq", "stored_bits") == {
        point: pytest.approx(values) for point, values in gaps.items()
    }


def test_misses_of_the_target_are_shares_of_it() -> None:
    outcomes = [_outcome("csq", 1.53, 0.9, point="1.5 bits"), _outcome("csq", 1.9, 0.9, point="2 bits")]
    assert experiments.target_misses(outcomes, "resnet20") == pytest.approx([0.02, 0.05])
