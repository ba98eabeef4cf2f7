import json
import re

import pytest

from migperf.jobs import InferenceJob, TrainingJob, read_jobs
from shared_core import InputError


def test_a_yaml_list_and_its_json_twin_read_the_same(tmp_path):
    entries = [
        {
            "name": "search",
            "workload": "bert",
            "rate": 200,
            "slo_ms": 50,
            "percentile": 95,
            "batches": [1, 8],
        },
        {"name": "chat", "workload": "llm", "rate": 2.5, "slo_ms": 900, "mode": "generate"},
        {"name": "tune", "workload": "vit", "batch": 32, "weight": 2, "min_memory_mib": 9000},
    ]
    as_json = tmp_path / "jobs.json"
    as_json.write_text(json.dumps(entries))
    as_yaml = tmp_path / "jobs.yaml"
    as_yaml.write_text(
        "jobs:\n"
        "- {name: search, workload: bert, rate: 200, slo_ms: 50, percentile: 95, batches: [1, 8]}\n"
        "- {name: chat, workload: llm, rate: 2.5, slo_ms: 900, mode: generate}\n"
        "- {name: tune, workload: vit, batch: 32, weight: 2, min_memory_mib: 9000}\n"
    )
    assert read_jobs(as_yaml) == (
        InferenceJob("search", "bert", 200, 50, percentile=95, batches=(1, 8)),
        InferenceJob("chat", "llm", 2.5, 900, mode="generate"),
        TrainingJob("tune", "vit", 32, weight=2, min_memory_mib=9000),
    )
    assert read_jobs(as_json) == read_jobs(as_yaml)


GOOD = "- {name: a, workload: w, rate: 1, slo_ms: 9}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "- {name: b, workload: w, rate: 0, slo_ms: 9}",
            "jobs[1].rate: expected a finite number above 0 (got 0",
        ),
        ("- {name: b, workload: w, rate: -3, slo_ms: 9}", "jobs[1].rate: expected a finite number above 0"),
        ("- {name: b, workload: w, rate: .nan, slo_ms: 9}", "jobs[1].rate: expected a finite number above 0"),
        (
            "- {name: b, workload: w, rate: 1, slo_ms: .inf}",
            "jobs[1].slo_ms: expected a finite number above 0",
        ),
        ("- {name: b, workload: w, rate: fast, slo_ms: 9}", "jobs[1].rate: expected a number (got 'fast')"),
        ("- {name: b, workload: w, rate: true, slo_ms: 9}", "jobs[1].rate: expected a number (got True)"),
        ("- {name: b, workload: w, rate: 1}", "jobs[1].slo_ms: is missing"),
        ("- {name: b, workload: w}", "jobs[1]: expected either rate and slo_ms (inference) or batch"),
        ("- {name: b, workload: w, rate: 1, slo_ms: 9, batch: 2}", "jobs[1]: expected either rate"),
        ("- {name: b, workload: w, batch: 2.5}", "jobs[1].batch: expected a whole number (got 2.5)"),
        (
            "- {name: b, workload: w, batch: 2, wieght: 3}",
            "jobs[1].wieght: unknown key, known: name, workload",
        ),
        (
            "- {name: b, workload: w, rate: 1, slo_ms: 9, percentile: 42}",
            "jobs[1].percentile: expected one of",
        ),
        (
            "- {name: b, workload: w, rate: 1, slo_ms: 9, batches: [0]}",
            "jobs[1].batches: expected batches of",
        ),
        ("- {name: a, workload: w, batch: 2}", "jobs[1].name: two jobs have this name (got 'a')"),
        ("- just text", "jobs[1]: expected keys and values"),
        ("- {name: b", "is neither YAML nor JSON in line"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_field(tmp_path, text, message):
    path = tmp_path / "jobs.yaml"
    path.write_text(GOOD + text + "\n")
    with pytest.raises(InputError, match=re.escape(f"{path}: {message}")):
        read_jobs(path)


def test_an_empty_or_missing_file_is_refused(tmp_path):
    empty = tmp_path / "jobs.yaml"
    empty.write_text("")
    with pytest.raises(InputError, match="expected a list with at least one job"):
        read_jobs(empty)
    with pytest.raises(InputError, match="cannot be read"):
        read_jobs(tmp_path / "none.yaml")
