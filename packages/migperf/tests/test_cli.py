"""The command: what it prints, what it refuses and with which exit code, and what a killed sweep leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer.main
import yaml

from migperf import cli, records, sharing
from shared_core import testing

COMMANDS = [
    *("devices", "profiles", "placements", "geometries", "plan", "apply", "clear", "bench", "sweep", "share"),
    *("compat", "recommend", "report", "import-official", "prove"),
]
JOBS = """
- {name: chat, workload: bert-base-multilingual, rate: 300, slo_ms: 120}
- {name: search, workload: minilm-l12, rate: 200, slo_ms: 250}
- {name: tune, workload: vit_base_patch16, batch: 8}
"""


@pytest.fixture(autouse=True)
def _state(tmp_path, monkeypatch):
    monkeypatch.setenv("MIGPERF_STATE", str(tmp_path / "state"))


def call(capsys, *arguments):
    code = testing.exit_code(cli.app, *arguments)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_commands_are_those_that_are_promised():
    assert sorted(typer.main.get_command(cli.app).commands) == sorted(COMMANDS)


def test_import_help_and_bad_arguments_load_neither_torch_nor_nvml():
    code = (
        "import sys, time; begin = time.process_time(); import migperf; spent = time.process_time() - begin\n"
        "import migperf.cli; from typer.testing import CliRunner as R\n"
        "assert R().invoke(migperf.cli.app, ['--help']).exit_code == 0\n"
        "assert R().invoke(migperf.cli.app, ['sweep', '--nonsense']).exit_code == 2\n"
        "loaded = {'torch', 'pynvml', 'scipy', 'matplotlib', 'torchvision'} & set(sys.modules)\n"
        "print(spent, sorted(loaded))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    spent, _, loaded = ran.stdout.strip().partition(" ")
    assert loaded == "[]"
    assert float(spent) < 0.3  # of processor time: other work on the machine does not count


def test_it_works_where_neither_torch_nor_nvml_is_installed(tmp_path):
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('torch', 'torchvision', 'pynvml'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import migperf\ndevice = migperf.open('sim:a100-40gb', allow_mode_change=True)\n"
        "with migperf.partitioned(device, migperf.Geometry.parse('3g,2g,1g,1g', device)) as instances:\n"
        "    result = migperf.run(migperf.workloads.torchvision('resnet50'), instances, duration=2)\n"
        "print(result.save(sys.argv[1]), len(result.records))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == [str(tmp_path / "records.simulated.jsonl"), "12"]


def test_the_19_are_printed_and_counted(capsys):
    code, out, _ = call(capsys, "geometries", "--device", "sim:a100-40gb", "--maximal")
    assert code == 0
    assert len(out.split()) == 19
    assert "3g.20gb@4,2g.10gb@0,1g.5gb@2,1g.5gb@3" in out.split()
    assert call(capsys, "geometries", "--all", "--count")[1].strip() == "2319"
    assert call(capsys, "geometries", "--maximal", "--legacy-driver", "--count")[1].strip() == "18"
    assert call(capsys, "geometries", "--device", "a30-24gb", "--multisets", "--count")[1].strip() == "10"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", "4g.20gb,4g.20gb"], 4, "at most 1 can exist"),
        (["plan", "1g.10gb*4,1g.5gb*3"], 4, "is left"),
        (["plan", "3g*2,1g"], 4, "is left"),
        (["plan", "8g.40gb"], 4, "did you mean"),
        (["plan", "1g+me*2"], 4, "at most 1"),
        (["plan", "3g@1"], 4, "it starts at 0, 4"),
        (["profiles", "--device", "sim:a999"], 3, "no table for"),
        (["profiles", "--device", "toaster"], 3, "no device"),
        (["apply", "1g", "--device", "cpu"], 3, "end with the process"),
        (["apply", "1c*99", "--device", "sim:a100-40gb"], 3, "end with the process"),
        (["clear", "--device", "sim:a100-40gb"], 3, "end with the process"),
        (["geometries", "--all", "--profile", "1g"], 2, "not both"),
        (["sweep", "--out", "x"], 2, "--study"),
        (["sweep", "--out", "x", "--study", "nothing"], 2, "expected one of inference"),
        (["sweep", "--out", "x", "--geometry", "1c", "--workload", "spin:1ms", "--rate", "0"], 2, "rate"),
        (["sweep", "--out", "x", "--geometry", "1c", "--workload", "resnet18"], 2, "torchvision/NAME"),
        (["sweep", "--out", "x", "--geometry", "1c", "--workload", "spin:1ms", "--set=a"], 2, "field=value"),
        (["sweep", "--out", "x", "--geometry", "99c", "--workload", "spin:1ms"], 4, "no profile"),
        (["share", "spin:1ms", "--workers", "1"], 2, "at least 2"),
        (["compat", "--device", "sim:a100-40gb"], 3, "only as a table"),
        (["report", "nowhere"], 2, "cannot be read"),
        (["import-official", "nowhere.json", "--out", "x"], 2, "cannot be read"),
        (["bench", "nowhere.yaml", "--out", "x"], 2, "nowhere.yaml"),
        (["prove", "--seeds", "0"], 2, "not in the range"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_its_exit_code(
    capsys, tmp_path, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    found, _, err = call(capsys, *arguments)
    assert found == code
    assert message in err
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert not list(tmp_path.glob("x/records*"))


def test_a_plan_is_printed_for_people_and_for_other_tools(capsys):
    assert call(capsys, "plan", "3g,2g,1g*2")[1].splitlines()[0] == "3g.20gb@4,2g.10gb@0,1g.5gb@2,1g.5gb@3"
    smi = call(capsys, "plan", "3g,2g", "--format", "nvidia-smi")[1]
    assert smi.splitlines() == ["nvidia-smi mig -i 0 -cgi 9:4 -C", "nvidia-smi mig -i 0 -cgi 14:0 -C"]
    parted = yaml.safe_load(call(capsys, "plan", "3g,1g*2", "--format", "mig-parted")[1])
    assert parted["mig-configs"]["migperf"][0]["mig-devices"] == {"3g.20gb": 1, "1g.5gb": 2}


def test_kubernetes_gets_the_label_and_the_resource_that_the_device_plugin_has(capsys):
    code, out, _ = call(capsys, "plan", "3g,2g,1g*2", "--format", "k8s", "--name", "mix-1")
    config, *pods = yaml.safe_load_all(out)
    assert code == 0
    assert "kubectl label node NODE nvidia.com/mig.config=mix-1" in out
    assert yaml.safe_load(config["data"]["config.yaml"])["mig-configs"]["mix-1"][0]["mig-enabled"]
    limits = [pod["spec"]["containers"][0]["resources"]["limits"] for pod in pods]
    assert limits == [
        {"nvidia.com/mig-3g.20gb": 1},
        {"nvidia.com/mig-2g.10gb": 1},
        {"nvidia.com/mig-1g.5gb": 1},
    ]
    code, out, err = call(capsys, "plan", "3g,1g", "--format", "k8s", "--strategy", "single")
    assert code == 4
    assert "use mixed" in err
    assert "nvidia.com/gpu: 7" in call(capsys, "plan", "1g*7", "--format", "k8s", "--strategy", "single")[1]


def test_apply_keeps_what_fits_and_clear_removes_all(capsys, tmp_path):
    device = f"sim:a100-40gb@{tmp_path}/gpu.json"
    arguments = ("--device", device)
    assert call(capsys, "apply", "3g@4,1g@0", *arguments)[0] == 0
    before = call(capsys, "apply", "3g,2g", *arguments, "--dry-run")[1]
    assert "destroy 1g.5gb@0" in before or "create 2g.10gb@2" in before
    _, out, _ = call(capsys, "apply", "3g,2g", *arguments)
    assert "destroy 3g" not in out
    assert out.count("MIG-") >= 2
    assert "MIG mode" not in call(capsys, "placements", "--device", device, "--profile", "3g")[1]
    assert call(capsys, "clear", "--device", device)[0] == 0
    assert "nothing to do" in call(capsys, "clear", "--device", device)[1]
    assert "nothing to restore" in call(capsys, "clear", "--device", device, "--restore")[1]


def test_a_killed_sweep_leaves_a_journal_that_restores_and_its_finished_cells(capsys, tmp_path):
    device = f"sim:a100-40gb@{tmp_path}/gpu.json"
    assert call(capsys, "apply", "4g@0", "--device", device, "--allow-mode-change")[0] == 0
    # simulated windows are over at once: a custom cut of the clock makes the third one last
    code = f"""
