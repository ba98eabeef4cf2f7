import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import poisson, record

from migperf.exhaustive import best_ranks, placed_states
from migperf.geometry import Geometry
from migperf.jobs import InferenceJob, TrainingJob
from migperf.profiles import layout
from migperf.recommendation import confirm
from migperf.recommender import recommend, require_feasible, unusable_slices
from migperf.tables import Cell, OpenLoop, Spread, Table, official_a100, table_from_records
from shared_core import InputError

A100, A30 = layout("a100-40gb"), layout("a30-24gb")
BASE = {"A100-40GB": ("1g.5gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb"),
        "A30-24GB": ("1g.6gb", "2g.12gb", "4g.24gb")}  # fmt: skip


def spread(value):
    return Spread(value, value, value)


def infer(profile, batch, rate, loads=(), memory=None):
    """A cell of `rate` items/s; loads are (rate, p99 or None where the queue grew without end)."""
    step = 1000 * batch / rate
    seen = tuple(
        OpenLoop(r, "saturated", {}, spread(0.9 * r))
        if p99 is None
        else OpenLoop(r, "ok", {"p99": spread(p99)})
        for r, p99 in loads
    )
    return Cell("m infer", profile, batch, "ok", spread(rate), {"mean": spread(step)}, seen, memory)


def train(profile, rate, memory=None, workload="t train"):
    if rate is None:
        return Cell(workload, profile, 8, "oom", message="CUDA out of memory")
    return Cell(workload, profile, 8, "ok", spread(rate), {"mean": spread(8000 / rate)}, (), memory)


def table_of(device, cells):
    return Table(device.device, False, {(c.workload, c.profile, c.batch): c for c in cells}, len(cells))


rates = st.integers(1, 40).map(float)
loads = st.dictionaries(
    st.sampled_from([20.0, 60.0, 90.0]), st.sampled_from([15.0, 40.0, 90.0, None]), max_size=2
)
row = st.tuples(
    st.sampled_from([(1,), (8,), (1, 8)]),
    st.lists(
        st.tuples(rates, loads, st.sampled_from([None, 1000.0, 5000.0, 20000.0])), min_size=2, max_size=2
    ),
    st.one_of(st.none(), rates),
    st.one_of(st.none(), rates),
)
drawn = st.tuples(  # numbers only: the checks of annotations draw lots of their own, which strategies may not
    st.lists(row, min_size=5, max_size=5),
    st.tuples(
        rates, st.sampled_from([20.0, 50.0, 100.0, 400.0]), st.sampled_from([1.0, 3.0]), st.integers(0, 2)
    ),
    st.integers(0, 10_000),
)


def situation(device, numbers):
    """A device's table, jobs and live state, all at random."""
    rows, (rate, slo, weight, third), index = numbers
    cells = []
    for name, (batches, infers, *trains) in zip(BASE[device.device], rows, strict=False):
        for batch, (top, seen, memory) in zip(batches, infers, strict=False):
            cells.append(infer(name, batch, 10 * top, sorted(seen.items()), memory))
        cells += [train(name, trains[i], None, key) for i, key in enumerate(("t train", "u train"))]
    last = (
        InferenceJob("b", "m", 60.0, 100.0),
        TrainingJob("u", "u", 8),
        TrainingJob("u", "u", 8, min_memory_mib=11000.0),
    )[third]
    jobs = [InferenceJob("a", "m", 5 * rate, slo), TrainingJob("t", "t", 8, weight=weight), last]
    states = sorted(map(sorted, placed_states(device, BASE[device.device])))
    return table_of(device, cells), jobs, frozenset(states[index % len(states)])


def check_against_judge(device, table, jobs, live):
    live_geometry = Geometry.parse(",".join(f"{n}@{s}" for n, s in live) or "empty", device)
    found = recommend(device, jobs, table, live=live_geometry, predict=False)
    judged = best_ranks(device, jobs, table, BASE[device.device], live)
    assert found.ranks == pytest.approx(judged, abs=1e-6)
    assert found.geometry.valid
    assert {one.job for one in found.placed} | {one.job for one in found.unmet} == {job.name for job in jobs}
    for job in jobs:
        owned = found.of(job.name)
        if isinstance(job, InferenceJob) and owned:
            assert sum(one.rate or 0 for one in owned) == pytest.approx(job.rate)
            assert all(one.latency_ms and one.latency_ms.middle <= job.slo_ms * (1 + 1e-6) for one in owned)
    return found


