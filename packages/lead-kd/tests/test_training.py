"""The loop against a plain one, resuming to the bit after a kill, rivals, co-training, two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_data import worded
from tiny_models import (
    PASSAGES,
    QUERIES,
    WORDS,
    colbert,
    cross_encoder,
    dual_encoder,
    save_bert,
    save_distilbert,
)

from lead_kd.cache import CachedTeacher, TeacherCache, build_cache, fingerprint
from lead_kd.checkpoints import read_checkpoint, write_checkpoint
from lead_kd.corpus import Corpus
from lead_kd.jobs import LayerOptions, make_objective
from lead_kd.losses import lead_loss
from lead_kd.objectives import Contrastive, Lead
from lead_kd.sampling import Sampler
from lead_kd.scorers import ColBERT, CrossEncoderScorer, DualEncoder
from lead_kd.selection import LayerSchedule
from lead_kd.training import CHECKPOINT, Recipe, distill
from shared_core import InputError
from shared_core.errors import TrainingDiverged


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


def test_a_passage_under_two_ids_is_one_candidate(folders):
    """Its second id is neither another candidate nor, where the first is a positive, a negative."""
    plain = worded(negatives=1)
    texts = list(plain.corpus)
    hard = [plain.corpus.row(names[0]) for names in plain.negatives.values()]
    texts[hard[0]] = texts[0]  # the hard negative of the first query says what its positive says
    texts[hard[1]] = texts[hard[2]]
    data = replace(plain, corpus=Corpus(plain.corpus.ids, texts))
    small, objective = student(folders), Contrastive()

    def masked(data):
        return distill(small, None, objective, Sampler(data, 10, 1), Recipe(1, lr=1e-9)).masked

    assert masked(plain) == 0
    # Of the first query both copies but its target; for the others the positive's copy in column 1; and the
    # second of the two equal negatives for all ten.
    assert masked(data) == 10 + 10


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
    single, gradients = student(folders, dropout=False), []
    for group in (sampler.group(number) for number in range(3)):
        scores = single(single.collate(group.queries, group.passages)).final
        loss = torch.nn.functional.cross_entropy(scores, torch.tensor([0, 2])) / 3
        gradients.append(torch.autograd.grad(loss, list(single.parameters()), allow_unused=True))
    signs = 0
    for (name, _), *parts in zip(single.named_parameters(), *gradients, strict=True):
        if parts[0] is None or name.endswith("key.bias"):
            continue
        # Adam's first step is the rate times the sign of the gradient.
        total = torch.stack(parts).sum(0)
        clear = total.abs() > 1e-4
        moved = (dict(model.named_parameters())[name] - before[name])[clear]
        assert torch.equal(moved.sign(), -total[clear].sign()), name
        signs += int(clear.sum())
    assert signs > 1000


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
    with pytest.raises(InputError, match="holds a run already; --resume goes on with it"):
        run()
    with pytest.raises(InputError, match=r"another recipe: expected lr 0\.002 \(got .lr 0\.001"):
        run(lr=2e-3, resume=True)
    (tmp_path / CHECKPOINT).write_bytes(b"half a file")
    with pytest.raises(InputError, match="is no whole checkpoint"):
        run(resume=True)
    (tmp_path / CHECKPOINT).unlink()
    run(resume=True)  # where there is none, it begins
    assert (tmp_path / CHECKPOINT).exists()


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
    with pytest.raises(
        TrainingDiverged, match=r"lr: the loss is nan at step 1: try a lower learning rate \(got"
    ):
        distill(small, None, objective, Sampler(worded(), 4, 1), Recipe(1))


WORK = """
import os, sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_training import two_process_cases, run_case
from lead_kd.training import Recipe
for name in two_process_cases if {case!r} == "all" else [{case!r}]:
    run_case(
        name, {root!r}, {out!r} + "/" + name, int(os.environ.get("WORLD_SIZE", 1)), {recipe},
        on_step=lambda step, loss: time.sleep({pause}),
    )
