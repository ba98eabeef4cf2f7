"""The command works on a user's own model folder and text file, and says in one line what is wrong."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny_encoders
from tiny_encoders import SENTENCES

from isocse import cli
from shared_core import testing

run = partial(testing.exit_code, cli.app)
CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models, a corpus, pairs and human similarities."""
    folder = tmp_path_factory.mktemp("user")
    tiny_encoders.save_bert(folder / "before", 0)
    tiny_encoders.save_bert(folder / "after", 1)
    broken, tokenizer = tiny_encoders.bert()
    broken.encoder.layer[0].output.dense.weight.data[0, 0] = float("nan")
    for part in (broken, tokenizer):
        part.save_pretrained(folder / "broken")
    (folder / "empty.txt").write_text("\n")
    (folder / "corpus.txt").write_text("\n".join(SENTENCES) + "\n")
    rows = "".join(f'"{a}","{b}"\n' for a, b in zip(SENTENCES[:20], SENTENCES[20:40], strict=True))
    (folder / "pairs.csv").write_text("anchor,positive\n" + rows)
    return folder


def test_help_and_wrong_arguments_answer_without_torch(tmp_path: Path):
    code = """
import sys
from shared_core import command
from isocse import cli
for arguments in (
    ["--help"], ["measure", "--help"], ["compare", "--help"], ["train", "--help"], ["sweep", "--help"],
    ["measure", "x", "--data", "nowhere.txt", "--out", "y"],
    ["measure", "x", "--data", "here.txt", "--out", "y", "--pooling", "median"],
    ["compare", "x", "y", "--out", "z"],
    ["train", "--base", "x", "--pairs", "here.txt", "--data", "here.txt", "--out", "y", "--temperature", "0"],
    ["prove", "--seeds", "1"],
):
    try:
        command.run(cli.app, arguments)
    except SystemExit as ended:
        print("exit", ended.code)
print("torch" in sys.modules)
"""
    (tmp_path / "here.txt").write_text("a\n")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit")]
    assert codes == ["exit 0"] * 5 + ["exit 2"] * 5, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert "Traceback" not in done.stderr


def test_measure_compare_and_report_on_a_users_model_folder_and_text_file(place, tmp_path, capsys):
    data = ("--data", place / "corpus.txt")
    for name in ("before", "after"):
        extra = ("--pairs", place / "pairs.csv", "--treat", "remove-1") if name == "after" else ()
        assert run("measure", place / name, *data, "--out", tmp_path / name, *extra, *CPU) == 0
    printed = capsys.readouterr().out
    assert "alignment" in printed
    page = (tmp_path / "before" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    assert "<script" not in page
    assert (tmp_path / "before" / "types.csv").read_text().startswith("token,text,class,count,layer_0")
    geometry = tmp_path / "before" / "geometry.json"
    assert run("compare", geometry, tmp_path / "after" / "geometry.json", "--out", tmp_path / "c") == 0
    saved = json.loads((tmp_path / "c" / "shift.json").read_text())
    assert run("compare", place / "before", place / "after", *data, "--out", tmp_path / "d", *CPU) == 0
    direct = json.loads((tmp_path / "d" / "shift.json").read_text())
    assert direct["adjusted"]["difference"] == pytest.approx(saved["adjusted"]["difference"], abs=1e-6)
    printed = capsys.readouterr().out
    assert "rose most:" in printed
    assert "difference" in printed
    assert "Maps of tokens" in (tmp_path / "d" / "report.html").read_text()
    (tmp_path / "before" / "report.html").unlink()
    assert run("report", tmp_path / "before") == 0
    assert (tmp_path / "before" / "report.html").is_file()


def test_train_sweep_checkpoints_and_report(place, tmp_path, capsys):
    common = [
        "--base",
        place / "before",
        "--data",
        place / "corpus.txt",
        "--batch-size",
        8,
        "--steps",
        2,
        *CPU,
    ]
    pairs = ("--pairs", place / "pairs.csv")
    out = tmp_path / "t"
    assert run("train", *common, *pairs, "--out", out, "--checkpoint-every", 1) == 0
    assert (out / "model" / "modules.json").is_file()
    assert "Along training" not in capsys.readouterr().err
    arguments = [
        "measure",
        out,
        "--checkpoints",
        "--data",
        place / "corpus.txt",
        "--out",
        tmp_path / "k",
        *CPU,
    ]
    assert run(*arguments) == 0
    measured = json.loads((tmp_path / "k" / "dynamics.jsonl").read_text().splitlines()[-1])
    logged = json.loads((out / "dynamics.jsonl").read_text().splitlines()[-1])
    assert measured["step"] == logged["step"] == 2
    assert measured["anisotropy"] == pytest.approx(logged["anisotropy"], abs=1e-5)
    text = ("--pairs", place / "corpus.txt")
    grid = ("--temperature", 0.05, "--temperature", 1, "--out", tmp_path / "s")
    assert run("sweep", *common, *text, *grid) == 0
    assert run("sweep", *common, *text, *grid) == 0
    assert "done before" in capsys.readouterr().err
    (tmp_path / "s" / "report.html").unlink()
    assert run("report", tmp_path / "s") == 0
    assert "temperature 1.0" in (tmp_path / "s" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["measure", "{}/before", "--data", "{}/corpus.txt", "--min-count", "99", "--out", "OUT"],
         "min_count: no type of token occurs 99 times"),
        (["measure", "{}", "--data", "{}/corpus.txt", "--out", "OUT"], "model: cannot be loaded"),
        (["measure", "{}/before", "--data", "{}/corpus.txt", "--classes", "nouns", "--out", "OUT"],
         "--classes: expected stopwords, frequency or pos:PIPELINE"),
        (["measure", "{}/before", "--data", "{}/corpus.txt", "--treat", "bleach", "--out", "OUT"],
         "treatments: expected remove-K, center or standardize"),
        (["measure", "{}/before", "--data", "{}/corpus.txt", "--checkpoints", "--out", "OUT"],
         "holds no checkpoint-N folder"),
        (["compare", "{}/pairs.csv.json", "{}/before", "--data", "{}/corpus.txt", "--out", "OUT"],
         "cannot be read"),
        (["train", "--base", "{}/before", "--pairs", "{}/pairs.csv", "--data", "{}/corpus.txt",
          "--batch-size", "1", "--out", "OUT"], "batch_size: expected 2 or more"),
        (["report", "{}"], "holds no finished run"),
        (["measure", "{}/before", "--data", "{}/corpus.txt", "--out", "{}/corpus.txt/x"],
         "corpus.txt is not a folder that one may write to"),
        (["measure", "{}/before", "--data", "{}/empty.txt", "--out", "OUT"],
         "expected at least one sentence, the corpus is empty"),
        (["measure", "{}/before", "--data", "{}/nowhere.txt", "--out", "OUT"], "does not exist"),
        (["measure", "{}/broken", "--data", "{}/corpus.txt", "--out", "OUT"],
         "NaN or infinity at layer 1, sentence"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(place, tmp_path, capsys, arguments, message):
    given = [
        argument.replace("{}", str(place)).replace("OUT", str(tmp_path / "out")) for argument in arguments
    ]
    assert run(*given) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("error:")]) == 1
    assert message in error[-1]
    assert not (tmp_path / "out").exists()