@given(drawn)
@settings(max_examples=12)
def test_on_an_a30_it_is_what_exhaustive_search_finds(numbers):
    check_against_judge(A30, *situation(A30, numbers))


@given(drawn)
@settings(max_examples=2)
def test_on_an_a100_it_is_what_exhaustive_search_finds(numbers):
    table, jobs, live = situation(A100, numbers)
    check_against_judge(A100, table, jobs[:2], live)


@given(drawn, st.data())
@settings(max_examples=8)
def test_one_changed_cell_moves_the_optimum_as_it_moves_the_exhaustive_one(numbers, data):
    table, jobs, live = situation(A30, numbers)
    keys = sorted(key for key, cell in table.cells.items() if cell.throughput is not None)
    key = keys[data.draw(st.integers(0, 100)) % len(keys)]
    factor = data.draw(st.sampled_from([0.1, 8.0]))
    cell = table.cells[key]
    assert cell.throughput is not None
    service = {name: one.scaled(1 / factor) for name, one in cell.service_ms.items()}
    changed = dataclasses.replace(cell, throughput=cell.throughput.scaled(factor), service_ms=service)
    check_against_judge(A30, dataclasses.replace(table, cells={**table.cells, key: changed}), jobs, live)


def test_the_optimum_follows_one_cell_from_one_geometry_to_another():
    names = BASE["A100-40GB"]
    cells = [train(name, rate) for name, rate in zip(names, (10, 20, 35, 40, 70), strict=True)]
    cells += [
        train(name, rate, None, "u train") for name, rate in zip(names, (50, 52, 53, 54, 55), strict=True)
    ]
    jobs = [TrainingJob("t", "t", 8), TrainingJob("u", "u", 8)]
    before = recommend(A100, jobs, table_of(A100, cells), predict=False)
    assert {one.job: one.instance.partition("@")[0] for one in before.placed} == {
        "t": "4g.20gb",
        "u": "3g.20gb",
    }
    cells[3] = train("4g.20gb", 20)
    after = recommend(A100, jobs, table_of(A100, cells), predict=False)
    assert {one.job: one.instance.partition("@")[0] for one in after.placed} == {
        "t": "3g.20gb",
        "u": "4g.20gb",
    }


def test_official_figures_give_what_exhaustive_search_gives():
    jobs = [
        InferenceJob("bert", "bert-base-multilingual", 1500, 150),
        InferenceJob("mini", "minilm-l12", 1000, 60),
        TrainingJob("vit", "vit_base_patch16", 32),
    ]
    found = recommend(A100, jobs, official_a100(), predict=False)
    judged = best_ranks(A100, jobs, official_a100(), ("1g.5gb", "2g.10gb", "3g.20gb", "7g.40gb"))
    assert found.ranks == pytest.approx(judged, abs=1e-6)
    assert found.feasible


def test_a_job_is_never_put_where_it_ran_out_of_memory():
    cells = [train("1g.5gb", None), train("2g.10gb", None), train("3g.20gb", 5), train("7g.40gb", 6)]
    found = recommend(A100, [TrainingJob(n, "t", 8) for n in "abc"], table_of(A100, cells))
    assert [one.instance.partition("@")[0] for one in found.placed] == ["3g.20gb", "3g.20gb"]
    (left,) = found.unmet
    assert left.alone
    alone = recommend(A100, [TrainingJob("a", "t", 8)], table_of(A100, cells[:2]))
    assert "1g.5gb: CUDA out of memory" in alone.unmet[0].reason
    with pytest.raises(InputError, match="no geometry of A100-40GB carries all jobs: a: fits no profile"):
        require_feasible(alone)


def test_memory_needs_a_tenth_more_than_the_peak():
    limit = A100.profile("1g.5gb").memory_mib
    assert limit is not None
    for peak, profile in ((limit / 1.1 - 1, "1g.5gb"), (limit / 1.1 + 1, "2g.10gb")):
        cells = [train("1g.5gb", 50, peak), train("2g.10gb", 49, peak)]
        found = recommend(A100, [TrainingJob("a", "t", 8)], table_of(A100, cells), predict=False)
        assert found.placed[0].instance.partition("@")[0] == profile


def test_a_measured_open_loop_at_the_rate_or_above_is_what_a_promise_rests_on():
    cells = [infer("1g.5gb", 1, 1000.0, [(50.0, 8.0), (100.0, 19.0), (200.0, 45.0)])]
    found = recommend(A100, [InferenceJob("a", "m", 70, 20)], table_of(A100, cells), predict=False)
    (one,) = found.placed
    assert (one.evidence, one.capacity) == ("measured", 100.0)
    assert one.latency_ms == spread(19.0)  # of the next heavier load, not of the lighter one


