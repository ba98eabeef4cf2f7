"""Training gives the published objective, logs the geometry, and goes on after a kill to the same result."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny_encoders
import torch
from tiny_encoders import SENTENCES

from isocse import dynamics, pairs, sweep
from isocse.training import Recipe, sentence_transformer, train
from shared_core import InputError

TINY = Recipe(batch_size=8, steps=4, learning_rate=1e-3, device="cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_encoders.save_bert(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    return out, train(base, pairs.unsupervised(SENTENCES), SENTENCES, TINY, out=out)


def test_the_loss_is_info_nce_on_cosines(base):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = sentence_transformer(base, TINY).eval()
    texts = [SENTENCES[:4], SENTENCES[4:8]]
    vectors = [
        torch.nn.functional.normalize(model.encode(side, convert_to_tensor=True), dim=1) for side in texts
    ]
    cosines = vectors[0] @ vectors[1].T
    expected = -np.mean(
        [
            math.log(math.exp(cosines[i, i] / 0.05) / sum(math.exp(c / 0.05) for c in cosines[i]))
            for i in range(4)
        ]
    )
    features = [model.preprocess(side) for side in texts]
    loss = MultipleNegativesRankingLoss(model, scale=1 / TINY.temperature)
    with torch.no_grad():
        assert float(loss(features, None)) == pytest.approx(expected, rel=1e-4)


def test_geometry_is_logged_before_training_and_at_powers_of_two(trained):
    out, found = trained
    assert [row["step"] for row in found.history] == [0, 1, 2, 4]
    assert dynamics.read_history(out / "dynamics.jsonl") == found.history
    assert len(found.losses) == 4
    assert found.history[0]["anisotropy"] != found.history[-1]["anisotropy"]
    for name in ("adjusted_intra_sentence", "self_similarity_semantic", "self_similarity_functional", "norm"):
        assert name in found.history[-1]
    from isocse.analysis import analyze

    saved = analyze(out / "model", SENTENCES, layers=[-1], detail=False, max_length=32)
    assert saved.last("anisotropy") == pytest.approx(found.history[-1]["anisotropy"], abs=1e-5)


def test_training_is_deterministic_and_leaves_the_callers_randomness_alone(base, trained):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002
    again = train(base, pairs.unsupervised(SENTENCES), SENTENCES, TINY)
    assert again.history == trained[1].history
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_dropout_pairs_train_as_by_sentence_transformers_own_recipe(base, tmp_path, capsys, dropout):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.base.sampler import BatchSamplers
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import AutoModel, AutoTokenizer

    start = tmp_path / "start"
    plain = AutoModel.from_pretrained(base, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    for part in (plain, AutoTokenizer.from_pretrained(base)):
        part.save_pretrained(start)
    ours = train(start, pairs.unsupervised(SENTENCES), SENTENCES, TINY)
    assert "widget" not in capsys.readouterr().err

    # As in its documentation of unsupervised SimCSE: each sentence is its own positive.
    model = SentenceTransformer(str(start), device="cpu")
    model.max_seq_length = TINY.max_length
    trainer = SentenceTransformerTrainer(
        model=model,
        args=Arguments(
            output_dir=str(tmp_path), max_steps=TINY.steps, per_device_train_batch_size=TINY.batch_size,
            learning_rate=TINY.learning_rate, warmup_steps=0.1, seed=0, data_seed=0, use_cpu=True,
            batch_sampler=BatchSamplers.NO_DUPLICATES, logging_steps=1, report_to="none", disable_tqdm=True,
            save_strategy="no", dataloader_drop_last=True, dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"anchor": SENTENCES, "positive": SENTENCES}),
        loss=MultipleNegativesRankingLoss(model, scale=20.0),
    )  # fmt: skip
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert ours.losses == pytest.approx(theirs, abs=1e-6)
    np.testing.assert_allclose(ours.model.encode(SENTENCES[:5]), model.encode(SENTENCES[:5]), atol=1e-5)


def test_measuring_does_not_change_training(base, trained):
    seldom = train(base, pairs.unsupervised(SENTENCES), SENTENCES, TINY, measure_steps=[4])
    assert [row["step"] for row in seldom.history] == [4]
    assert seldom.history[-1] == trained[1].history[-1]
    assert seldom.losses == trained[1].losses


def test_frozen_embeddings_and_lower_layers(base):
    start = sentence_transformer(base, TINY)[0].auto_model
    recipe = replace(TINY, freeze_embeddings=True, cut=1, pooling="cls", steps=2)
    model = train(base, pairs.unsupervised(SENTENCES), SENTENCES, recipe).model[0].auto_model
    assert len(model.encoder.layer) == 1
    for name, value in start.embeddings.state_dict().items():
        assert torch.equal(value, model.embeddings.state_dict()[name])
    changed = model.encoder.layer[0].output.dense.weight
    assert not torch.equal(changed, start.encoder.layer[0].output.dense.weight)


def test_masked_words_begin_with_the_same_encoder(base, trained):
    found = train(base, pairs.unsupervised(SENTENCES), SENTENCES, replace(TINY, objective="mlm", steps=2))
    first = trained[1].history[0]
    for name in ("anisotropy", "norm", "self_similarity_semantic"):
        assert found.history[0][name] == pytest.approx(first[name], abs=1e-5)
    assert found.losses[0] == pytest.approx(math.log(150), rel=0.5)  # over a vocabulary of 150


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from tiny_encoders import SENTENCES
from isocse import pairs
from isocse.dynamics import GeometryCallback
from isocse.training import Recipe, train
end = GeometryCallback.on_step_end
def killing(self, args, state, control, **given):
    end(self, args, state, control, **given)
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
GeometryCallback.on_step_end = killing
train({base!r}, pairs.unsupervised(SENTENCES), SENTENCES, {recipe}, out={out!r}, checkpoint_every=2,
      measure_steps=range(7))
"""


