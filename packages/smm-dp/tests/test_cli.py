"""The command, run as a user runs it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest


def smm_dp(*arguments, code=0):
    script = "from smm_dp.cli import main; main()"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_account_gives_the_official_value_with_its_assumptions():
    out = smm_dp(
        "account",
        "--mu",
        1428,
        "--clip",
        4096,
        "--coordinate-bound",
        4,
        "--delta",
        "1e-5",
        "--rate",
        0.004,
        "--rounds",
        1000,
    )
    assert out.startswith("epsilon 2.998798 at delta 1e-05, proved by order 5")
    assert "vector being zero" in out


def test_calibrate_prints_a_consistent_set():
    out = smm_dp(
        "calibrate", "--epsilon", 8, "--delta", "1e-5", "--dim", 65536, "--participants", 100, "--scale", 64
    )
    assert "coordinate bound     5" in out or "coordinate bound     4" in out
    assert "left after clipping  31.3%" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["account", "--mu", "3", "--clip", "4096", "--coordinate-bound", "4", "--delta", "1e-5"],
            "order 2 needs mu >= 123.6",
        ),
        (
            [
                "calibrate",
                "--epsilon",
                "-1",
                "--delta",
                "1e-5",
                "--dim",
                "9",
                "--participants",
                "5",
                "--scale",
                "4",
            ],
            "epsilon",
        ),
        (
            ["aggregate", "nowhere.npy", "--epsilon", "1", "--delta", "1e-5", "--scale", "9", "--out", "x"],
            "nowhere.npy",
        ),
        (["simulate", "--out", "x", "--epsilon", "1", "--method", "magic"], "expected smm-dp"),
        (["prove", "--seeds", "0"], "not in the range"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, text, tmp_path):
    arguments = [str(tmp_path / a) if a in ("x", "nowhere.npy") else a for a in arguments]
    line = smm_dp(*arguments, code=2)
    assert line.startswith("error: ")
    assert text in line
    assert line.count("\n") == 1


def test_aggregate_releases_once_and_then_stops(tmp_path):
    np.save(tmp_path / "v.npy", np.full((6, 9), 0.1))
    arguments = [
        "aggregate",
        tmp_path / "v.npy",
        "--epsilon",
        5,
        "--delta",
        "1e-5",
        "--scale",
        32,
        "--out",
        tmp_path / "o",
        "--accounting",
        "numeric",
        "--ledger",
        tmp_path / "ledger.json",
    ]
    assert "privacy.html" in smm_dp(*arguments)
    report = json.loads((tmp_path / "o" / "privacy.json").read_text())
    assert report["epsilon"] == pytest.approx(5, abs=1e-4)
    assert "not peer-reviewed" in report["accounting"]
    assert report["sampler"]["total_variation"] == 0
    assert "stopped before release 2" in smm_dp(*arguments, code=2)


def test_help_does_not_import_heavy_libraries():
    script = (
        "import sys\nsys.argv = ['smm-dp', '--help']\nfrom smm_dp.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'flwr', 'opacus', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.rstrip().endswith("[]")