import time, migperf, migperf.simulating as s
real, seen = s.simulate, []
def slow(cell, model):
    seen.append(cell)
    if len(seen) == 3:
        print("third", flush=True); time.sleep(60)
    real(cell, model)
s.simulate = slow
device = migperf.open({device!r})
work = migperf.workloads.torchvision("resnet50")
migperf.sweep(device, [migperf.Cell(g, (work,)) for g in ("1g*7", "2g*3", "3g*2")], {str(tmp_path / "out")!r},
              duration=2, repeats=1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "third\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(records.finished(records.read(tmp_path / "out"))) == 2
    code, out, err = call(capsys, "apply", "7g", "--device", device)
    assert (code, out) == (3, "")  # no steps are printed that were not taken
    assert "restore it first" in err
    assert "would be undone" in call(capsys, "clear", "--restore", "--dry-run", "--device", device)[1]
    code, out, _ = call(capsys, "clear", "--restore", "--device", device)
    assert code == 0
    assert out.startswith("restored 4g.20gb@0")
    assert "no room" not in out
    sweep = ("sweep", "--device", device, "--out", tmp_path / "out", "--workload", "torchvision/resnet50")
    sizes = ("--geometry", "1g*7", "--geometry", "2g*3", "--geometry", "3g*2")
    assert call(capsys, *sweep, *sizes, "--duration", 2, "--repeats", 1)[0] == 0
    assert len(records.finished(records.read(tmp_path / "out"))) == 3


def test_a_recommendation_is_printed_in_all_forms(capsys, tmp_path):
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(JOBS)
    ask = ("recommend", jobs, "--device", "sim:a100-40gb", "--table", "official-a100")
    code, out, _ = call(capsys, *ask)
    assert code == 0
    assert "chat" in out
    assert "estimated" in out
    assert "second:" in out
    found = json.loads(call(capsys, *ask, "--format", "json")[1])
    assert found["feasible"]
    assert {one["job"] for one in found["placed"]} == {"chat", "search", "tune"}
    assert "mig-devices" in call(capsys, *ask, "--format", "mig-parted")[1]
    assert "nvidia.com/mig-" in call(capsys, *ask, "--format", "k8s")[1]
    cost = json.loads(call(capsys, *ask, "--format", "json", "--objective", "cost")[1])
    assert cost["levels"][2].startswith("memory slices used")


def test_a_mix_that_nothing_carries_says_so_with_exit_code_4(capsys, tmp_path):
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text("- {name: chat, workload: minilm-l12, rate: 1000000, slo_ms: 100}\n")
    code, out, err = call(capsys, "recommend", jobs, "--device", "sim:a100-40gb", "--table", "official-a100")
    assert code == 4
    assert "NOT MET chat" in out
    assert "no geometry" in err


def test_several_devices_share_one_mix(capsys, tmp_path):
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(JOBS.replace("rate: 300", "rate: 5000"))
    two = ("--device", "sim:a100-40gb", "--device", "sim:a100-40gb")
    code, out, _ = call(capsys, "recommend", jobs, *two, "--table", "official-a100")
    assert code == 0
    assert "sim:a100-40gb#0" in out
    assert "proven best" in out
    found = json.loads(
        call(capsys, "recommend", jobs, *two, "--table", "official-a100", "--format", "json")[1]
    )
    assert {share["gpu"] for share in found["shares"] if share["job"] == "chat"} == set(found["geometries"])
    code, _, err = call(capsys, "recommend", jobs, *two, "--table", "official-a100", "--confirm")
    assert code == 2
    assert "without --confirm" in err


def test_a_simulated_sweep_is_recommended_confirmed_and_reported_and_marked_everywhere(capsys, tmp_path):
    out = tmp_path / "out"
    sweep = ("sweep", "--device", "sim:a100-40gb", "--out", out, "--duration", 3, "--repeats", 2)
    sizes = [x for g in ("1g", "2g", "3g", "7g") for x in ("--geometry", g)]
    bert = ("--workload", "transformers/bert", "--batch", 1, "--batch", 8)
    assert call(capsys, *sweep, *sizes, *bert)[0] == 0
    train = ("--workload", "timm/vit_base_patch16_224", "--mode", "train", "--batch", 8)
    code, text, _ = call(capsys, *sweep, *sizes, *train)
    assert code == 0
    assert "SIMULATED" in text
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text("- {name: chat, workload: bert, rate: 100, slo_ms: 100}\n"
                    "- {name: tune, workload: vit_base_patch16_224, batch: 8}\n")  # fmt: skip
    ask = ("recommend", jobs, "--device", "sim:a100-40gb", "--table", out)
    code, text, _ = call(capsys, *ask, "--confirm", "--duration", 10, "--repeats", 2, "--out", tmp_path / "c")
    assert code == 0
    assert "SIMULATED" in text
    assert "all jobs together:" in text
    assert "objective kept" in text
    assert (tmp_path / "c" / "records.simulated.jsonl").exists()
    page, table, prom = (tmp_path / name for name in ("r.html", "r.csv", "r.prom"))
    code, text, _ = call(capsys, "report", out, "--out", page, "--csv", table, "--prometheus", prom)
    assert code == 0
    made = sorted(path.name for path in tmp_path.glob("r.*"))
    assert made == ["r.simulated.csv", "r.simulated.html", "r.simulated.prom"]
    assert "(SIMULATED)" in (tmp_path / made[1]).read_text()
    assert 'simulated="true"' in (tmp_path / made[2]).read_text()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != jobs]
    assert len(written) > 20
    for path in written:
        assert "simulated" in path.name
        if path.suffix != ".npy":
            assert "simulated" in path.read_text().lower()
            assert '"simulated": false' not in path.read_text()