def test_a_killed_run_goes_on_to_the_same_result(base, tmp_path):
    from safetensors.torch import load_file

    recipe = replace(TINY, steps=6)
    tests = os.path.dirname(__file__)
    code = KILLED.format(tests=tests, base=str(base), recipe=recipe, out=str(tmp_path / "cut"))
    command = [sys.executable, "-W", "ignore", "-c", code]
    # One thread, as here: sums of several threads differ in their last digit.
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, capture_output=True, text=True, check=False, env=one)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert [row["step"] for row in dynamics.read_history(tmp_path / "cut" / "dynamics.jsonl")][-1] == 5
    for name, resume in (("whole", False), ("cut", True)):
        train(base, pairs.unsupervised(SENTENCES), SENTENCES, recipe, out=tmp_path / name,
              checkpoint_every=2, measure_steps=range(7), resume=resume)  # fmt: skip
    a, b = (dynamics.read_history(tmp_path / name / "dynamics.jsonl") for name in ("whole", "cut"))
    assert a == b
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_sweep_goes_on_where_it_stopped(base, tmp_path, monkeypatch):
    recipes = sweep.grid(replace(TINY, steps=2), {"temperature": [0.05, 1.0], "batch_size": [8, 4]}, range(1))
    assert [recipe.name for recipe in recipes] == [
        "tau0.05-batch8-mean-seed0", "tau1-batch8-mean-seed0", "tau0.05-batch4-mean-seed0",
    ]  # fmt: skip
    data = pairs.unsupervised(SENTENCES)
    first = sweep.sweep(base, data, SENTENCES, recipes[:1], tmp_path)
    calls = []
    monkeypatch.setattr(sweep, "train", lambda *a, **k: calls.append(a[3].name) or train(*a, **k))
    lines = []
    cells = sweep.sweep(base, data, SENTENCES, recipes, tmp_path, say=lines.append)
    assert calls == ["tau1-batch8-mean-seed0", "tau0.05-batch4-mean-seed0"]
    assert lines[0] == "1/3 tau0.05-batch8-mean-seed0: done before"
    assert cells[0] == first[0]
    axes = sweep.by_axis(sweep.read_sweep(tmp_path))
    assert {axis: list(runs) for axis, runs in axes.items()} == {
        "temperature": ["temperature 0.05", "temperature 1.0"],
        "batch size": ["batch size 4", "batch size 8"],
    }
    with pytest.raises(InputError, match="holds a sweep of another pairs"):
        sweep.sweep(base, pairs.unsupervised(SENTENCES[:20]), SENTENCES, recipes, tmp_path)
    with pytest.raises(InputError, match=r"holds a run with other settings \(steps\)"):
        sweep.sweep(base, data, SENTENCES, [replace(recipes[0], steps=3)], tmp_path)


def test_a_full_grid_has_all_combinations():
    axes = {"temperature": [0.05, 1.0], "pooling": ["mean", "cls"]}
    assert len(sweep.grid(TINY, axes, range(3), full=True)) == 12
    with pytest.raises(InputError, match="axes: expected temperature, batch_size, pooling"):
        sweep.grid(TINY, {"colour": [1]}, [0])


def test_a_folder_that_holds_a_run_is_not_overwritten(base, trained):
    data = pairs.unsupervised(SENTENCES)
    with pytest.raises(InputError, match="holds this run already: give --resume"):
        train(base, data, SENTENCES, TINY, out=trained[0])
    with pytest.raises(InputError, match=r"holds a run with other settings \(temperature\)"):
        train(base, data, SENTENCES, replace(TINY, temperature=1.0), out=trained[0], resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 1}, "batch_size: expected 2 or more: with one pair there is no negative"),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
        ({"temperature": -1.0}, "temperature: expected a number above 0"),
        ({"pooling": "median"}, "pooling: expected one of cls, mean, max, last"),
        ({"objective": "triplet"}, "objective: expected one of contrastive, mlm"),
        ({"steps": 0}, "steps: expected 1 or more"),
    ],
)
def test_recipes_that_cannot_work(change, message):
    with pytest.raises(InputError, match=message):
        replace(TINY, **change)


