"""The proof's parts decide by their numbers, refuse on a busy machine, and end in time."""

import json
import os
import time

import pytest
from rich.progress import Progress

from migperf import contamination, proof, proof_partitions
from migperf.backends.cpu import CpuBackend
from migperf.measuring import Result
from migperf.proof_partitions import DEFAULT, MATCHED, WHOLE, Stage, Study
from migperf.standing import Measured, interleave
from migperf.sweeps import Cell
from migperf.workloads import parse
from shared_core.proof import ProofRun

pytest.importorskip("matplotlib")
CORES = len(os.sched_getaffinity(0))


@pytest.fixture
def small(monkeypatch):
    """Plain work in the place of a model, and no check for a quiet moment: the tests' machine may be busy."""
    monkeypatch.setattr(proof_partitions, "MODEL", "sleep:3ms")
    monkeypatch.setattr(proof, "QUICK_BUDGET", 600.0)
    monkeypatch.setattr(proof_partitions, "_busy", lambda stage: "")


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib and pyparsing among themselves
def test_the_shortened_proof_measures_writes_and_decides_by_its_numbers(tmp_path, small):
    code = proof.run_proof(tmp_path, [0], quick=True)
    found = json.loads((tmp_path / "proof.json").read_text())
    assert code == (0 if found["holds"] else 1)
    assert len(found["claims"]) == 7
    exact = [claim["holds"] for claim in found["claims"][:4]]
    assert exact == [True] * 4, found["claims"]
    assert "recommender.png" in found["pictures"]
    assert {"throughput.png", "p99.png"} <= {path.name for path in tmp_path.glob("*.png")} or any(
        "inconclusive" in claim["reason"] for claim in found["claims"]
    )
    assert {"migperf", "all 1g", "whole GPU"} <= set(found["methods"])
    assert (tmp_path / "measured" / "records.jsonl").exists()
    for claim in found["claims"][4:]:
        assert not (claim["holds"] and "inconclusive" in claim["reason"])


def study(worker=None, **arms):
    from made_records import record

    def result(seed, rate, p99, contaminated=""):
        return Result([record(repeat=seed, items_per_second=rate, contaminated=contaminated,
                              latency_ms={"p50": 1.0, "p95": p99, "p99": p99})], {})  # fmt: skip

    measured = {
        name: Measured({seed: result(seed, *one) for seed, one in enumerate(values)})
        for name, values in arms.items()
    }
    return Study("x", measured, [0, 1, 2], 2, worker)


@pytest.fixture
def stage(tmp_path):
    run = ProofRun(package="migperf", version="0", source="", data="", seeds=[0, 1, 2], out=tmp_path)
    return Stage(run, [0, 1, 2], False, Progress(), 0.0)


def claims(stage):
    return [(claim.holds, claim.reason) for claim in stage.run.claims]


def test_on_a_busy_machine_nothing_is_measured_and_nothing_is_claimed(stage, monkeypatch):
    monkeypatch.setattr(contamination, "baseline", lambda *_: 2.0 * CORES)
    monkeypatch.setattr(proof_partitions, "interleave", None)  # would fail if anything were measured
    stage.quick = True
    stage.progress.add_task("", total=None)
    proof_partitions.prove_partitions(stage, CpuBackend())
    assert [holds for holds, _ in claims(stage)] == [False] * 3
    assert all("contaminated" in reason or "two cores" in reason for _, reason in claims(stage))


def test_two_of_three_clean_repeats_are_needed_in_every_arm(stage):
    good = [(120.0, 10.0)] * 3
    one_bad, two_bad = [(1.0, 1.0, "load"), *good[1:]], [(1.0, 1.0, "load")] * 2 + good[:1]
    slow = [(100.0, 12.0)] * 3
    proof_partitions._claim_small(stage, study(migperf=one_bad, **{WHOLE: slow}))
    proof_partitions._claim_small(stage, study(migperf=good, **{WHOLE: two_bad}))
    assert claims(stage)[0][0] is True  # the contaminated repeat is left out
    assert claims(stage)[1][0] is False
    assert "inconclusive: clean repeats" in claims(stage)[1][1]
    assert "load" in claims(stage)[1][1]


