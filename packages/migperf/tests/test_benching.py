"""A configuration runs as it says; a recommendation is confirmed by running it."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from made_records import record

from migperf import confirming
from migperf.backends.opening import open as open_device
from migperf.benching import bench
from migperf.config import read as read_config
from migperf.errors import GeometryError
from migperf.jobs import InferenceJob, TrainingJob
from migperf.loads import Poisson
from migperf.measuring import Result
from migperf.recommender import recommend
from migperf.records import read
from migperf.sweeps import Cell, sweep
from migperf.tables import official_a100, table_from_records
from migperf.workloads import parse
from shared_core import InputError

CONFIG = """
gpus:
  - device: sim:a100-40gb
    devices:
      - {gi_profile: 1g.5gb, count: 2, job: serve}
      - {gi_profile: 3g.20gb, start: 4, job: train}
job_configs:
  train: {workload: timm/vit_base_patch16_224, mode: train, batch: 8}
  serve: {workload: transformers/bert, batch: 1, load: {kind: poisson, rate: 20, seed: 666}}
duration: 10
repeats: 2
"""


def simulated(spec):
    return open_device(spec, allow_mode_change=True)


def test_every_job_runs_in_its_part_and_repeats_that_are_there_are_not_run_again(tmp_path):
    file = tmp_path / "bench.yaml"
    file.write_text(CONFIG)
    found = bench(file, tmp_path / "out", open_device=simulated)
    assert len(found) == 2 * 3
    where = {(r.workload["mode"], r.instance.partition("@")[0], r.load["kind"]) for r in found}
    assert where == {("train", "3g.20gb", "closed"), ("infer", "1g.5gb", "poisson")}
    assert {r.instance for r in found if r.workload["mode"] == "train"} == {"3g.20gb@4"}
    assert len({r.load["seed"] for r in found if r.load["kind"] == "poisson"}) == 4  # each its own schedule
    seen = []
    again = bench(file, tmp_path / "out", open_device=simulated, progress=lambda *step: seen.append(step))
    assert again == found
    assert seen[-1] == (2, 2, "")
    assert len(read(tmp_path / "out")) == 6


def test_two_devices_have_folders_of_their_own(tmp_path):
    file = tmp_path / "bench.yaml"
    other = "  - device: sim:a30-24gb\n    devices: [{gi_profile: 2g.12gb, job: serve}]\njob_configs:"
    file.write_text(CONFIG.replace("job_configs:", other).replace("repeats: 2", "repeats: 1"))
    found = bench(file, tmp_path / "out", open_device=simulated)
    assert len({r.device for r in found}) == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["sim-a100-40gb", "sim-a30-24gb"]


def test_a_geometry_that_cannot_be_is_refused_before_anything_runs(tmp_path):
    file = tmp_path / "bench.yaml"
    file.write_text(CONFIG.replace("count: 2", "count: 7"))
    with pytest.raises(GeometryError, match="cannot exist"):
        bench(file, tmp_path / "out", open_device=simulated)
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_a_job_names_it(tmp_path):
    file = tmp_path / "bench.yaml"
    file.write_text(CONFIG.replace("rate: 20", "rate: -1"))
    with pytest.raises(InputError, match=r"job_configs\.serve\.rate: expected requests"):
        bench(read_config(file), tmp_path / "out", open_device=simulated)


@dataclass
class Gpu:
    """A GPU without MIG, whose MPS has no server."""

    def __init__(self):
        self.inner = open_device("cpu")
        self.asked = []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    @contextmanager
    def share(self, mode, processes, thread_percentage=None):
        from migperf.sweeps import cut

        self.asked.append((mode, processes))
        with cut(self.inner, "1c") as instances:
            yield type("Sharing", (), {"instances": instances * processes, "mode": "timeslice"})()


def test_mps_of_a_configuration_is_asked_for_and_recorded_as_what_it_was_seen_to_be(tmp_path):
    file = tmp_path / "bench.yaml"
    file.write_text("gpus: [{id: 0, mig: false, mps: true, devices: [{job: a, count: 2}]}]\n"
                    "job_configs: {a: {workload: 'sleep:3ms'}}\nduration: 0.2\nrepeats: 1\n")  # fmt: skip
    gpu = Gpu()
    found = bench(file, tmp_path / "out", open_device=lambda spec: gpu)
    assert gpu.asked == [("mps", 2)]
    assert [r.mode for r in found] == ["timeslice"] * 2


@pytest.fixture
def swept(tmp_path):
    device = simulated("sim:a100-40gb")
    work = [parse("transformers/bert", batch=b) for b in (1, 8)]
    train = parse("timm/vit_base_patch16_224", mode="train", batch=8)
    wanted = [Cell(g, (w,)) for g in ("1g", "2g", "3g", "7g") for w in (*work, train)]
    return device, sweep(device, wanted, tmp_path / "table", duration=3, repeats=1)


def test_a_recommendation_is_run_with_all_jobs_at_once_and_compared(swept, tmp_path):
    device, records = swept
    jobs = [InferenceJob("chat", "bert", 150, 120), TrainingJob("tune", "vit_base_patch16_224", 8)]
    answer = recommend(device, jobs, table_from_records(records))
    found = confirming.confirm_run(device, answer, records, duration=20, repeats=2, folder=tmp_path / "c")
    assert {one.job for one in found.compared} == {"chat", "tune"}
    assert found.holds
    assert not found.problems
    ran = read(tmp_path / "c")
    assert {r.geometry for r in ran} == {str(answer.geometry)}
    shares = {one.instance: one.rate for one in answer.placed}
    for one in ran:
        if one.load["kind"] == "poisson":
            batched = max(int(one.workload["batch"]), int(one.load["collect"]))
            offered = one.load["rate"] * int(one.workload["batch"])
            assert offered == pytest.approx(shares[one.instance])
            assert batched == next(p.batch for p in answer.placed if p.instance == one.instance)
    assert "the recommendation holds" in confirming.text(found)


def test_a_device_slower_than_its_table_does_not_confirm(swept):
    from migperf.simulating import Model

    device, records = swept
    answer = recommend(device, [TrainingJob("tune", "vit_base_patch16_224", 8)], table_from_records(records))
    found = confirming.confirm_run(
        device, answer, records, duration=5, repeats=1, model=Model(500.0, 80.0, 80.0)
    )
    assert found.holds is False
    assert "does NOT hold" in confirming.text(found)


def test_official_figures_cannot_be_run_again_and_say_so():
    device = simulated("sim:a100-40gb")
    answer = recommend(device, [TrainingJob("tune", "vit_base_patch16", 8)], official_a100())
    with pytest.raises(InputError, match="no record knows how this workload is made"):
        confirming.confirm_run(device, answer, [])


def test_a_service_measured_in_whole_batches_is_asked_in_whole_batches():
    placed = next(iter(recommend("a100-40gb", [InferenceJob("a", "resnet18", 80, 100)], table_from_records([
        record("1g.5gb", workload={"batch": 8}, latency_ms={"mean": 20.0, "p99": 20.0}, load={
            "kind": "poisson", "rate": 20.0, "seed": 1}),
    ])).placed))  # fmt: skip
    known = [record("1g.5gb", workload={"batch": 8}, load={"kind": "poisson", "rate": 20.0, "seed": 1})]
    workload, load = confirming._work(placed, known, seed=3)
    assert isinstance(load, Poisson)
    assert (workload.batch, load.rate, load.collect) == (8, 10.0, 1)
    closed = [record("1g.5gb", workload={"batch": 8})]
    workload, load = confirming._work(placed, closed, seed=3)
    assert isinstance(load, Poisson)
    assert (workload.batch, load.rate, load.collect) == (1, 80.0, 8)


def test_instances_know_their_device_and_a_run_without_one_is_refused():
    from migperf import Geometry, partitioned, run

    device = simulated("sim:a100-40gb")
    with partitioned(device, Geometry.parse("1g*2", device)) as instances:
        assert instances.backend is device
        assert isinstance(run(parse("transformers/bert"), instances, duration=2, repeats=1), Result)
        with pytest.raises(InputError, match="name the device"):
            run(parse("transformers/bert"), list(instances), duration=2, repeats=1)
