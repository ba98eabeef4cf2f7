"""Official files become records that say what their numbers are; the paper's studies are its scripts'."""

import json

import numpy as np
import pytest

from migperf import presets
from migperf.geometry import Geometry
from migperf.loads import Poisson
from migperf.official import import_official
from migperf.records import raw_latencies, read
from shared_core import InputError

LABELS = {
    "gpu": "0", "UUID": "GPU-1", "device": "nvidia0", "modelName": "NVIDIA A30",
    "GPU_I_PROFILE": "2g.12gb", "GPU_I_ID": "1",
}  # fmt: skip


def official(**changes):
    """A file as the project's block client for text writes it."""
    latency = [0.01 + 0.0001 * (index % 7) for index in range(200)]
    values = {
        "test_time": "2022-12-20_10-00-00",
        "start_time": 1671530400.0,
        "num_test_batches": 200,
        "batch_size": 8,
        "num_threads": 1,
        "sequence_length": 64,
        "model_name": "bert-base-cased",
        "task": "sequence_classification",
        "qps": 780.5,
        "latency": latency,
        "latency_mean": float(np.mean(latency)),
        "latency_p99": float(np.percentile(latency, 99)),
        "metrics": {
            "DCGM_FI_PROF_GR_ENGINE_ACTIVE": [0.5, 0.6, 0.7],
            "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": [1000, 151000, 301000],
            "DCGM_FI_DEV_FB_USED": [2000, 2000, 2000],
        },
        "gpu_model_name": "NVIDIA A30",
        "config": {
            "gpu_static_profile": LABELS,
            "mig": {"enabled": True, "gpu_instance_profiles": ["2g.12gb", "2g.12gb"]},
        },
    }
    return {**values, **changes}


def write(folder, values, name="NVIDIA-A30_bert-base-cased_bs8_seq64_j1.json"):
    path = folder / name
    path.write_text(json.dumps(values))
    return path


def test_an_official_file_becomes_a_record_with_its_raw_latencies(tmp_path):
    values = official()
    result = import_official(write(tmp_path, values))
    (record,) = result.records
    assert (record.device, record.profile, record.slices, record.memory_slices) == (
        "NVIDIA A30",
        "2g.12gb",
        2,
        2,
    )
    assert record.geometry == "2g.12gb,2g.12gb"
    assert record.items_per_second == 780.5
    assert record.latency_ms["mean"] == pytest.approx(values["latency_mean"] * 1e3)
    assert record.latency_ms["p99"] == pytest.approx(values["latency_p99"] * 1e3)
    assert record.energy_joules == 300.0
    assert record.metrics == {"dcgm.gr_active": pytest.approx(0.6), "dcgm.memory_used_mib": 2000.0}
    assert record.workload["sequence_length"] == 64
    assert any("training mode" in warning for warning in record.extra["warnings"])
    assert not record.simulated
    path = result.save(tmp_path / "out")
    assert read(path) == result.records
    assert len(raw_latencies(result.records, tmp_path / "out")) == 200


@pytest.mark.parametrize("change", [{"config": {}}, {"config": {"gpu_static_profile": {}}}, {"config": None}])
def test_missing_labels_are_tolerated_with_a_clear_line(tmp_path, change):
    (record,) = import_official(write(tmp_path, official(**change))).records
    assert (record.profile, record.device) == ("", "NVIDIA A30")
    assert any("labels are missing" in warning for warning in record.extra["warnings"])


def test_labels_are_found_where_older_files_have_them(tmp_path):
    values = official(config={})
    values["metrics"]["labels"] = [LABELS]
    assert import_official(write(tmp_path, values)).records[0].profile == "2g.12gb"


def test_a_training_file_has_its_phases(tmp_path):
    values = official(step_latency=[0.2] * 150, data_process_time=[0.01] * 150, forward_time=[0.07] * 150,
                      backward_time=[0.12] * 150, model_name="resnet50")  # fmt: skip
    del values["latency"], values["sequence_length"]
    (record,) = import_official(write(tmp_path, values)).records
    assert record.workload["mode"] == "train"
    assert record.workload["source"] == "torchvision"
    assert record.extra["phases_ms"]["backward"]["p50"] == pytest.approx(120)


def test_an_open_loop_file_says_that_its_latency_begins_at_the_send(tmp_path):
    (record,) = import_official(write(tmp_path, official(arrival_rate=75, testing_time=30))).records
    assert record.load == {"kind": "poisson", "rate": 75, "seed": 666, "duration": 30, "latency_from": "send"}


def test_a_counter_that_went_back_gives_no_energy(tmp_path):
    values = official()
    values["metrics"]["DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"] = [9000, 20]
    assert import_official(write(tmp_path, values)).records[0].energy_joules is None


def test_without_mig_the_profile_is_the_whole_device(tmp_path):
    labels = {key: value for key, value in LABELS.items() if not key.startswith("GPU_I")}
    (record,) = import_official(write(tmp_path, official(config={"gpu_static_profile": labels}))).records
    assert (record.mode, record.profile, record.slices, record.memory_slices) == ("whole", "whole", 4, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "is no result of the official project"),
        ('{"latency": "fast"}', "latency: expected a list of seconds"),
        ('{"latency": [-1]}', "latency: expected a list of seconds"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=message):
        import_official(tmp_path)


def test_an_empty_folder_says_what_it_lacks(tmp_path):
    with pytest.raises(InputError, match="has no"):
        import_official(tmp_path)


def test_the_papers_studies_are_those_of_its_scripts():
    inference = presets.paper("inference", "a100-80gb")
    assert {cell.geometry for cell in inference} == {"1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"}
    assert {cell.workloads[0].batch for cell in inference} == {1, 2, 4, 8, 16, 32, 64}
    assert {cell.loads[0].concurrency for cell in inference} == {1, 4}
    assert len(inference) == 5 * 2 * 7 * 2
    training = presets.paper("training", "a100-80gb")
    assert {cell.workloads[0].batch for cell in training} == {16, 32, 64, 128, 256, 512}
    assert {cell.workloads[0].mode for cell in training} == {"train"}
    rates = presets.paper("rates", "a30-24gb")
    assert {cell.geometry for cell in rates} == {"4g.24gb*1", "2g.12gb*2", "1g.6gb*4"}
    assert {cell.loads[0] for cell in rates} == {
        Poisson(r, seed=666) for r in (25, 50, 75, 100, 125, 150, 200)
    }
    lengths = presets.paper("sequence", "a100-80gb")
    assert {(c.workloads[0].batch, c.workloads[0].sequence_length) for c in lengths} == {
        (32, 32), (32, 64), (32, 128), (32, 256)
    }  # fmt: skip


@pytest.mark.parametrize(
    "study",
    ["inference", "sequence", "training", "training-sequence", "compute", "sharing", "models", "rates"],
)
@pytest.mark.parametrize("device", ["a100-40gb", "a100-80gb", "h100-80gb"])
def test_every_geometry_of_the_studies_exists(study, device):
    cells = presets.paper(study, device)
    assert cells
    for geometry in {cell.geometry for cell in cells}:
        assert Geometry.parse(geometry, device).valid
    assert len({cell.name(30) for cell in cells}) == len(cells)


def test_an_unknown_study_lists_those_there_are():
    with pytest.raises(InputError, match="expected one of inference, sequence"):
        presets.paper("all", "a100-80gb")
