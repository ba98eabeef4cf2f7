import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import workspace


def run_ci(folder: Path, make: str) -> subprocess.CompletedProcess[str]:
    """Runs .ci/run in a folder where make is the given script and ci/ only says its name."""
    for part in (".ci", "ci", "bin"):
        (folder / part).mkdir()
    shutil.copy(workspace.ROOT / ".ci" / "run", folder / ".ci" / "run")
    for script in ("readme", "matrix"):
        (folder / "ci" / f"{script}.sh").write_text(f"echo {script} ran\n")
    fake = folder / "bin" / "make"
    fake.write_text(f"#!/bin/sh\necho make $1\n{make}\n")
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(folder / ".ci" / "run")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def proofs_end_with(code: int) -> str:
    return (
        '[ "$1" = prove ] || exit 0; mkdir -p runs\n'
        f"echo '{{\"exit_code\": {code}}}' >runs/summary.json; [ {code} = 0 ] || exit 2"
    )


def test_ci_runs_every_step_in_order(tmp_path: Path) -> None:
    done = run_ci(tmp_path, proofs_end_with(0))
    steps = [line for line in done.stdout.splitlines() if line.startswith(("make", "readme", "matrix"))]
    assert steps == [
        "make lint", "make test", "make prove", "make dist", "readme ran", "matrix ran", "make docs",
    ]  # fmt: skip
    assert done.returncode == 0
    assert "DOES NOT HOLD" not in done.stdout


def test_ci_says_loudly_that_a_claim_does_not_hold_and_goes_on(tmp_path: Path) -> None:
    done = run_ci(tmp_path, proofs_end_with(1))
    assert "A CLAIM DOES NOT HOLD" in done.stdout
    assert "readme ran" in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize("code", [2, 70])
def test_ci_fails_on_a_crashed_proof(tmp_path: Path, code: int) -> None:
    assert run_ci(tmp_path, proofs_end_with(code)).returncode == code


@pytest.mark.parametrize("step", ["lint", "test", "dist", "docs"])
def test_ci_fails_with_a_failing_step(tmp_path: Path, step: str) -> None:
    assert run_ci(tmp_path, f'[ "$1" != {step} ] || exit 2').returncode == 2


def test_ci_fails_where_the_proofs_never_started_whatever_an_earlier_run_left(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "summary.json").write_text('{"exit_code": 1}')
    assert run_ci(tmp_path, '[ "$1" != prove ] || exit 2').returncode == 2
