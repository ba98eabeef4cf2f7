"""The promises of the repository's own files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import api, workspace
from tools.constraints import pins

ROOT = workspace.ROOT


def readme_table() -> dict[str, list[str]]:
    rows = re.findall(r"^\| \[([\w-]+)\]\(packages/\1\) \|(.+)\|$", (ROOT / "README.md").read_text(), re.M)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}


def test_the_readme_lists_all_packages_with_paper_and_command() -> None:
    table = readme_table()
    assert {name: row[2] for name, row in table.items()} == {
        member.name: f"`{member.command}`" for member in workspace.packages()
    }
    assert all("arXiv" in row[1] for row in table.values())


def test_nothing_else_names_a_package() -> None:
    """A package exists by its folder: another list would be a second place to edit."""
    listed = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in readme_table()))
    files = [
        "Makefile",
        "pyproject.toml",
        ".github/workflows/ci.yml",
        ".ci/run",
        "ci/test-package.sh",
        "ci/readme.sh",
    ]
    for file in [*files, *(str(path.relative_to(ROOT)) for path in (ROOT / "tools").glob("*.*"))]:
        assert listed.findall(re.sub("#.*", "", (ROOT / file).read_text())) == [], file


def test_pins_are_exact_and_without_hash_suffix_or_address() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; .+)?", line), line
    assert len({line.partition("==")[0] for line in lines}) == len(lines)


def test_embedded_wheels_are_pinned_by_hash() -> None:
    lines = [line for line in (ROOT / "embedded.txt").read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]* --hash=sha256:[0-9a-f]{64}", line), line


def test_constraints_leave_out_members_suffixes_and_cuda() -> None:
    installed = [
        ("Torch", "2.9.0+cpu"),
        ("nvidia_cublas", "13"),
        ("triton", "3"),
        ("csq.quant", "0.1"),
        ("b_c", "1"),
    ]
    assert pins(installed, ["csq-quant"]) == ["b-c==1", "torch==2.9.0"]


@pytest.mark.parametrize("target", ["setup", "prove", "test", "lint", "bench", "dist", "docs", "clean"])
def test_make_help_names_every_target(target: str) -> None:
    text = subprocess.run(
        ["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(rf"^make {target}\b", text, re.M)


def test_an_old_python_gets_one_clear_line(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\ncase "$2" in *exit*) exit 1 ;; *) echo 3.9 ;; esac\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["sh", str(ROOT / "tools" / "setup.sh"), str(old), str(tmp_path / "venv")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"error: Python 3.11 or newer is needed, {old} is 3.9; name another: make setup PYTHON=python3.11\n"
    )


@pytest.mark.parametrize(
    "script",
    [
        "tools/setup.sh",
        "tools/dist.sh",
        "tools/docs.sh",
        "tools/uv-env.sh",
        "ci/test-package.sh",
        "ci/readme.sh",
    ],
)
def test_shell_scripts_parse(script: str) -> None:
    done = subprocess.run(["sh", "-n", str(ROOT / script)], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize("member", workspace.packages(), ids=lambda member: member.name)
def test_a_package_is_imported_in_less_than_3_seconds_of_work(member: workspace.Member) -> None:
    """Processor time, which other work on the machine does not lengthen much; the best of two."""
    code = (
        f"import time; a = time.process_time(); import {member.import_name}; print(time.process_time() - a)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    ]
    assert min(times) < 3


def test_readmes_list_all_public_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert api.main(["--check"]) == 0, f"run python -m tools.api: {capsys.readouterr().out}"
