"""The command works on a user's own model directory and data, and says in one line what is wrong."""

import io
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from tiny_models import CORPUS

from relattn import cli, evaluation, methods
from relattn.examples import MethodSummary
from relattn.pplm import PPLM
from shared_core import testing

EVAL = ["eval", "--out", "OUT", "--data", "DATA", "--method"]
SHORT = ["--beams", 2, "--max-tokens", 8, "--device", "cpu"]
run = partial(testing.exit_code, cli.app)


@pytest.fixture(params=["bart", "t5"])
def folder(request, bart_folder, t5_folder):
    return bart_folder if request.param == "bart" else t5_folder


@pytest.fixture
def article(tmp_path):
    path = tmp_path / "article.txt"
    path.write_text(f"{CORPUS[0]} {CORPUS[2]}\n")
    return path


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [
        {
            "document": f"{CORPUS[n]} {CORPUS[n + 1]}",
            "document_id": f"d{n}",
            "control": control,
            "summary": text,
            "id": f"{n}-{control}",
        }
        for n in range(5)
        for control, text in (("music", CORPUS[n]), ("water", CORPUS[n + 1]))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_help_and_wrong_arguments_answer_without_torch(tmp_path: Path):
    code = """
import sys
from shared_core import command
from relattn import cli
for arguments in (
    ["--help"], ["summarize", "--help"], ["eval", "--help"], ["prove", "--help"],
    ["summarize", "--model", "x", "--control", "a", "--weight", "2", "x.txt"],
    ["summarize", "--model", "x", "--control", "a", "nowhere.txt"],
    ["eval", "--model", "x", "--out", "y", "--method", "magic"],
    ["explain", "--model", "x", "--control", "a", "--temperature", "0"],
    ["prove", "--seeds", "0"],
):
    try:
        command.run(cli.app, arguments)
    except SystemExit as ended:
        print("exit", ended.code)
print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit")]
    assert codes == ["exit 0"] * 4 + ["exit 2"] * 5, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert "Traceback" not in done.stderr


def test_the_methods_in_the_help_are_those_there_are():
    assert cli.METHOD_NAMES == methods.METHODS


def test_summarize_steers_a_models_own_directory(folder, article, tmp_path, capsys):
    arguments = ["summarize", "--model", folder, "--control", "music", article, *SHORT]
    assert run(*arguments, "--weight", "0.5", "--out", tmp_path / "s.json") == 0
    steered = capsys.readouterr().out.strip()
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["summary"], found["weight"], found["control"]) == (steered, 0.5, ["music"])
    assert run(*arguments, "--weight", "0.5") == 0
    assert capsys.readouterr().out.strip() == steered  # two runs give the same text
    assert run(*arguments, "--weight", "online", "--out", tmp_path / "o.json") == 0
    tried = json.loads((tmp_path / "o.json").read_text())["candidates"]
    assert [c["weight"] for c in tried] == [round(0.01 * n, 2) for n in range(1, 31)]


def test_explain_writes_a_page_and_numbers(folder, article, tmp_path, capsys):
    for name in ("page.html", "numbers.json"):
        assert run("explain", "--model", folder, "--control", "music", article, "--device", "cpu", "--out",
                   tmp_path / name) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "relevance to music: spread over about" in printed
    assert "Jazz musicians met" in (tmp_path / "page.html").read_text()
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert len(numbers["sentences"]) == 2
    assert run("explain", "--model", folder, "--control", "music", article, "--out", tmp_path / "x.pdf") == 2
    assert "'--out': expected a file name that ends in .html or .json" in capsys.readouterr().err


def test_eval_scores_resumes_and_refuses_to_mix(folder, data, tmp_path, capsys):
    arguments = [
        "eval",
        "--model",
        folder,
        "--data",
        data,
        "--out",
        tmp_path / "e",
        "--batch-size",
        4,
        *SHORT,
    ]
    assert run(*arguments, "--limit", 4) == 0
    assert run(*arguments) == 2
    assert "give --resume" in capsys.readouterr().err
    assert run(*arguments, "--weight", "0.3", "--resume") == 2
    assert "other settings (weight)" in capsys.readouterr().err
    copy = data.with_name("copy.jsonl")
    copy.write_text(data.read_text().replace("water", "river"))
    swapped = [copy if argument == data else argument for argument in arguments]
    assert run(*swapped, "--resume") == 2
    assert "other settings (data)" in capsys.readouterr().err
    recorded = json.loads((tmp_path / "e" / "results.jsonl.settings.json").read_text())
    assert (recorded["data"], recorded["format"], recorded["split"]) == (str(data), "jsonl", "test")
    assert run(*arguments, "--resume") == 0
    found = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert found["examples"] == 10
    assert found["metrics"]["rouge1"]["documents"] == 5  # intervals are over documents, not examples
    assert set(found["metrics"]) >= {"control_contrast", "success", "rougeLsum", "copy_density"}
    assert "95 % interval over documents" in capsys.readouterr().out
    ids = [json.loads(line)["id"] for line in (tmp_path / "e" / "results.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 10


def test_fewshot_learns_on_other_documents_than_it_validates_on(folder, data, tmp_path, article, capsys):
    out = tmp_path / "f"
    arguments = ["fewshot", "--model", folder, "--data", data, "--out", out, "--train", 2, "--validation", 2,
                 "--steps", 2, "--trainable", "new", "--weight-variant", "per_layer", *SHORT]  # fmt: skip
    assert run(*arguments) == 0
    assert json.loads((out / "relattn_config.json").read_text())["smooth_sigma"] is None  # as in the release
    record = json.loads((out / "fewshot.json").read_text())
    assert len(record["train"]) == len(record["validation"]) == 2
    assert not set(record["train"]) & set(record["validation"])
    assert run("summarize", "--model", folder, "--module", out, "--control", "music", article, *SHORT) == 0
    capsys.readouterr()
    arguments[6], arguments[10] = tmp_path / "g", 9
    assert run(*arguments) == 2
    assert "expected at least 11 documents" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["summarize", "--control", "  "], "control 0 is empty"),
        (["summarize", "--control", "music", "--device", "cuda:77"], "device: no such device here"),
        (["eval", "--out", "OUT"], "--data: is missing: expected the data's place for the format jsonl"),
        (["eval", "--out", "OUT", "--format", "entsum", "--data", "DATA"], "--articles: is missing"),
        ([*EVAL, "prefix", "--weight", "online"], "--weight: is not used by the method prefix"),
        ([*EVAL, "relattn-prefix", "--weight", "online"], "--weight: expected a number for relattn-prefix"),
        ([*EVAL, "relattn-online", "--weight", "0.3"], "--weight: is not used by the method relattn-online"),
        ([*EVAL, "plain", "--temperature", "auto"], "--temperature: is not used by the method plain"),
        ([*EVAL, "boost", "--module", "MODULE"], "--module: is not used by the method boost"),
        ([*EVAL, "relattn", "--pplm-step", "0.1"], "--pplm-step: is not used by the method relattn"),
        ([*EVAL, "pplm", "--pplm-step", "-1"], "expected a number above 0, got -1.0"),
        ([*EVAL, "relattn", "--module", "MODULE", "--temperature", "auto"], "is the module's own"),
        ([*EVAL, "relattn", "--boost", "3"], "--boost: is not used by the method relattn"),
        ([*EVAL, "bias", "--alpha", "2"], "expected a number above 0, at most 1, got 2.0"),
        ([*EVAL, "relattn", "--coarse", "5"], "--coarse: is not used by the method relattn"),
        ([*EVAL, "plain", "--newts-control", "phrases"], "--newts-control: is for --format newts alone"),
        (["summarize", "--control", "music", "--coarse", "5"], "--coarse: is for --weight online alone"),
        (["explain", "--control", "music", "--weight", "0.5"], "--weight: changes the summary alone"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(
    t5_folder, article, data, tmp_path, capsys, arguments, message
):
    (tmp_path / "module").mkdir()
    places = {"OUT": tmp_path / "out", "DATA": data, "MODULE": tmp_path / "module"}
    given = [places.get(a, a) for a in arguments]
    last = [article] if arguments[0] in ("summarize", "explain") else []
    assert run(given[0], "--model", t5_folder, *given[1:], *last) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()


def test_a_weight_of_online_is_the_method_relattn_online(t5_folder, data, tmp_path):
    for name, method in (("a", "relattn"), ("b", "relattn-online")):
        assert run("eval", "--model", t5_folder, "--data", data, "--out", tmp_path / name, "--limit", 1,
                   "--method", method, "--weight", "online", *SHORT) == 0  # fmt: skip
        settings = json.loads((tmp_path / name / "results.jsonl.settings.json").read_text())
        assert (settings["method"], settings["weight"]) == ("relattn-online", None)


def test_models_that_are_no_summarizers_are_named_with_what_is_supported(tmp_path, article, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10)).save_pretrained(
        tmp_path / "gpt"
    )
    assert run("summarize", "--model", tmp_path / "gpt", "--control", "x", article) == 2
    assert "gpt2 is no encoder-decoder model: expected one of BART, PEGASUS" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run("summarize", "--model", tmp_path / "empty", "--control", "x", article) == 2
    assert "--model: cannot be loaded" in capsys.readouterr().err


def test_a_text_that_is_not_utf8_is_one_line_also_on_standard_input(t5_folder, tmp_path, monkeypatch, capsys):
    content = "caf\u00e9 music".encode("latin-1")
    (tmp_path / "latin.txt").write_bytes(content)
    arguments = ["summarize", "--model", t5_folder, "--control", "music", *SHORT]
    assert run(*arguments, tmp_path / "latin.txt") == 2
    assert "latin.txt: is not UTF-8 text: invalid continuation byte at byte 3" in capsys.readouterr().err
    for given, code in ((content, 2), ("Caf\u00e9 music.\r\n".encode(), 0)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        assert run(*arguments) == code
    error = capsys.readouterr().err
    assert error.splitlines() == [
        "error: standard input: is not UTF-8 text: invalid continuation byte at byte 3"
    ]
    (tmp_path / "blank.txt").write_text(" \n")
    assert run(*arguments, tmp_path / "blank.txt") == 2
    assert "blank.txt: is empty: expected a text" in capsys.readouterr().err


def test_eval_hands_the_step_size_to_pplm_and_records_it(t5_folder, data, tmp_path, monkeypatch):
    sizes = []
    given = PPLM.__init__
    monkeypatch.setattr(PPLM, "__init__", lambda self, *a, **k: sizes.append(k) or given(self, *a, **k))
    arguments = ["eval", "--model", t5_folder, "--data", data, "--limit", 1, "--method", "pplm", *SHORT]
    assert run(*arguments, "--out", tmp_path / "a", "--pplm-step", "0.25") == 0
    assert run(*arguments, "--out", tmp_path / "b") == 0
    assert sizes == [{"step_size": 0.25}, {}]
    recorded = json.loads((tmp_path / "a" / "results.jsonl.settings.json").read_text())
    assert recorded["pplm_step"] == 0.25


def test_a_control_that_the_text_lacks_is_a_warning(t5_folder, article, capsys):
    assert run("summarize", "--model", t5_folder, "--control", "opera", article, *SHORT) == 0
    assert "warning: 'opera' does not occur in the source; best match:" in capsys.readouterr().err


def test_examples_that_the_tokenizer_cannot_read_are_found_before_the_long_work(
    t5_folder, data, tmp_path, capsys
):
    lines = data.read_text().splitlines()
    for place, control in ((4, "Ж"), (9, "Я")):
        lines[place] = json.dumps(json.loads(lines[place]) | {"control": control})
    data.write_text("\n".join(lines))
    arguments = ["eval", "--model", t5_folder, "--data", data, "--out", tmp_path / "e", *SHORT]
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error == (
        "error: the tokenizer knows no token of the control of example '2-music', and so of 1 more: leave"
        " such examples out with --skip-bad"
    )
    assert not (tmp_path / "e").exists()
    assert run(*arguments, "--skip-bad") == 0
    assert "warning: skipped: control: the tokenizer knows no token" in capsys.readouterr().err
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["examples"] == 8
    few = ["fewshot", "--model", t5_folder, "--data", data, "--out", tmp_path / "f"]
    assert run(*few) == 2
    assert "knows no token of the control of example '2-music'" in capsys.readouterr().err


def test_a_killed_evaluation_goes_on_where_it_was_and_ends_the_same(bart_folder, data, tmp_path, monkeypatch):
    """The command itself, with online selection: killed behind its second batch, in a process of its own."""
    arguments = ["eval", "--model", bart_folder, "--data", data, "--method", "relattn-online", "--coarse", 10,
                 "--batch-size", 3, *SHORT]  # fmt: skip
    child = os.fork()
    if child == 0:
        try:
            batches, batch = iter(range(3)), evaluation._batch
            monkeypatch.setattr(
                evaluation,
                "_batch",
                lambda *a: batch(*a) if next(batches) < 2 else os.kill(os.getpid(), signal.SIGKILL),
            )
            run(*arguments, "--out", tmp_path / "killed")
        finally:
            os._exit(1)  # reached only if it was not killed
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    results = tmp_path / "killed" / "results.jsonl"
    assert len(results.read_text().splitlines()) == 6
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert run(*arguments, "--out", tmp_path / "killed", "--resume") == 0
    assert run(*arguments, "--out", tmp_path / "whole") == 0
    killed, whole = (
        [
            json.loads(line) | {"seconds": 0}
            for line in (tmp_path / name / "results.jsonl").read_text().splitlines()
        ]
        for name in ("killed", "whole")
    )
    assert killed == whole
    assert len(whole) == 10


def test_eval_hands_each_method_its_own_settings_and_records_them(t5_folder, data, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        methods, "summarize", lambda *a: given.append(a[4]) or [MethodSummary("x") for _ in a[2]]
    )
    for name, options in {
        "boost": {"boost": 3.5},
        "bias": {"alpha": 0.1, "sentences": 2},
        "relattn-online": {"coarse": 5},
    }.items():
        words = [part for option, value in options.items() for part in (f"--{option}", value)]
        assert run("eval", "--model", t5_folder, "--data", data, "--method", name, "--out", tmp_path / name,
                   "--limit", 1, *words) == 0  # fmt: skip
        recorded = json.loads((tmp_path / name / "results.jsonl.settings.json").read_text())
        assert options.items() <= recorded.items()
    assert (given[0].boost, given[1].alpha, given[1].sentences) == (3.5, 0.1, 2)
    assert given[2].online == {"coarse": 5}


def test_a_models_prefix_goes_in_front_of_each_document(t5_folder, article, data, tmp_path, capsys):
    """`summarize: ` for T5: as in front of the text itself, and no part of what is shown."""
    arguments = ["--model", t5_folder, "--control", "water", "--device", "cpu"]
    prefix = ["--source-prefix", "trade: "]
    other = tmp_path / "prefixed.txt"
    other.write_text(f"trade: {article.read_text()}")
    assert run("summarize", *arguments, article, *prefix, "--out", tmp_path / "a.json") == 0
    assert run("summarize", *arguments, other, "--out", tmp_path / "b.json") == 0
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert run("explain", *arguments, article, *prefix, "--out", tmp_path / "x.json") == 0
    shown = json.loads((tmp_path / "x.json").read_text())
    assert shown["sentences"][0]["text"] == CORPUS[0]
    few = ["fewshot", "--model", t5_folder, "--data", data, "--out", tmp_path / "f", "--train", 2,
           "--validation", 1, "--steps", 1, "--trainable", "new", *SHORT]  # fmt: skip
    assert run(*few, *prefix) == 0
    assert run(*few) == 2
    assert "holds a run already; --resume goes on with it" in capsys.readouterr().err
    assert run(*few, "--resume") == 2
    assert "is the state of a run with another source_prefix" in capsys.readouterr().err
    assert run("eval", "--model", t5_folder, "--data", data, "--out", tmp_path / "e", "--limit", 1, *prefix,
               *SHORT) == 0  # fmt: skip


def test_skip_bad_keeps_the_other_rows(t5_folder, data, tmp_path, capsys):
    data.write_text(data.read_text() + "{broken\n")
    arguments = [
        "eval",
        "--model",
        t5_folder,
        "--data",
        data,
        "--method",
        "plain",
        "--out",
        tmp_path / "e",
        *SHORT,
    ]
    assert run(*arguments) == 2
    assert "line 11: is not JSON" in capsys.readouterr().err
    assert run(*arguments, "--skip-bad") == 0
    assert "warning: skipped:" in capsys.readouterr().err


def test_eval_measures_bertscore_with_an_encoder_and_reports_pplms_cost(t5_folder, data, tmp_path, capsys):
    from tiny_models import wordpiece_tokenizer
    from transformers import BertConfig, BertModel

    tokenizer = wordpiece_tokenizer()
    encoder = BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2,
                                   num_attention_heads=2, intermediate_size=16))  # fmt: skip
    for part in (encoder, tokenizer):
        part.save_pretrained(tmp_path / "encoder")
    arguments = ["eval", "--model", t5_folder, "--data", data, "--limit", 2, "--method", "pplm", *SHORT]
    given = ["--bertscore", tmp_path / "encoder", "--bertscore-layer", 2]
    assert run(*arguments, "--out", tmp_path / "e", *given) == 0
    found = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert -1 <= found["metrics"]["bertscore"]["mean"] <= 1
    passes = found["pplm_passes_of_this_run"]
    assert passes["backward_passes"] == 3 * passes["steps"] > 0
    assert run(*arguments, "--out", tmp_path / "f", "--bertscore", tmp_path / "nowhere") == 2
    assert "--bertscore: cannot be loaded" in capsys.readouterr().err
