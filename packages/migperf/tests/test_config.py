import re
from pathlib import Path

import pytest

from migperf import config
from shared_core import InputError

GOOD = """\
gpus:
  - id: 0
    mig: true
    devices:
      - {gi_profile: 3g.20gb, start: 4, job: train}
      - {gi_profile: 1g.5gb, count: 2, job: serve}
  - device: cuda:1
    mps: true
    devices: [{job: serve}, {job: serve}]
job_configs:
  train: {workload: torchvision/resnet50, mode: train, batch: 32}
  serve:
    workload: timm/vit_small_patch16_224
    load: {kind: poisson, rate: 50, seed: 666}
    options: {image_size: 64}
duration: 2.5
"""


def read(tmp_path: Path, text: str) -> config.BenchConfig:
    path = tmp_path / "bench.yaml"
    path.write_text(text)
    return config.read(path)


def test_a_configuration_says_what_runs_where(tmp_path):
    found = read(tmp_path, GOOD)
    first, second = found.devices
    assert (first.spec, first.mode, first.geometry) == ("nvml:0", "partition", "3g.20gb@4,1g.5gb,1g.5gb")
    assert [job for _, job in first.parts] == ["train", "serve", "serve"]
    assert (second.spec, second.mode, len(second.parts)) == ("cuda:1", "mps", 2)
    assert found.jobs["train"].batch == 32
    assert found.jobs["serve"].load == {"kind": "poisson", "rate": 50, "seed": 666}
    assert (found.duration, found.repeats) == (2.5, 3)


def test_without_mig_the_whole_gpu_is_shared_by_time(tmp_path):
    text = GOOD.replace("mig: true", "mig: false")
    assert (read(tmp_path, text).devices[0].spec, read(tmp_path, text).devices[0].mode) == (
        "cuda:0",
        "timeslice",
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    mig: true", "    mgi: true", "line 3: unknown key; did you mean mig?"),
        ("job: train}", "job: trian}", "line 5: trian is not in job_configs, which has train, serve"),
        ("count: 2", "count: 0", "line 6: expected a whole number of at least 1, got 0"),
        ("count: 2", "count: true", "line 6: expected a whole number of at least 1, got True"),
        ("start: 4", "start: 4, count: 2", "line 5: a start is for one instance"),
        ("gi_profile: 3g.20gb, ", "", "line 5: gi_profile is missing"),
        ("mode: train", "mode: learn", "line 11: expected one of infer, train, generate, got 'learn'"),
        ("    workload: timm/vit_small_patch16_224\n", "", "line 13: workload is missing"),
        ("duration: 2.5", "duration: -1", "line 16: expected seconds above 0, got -1"),
        ("duration: 2.5", "duration: .inf", "line 16: expected seconds above 0, got inf"),
        ("  - id: 0", "  - id: 0\n    device: cpu", "line 2: expected either id"),
        ("mig: true", "mig: true\n    mps: true", "line 4: MIG and MPS together"),
        ("duration: 2.5", "gpus: []", "line 16: stands there twice"),
        ("gpus:", "gpu:", "line 1: unknown key; did you mean gpus?"),
        ("{job: serve}]", "{job: serve]", "line 9"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(InputError, match=rf"bench\.yaml: .*{re.escape(message)}"):
        read(tmp_path, GOOD.replace(old, new))


def test_jobs_may_share_settings_by_yamls_merge(tmp_path):
    text = GOOD.replace("  train: {", "  train: &train {").replace(
        "  serve:\n", "  serve:\n    <<: *train\n    mode: infer\n"
    )
    serve = read(tmp_path, text).jobs["serve"]
    assert (serve.workload, serve.mode, serve.batch) == ("timm/vit_small_patch16_224", "infer", 32)


@pytest.mark.parametrize(
    ("text", "message"), [("", "the file: line 1: expected keys"), ("- 1", "expected keys")]
)
def test_a_file_without_keys_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, text)
