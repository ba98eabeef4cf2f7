"""The loop against a plain one, resuming to the bit after a kill, rivals, co-training, two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import worded
from tiny_models import (
    WORDS,
    colbert,
    cross_encoder,
    dual_encoder,
    save_bert,
    save_distilbert,
)

from lead_kd.cache import CachedTeacher, TeacherCache, build_cache, fingerprint
from lead_kd.jobs import LayerOptions, make_objective
from lead_kd.losses import lead_loss
from lead_kd.objectives import Lead
from lead_kd.sampling import Sampler
from lead_kd.scorers import ColBERT, CrossEncoderScorer, DualEncoder
from lead_kd.selection import LayerSchedule
from lead_kd.training import CHECKPOINT, Recipe, TrainingDiverged, distill
from shared_core import InputError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "student": save_bert(root / "student", layers=2),
        "teacher": save_bert(root / "teacher", width=24, layers=4, offset=3, seed=1),
        "same": save_bert(root / "same", width=32, layers=3, seed=5),
        "distil": save_distilbert(root / "distil"),
        "cross": save_bert(root / "cross", layers=3, classifier=True, seed=2),
    }


def student(folders, dropout=True):
    model = DualEncoder(dual_encoder(folders["student"], "mean", normalize=True))
    if not dropout:
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
    return model


def teacher(folders, name="teacher"):
    return DualEncoder(dual_encoder(folders[name], "mean", normalize=True))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def schedule(big, small, **options):
    return LayerSchedule(big.n_layers, small.n_layers, 2, every=2, **options)


def test_a_step_is_adamw_on_the_loss_with_warm_up_clipping_and_linear_decay(folders):
    """The loop written out: no accelerate, no sampler's helpers beyond the texts."""
    ours, theirs, big = student(folders, dropout=False), student(folders, dropout=False), teacher(folders)
    recipe = Recipe(4, lr=1e-2, warmup=0.25, clip_norm=0.5, seed=3)
    sampler = Sampler(worded(), 4, 1, seed=3)
    pairs = schedule(big, ours, seed=3)
    distill(ours, big, Lead(1.0), sampler, recipe, pairs)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    big.eval()
    for step, rate in enumerate([1e-2 * 1 / 2, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3]):
        group = sampler.group(step)
        scores, told = (
            theirs(theirs.collate(group.queries, group.passages)),
            big(big.collate(group.queries, group.passages)),
        )
        mask = torch.tensor(
            [
                [
                    column == 2 * row
                    or (
                        group.passage_ids[column] not in group.positive_ids[row]
                        and group.passage_ids[column] not in group.passage_ids[:column]
                    )
                    for column in range(8)
                ]
                for row in range(4)
            ]
        )
        terms = lead_loss(
            scores.layers, told.layers, torch.arange(0, 8, 2), pairs.pairs(step), layer_temperature=1.0,
            mask=mask, student_final=scores.final, teacher_final=told.final,
        )  # fmt: skip
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_accumulated_groups_make_the_gradient_of_their_mean(folders):
    big = teacher(folders)
    model = student(folders, dropout=False)
    sampler = Sampler(worded(), 2, 1, seed=1)
    before = weights(model)
    distill(
        model,
        big,
        make_objective("none", model, None, LayerOptions(), co_train=False, seed=0),
        sampler,
        Recipe(1, lr=1e-3, accumulate=3),
    )
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("layer.0" in name for name in moved)


@pytest.mark.parametrize("co_train", [False, True])
def test_a_run_that_goes_on_is_the_run_without_a_break_to_the_bit(folders, tmp_path, co_train):
    recipe = Recipe(6, lr=1e-3, log_every=1, checkpoint_every=2)

    def run(out, **options):
        small, big = student(folders), teacher(folders)
        objective = make_objective("lead", small, big, LayerOptions(), co_train=co_train, seed=0)
        made = distill(
            small, big, objective, Sampler(worded(), 4, 1), recipe, schedule(big, small), co_train=co_train,
            out=out, **options,
        )  # fmt: skip
        return small, big, made

    whole, whole_teacher, history = run(tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(step, loss):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "broken", on_step=stop)
    again, again_teacher, gone_on = run(tmp_path / "broken", resume=True)
    assert same(weights(whole), weights(again))
    assert same(weights(whole_teacher), weights(again_teacher))
    assert gone_on.history == history.history
    before = weights(teacher(folders))
    assert same(weights(whole_teacher), before) != co_train


