"""The README's Python and commands run where they are pasted."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

from test_data import write_beir
from tiny_models import QUERIES, dual_encoder, save_bert

from lead_kd import cli
from lead_kd.objectives import NAMES
from shared_core import testing

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def a_users_folder(tmp_path, monkeypatch):
    """A teacher of four layers, and data of eight queries."""
    dual_encoder(save_bert(tmp_path / "bert", layers=4), "mean", normalize=True).save(
        str(tmp_path / "my-teacher")
    )
    folder = write_beir(tmp_path / "my-data")
    rows = [{"_id": f"d{n}", "title": "", "text": f"the old moon shines {n}"} for n in range(60)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"_id": f"q{n}", "text": QUERIES[n % 4]} for n in range(40)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    judged = "query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t1\n" for n in range(40))
    for split in ("train", "test", "dev"):
        (folder / "qrels" / f"{split}.tsv").write_text(judged)
    monkeypatch.chdir(tmp_path)


def test_the_python_runs_as_one_session(tmp_path, monkeypatch):
    a_users_folder(tmp_path, monkeypatch)
    session = None
    for block in testing.fenced_blocks(TEXT, "python"):
        session = testing.run_block(block, session)
    assert (tmp_path / "my-student" / "modules.json").is_file()


def test_the_commands_run_where_they_are_pasted(tmp_path, monkeypatch, capsys):
    a_users_folder(tmp_path, monkeypatch)
    (block,) = [one for one in testing.fenced_blocks(TEXT, "sh") if one.startswith("lead-kd mine")]
    for command in block.strip().splitlines():
        arguments = shlex.split(command)[1:]
        arguments += [] if arguments[0] == "evaluate" else ["--device", "cpu"]
        assert testing.exit_code(cli.app, *arguments) == 0, capsys.readouterr().err
    assert set(json.loads(Path("measures.json").read_text())["runs"]["student.run"]["mean"]) == {
        "RR@10", "nDCG@10", "R@100", "AP@1000",
    }  # fmt: skip
    shutil.rmtree("run")


def test_the_commands_have_these_options():
    named = testing.check_command_lines(cli.app, re.findall(r"^lead-kd \w+ .*$", TEXT, re.M))
    assert named == {"mine", "train", "encode", "search", "evaluate"}


def test_the_objectives_named_are_those_there_are():
    (sentence,) = re.findall(r"^`--objective`: (.*?)\.\nThose", TEXT, re.DOTALL | re.MULTILINE)
    names = re.sub(r"\(.*?\)", "", sentence, flags=re.DOTALL).split(",")
    assert {name.strip() for name in names} == set(NAMES)
