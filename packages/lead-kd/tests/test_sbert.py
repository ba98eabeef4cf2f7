"""LEAD in sentence-transformers' own Trainer, with a teacher that has another tokenizer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from tiny_models import PASSAGES, QUERIES, cross_encoder, dual_encoder, save_bert, save_distilbert

from lead_kd.cache import CachedTeacher, build_cache
from lead_kd.losses import lead_loss
from lead_kd.objectives import Contrastive, Embedding, Lead
from lead_kd.sbert import LeadDataCollator, LeadLoss, follow_steps
from lead_kd.scorers import CrossEncoderScorer, DualEncoder
from shared_core import InputError

ROWS = {
    "query": QUERIES,
    "positive": PASSAGES[::2],
    "negative": PASSAGES[1::2],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return (
        save_bert(root / "student", layers=2),
        save_distilbert(root / "teacher"),
        save_bert(root / "cross", layers=3, classifier=True),
    )


def batch_of(model, rows=ROWS):
    collator = LeadDataCollator(model.preprocess)
    names = list(rows)
    batch = collator([dict(zip(names, row, strict=True)) for row in zip(*rows.values(), strict=True)])
    return [
        {key.removeprefix(f"{name}_"): value for key, value in batch.items() if key.startswith(f"{name}_")}
        for name in names
    ]


def test_the_loss_of_a_batch_is_that_of_the_plain_functions(folders):
    model = dual_encoder(folders[0], "mean", normalize=True).eval()
    teacher = DualEncoder(dual_encoder(folders[1]).eval())
    loss = LeadLoss(model, teacher, pairs=2, layer_temperature=2.0)
    found = loss(batch_of(model))
    student = DualEncoder(model)
    with torch.no_grad():
        scores, told = (one(one.collate(QUERIES, PASSAGES)) for one in (student, teacher))
    terms = lead_loss(
        scores.layers, told.layers, torch.arange(0, 8, 2), loss.schedule.pairs(0), layer_temperature=2.0,
        student_final=scores.final, teacher_final=told.final,
    )  # fmt: skip
    assert found.item() == pytest.approx(terms.total.item(), rel=1e-5)
    assert loss.log["lyr"] == pytest.approx(terms.lyr.item(), rel=1e-4)


def test_copies_and_other_positives_of_the_same_query_are_no_candidates(folders):
    model = dual_encoder(folders[0]).eval()
    rows = {
        "query": ["a", "a", "the"],
        "positive": ["moon", "star", "cat"],
        "negative": ["cat", "iron", "iron"],
    }
    loss = LeadLoss(model, DualEncoder(dual_encoder(folders[1]).eval()), objective=Contrastive())
    found = loss(batch_of(model, rows))
    with torch.no_grad():
        scorer = DualEncoder(model)
        scores = scorer(scorer.collate(rows["query"], ["moon", "cat", "star", "iron", "cat", "iron"])).final
    # Of query 1 and 2 "moon" and "star" are positives; "cat" in column 4 and "iron" in column 5 are copies.
    kept = [[0, 1, 3], [1, 2, 3], [0, 2, 3, 4]]
    target = [0, 1, 3]
    expected = (
        -sum(
            scores[row, columns].log_softmax(0)[at]
            for row, (columns, at) in enumerate(zip(kept, target, strict=True))
        )
        / 3
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_several_negatives_are_in_the_order_of_a_step(folders):
    model = dual_encoder(folders[0], "mean", normalize=True).eval()
    teacher = DualEncoder(dual_encoder(folders[1]).eval())
    rows = {
        "query": QUERIES[:2],
        "positive": PASSAGES[:2],
        "negative_1": PASSAGES[2:4],
        "negative_2": PASSAGES[4:6],
    }
    loss = LeadLoss(model, teacher, pairs=1, layer_temperature=2.0)
    found = loss(batch_of(model, rows))
    student, passages = DualEncoder(model), [PASSAGES[n] for n in (0, 2, 4, 1, 3, 5)]
    with torch.no_grad():
        scores, told = (one(one.collate(QUERIES[:2], passages)) for one in (student, teacher))
    terms = lead_loss(
        scores.layers, told.layers, torch.tensor([0, 3]), loss.schedule.pairs(0), layer_temperature=2.0,
        student_final=scores.final, teacher_final=told.final,
    )  # fmt: skip
    assert found.item() == pytest.approx(terms.total.item(), rel=1e-5)


def test_a_cross_encoder_teaches_too(folders):
    model = dual_encoder(folders[0])
    loss = LeadLoss(model, CrossEncoderScorer(cross_encoder(folders[2])))
    loss(batch_of(model)).backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def arguments(tmp_path, steps, **more):
    return SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=steps, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        save_steps=2, logging_steps=1, disable_tqdm=True, learning_rate=1e-3, seed=1, **more,
    )  # fmt: skip


def test_the_trainer_trains_only_the_student_and_draws_pairs_anew(folders, tmp_path):
    model = dual_encoder(folders[0], "mean", normalize=True)
    teacher = DualEncoder(dual_encoder(folders[1]))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    loss = LeadLoss(model, teacher, pairs=1, every=1, seed=2)
    assert loss.schedule.pairs(0) != loss.schedule.pairs(3)  # else nothing would be seen below
    trainer = SentenceTransformerTrainer(
        model, arguments(tmp_path, 4), Dataset.from_dict(ROWS), loss=loss,
        data_collator=LeadDataCollator(model.preprocess),
    )  # fmt: skip
    follow_steps(trainer, loss)
    trainer.train()
    assert loss.step == 3
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert any(not torch.equal(start[name], value) for name, value in model.state_dict().items())
    logged = [record for record in trainer.state.log_history if "loss" in record]
    assert all("lead_lyr" in record for record in logged)
    trainer.save_model(str(tmp_path / "saved"))
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(
        torch.from_numpy(loaded.encode(QUERIES)),
        torch.from_numpy(model.encode(QUERIES)),
        rtol=1e-5,
        atol=1e-6,
    )
    assert not loaded[0].model.config.output_hidden_states


def test_accumulated_batches_have_the_same_pairs_and_prompts_stay_the_students(folders, tmp_path):
    model, teacher = dual_encoder(folders[0]), DualEncoder(dual_encoder(folders[1]))
    loss = LeadLoss(model, teacher, pairs=1, every=1, seed=2)
    steps, told, read = [], [], []
    schedule, collate, preprocess = loss.schedule, teacher.collate, model.preprocess

    class Watched:
        def pairs(self, step):
            steps.append(step)
            return schedule.pairs(step)

    def watched(queries, passages):
        told.extend(queries)
        return collate(queries, passages)

    def seen(texts, *rest, **more):
        read.append((tuple(texts), more.get("prompt")))
        return preprocess(texts, *rest, **more)

    loss.schedule, teacher.collate = Watched(), watched
    options = arguments(tmp_path, 2, gradient_accumulation_steps=2, prompts={"query": "what "})
    options.per_device_train_batch_size = 2
    trainer = SentenceTransformerTrainer(
        model, options, Dataset.from_dict(ROWS), loss=loss, data_collator=LeadDataCollator(seen)
    )
    follow_steps(trainer, loss)
    trainer.train()
    assert steps == [0, 0, 1, 1]
    assert set(told) == set(QUERIES)  # without the student's prompt
    assert {prompt for texts, prompt in read if set(texts) <= set(QUERIES)} == {"what "}
    assert {prompt for texts, prompt in read if set(texts) <= set(PASSAGES)} <= {None, ""}


def test_a_cache_teaches_in_the_trainer(folders, tmp_path):
    model = dual_encoder(folders[0])
    teacher = DualEncoder(dual_encoder(folders[1]).eval())
    cache = build_cache(teacher, tmp_path / "cache", QUERIES, PASSAGES)
    live, read = (LeadLoss(model, one, layer_temperature=1.0) for one in (teacher, CachedTeacher(cache)))
    model.eval()
    assert read(batch_of(model)).item() == pytest.approx(live(batch_of(model)).item(), rel=2e-2)


def test_objectives_that_train_the_teacher_or_read_features_are_refused(folders):
    model, teacher = dual_encoder(folders[0]), DualEncoder(dual_encoder(folders[1]))
    for objective in (Lead(co_train=True), Embedding(16, 24)):
        with pytest.raises(InputError, match="only reads scores of a frozen teacher"):
            LeadLoss(model, teacher, objective=objective)


def test_without_the_collator_the_error_says_what_to_give(folders):
    model = dual_encoder(folders[0])
    loss = LeadLoss(model, DualEncoder(dual_encoder(folders[1])))
    features = [{k: v for k, v in part.items() if k != "lead_text"} for part in batch_of(model)]
    with pytest.raises(InputError, match="give the trainer data_collator=LeadDataCollator"):
        loss(features)
    with pytest.raises(InputError, match="expected a query column and a positive column"):
        loss(batch_of(model)[:1])