"""

two_process_cases = ("frozen", "co-trained", "colbert", "cross", "regression", "trainer")


def run_case(name, root, out, world, recipe, **options):
    """Train with half of the queries a process, or with all in one."""
    torch.manual_seed(0)
    small = DualEncoder(dual_encoder(f"{root}/student", "mean", normalize=True))
    for part in small.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    if name == "colbert":
        big = ColBERT(colbert(f"{root}/teacher"))
    elif name == "cross":
        big = CrossEncoderScorer(cross_encoder(f"{root}/cross"))
    else:
        big = DualEncoder(dual_encoder(f"{root}/teacher", "mean", normalize=True))
    for part in big.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    if name == "trainer":
        return run_trainer(small, big, out, world)
    co_train = name == "co-trained"
    # A process weights layers by its own queries, as released: with equal weights both are the same loss.
    objective = (
        make_objective("regression", small, big, LayerOptions(), co_train=False, seed=0)
        if name == "regression"
        else Lead(1.0, co_train=co_train, reweight=False)
    )
    return distill(
        small, big, objective, Sampler(worded(), 4 // world, 1, processes=world), recipe,
        LayerSchedule(big.n_layers, 2, 2, every=2), co_train=co_train, out=out, **options,
    )  # fmt: skip


def run_trainer(small, big, out, world):
    """LeadLoss: the same query stands in both processes, with two positives."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    from lead_kd.sbert import LeadDataCollator, LeadLoss, follow_steps

    loss = LeadLoss(small.model, big, objective=Lead(1.0, reweight=False), pairs=2, every=1)
    rows = {
        "query": [QUERIES[0], QUERIES[1], QUERIES[0], QUERIES[3]],
        "positive": [PASSAGES[0], PASSAGES[2], PASSAGES[4], PASSAGES[6]],
        "negative": [PASSAGES[1], PASSAGES[3], PASSAGES[5], PASSAGES[7]],
    }
    trainer = SentenceTransformerTrainer(
        small.model,
        SentenceTransformerTrainingArguments(
            out, max_steps=3, per_device_train_batch_size=4 // world, report_to="none", use_cpu=True,
            learning_rate=1e-3, disable_tqdm=True, save_strategy="no", max_grad_norm=0, seed=1,
        ),
        Dataset.from_dict(rows), loss=loss, data_collator=LeadDataCollator(small.model.preprocess),
    )  # fmt: skip
    follow_steps(trainer, loss)
    trainer.train()
    if int(os.environ.get("RANK", 0)) == 0:
        weights = {f"module.{name}": value for name, value in small.model.state_dict().items()}
        Path(out).mkdir(parents=True, exist_ok=True)
        save_file({name: value.clone() for name, value in weights.items()}, Path(out) / CHECKPOINT)


def start(folders, out, case="all", recipe="Recipe(3, lr=1e-3, log_every=1)", pause=0, **environment):
    code = WORK.format(
        tests=str(Path(__file__).parent), root=str(folders["student"].parent), out=str(out), case=case,
        recipe=recipe, pause=pause,
    )  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "ACCELERATE_USE_CPU": "true", **environment}
    )


@pytest.fixture(scope="module")
def one_and_two(folders, tmp_path_factory):
    """The cases in one process, and the same in two."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    out = tmp_path_factory.mktemp("processes")
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "ACCELERATE_TORCH_BACKEND": "gloo",
    }
    running = [
        start(folders, out / "two", **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)
    ]
    for case in two_process_cases:
        run_case(case, folders["student"].parent, out / "one" / case, 1, Recipe(3, lr=1e-3, log_every=1))
    assert [process.wait(300) for process in running] == [0, 0]
    return out


@pytest.mark.parametrize("case", two_process_cases)
def test_two_processes_train_as_one_with_all_queries(one_and_two, case):
    """Gradients of gathered candidates are averaged over processes: student and teacher are the same."""
    one, two = (load_file(one_and_two / name / case / CHECKPOINT) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert any(name.startswith("module.teacher") for name in one) == (case == "co-trained")
    for name, value in one.items():
        # Keys' biases shift all scores of a softmax alike: their gradient is rounding, which Adam magnifies.
        if name.startswith("module.") and not name.endswith("key.bias"):
            torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_killed_process_is_gone_on_with_to_the_same_bits(folders, tmp_path):
    root, recipe = folders["student"].parent, Recipe(60, lr=1e-3, checkpoint_every=3)
    process = start(folders, tmp_path, "frozen", repr(recipe), pause=0.05)
    checkpoint = tmp_path / "frozen" / CHECKPOINT
    limit = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with safe_open(checkpoint, framework="pt") as file:
        assert 1 <= json.loads(file.metadata()["state"])["step"] < 60
    run_case("frozen", root, tmp_path / "frozen", 1, recipe, resume=True)
    run_case("frozen", root, tmp_path / "whole" / "frozen", 1, recipe)
    again, whole = load_file(checkpoint), load_file(tmp_path / "whole" / "frozen" / CHECKPOINT)
    assert same(again, whole)


def test_the_scale_of_float16_losses_is_gone_on_with(tmp_path):
    scaler, fresh = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu")
    scaler.load_state_dict({**scaler.state_dict(), "scale": 1024.0, "_growth_tracker": 7})
    write_checkpoint(tmp_path / "c", 2, {}, {}, {}, scaler)
    assert read_checkpoint(tmp_path / "c", {}, {}, {}, fresh) == 2
    assert fresh.state_dict() == scaler.state_dict()