@pytest.mark.parametrize(("status", "known"), [("insufficient", True), ("failed", False)])
def test_a_neighbour_with_few_steps_hides_no_service_and_one_that_failed_does(status, known):
    """Unpinned, a training of many threads gets through hardly a step in a window: it was there though."""
    from made_records import record

    both = study(worker=0, migperf=[(40.0, 70.0)] * 3, **{DEFAULT: [(1.5, 9000.0)] * 3})
    for result in both.measured[DEFAULT].results.values():
        result.records.append(record(worker=1, status=status, message="1 requests began"))
    assert (both.inconclusive(("migperf", DEFAULT)) == "") is known
    for result in both.measured[DEFAULT].results.values():
        result.records[0] = record(worker=0, status="insufficient", message="1 requests began")
    assert "inconclusive" in both.inconclusive(("migperf", DEFAULT))


@pytest.mark.parametrize(("rate", "holds"), [(120.0, True), (91.0, True), (89.0, False), (39.0, False)])
def test_the_honest_rival_may_tie_but_not_win_by_more_than_a_tenth(stage, rate, holds, monkeypatch):
    monkeypatch.setattr(Study, "pooled", lambda self, arm: {
        "items_per_second": {"migperf": rate, DEFAULT: 40.0, MATCHED: 100.0}[arm],
        "latency_ms": {"p99": {"migperf": 10.0, DEFAULT: 200.0, MATCHED: 10.0}[arm]},
        "latency_interval_ms": {},
    })  # fmt: skip
    proof_partitions._claim_rival(
        stage, study(**dict.fromkeys(("migperf", DEFAULT, MATCHED), [(1.0, 1.0)] * 3))
    )
    assert claims(stage)[0][0] is holds


def test_a_gain_that_does_not_shrink_or_is_not_known_is_reported_as_such(stage):
    small = study(migperf=[(120.0, 1.0)] * 3, **{WHOLE: [(100.0, 1.0)] * 3})
    large = study(migperf=[(150.0, 1.0)] * 3, **{WHOLE: [(100.0, 1.0)] * 3})
    proof_partitions._note_gain(stage, {1: small, 8: large})
    assert "does not shrink" in stage.run._notes[0]
    proof_partitions._note_gain(stage, {1: small, 8: study(migperf=[], **{WHOLE: []})})
    assert "is not known" in stage.run._notes[1]


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
def test_standing_crews_measure_every_window_in_turn_and_stop_at_the_deadline():
    wanted = {"a": Cell("1c*2", (parse("sleep:3ms"),)), "b": Cell("2c", (parse("sleep:3ms"),), mode="whole")}
    told = []
    found = interleave(
        CpuBackend(), wanted, duration=0.15, repeats=[0, 1], run_id="r", deadline=time.monotonic() + 60,
        progress=told.append,
    )  # fmt: skip
    assert {name: sorted(one.results) for name, one in found.items()} == {"a": [0, 1], "b": [0, 1]}
    records = [r for one in found.values() for result in one.results.values() for r in result.records]
    assert {r.status for r in records} == {"ok"}
    assert len({r.started for r in records}) >= 1
    assert sorted(told) == ["a", "a", "b", "b", "start a", "start b"]
    # each window is its own: the second repeat's requests are not the first one's
    first, second = (found["b"].results[r] for r in (0, 1))
    assert set(first.raws) != set(second.raws)
    late = interleave(
        CpuBackend(), wanted, duration=0.1, repeats=[0], run_id="r", deadline=time.monotonic() - 1
    )
    assert all(not one.results and one.dirty(0) for one in late.values())