def test_too_few_pairs_for_a_batch(base):
    with pytest.raises(InputError, match=r"batch_size: expected 8 pairs or more, one batch \(got 3\)"):
        train(base, pairs.unsupervised(SENTENCES[:3]), SENTENCES, TINY)


def test_the_evaluator_gives_a_flat_dict_with_a_primary_metric(trained, tmp_path):
    evaluator = dynamics.GeometryEvaluator(SENTENCES, name="g")
    found = evaluator(trained[1].model, str(tmp_path), steps=3)
    assert evaluator.primary_metric == "g_anisotropy"
    assert evaluator.greater_is_better is False
    assert set(map(type, found.values())) == {float}
    (line,) = (tmp_path / "g_results.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 3
    with pytest.raises(InputError, match="primary: expected one of"):
        dynamics.GeometryEvaluator(SENTENCES, primary="beauty")(trained[1].model)
    with pytest.raises(TypeError, match="unexpected argument colour"):
        dynamics.GeometryCallback(SENTENCES, colour=1)


def test_spearman_with_people_is_of_cosines(base):
    from scipy.stats import spearmanr

    judged = pairs.Judged(SENTENCES[:10], SENTENCES[10:20], [float(n * n) for n in range(10)])
    model = sentence_transformer(base, TINY)
    first, second = (model.encode(side) for side in (judged.first, judged.second))
    cosines = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    expected = spearmanr(cosines, judged.scores).statistic
    assert dynamics.similarity_spearman(model, judged) == pytest.approx(expected, abs=1e-6)


def test_log_steps_begin_at_0_and_end_at_the_last():
    assert dynamics.log_steps(100) == [0, 1, 2, 4, 8, 16, 32, 64, 100]
    assert dynamics.log_steps(0) == [0]


# Files of pairs.


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "anchor,positive\na b,c\nd,e\n"),
        ("a.csv", "sent0,sent1,hard_neg\na b,c,x\nd,e,y\n"),
        ("a.tsv", "sentence1\tsentence2\na b\tc\nd\te\n"),
        ("a.jsonl", '{"anchor": "a b", "positive": "c"}\n\n{"anchor": "d", "positive": "e"}\n'),
    ],
)
def test_layouts_of_pairs(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    found = pairs.load_pairs(tmp_path / name)
    assert (found.anchors, found.positives, found.supervised) == (["a b", "d"], ["c", "e"], True)
    assert found.negatives == (["x", "y"] if "hard_neg" in content else None)
    assert list(found.columns()) == ["anchor", "positive"] + (["negative"] if found.negatives else [])


def test_a_text_file_is_for_unsupervised_training_and_repeated_sentences_are_kept_once(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\none\n")
    found = pairs.load_pairs(tmp_path / "a.txt")
    assert found.anchors == found.positives == ["one", "two"]
    assert not found.supervised


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "anchor,other\na,b\n", r"a\.csv: positive: the column is missing"),
        ("a.csv", "x,y\na,b\n", "columns: expected the columns anchor and positive"),
        ("a.csv", "anchor,positive\na,\nb,c\n", "positive: line 2: expected a text"),
        ("a.csv", "anchor,positive\n", "expected at least 2 pairs"),
        ("a.jsonl", "{\n", "line 1: is not JSON"),
        ("a.jsonl", "3\n", "line 1: expected an object"),
        ("a.parquet", "", "expected a .txt, .csv, .tsv or .jsonl file"),
        ("a.txt", "one\n", "expected at least 2 pairs"),
    ],
)
def test_files_of_pairs_that_are_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        pairs.load_pairs(tmp_path / name)


def test_human_similarities_in_both_layouts(tmp_path):
    (tmp_path / "a.csv").write_text("sentence1,sentence2,score\na,b,1\nc,d,2.5\ne,f,5\n")
    (tmp_path / "sts-test.csv").write_text(
        "".join(f"news\tx\t2012\t{n}\t{s}\t{a}\t{b}\n" for n, (a, b, s) in
                enumerate((("a", "b", 1), ("c", "d", 2.5), ("e", "f", 5))))
    )  # fmt: skip
    for name in ("a.csv", "sts-test.csv"):
        found = pairs.load_judged(tmp_path / name)
        assert (found.first, found.second, found.scores) == (["a", "c", "e"], ["b", "d", "f"], [1, 2.5, 5])
    (tmp_path / "sts-dev.csv").write_text("a\tb\n")
    with pytest.raises(InputError, match="line 1: expected 7 columns"):
        pairs.load_judged(tmp_path / "sts-dev.csv")
    (tmp_path / "b.csv").write_text("sentence1,sentence2,score\na,b,1\nc,d,x\ne,f,5\n")
    with pytest.raises(InputError, match="score: line 3: expected a number"):
        pairs.load_judged(tmp_path / "b.csv")
