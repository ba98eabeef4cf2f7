"""Every Python example of README.md and of docstrings runs; its commands and their options exist."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import typer.main

import migperf
from migperf import cli
from shared_core import testing

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = testing.fenced_blocks(TEXT, "python")
COMMANDS = typer.main.get_command(cli.app).commands


def test_there_is_an_example_for_each_door():
    text = "".join(BLOCKS)
    for name in ("mp.partitioned(", "mp.run(", "mp.report(", "mp.sweep(", "mp.recommend(", "mp.confirm_run(",
                 "mp.recommend_fleet(", "mp.exports.kubernetes("):  # fmt: skip
        assert name in text


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    testing.run_block(BLOCKS[number])
    if number == 0:
        assert capsys.readouterr().out.startswith("3g.20gb@4,2g.10gb@0,1g.5gb@2,1g.5gb@3\n")
        assert (tmp_path / "report.simulated.html").exists()


def test_commands_and_options_exist():
    said = re.findall(r"`migperf ([a-z-]+)([^`]*)`|^(?:\$ )?migperf ([a-z-]+)(.*)$", TEXT, re.MULTILINE)
    named = {one[0] or one[2] for one in said} | {"profiles", "placements", "geometries"}
    assert named == set(COMMANDS)
    for command, options, other, more in said:
        known = {option for parameter in COMMANDS[command or other].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", options + more)) <= known, (command or other, options)


def test_jobs_of_the_readme_are_jobs(tmp_path):
    (tmp_path / "jobs.yaml").write_text(testing.fenced_blocks(TEXT, "yaml")[0])
    assert [job.name for job in migperf.read_jobs(tmp_path / "jobs.yaml")] == ["chat", "search", "tune"]


def test_public_names_exist_and_have_a_docstring():
    testing.check_public_names("migperf")
    for name in migperf.__all__:
        assert getattr(migperf, name).__doc__, name


@pytest.mark.parametrize(
    "name",
    sorted(
        m.name for m in pkgutil.iter_modules(migperf.__path__) if m.name not in ("worker", "models", "inputs")
    ),
)
def test_examples_of_docstrings(name):
    assert doctest.testmod(importlib.import_module(f"migperf.{name}")).failed == 0