def test_an_evaluation_that_was_interrupted_is_done_when_the_run_goes_on(folders, tmp_path):
    def run(evaluate, **options):
        small, big = student(folders), teacher(folders)
        recipe = Recipe(2, lr=1e-3, checkpoint_every=1, evaluate_every=2)
        return distill(
            small, big, Lead(1.0), Sampler(worded(), 4, 1), recipe, schedule(big, small), out=tmp_path,
            evaluate=evaluate, **options,
        )  # fmt: skip

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        run(stop)
    assert run(lambda: {"nDCG@10": 0.5}, resume=True).evaluations == {2: {"nDCG@10": 0.5}}


def test_dropout_neither_uses_nor_changes_the_callers_random_numbers(folders):
    big = teacher(folders)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    small = student(folders)
    torch.manual_seed(7)
    distill(small, big, Lead(1.0), Sampler(worded(), 4, 1), Recipe(2, lr=1e-3), schedule(big, small))
    assert torch.equal(torch.rand(3), expected)


def test_another_run_is_not_gone_on_with_nor_overwritten(folders, tmp_path):
    def run(lr=1e-3, **options):
        small, big = student(folders), teacher(folders)
        return distill(
            small, big, Lead(1.0), Sampler(worded(), 4, 1), Recipe(2, lr=lr), schedule(big, small),
            out=tmp_path, **options,
        )  # fmt: skip

    run()
    with pytest.raises(InputError, match="holds a run already: go on with --resume"):
        run()
    with pytest.raises(InputError, match="recipe: the run began with"):
        run(lr=2e-3, resume=True)
    (tmp_path / CHECKPOINT).write_bytes(b"half a file")
    with pytest.raises(InputError, match="is no whole checkpoint"):
        run(resume=True)
    (tmp_path / CHECKPOINT).unlink()
    with pytest.raises(InputError, match="there is no checkpoint to go on from"):
        run(resume=True)


@pytest.mark.parametrize(
    "name", ["lead", "none", "response", "margin-mse", "listwise", "regression", "embedding", "minilm"]
)
def test_every_objective_lowers_its_own_loss(folders, name):
    small = student(folders, dropout=False)
    big = teacher(folders, "same")
    objective = make_objective(name, small, big, LayerOptions(2), co_train=False, seed=0)
    losses = []
    data = worded(queries=4)
    distill(
        small, big, objective, Sampler(data, 4, 2), Recipe(25, lr=2e-3, log_every=1, warmup=0),
        LayerSchedule(3, 2, 2, "last"), on_step=lambda step, loss: losses.append(loss.total.item()),
    )  # fmt: skip
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["dual", "colbert", "cross"])
@pytest.mark.parametrize("co_train", [False, True])
def test_any_teacher_teaches_and_trains_only_where_asked(folders, kind, co_train):
    big = {
        "dual": lambda: DualEncoder(dual_encoder(folders["distil"])),
        "colbert": lambda: ColBERT(colbert(folders["teacher"])),
        "cross": lambda: CrossEncoderScorer(cross_encoder(folders["cross"])),
    }[kind]()
    small = student(folders)
    before = weights(big)
    objective = make_objective("lead", small, big, LayerOptions(), co_train=co_train, seed=0)
    made = distill(
        small, big, objective, Sampler(worded(), 4, 1), Recipe(2, lr=1e-3, log_every=1), schedule(big, small),
        co_train=co_train,
    )  # fmt: skip
    assert same(before, weights(big)) != co_train
    assert set(made.history[0]) >= {"stu", "tch", "rep", "lyr", "pairs", "weights"}
    assert sum(made.history[0]["weights"]) == pytest.approx(1)


