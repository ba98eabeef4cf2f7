import json
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recommender import infer, table_of, train

from migperf.backends.cpu import CpuBackend
from migperf.exhaustive import capacity, lost_slices, placed_states, training_rates
from migperf.fleet import Gpu, recommend_fleet
from migperf.geometry import Geometry
from migperf.jobs import InferenceJob, TrainingJob
from migperf.profiles import layout
from migperf.recommender import recommend
from migperf.tables import official_a100
from shared_core import InputError

A30, A100 = layout("a30-24gb"), layout("a100-40gb")
NAMES = ("1g.6gb", "2g.12gb", "4g.24gb")


def best_of_two(jobs, tables):
    """Every pair of placed geometries, every owner of every instance; shares no code with the program."""
    speeds = {
        job.name: [
            {n: capacity(job, t, A30, n) if isinstance(job, InferenceJob) else raw_rates(job, t).get(n, 0.0)
             for n in NAMES} for t in tables
        ]
        for job in jobs
    }  # fmt: skip
    sites = {}  # by what runs, not where: the best placement of each multiset
    for state in placed_states(A30, NAMES):
        counts = tuple(sorted(name for name, _ in state))
        sites[counts] = max(sites.get(counts, (-99, -99)), (-lost_slices(A30, state), -len(state)))
    best = (-1.0, 0.0, 0.0, 0.0)
    for pair in product(sites, repeat=2):
        slots = [(g, name) for g, names in enumerate(pair) for name in names]
        rank = tuple(a + b for a, b in zip(sites[pair[0]], sites[pair[1]], strict=True))
        for owners in product(jobs, repeat=len(slots)):
            score = pair_score(jobs, speeds, slots, owners)
            if score is not None:
                best = max(best, (*score, *rank))
    return best


def raw_rates(job, table):
    fits = training_rates(job, table, A30)
    return {n: table.cells["t train", n, job.batch].throughput.middle for n in fits}


def pair_score(jobs, speeds, slots, owners):
    met = trained = 0.0
    for job in jobs:
        mine = [speeds[job.name][g][n] for (g, n), owner in zip(slots, owners, strict=True) if owner is job]
        if not all(mine):
            return None
        if isinstance(job, InferenceJob):
            met += sum(mine) >= job.rate
        elif len(mine) > 1:
            return None
        elif mine:
            trained += job.weight * mine[0] / max(max(of_gpu.values()) for of_gpu in speeds[job.name])
    return met, round(trained, 6)


numbers = st.lists(st.integers(1, 40), min_size=12, max_size=12)


def tables_of(values):
    made = []
    for half in (values[:6], values[6:]):
        cells = [
            infer(n, 1, 1000.0, [(10.0 * v, 9.0), (10.0 * v + 1, None)])
            for n, v in zip(NAMES, half, strict=False)
        ]
        cells += [train(n, float(v)) for n, v in zip(NAMES, half[3:], strict=True)]
        made.append(table_of(A30, cells))
    return made


@given(numbers, st.integers(10, 900))
@settings(max_examples=4)
def test_two_gpus_are_shared_as_exhaustive_search_shares_them(values, rate):
    tables = tables_of(values)
    jobs = [InferenceJob("a", "m", rate, 10), TrainingJob("t", "t", 8)]
    plan = recommend_fleet([Gpu(f"g{i}", A30, t) for i, t in enumerate(tables)], jobs, predict=False)
    assert plan.ranks == pytest.approx(best_of_two(jobs, tables), abs=1e-5)
    assert plan.method == "milp"
    assert plan.gap == pytest.approx((0, 0), abs=1e-6)


def test_a_rate_that_no_single_gpu_serves_is_split():
    (table, _) = tables_of([10] * 12)
    gpus = [Gpu("left", A30, table), Gpu("right", A30, table)]
    plan = recommend_fleet(gpus, [InferenceJob("a", "m", 600, 10)], predict=False)
    assert not plan.unmet
    assert {share.gpu for share in plan.shares} == {"left", "right"}
    assert sum(share.rate or 0 for share in plan.shares) == pytest.approx(600)
    beyond = recommend_fleet(gpus, [InferenceJob("a", "m", 801, 10)], predict=False)
    assert beyond.unmet == ("a",)
    assert "NOT MET a" in beyond.text()


def test_one_gpu_gives_what_the_recommender_gives():
    jobs = [InferenceJob("b", "bert-base-multilingual", 1500, 150), TrainingJob("v", "vit_base_patch16", 8),
            TrainingJob("r", "moco-v2-resnet50", 8)]  # fmt: skip
    alone = recommend(A100, jobs, official_a100(), predict=False)
    plan = recommend_fleet([Gpu("g", A100, official_a100())], jobs, predict=False)
    assert plan.ranks == pytest.approx(alone.ranks, abs=1e-6)


def test_when_the_solver_has_no_time_a_greedy_plan_comes_with_its_gap():
    tables = tables_of([5, 10, 20, 3, 6, 12, 5, 10, 20, 3, 6, 12])
    gpus = [Gpu(f"g{i}", A30, t) for i, t in enumerate(tables)]
    jobs = [InferenceJob("a", "m", 120, 10), TrainingJob("t", "t", 8)]
    plan = recommend_fleet(gpus, jobs, predict=False, time_limit=0.0)
    exact = recommend_fleet(gpus, jobs, predict=False)
    assert plan.method == "greedy"
    assert plan.ranks[:2] <= exact.ranks[:2]
    assert plan.bound[0] >= exact.ranks[0]
    assert plan.ranks[0] == 1
    assert "gap" in plan.text()


def test_gpus_of_different_models_have_tables_of_their_own_and_live_instances_stay():
    (small, _) = tables_of([5, 10, 20, 3, 6, 12] * 2)
    big = table_of(A100, [infer("1g.5gb", 1, 1000.0, [(30.0, 9.0), (31.0, None)]), train("3g.20gb", 40.0)])
    live = Geometry.parse("3g.20gb@0", A100)
    jobs = [InferenceJob("a", "m", 210, 10), TrainingJob("t", "t", 8)]
    plan = recommend_fleet([Gpu("a30", A30, small), Gpu("a100", A100, big, live)], jobs, predict=False)
    assert not plan.unmet
    assert plan.proven
    owned = {(share.job, share.gpu, share.profile): share.instances for share in plan.shares}
    assert owned["t", "a100", "3g.20gb"] == 1  # 40 items/s, the A30's best is 12
    assert owned["a", "a30", "4g.24gb"] == 1  # 200 of the 210: the A100 has to help
    assert "3g.20gb@0" in str(plan.sites["a100"].geometry)
    assert not plan.sites["a100"].destroy
    assert json.dumps(plan.as_dict())


def test_a_machine_of_many_cores_gives_one_job_more_than_eight_instances():
    cpus = CpuBackend(set(range(12)), system=Path("/nowhere")).layout
    table = table_of(cpus, [infer("1c", 1, 1000.0, [(10.0, 9.0), (11.0, None)])])
    plan = recommend_fleet([Gpu("host", cpus, table)], [InferenceJob("a", "m", 120, 10)], predict=False)
    assert not plan.unmet
    assert [share.instances for share in plan.shares] == [12]


def test_two_gpus_of_one_name_and_none_are_refused():
    (table, _) = tables_of([5] * 12)
    for gpus in ([], [Gpu("g", A30, table)] * 2):
        with pytest.raises(InputError, match="different names"):
            recommend_fleet(gpus, [InferenceJob("a", "m", 20, 10)])