def test_real_and_simulated_records_share_a_page_only_when_asked(capsys, tmp_path):
    from made_records import record

    folder = tmp_path / "both"
    for simulated in (False, True):
        records.Writer(folder, simulated).append([record(simulated=simulated, cell=str(simulated))])
    code, _, err = call(capsys, "report", folder, "--out", tmp_path / "r.html")
    assert code == 2
    assert "not mixed unless asked for" in err
    assert call(capsys, "report", folder, "--out", tmp_path / "r.html", "--mixed")[0] == 0
    assert (tmp_path / "r.simulated.html").exists()


def test_cells_that_tell_nothing_end_with_exit_code_5(capsys, tmp_path):
    sweep = ("sweep", "--out", tmp_path, "--geometry", "1c", "--workload", "sleep:30ms", "--repeats", 1)
    code, out, err = call(capsys, *sweep, "--duration", 0.02)  # shorter than a step
    assert code == 5
    assert "insufficient" in out
    assert "tell nothing" in err


def test_the_ways_to_share_a_cpu_are_compared(capsys, tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    code, out, _ = call(capsys, "share", "sleep:5ms", "--duration", 0.2, "--repeats", 1, "--out", tmp_path)
    assert code in (0, 5)  # 5: the machine that runs the tests is busy
    for way in ("1c*2" if "1c*2" in out else "1c@0,1c@1", "unpinned x2", "unpinned-matched x2"):
        assert way in out
    rates = {}
    for record in records.read(tmp_path):
        rates.setdefault(record.mode, []).append(record.items_per_second)
    workers = {mode: len(some) for mode, some in rates.items()}
    assert workers == {"whole": 1, "partition": 2, "unpinned": 2, "unpinned-matched": 2}
    # sleepers do not disturb one another: two of them do twice the work
    assert sharing.gain(rates["partition"], rates["whole"][0]) == pytest.approx(2, rel=0.25)


def test_probes_answer_from_the_command(capsys):
    code, out, _ = call(capsys, "compat", "--framework", "mxnet")
    assert code == 0
    assert "not installed" in out


def test_official_files_are_imported(capsys, tmp_path):
    file = tmp_path / "A100_resnet50_bs8.json"
    file.write_text(
        json.dumps({"model_name": "resnet50", "batch_size": 8, "latency": [0.01] * 150, "qps": 90})
    )
    code, out, _ = call(capsys, "import-official", file, "--out", tmp_path / "out")
    assert code == 0
    assert "labels are missing" in out
    assert records.read(tmp_path / "out")[0].samples == 150


def test_devices_say_what_is_here_and_what_is_simulated(capsys):
    out = call(capsys, "devices")[1]
    assert "cpu" in out
    assert "last-level cache" in out
    assert "sim:a100-40gb" in out
    assert "21" in call(capsys, "profiles", "--device", "a30-24gb")[1]
    assert "0, 2" in call(capsys, "placements", "--device", "sim:a30-24gb")[1]


def test_ctrl_c_in_a_sweep_keeps_finished_cells_and_ends_with_130(tmp_path):
    environment = {**os.environ, "MIGPERF_STATE": str(tmp_path / "state")}
    sweep = ["sweep", "--out", str(tmp_path / "out"), "--geometry", "1c", "--workload", "sleep:2ms"]
    often = ["--duration", "0.05", "--repeats", "500"]
    # A shell that runs the tests in the background has them ignore Ctrl-C.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from migperf.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *sweep, *often],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    path, limit = Path(tmp_path, "out", "records.jsonl"), time.monotonic() + 120
    while not (path.exists() and path.stat().st_size) and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.strip().endswith("error: interrupted")
    assert records.read(path)