def test_a_cache_gives_the_teachers_scores_and_training(folders, tmp_path):
    big = teacher(folders).eval()
    data = worded()
    queries, passages = list(data.queries.values()), list(data.corpus)
    cache = CachedTeacher(build_cache(big, tmp_path / "cache", queries, passages, batch_size=7), big)
    with torch.no_grad():
        live = big(big.collate(queries[:3], passages[:6]))
        read = cache(cache.collate(queries[:3], passages[:6]))
        some = cache(cache.collate(queries[:3], passages[:6]), [3, 1])
    torch.testing.assert_close(read.layers, live.layers, rtol=2e-3, atol=2e-2)  # float16 on disk, times 20
    torch.testing.assert_close(read.final, live.final, rtol=2e-3, atol=2e-2)
    torch.testing.assert_close(some.layers, read.layers[[3, 1]])
    small = student(folders)
    distill(small, cache, Lead(1.0), Sampler(data, 4, 1), Recipe(2, lr=1e-3), schedule(cache, small))
    with pytest.raises(InputError, match="a teacher that is read from a cache cannot train"):
        distill(
            small, cache, Lead(1.0, co_train=True), Sampler(data, 4, 1), Recipe(2), schedule(cache, small),
            co_train=True,
        )  # fmt: skip
    with pytest.raises(InputError, match=r"has no vectors of this query; build the cache .* \(got 'new'\)"):
        cache.collate(["new"], passages[:2])
    with pytest.raises(InputError, match="was made by another teacher"):
        CachedTeacher(TeacherCache(tmp_path / "cache"), teacher(folders, "same"))
    with pytest.raises(InputError, match="holds the cache of other texts"):
        build_cache(big, tmp_path / "cache", queries[1:], passages)
    with pytest.raises(InputError, match="there is no finished cache here"):
        TeacherCache(tmp_path / "none")


def test_a_cache_that_was_interrupted_is_gone_on_with(folders, tmp_path):
    big, data = teacher(folders).eval(), worded()
    texts = list(data.queries.values()), [f"{WORDS[n % 36]} {WORDS[n // 36]}" for n in range(400)]
    whole = build_cache(big, tmp_path / "whole", *texts, batch_size=2)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done >= 250:
            raise Stop

    with pytest.raises(Stop):
        build_cache(big, tmp_path / "broken", *texts, batch_size=2, progress=stop)
    starts = []
    again = build_cache(
        big, tmp_path / "broken", *texts, batch_size=2, progress=lambda done, total: starts.append(done)
    )
    assert starts[0] > 200
    np.testing.assert_array_equal(whole.layers, again.layers)


def test_lengths_and_weights_are_in_the_teachers_fingerprint(folders):
    model = dual_encoder(folders["teacher"])
    assert fingerprint(DualEncoder(model)) == fingerprint(DualEncoder(model))
    assert fingerprint(DualEncoder(model)) != fingerprint(DualEncoder(model, passage_length=9))
    changed = dual_encoder(folders["teacher"])
    next(changed.parameters()).data[0] += 1
    assert fingerprint(DualEncoder(model)) != fingerprint(DualEncoder(changed))


