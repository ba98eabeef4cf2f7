"""The command: a user's folder from mining to measures, bad input in one line, help without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from test_readme import a_users_folder

from lead_kd import cli, jobs
from lead_kd.embeddings import encode_corpus, load_embeddings
from lead_kd.jobs import load_dual_encoder
from lead_kd.readers import load_data
from shared_core import InputError, testing


def run(*arguments):
    return testing.exit_code(cli.app, *arguments)


TRAIN = (
    "train", "--data", "my-data", "--student", "my-teacher", "--teacher", "my-teacher", "--device", "cpu",
    "--batch-size", "4", "--lr", "1e-3",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    a_users_folder(tmp_path, monkeypatch)
    return tmp_path


def test_training_with_a_cache_a_dev_split_and_resuming(folder, capsys):
    options = (
        *TRAIN, "--keep-layers", "0,1", "--cache", "cache", "--dev-split", "dev", "--evaluate-every", "2",
        "--checkpoint-every", "2", "--out", "run",
    )  # fmt: skip
    assert run(*options, "--steps", "4") == 0, capsys.readouterr().err
    assert {"student", "best", "checkpoint.safetensors", "history.jsonl", "dev.json"} <= {
        path.name for path in Path("run").iterdir()
    }
    assert list(json.loads(Path("run/dev.json").read_text())) == ["2", "4"]
    assert run(*options, "--steps", "4") == 2
    assert "holds a run already; --resume goes on with it" in capsys.readouterr().err
    assert run(*options, "--steps", "4", "--resume", "--objective", "response") == 2
    assert "is of a run with another objective: expected Response (got 'Lead')" in capsys.readouterr().err
    assert run(*options, "--steps", "4", "--resume") == 0


def test_co_training_saves_the_teacher_too(folder):
    assert run(*TRAIN, "--co-train", "--steps", "2", "--out", "run") == 0
    before, after = (
        load_dual_encoder(name, "cpu").encode(["the moon"]) for name in ("my-teacher", "run/teacher")
    )
    assert not np.allclose(before, after)


def test_shards_are_encoded_apart_and_an_interrupted_one_is_gone_on_with(folder, monkeypatch):
    import lead_kd.embeddings as embeddings

    for shard in range(3):
        part = ("--out", "vectors", "--shard", shard, "--shards", 3, "--precision", "float32")
        assert run("encode", "--data", "my-data", "--model", "my-teacher", "--device", "cpu", *part) == 0
    whole = np.concatenate(load_embeddings("vectors").parts)
    model, corpus = load_dual_encoder("my-teacher", "cpu"), load_data("my-data", "test").corpus
    np.testing.assert_allclose(whole, model.encode(list(corpus)), rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(embeddings, "_BLOCK", 7)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done >= 21:
            raise Stop

    with pytest.raises(Stop):
        encode_corpus(model, corpus, "broken", precision="float32", progress=stop)
    with pytest.raises(InputError, match="is missing: encode shard 0 of 1"):
        load_embeddings("broken")
    begun = []
    encode_corpus(
        model, corpus, "broken", precision="float32", progress=lambda done, total: begun.append(done)
    )
    assert begun[0] == 28
    np.testing.assert_array_equal(np.concatenate(load_embeddings("broken").parts), model.encode(list(corpus)))


def test_runs_are_compared_query_by_query(folder, capsys):
    assert run("encode", "--data", "my-data", "--model", "my-teacher", "--out", "v", "--device", "cpu") == 0
    search = ("search", "--data", "my-data", "--model", "my-teacher", "--embeddings", "v", "--device", "cpu")
    assert run(*search, "--out", "exact.run") == 0
    assert run(*search, "--out", "faiss.run", "--faiss", "Flat", "--k", "60") == 0
    assert (
        run("evaluate", "exact.run", "faiss.run", "--qrels", "my-data/qrels/test.tsv", "--out", "m.json") == 0
    )
    runs = json.loads(Path("m.json").read_text())["runs"]
    assert len(runs["exact.run"]["per_query"]["RR@10"]) == 40
    assert set(runs["faiss.run"]["against_first"]["nDCG@10"]) >= {"difference", "low", "high", "p_value"}
    assert "exact.run" in capsys.readouterr().out
    assert run("encode", "--data", "my-data", "--model", "bert", "--out", "other", "--device", "cpu") == 0
    assert run("search", "--data", "my-data", "--model", "my-teacher", "--embeddings", "other", "--out", "x",
               "--device", "cpu") == 2  # fmt: skip
    assert "other: holds vectors of another model than my-teacher" in capsys.readouterr().err


def test_any_queries_are_searched_and_no_judgement_is_needed_to_encode(folder, capsys):
    for file in Path("my-data/qrels").iterdir():
        file.unlink()
    Path("my-data/queries.jsonl").unlink()
    texts = ("--passage-length", "5", "--device", "cpu")
    assert run("encode", "--data", "my-data", "--model", "my-teacher", "--out", "v", *texts) == 0
    assert "note: 60 of the first 60 passages are cut at 5 tokens." in capsys.readouterr().err
    Path("asked.tsv").write_text("a\twhat shines\nb\twhat melts\n")
    Path("asked.jsonl").write_text(
        '{"_id": "a", "text": "what shines"}\n{"_id": "b", "text": "what melts"}\n'
    )
    search = ("search", "--model", "my-teacher", "--embeddings", "v", "--device", "cpu", "--k", "3")
    for name in ("asked.tsv", "asked.jsonl"):
        assert run(*search, "--queries", name, "--out", f"{name}.run") == 0
    assert Path("asked.tsv.run").read_text() == Path("asked.jsonl.run").read_text()
    assert len(Path("asked.tsv.run").read_text().splitlines()) == 6
    assert run(*search, "--out", "x") == 2
    assert "--queries: expected one of --data and --queries" in capsys.readouterr().err
    assert run(*search, "--queries", "asked.tsv", "--out", "x", "--nprobe", "4") == 2
    assert "--nprobe: is for --faiss alone" in capsys.readouterr().err


def test_vectors_of_other_texts_under_the_same_ids_are_refused(folder, capsys):
    encode = ("encode", "--data", "my-data", "--model", "my-teacher", "--out", "v", "--device", "cpu")
    assert run(*encode) == 0
    corpus = Path("my-data/corpus.jsonl")
    corpus.write_text(corpus.read_text().replace("the old moon shines 7", "another text"))
    assert run(*encode) == 2
    assert "v: holds vectors of other corpus; name another folder" in capsys.readouterr().err


def test_what_is_cut_and_masked_is_told(folder, capsys):
    assert run(*TRAIN, "--steps", "2", "--query-length", "4", "--out", "run") == 0
    told = capsys.readouterr()
    assert "note: 20 of the first 40 queries are cut at 4 tokens." in told.err
    corpus = Path("my-data/corpus.jsonl")
    corpus.write_text(corpus.read_text().replace('shines 1"', 'shines 2"'))
    assert run(*TRAIN, "--steps", "12", "--batch-size", "40", "--out", "again") == 0
    assert "candidates, copies or other positives of the same query" in capsys.readouterr().out


def test_a_cosine_model_keeps_its_order_and_a_raw_one_is_saved_with_dot_products(folder):
    cosine = SentenceTransformer("my-teacher", device="cpu")
    del cosine[2]
    cosine.save("cosine")  # its configuration says cosine, which is what the library takes by default
    loaded = load_dual_encoder("cosine", "cpu")
    np.testing.assert_allclose(np.linalg.norm(loaded.encode(["the moon"]), axis=1), 1, rtol=1e-5)
    common = ("train", "--data", "my-data", "--objective", "none", "--steps", "1", "--device", "cpu")
    assert run(*common, "--batch-size", "4", "--student", "bert", "--out", "raw") == 0
    assert SentenceTransformer("raw/student", device="cpu").similarity_fn_name == "dot"


def test_a_students_folder_is_replaced_whole(folder, monkeypatch):
    model = load_dual_encoder("my-teacher", "cpu")
    jobs._save(model, Path("best"))
    jobs._save(model, Path("best"))
    before = sorted(path.name for path in Path("best").iterdir())

    def half(path, **options):
        Path(path).mkdir()
        Path(path, "half").touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(model, "save", half)
    with pytest.raises(OSError, match="No space"):
        jobs._save(model, Path("best"))
    assert sorted(path.name for path in Path("best").iterdir()) == before
    assert not Path(".best.old").exists()


NO_STUDENT = ("train", "--data", "my-data", "--student", "nothing-here", "--teacher", "my-teacher")
NO_DATA = ("train", "--data", "none", "--student", "my-teacher", "--teacher", "my-teacher", "--out", "r")
SEARCH = ("search", "--data", "my-data", "--model", "my-teacher", "--embeddings", "none", "--out", "x")
QRELS = "my-data/qrels/test.tsv"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (NO_DATA, "none: is not a folder"),
        (
            ("train", "--data", "my-data", "--student", "my-teacher", "--out", "r"),
            "--teacher: --objective lead needs one",
        ),
        ((*TRAIN, "--out", "r", "--keep-layers", "a,b"), "--keep-layers: expected numbers like 1,3,5"),
        ((*TRAIN, "--out", "r", "--keep-layers", "1,9"), "keep: expected rising layers from 0 to 3"),
        (
            (*TRAIN, "--out", "r", "--pairs", "9"),
            "expected 1 to 4: the teacher has 4 layers and the student 4",
        ),
        ((*TRAIN, "--out", "r", "--temperature", "0"), "'--temperature': expected a number above 0, got 0"),
        (
            (*TRAIN, "--out", "r", "--cache", "c", "--co-train"),
            "a teacher in a cache neither trains nor runs",
        ),
        ((*TRAIN, "--out", "r", "--batch-size", "41"), "expected at least the 41 queries of a step"),
        ((*TRAIN, "--out", "r", "--split", "nix"), "nix.tsv: there is no such file"),
        ((*NO_STUDENT, "--device", "cpu", "--out", "r"), "model: cannot be loaded"),
        (SEARCH, "none: holds no embeddings"),
        (("evaluate", "none.run", "--qrels", QRELS), "none.run: No such file"),
        (("evaluate", QRELS, "--qrels", QRELS), "line 1: expected query, Q0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, arguments, message):
    assert run(*arguments) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(err) == 1
    assert message in err[0]


def test_help_and_wrong_options_import_neither_torch_nor_transformers():
    code = (
        "import sys, lead_kd.cli as c\nfrom shared_core import command\n"
        "try:\n command.run(c.app, sys.argv[1:])\nexcept SystemExit as end:\n"
        " print(end.code, sorted({'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)))"
    )
    for arguments, expected in (
        (["train", "--help"], "0 []"),
        (["train", "--nix"], "2 []"),
        (["prove", "--seeds", "0"], "2 []"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == expected
