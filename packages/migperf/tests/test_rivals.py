"""Rivals choose by their own rules, never better than the exact answer; a dispatcher's queues by hand."""

from itertools import permutations, product

import numpy as np
import pytest

from migperf import official_a100, rivals
from migperf.geometry import Geometry, enumerate_geometries
from migperf.jobs import InferenceJob, TrainingJob
from migperf.loads import Poisson, arrivals
from migperf.mixes import Mix
from migperf.profiles import layout
from migperf.proof import mix_of
from migperf.recommender import grouped, prepare, recommend

A100 = layout("a100-40gb")
TABLE = official_a100()


def chosen(rule, jobs):
    mix = prepare(A100, jobs, TABLE, predict=False)
    counts = rule(mix, TABLE, tuple(grouped(mix, A100)))
    return mix, {p.name: n for p, n in zip(mix.profiles, counts, strict=True) if n}


@pytest.mark.parametrize("number", range(4))
def test_no_rule_does_better_than_the_exact_answer_and_each_chooses_what_can_exist(number):
    jobs = mix_of(7, number)
    best = recommend(A100, jobs, TABLE, predict=False).ranks[:2]
    found = rivals.compare(A100, jobs, TABLE)
    assert [one.name for one in found] == ["greedy by fitness", "MISO", "PARIS"]
    for one in found:
        assert Geometry.parse(one.geometry, A100).valid
        assert (one.met, round(one.trained, 6)) <= (best[0], round(best[1], 6) + 1e-6)


def test_somewhere_each_rule_falls_short():
    short = set()
    for number in range(2):
        jobs = mix_of(2, number)
        best = recommend(A100, jobs, TABLE, predict=False).ranks[:2]
        found = rivals.compare(A100, jobs, TABLE)
        short |= {one.name for one in found if not np.allclose((one.met, one.trained), best, atol=1e-6)}
    assert short == set(rivals.RULES)


def test_miso_has_the_greatest_sum_of_speeds_over_all_partitions_and_orders():
    jobs = [TrainingJob("v", "vit_base_patch16", 8), TrainingJob("m", "moco-v2-resnet50", 8),
            InferenceJob("d", "distiluse-v1", 10, 1000)]  # fmt: skip

    def rates(job):
        batches = [job.batch] if isinstance(job, TrainingJob) else [1, 8, 32, 64, 128, 256]
        cells = {
            (p, b): c.throughput.middle
            for (w, p, b), c in TABLE.cells.items()
            if w == TABLE.resolve(job.workload, job.mode) and b in batches and c.throughput
        }
        found = {p: max(rate for (q, _), rate in cells.items() if q == p) for p, _ in cells}
        return {p: rate / max(found.values()) for p, rate in found.items()}

    speeds = [rates(job) for job in jobs]

    def total(geometry):
        names = [slot.profile.name for slot in geometry.slots]
        return max(
            sum(speed.get(n, 0) for speed, n in zip(speeds, order, strict=True))
            for order in permutations(names)
        )

    _, found = chosen(rivals.by_speed, jobs)
    known = {p for speed in speeds for p in speed}
    states = [g for g in enumerate_geometries(A100, sorted(known)) if len(g.slots) == 3]
    wanted = Geometry.parse(",".join(f"{n}*{c}" for n, c in found.items()), A100)
    assert total(wanted) == pytest.approx(max(map(total, states)))


def test_paris_takes_sizes_in_proportion_to_the_work_they_are_best_for():
    # the smallest takes the batches up to its knee, whatever is quicker elsewhere
    jobs = [InferenceJob("m", "minilm-l12", 500, 250)]
    mix, found = chosen(rivals.by_knees, jobs)
    work = dict(zip([p.name for p in mix.profiles], rivals._work_by_size(jobs[0], mix, TABLE), strict=True))
    name = TABLE.resolve("minilm-l12", "infer")
    cell = {(p, b): c.throughput.middle for (w, p, b), c in TABLE.cells.items() if w == name}
    batches = sorted({b for _, b in cell})
    knee = min(b for b in batches if cell["1g.5gb", b] >= 0.8 * max(cell["1g.5gb", x] for x in batches))
    assert work["1g.5gb"] == pytest.approx(
        sum(1 / cell["1g.5gb", b] for b in batches if b <= knee) / len(batches)
    )
    assert max(found, key=found.get) == max(work, key=work.get)


def test_greedy_serves_the_rate_with_the_least_slices_and_gives_the_training_the_rest():
    jobs = [InferenceJob("m", "minilm-l12", 100, 500), TrainingJob("v", "vit_base_patch16", 8)]
    _, found = chosen(rivals.by_fitness, jobs)
    assert found["1g.5gb"] >= 1
    assert any(name.startswith(("3g", "4g")) for name in found)


def test_a_rule_without_data_chooses_nothing():
    mix = Mix((), (), {}, {}, {})
    assert rivals.by_fitness(mix, TABLE, ((),)) == ()
    assert rivals.best_shared(mix, ()) == (0, 0.0)


def test_elsa_on_one_instance_is_its_queue():
    schedule = arrivals(Poisson(70, seed=3), 60)
    free, expected = 0.0, []
    for due in schedule / 1e6:
        free = max(free, due) + 10
        expected.append(free - due)
    assert rivals.elsa(schedule, [10.0], 50.0) == pytest.approx(expected)


def test_elsa_prefers_the_smallest_instance_in_time_and_the_quickest_where_none_is():
    ms = 1_000_000
    found = rivals.elsa(np.array([0, 0, 0, 0]) * ms, [20.0, 10.0], 25.0)
    # the small one ends in 20 (slack 5); then it would end in 40: the large one, 10, 20; then none has slack
    assert found.tolist() == [20.0, 10.0, 20.0, 30.0]
    cautious = rivals.elsa(np.array([0]) * ms, [20.0, 10.0], 25.0, alpha=1.3)
    assert cautious.tolist() == [10.0]


def test_best_shared_is_what_trying_all_owners_gives():
    jobs = mix_of(1, 0)
    mix = prepare(A100, jobs, TABLE, predict=False)
    counts = tuple({"3g.20gb": 1, "2g.10gb": 1, "1g.5gb": 2}.get(p.name, 0) for p in mix.profiles)
    slots = [i for i, n in enumerate(counts) for _ in range(n)]
    best = (0, 0.0)
    for owners in product([None, *range(len(jobs))], repeat=len(slots)):
        met, trained, right = 0, 0.0, True
        for number, job in enumerate(jobs):
            part = tuple(
                sum(o == number and s == i for s, o in zip(slots, owners, strict=True))
                for i in range(len(counts))
            )
            if isinstance(job, InferenceJob):
                met += any(part) and mix.satisfied(job, part)
                right = right and (not any(part) or mix.satisfied(job, part))
            elif any(part):
                training = mix.training(job, part)
                right = right and training is not None
                trained += job.weight * training.normalised if training else 0
        if right:
            best = max(best, (met, trained))
    assert rivals.best_shared(mix, counts) == (best[0], pytest.approx(best[1]))