def test_what_was_seen_to_saturate_is_not_estimated_away():
    cells = [infer("1g.5gb", 1, 1000.0, [(50.0, 8.0), (60.0, None)])]
    found = recommend(A100, [InferenceJob("a", "m", 300, 100)], table_of(A100, cells), predict=False)
    assert len(found.placed) == 6
    assert all(one.evidence == "measured" for one in found.placed)


def test_without_open_loop_data_latency_is_estimated_and_marked():
    cells = [infer("1g.5gb", 1, 100.0)]
    found = recommend(A100, [InferenceJob("a", "m", 50, 60)], table_of(A100, cells), predict=False)
    (one,) = found.placed
    assert one.evidence == "estimated"
    assert "estimated" in found.text()
    # M/D/1 at half load: the exact 99th percentile of response is 43.4 ms with 10 ms steps
    assert one.latency_ms is not None
    assert 43.4 <= one.latency_ms.middle <= 60
    tight = recommend(A100, [InferenceJob("a", "m", 50, 19.9)], table_of(A100, cells), predict=False)
    assert not tight.feasible  # not even two steps fit


def test_utilisation_of_an_estimate_stays_at_four_fifths():
    table = table_of(A100, [infer("7g.40gb", 1, 100.0)])
    assert recommend(A100, [InferenceJob("a", "m", 80, 10_000)], table, predict=False).feasible
    assert not recommend(A100, [InferenceJob("a", "m", 81, 10_000)], table, predict=False).feasible


def test_a_service_may_own_several_instances_and_splits_its_rate_by_what_they_can_do():
    cells = [infer("1g.5gb", 1, 200.0, [(100.0, 10.0), (120.0, None)]),
             infer("3g.20gb", 1, 500.0, [(300.0, 10.0), (320.0, None)])]  # fmt: skip
    found = recommend(A100, [InferenceJob("a", "m", 660, 20)], table_of(A100, cells), predict=False)
    shares = {one.instance.partition("@")[0]: one.rate for one in found.placed}
    assert shares == pytest.approx({"3g.20gb": 660 * 3 / 7, "1g.5gb": 660 / 7})
    assert found.geometry.profiles == {"3g.20gb": 2, "1g.5gb": 1} or found.geometry.profiles == {
        "3g.20gb": 1, "1g.5gb": 4}  # fmt: skip


def test_an_impossible_mix_says_which_job_and_by_how_much():
    cells = [
        infer("1g.5gb", 1, 1000.0, [(10.0, 30.0)]),
        infer("7g.40gb", 1, 1000.0, [(90.0, 9.0), (95.0, None)]),
    ]
    jobs = [
        InferenceJob("fast", "m", 5, 2),
        InferenceJob("big", "m", 200, 10),
        InferenceJob("fits", "m", 80, 10),
    ]
    found = recommend(A100, jobs, table_of(A100, cells), predict=False)
    reasons = {one.job: one for one in found.unmet}
    assert set(reasons) == {"fast", "big"}
    assert "7g.40gb batch 1: p99 9 ms at 90 items/s, the objective is 2" in reasons["fast"].reason
    assert "stays within 10 ms up to 90 items/s (7g.40gb), 200 are wanted" in reasons["big"].reason
    assert not reasons["big"].alone
    assert "NOT MET big" in found.text()


def test_a_job_that_only_the_others_crowd_out_is_told_so():
    cells = [infer("7g.40gb", 1, 1000.0, [(90.0, 9.0)])]
    jobs = [InferenceJob("one", "m", 80, 10), InferenceJob("two", "m", 80, 10)]
    (left,) = recommend(A100, jobs, table_of(A100, cells), predict=False).unmet
    assert left.alone
    assert "can be served alone" in left.reason


def test_an_instance_that_exists_and_fits_stays():
    table = table_of(A100, [train("2g.10gb", 10)])
    live = Geometry.parse("2g.10gb@4,1g.5gb@0", A100)
    found = recommend(A100, [TrainingJob("a", "t", 8)], table, live=live, predict=False)
    assert (found.placed[0].instance, found.create, found.destroy) == ("2g.10gb@4", (), ())
    assert found.idle == ("1g.5gb@0",)
    assert found.commands == ()