def test_what_does_not_fit_together_is_said_before_the_first_step(folders):
    big, small = teacher(folders), student(folders)
    sampler = Sampler(worded(), 4, 1)
    with pytest.raises(InputError, match="teacher: Lead needs a teacher"):
        distill(small, None, Lead(), sampler, Recipe(1), schedule(big, small))
    with pytest.raises(InputError, match="Lead needs a schedule of layers"):
        distill(small, big, Lead(), sampler, Recipe(1))
    with pytest.raises(InputError, match="schedule: expected 4 teacher layers and 2 student layers"):
        distill(small, big, Lead(), sampler, Recipe(1), LayerSchedule(3, 2, 1))
    with pytest.raises(InputError, match="expected the accelerator's 1 processes"):
        distill(small, big, Lead(), Sampler(worded(), 4, 1, processes=2), Recipe(1), schedule(big, small))
    for flag in (False, True):
        with pytest.raises(InputError, match=r"co_train: Lead (only reads|trains) the teacher"):
            distill(
                small, big, Lead(co_train=flag), sampler, Recipe(1), schedule(big, small), co_train=not flag
            )
    cross = CrossEncoderScorer(cross_encoder(folders["cross"]))
    with pytest.raises(InputError, match="expected at least one negative a query"):
        distill(small, cross, Lead(), Sampler(worded(), 4, 0), Recipe(1), schedule(cross, small))
    other = make_objective(
        "minilm", small, DualEncoder(dual_encoder(folders["distil"])), LayerOptions(), co_train=False, seed=0
    )
    with pytest.raises(InputError, match="minilm needs the same tokens on both sides"):
        distill(small, DualEncoder(dual_encoder(folders["distil"])), other, sampler, Recipe(1))
    with pytest.raises(InputError, match="lr: expected a number above 0"):
        Recipe(1, lr=0)


def test_a_loss_that_is_no_number_stops_the_run(folders):
    small = student(folders)
    with torch.no_grad():
        next(small.parameters()).fill_(torch.nan)
    objective = make_objective("none", small, None, LayerOptions(), co_train=False, seed=0)
    with pytest.raises(TrainingDiverged, match="the loss is no number"):
        distill(small, None, objective, Sampler(worded(), 4, 1), Recipe(1))


WORK = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_data import worded
from tiny_models import dual_encoder
from lead_kd.objectives import Lead
from lead_kd.sampling import Sampler
from lead_kd.scorers import DualEncoder
from lead_kd.selection import LayerSchedule
from lead_kd.training import Recipe, distill
world = int(os.environ.get("WORLD_SIZE", 1))
names = ("student", "teacher")
models = [DualEncoder(dual_encoder({root!r} + "/" + name, "mean", normalize=True)) for name in names]
for part in models[0].modules():
    if isinstance(part, torch.nn.Dropout):
        part.p = 0.0
distill(
    *models, Lead(1.0, reweight=False), Sampler(worded(), 4 // world, 1, processes=world),
    Recipe(3, lr=1e-3, log_every=1), LayerSchedule(4, 2, 2, every=2), out={out!r},
)
"""


def start(tests, folders, out, **environment):
    code = WORK.format(tests=str(tests), root=str(folders["student"].parent), out=str(out))
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "ACCELERATE_USE_CPU": "true", **environment}
    )


def test_two_processes_train_as_one_with_all_queries(folders, tmp_path):
    """Gradients of gathered candidates are averaged over processes: the student is the same."""
    import socket

    from safetensors.torch import load_file

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    tests = Path(__file__).parent
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "ACCELERATE_TORCH_BACKEND": "gloo",
    }
    running = [
        start(tests, folders, tmp_path / "two", **common, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(2)
    ]
    running.append(start(tests, folders, tmp_path / "one"))
    assert [process.wait(300) for process in running] == [0, 0, 0]
    one, two = (load_file(tmp_path / name / CHECKPOINT) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        # Keys' biases shift all scores of a softmax alike: their gradient is rounding, which Adam magnifies.
        if name.startswith("module.") and not name.endswith("key.bias"):
            torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5)


def test_a_killed_process_leaves_a_whole_checkpoint(folders, tmp_path):
    code = WORK.format(
        tests=str(Path(__file__).parent), root=str(folders["student"].parent), out=str(tmp_path / "run")
    )
    code = code.replace("Recipe(3, lr=1e-3, log_every=1)", "Recipe(100000, lr=1e-3, checkpoint_every=1)")
    process = subprocess.Popen([sys.executable, "-c", code])
    limit = time.monotonic() + 120
    while not (tmp_path / "run" / CHECKPOINT).exists() and time.monotonic() < limit:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    from safetensors import safe_open

    with safe_open(tmp_path / "run" / CHECKPOINT, framework="pt") as file:
        about = file.metadata()
    assert int(about["step"]) >= 1
    assert json.loads(about["settings"])["objective"] == "Lead"