def test_the_fewest_instances_are_destroyed():
    table = table_of(A100, [train("3g.20gb", 10)])
    live = Geometry.parse("1g.5gb@0,1g.5gb@4,1g.5gb@5", A100)
    found = recommend(A100, [TrainingJob("a", "t", 8)], table, live=live, predict=False)
    assert (found.create, found.destroy) == (("3g.20gb@0",), ("1g.5gb@0",))
    assert found.commands == ('migperf apply "3g.20gb@0,1g.5gb@4,1g.5gb@5"',)


def test_slices_that_nothing_could_use_are_counted():
    assert (
        unusable_slices(
            Geometry.parse("1g.5gb@0,1g.5gb@1,1g.5gb@2,1g.5gb@3,1g.5gb@4,1g.5gb@5,1g.5gb@6", A100)
        )
        == 1
    )
    assert unusable_slices(Geometry.parse("3g.20gb@0,3g.20gb@4", A100)) == 0
    assert unusable_slices(Geometry.parse("empty", A100)) == 0
    assert unusable_slices(Geometry.parse("4g.20gb@0", A100)) == 0  # 3g at 4 is still there
    assert unusable_slices(Geometry.parse("4g.20gb@0,1g.5gb@6", A100)) == 1


def test_a_placement_that_leaves_room_is_preferred():
    table = table_of(A100, [train("1g.5gb", 10)])
    found = recommend(A100, [TrainingJob(n, "t", 8) for n in "abc"], table, predict=False)
    assert found.ranks[2] == 0
    starts = sorted(int(one.instance.partition("@")[2]) for one in found.placed)
    assert unusable_slices(found.geometry) == 0, starts


def test_old_drivers_get_no_4g_beside_3g():
    cells = [train("3g.20gb", 30), train("4g.20gb", 40)]
    jobs = [TrainingJob("a", "t", 8), TrainingJob("b", "t", 8)]
    modern = recommend(A100, jobs, table_of(A100, cells), predict=False)
    assert modern.geometry.profiles == {"3g.20gb": 1, "4g.20gb": 1}
    legacy = recommend(A100, jobs, table_of(A100, cells), predict=False, legacy_driver=True)
    assert legacy.geometry.profiles == {"3g.20gb": 2}


def test_fairness_lifts_the_slowest_where_throughput_feeds_the_fastest():
    cells = [train(name, rate) for name, rate in zip(BASE["A100-40GB"], (1, 2, 3, 20, 100), strict=True)]
    jobs = [TrainingJob("a", "t", 8, weight=5), TrainingJob("b", "t", 8)]
    greedy = recommend(A100, jobs, table_of(A100, cells), predict=False)
    fair = recommend(A100, jobs, table_of(A100, cells), predict=False, objective="fairness")
    assert len(greedy.placed) == 1
    least = min(one.throughput.middle for one in fair.placed if one.throughput)
    assert (len(fair.placed), least) == (2, 3)


def test_cost_takes_the_fewest_slices_that_do():
    cells = [
        infer("1g.5gb", 1, 1000.0, [(40.0, 9.0), (50.0, None)]),
        infer("2g.10gb", 1, 1000.0, [(100.0, 9.0)]),
    ]
    found = recommend(
        A100, [InferenceJob("a", "m", 90, 10)], table_of(A100, cells), objective="cost", predict=False
    )
    assert found.geometry.profiles == {"2g.10gb": 1}  # three of 1g would be needed


def test_energy_takes_the_least_joules_an_item_and_needs_them_measured():
    cells = [dataclasses.replace(train(name, 10), joules_per_item=spread(joules))
             for name, joules in (("1g.5gb", 3.0), ("2g.10gb", 1.0), ("7g.40gb", 2.0))]  # fmt: skip
    job = [TrainingJob("a", "t", 8)]
    found = recommend(A100, job, table_of(A100, cells), objective="energy", predict=False)
    assert found.geometry.profiles == {"2g.10gb": 1}
    with pytest.raises(InputError, match="a: no energy was measured of it"):
        recommend(A100, job, table_of(A100, [train("1g.5gb", 1)]), objective="energy", predict=False)


def test_predicted_cells_are_used_and_marked():
    cells = [train("1g.5gb", 10), train("7g.40gb", 74)]
    found = recommend(A100, [TrainingJob("a", "t", 8), TrainingJob("b", "t", 8)], table_of(A100, cells),
                      objective="fairness")  # fmt: skip
    marks = {one.instance.partition("@")[0]: one for one in found.placed}
    assert marks["3g.20gb"].evidence == "predicted"
    assert "two-resource law fitted on 1g.5gb, 7g.40gb" in marks["3g.20gb"].note
    assert marks["3g.20gb"].throughput is not None
    assert marks["3g.20gb"].throughput.low < marks["3g.20gb"].throughput.middle
    assert "[predicted]" in found.text()


def test_profiles_of_which_nothing_is_known_are_named():
    jobs = [TrainingJob("tune", "vit_base_patch16", 8)]
    whole = recommend("a100-40gb", jobs, official_a100(), predict=False)
    (note,) = [note for note in whole.notes if "not considered" in note]
    assert note == "tune was neither measured nor predicted in 1g.10gb, 4g.20gb: not considered there"
    service = [InferenceJob("search", "bert-base-multilingual", 200, 500)]  # saturates the GPU: predicted
    assert not [note for note in recommend("a100-40gb", service, official_a100()).notes if "4g.20gb" in note]


def test_the_runner_up_is_another_set_of_instances_and_the_margin_is_true():
    cells = [train(name, rate) for name, rate in zip(BASE["A100-40GB"], (10, 20, 35, 40, 70), strict=True)]
    found = recommend(A100, [TrainingJob("a", "t", 8)], table_of(A100, cells), predict=False)
    assert found.geometry.profiles == {"7g.40gb": 1}
    assert found.runner_up is not None
    assert found.runner_up.geometry == "4g.20gb@0"
    assert found.runner_up.level == "weighted normalised training throughput"
    assert found.runner_up.margin == pytest.approx(30 / 70)


def test_five_jobs_are_weighed_over_all_multisets_of_all_profiles():
    jobs = [
        InferenceJob("a", "bert-base-multilingual", 400, 60),
        InferenceJob("b", "minilm-l12", 900, 60),
        InferenceJob("c", "distiluse-v1", 800, 80),
        TrainingJob("d", "vit_base_patch16", 8),
        TrainingJob("e", "moco-v2-resnet50", 8),
    ]
    found = recommend(A100, jobs, official_a100())
    assert found.feasible
    assert found.considered == 128  # all multisets of all seven profiles


def test_it_can_be_written_as_json():
    found = recommend(
        A100, [InferenceJob("a", "bert-base-multilingual", 400, 60)], official_a100(), predict=False
    )
    read = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert read["placed"][0]["job"] == "a"
    assert read["geometry"] == str(found.geometry)


def test_a_table_of_another_device_is_refused():
    with pytest.raises(
        InputError, match=re.escape("table: is of A100-40GB; A30-24GB has no profile 1g.5gb or")
    ):
        recommend(A30, [TrainingJob("a", "vit_base_patch16", 8)], official_a100())


def test_simulated_tables_mark_the_recommendation():
    table = table_from_records([record(simulated=True, backend="simulated", load=poisson(50))])
    found = recommend(A100, [InferenceJob("a", "resnet18", 40, 20)], table)
    assert found.simulated
    assert "(SIMULATED)" in found.text()
    assert found.as_dict()["simulated"] is True


def together(**changes):
    load = poisson(40)
    return record(instance="1g.5gb@0", load=load, latency_ms={"p99": 10.0}, **changes)


def confirmed(*records):
    table = table_from_records([record(load=poisson(50))])
    found = recommend(A100, [InferenceJob("a", "resnet18", 40, 20)], table, predict=False)
    return confirm(found, records)


def test_confirmation_compares_with_what_was_measured_together():
    good = confirmed(together())
    assert (good.holds, good.compared[0].verdict, good.compared[0].kept) == (True, "as expected", True)
    slow = confirmed(dataclasses.replace(together(), latency_ms={"p99": 25.0}))
    assert (slow.holds, slow.compared[0].verdict, slow.compared[0].ratio) == (False, "worse", 2.5)
    assert slow.compared[0].kept is False
    drowned = confirmed(dataclasses.replace(together(), status="saturated", latency_ms={}))
    assert (drowned.holds, drowned.compared[0].kept) == (False, False)


def test_confirmation_concludes_nothing_from_contaminated_or_missing_runs():
    foul = confirmed(together(contaminated="17 % of a core"))
    assert foul.holds is None
    assert foul.problems == ("a in 1g.5gb@0: contaminated: 17 % of a core",)
    assert confirmed().problems == ("a in 1g.5gb@0: not measured",)
