from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from training_runs import METHODS, STEPS, run, small_model, stripes

import csq
from csq import rivals
from csq.checkpoints import read_checkpoint
from csq.data import PixelSplit
from csq.evaluate import soft_hard_gap, top1
from csq.methods import BsqStage, CsqStage, Method, Stage, UniformStage
from csq.training import (
    CHECKPOINT,
    Recipe,
    augment,
    batch_indices,
    bn_batches,
    rate,
    stage_ends,
    train,
)
from shared_core import InputError
from shared_core.errors import TrainingDiverged

pytestmark = pytest.mark.filterwarnings(
    # Runs of 24 steps are too short for a search; what is tested is not accuracy.
    "ignore:.*(the search (kept fewer|ended at)|settled at)",
    "ignore:hardened at temperature",
)


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_run_resumed_at_any_stage_ends_bit_for_bit_like_one_without_a_break(
    name: str, tmp_path: Path
) -> None:
    whole = run(name)

    class Stop(Exception):
        pass

    def stop_at(last: int):
        def progress(step: int, loss: float) -> None:
            if step == last:
                raise Stop

        return progress

    for last in (
        5,
        7,
        19,
    ):  # 5 and 7: before and after the first stage's end; the checkpoint is at 4 and at 4
        with pytest.raises(Stop):
            run(name, tmp_path, resume=True, progress=stop_at(last))
    assert read_checkpoint(tmp_path / CHECKPOINT).step == 16
    resumed = run(name, tmp_path, resume=True)
    assert resumed.history == whole.history
    assert _same(resumed.model.state_dict(), whole.model.state_dict())
    assert _same(resumed.checkpoint.optimizer, whole.checkpoint.optimizer)


def test_a_finished_run_is_not_trained_on(tmp_path: Path) -> None:
    run("csq", tmp_path)
    steps = []
    run("csq", tmp_path, resume=True, progress=lambda step, loss: steps.append(step))
    assert not steps


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run("csq", tmp_path)
    other = Method("csq", (CsqStage("csq", 1.0, lam=0.3, target_bits=3.0),))
    recipe = Recipe(STEPS, batch_size=10, lr=0.05, shift=1, flip=True, log_every=4)
    with pytest.raises(InputError, match=r"run with another method.*target_bits=3\.0"):
        train(small_model(), other, stripes(), recipe, folder=tmp_path, resume=True)
    with pytest.raises(InputError, match=r"another recipe: expected seed 1 \(got 'seed 0'\)"):
        train(small_model(), METHODS["csq"], stripes(), replace(recipe, seed=1), folder=tmp_path, resume=True)


def test_a_shared_first_stage_gives_the_same_run(tmp_path: Path) -> None:
    first = run("lsq", stages=1).checkpoint
    assert first.step == STEPS // 4
    for name in ("lsq", "hawq", "bsq"):
        assert _same(run(name, start=first).model.state_dict(), run(name).model.state_dict())
    with pytest.raises(InputError, match="not those that this method begins with"):
        run("csq", start=first)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    data, model = stripes(), small_model()
    steps: list[int] = []

    def poison(step: int, loss: float) -> None:
        steps.append(step)
        if step == 6:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))

    recipe = Recipe(STEPS, batch_size=10, checkpoint_every=4)
    with pytest.raises(TrainingDiverged, match=r"the loss is nan at step 6.*lower learning rate.*checkpoint"):
        train(model, METHODS["float"], data, recipe, folder=tmp_path, progress=poison)
    assert steps[-1] == 6
    kept = read_checkpoint(tmp_path / CHECKPOINT)
    assert kept.step == 4
    assert all(bool(torch.isfinite(value).all()) for value in kept.model.values())


def test_parameters_that_are_no_numbers_reach_no_checkpoint(tmp_path: Path) -> None:
    model = small_model()

    def poison(step: int, loss: float) -> None:
        if step == 3:  # seen by no loss before the checkpoint of step 4
            model[0].weight.register_hook(lambda gradient: gradient * float("nan"))

    with pytest.raises(TrainingDiverged, match=r"after step 4 .* is not finite"):
        train(
            model, METHODS["float"], stripes(), Recipe(8, batch_size=10, checkpoint_every=4),
            folder=tmp_path, progress=poison,
        )  # fmt: skip
    assert not (tmp_path / CHECKPOINT).exists()


def test_training_never_reads_the_test_part() -> None:
    class Forbidden(PixelSplit):
        def read(self, indices: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the test part was read")

        subset = read

    data = stripes()
    blind = replace(data, test=Forbidden(data.test.read(torch.arange(3)), torch.zeros(3, dtype=torch.int64)))
    recipe = Recipe(8, batch_size=10, evaluate_every=4)
    for name in ("csq", "hawq", "bsq"):
        trained = train(small_model(), METHODS[name], blind, recipe)
        METHODS[name].harden(trained.model, bn_batches(blind, 10))
        assert "validation" in trained.history[-1]


def test_torchs_own_generator_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    run("csq")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_reads_each_image_once_in_a_new_order() -> None:
    first, second = (
        torch.cat([batch_indices(12, 4, seed=3, step=step) for step in steps])
        for steps in ((0, 1, 2), (3, 4, 5))
    )
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert first.tolist() != second.tolist()


def test_augmentation_moves_and_mirrors_but_changes_no_pixel() -> None:
    pixels = torch.zeros(400, 1, 5, 5, dtype=torch.uint8)
    pixels[:, 0, 2, 1] = 9
    moved = augment(pixels, 1, True, torch.Generator().manual_seed(0))
    where = {tuple(place) for place in (moved[:, 0] == 9).nonzero()[:, 1:].tolist()}
    # Column 1 or, mirrored, 3, by one in each direction.
    assert where == {(row, column) for row in (1, 2, 3) for column in range(5)}
    assert (moved == 9).sum() == 400


def test_the_rate_rises_linearly_and_falls_as_a_cosine_in_each_stage() -> None:
    rates = [rate(step, 100, 0.1) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert max(rates) == rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] < 0.001
    two = Method("x", (Stage("a", 0.5, lr=1.0), Stage("b", 0.5, lr=0.1)))
    history = train(
        small_model(), two, stripes(), Recipe(20, batch_size=10, lr=0.5, log_every=1, warmup=0.0)
    ).history
    assert history[0]["lr"] == 0.5
    assert history[10]["lr"] == pytest.approx(0.05)


def test_stages_need_steps_and_shares_that_sum_to_1() -> None:
    with pytest.raises(InputError, match="too few for the 2 stages"):
        stage_ends(METHODS["lsq"], 1)
    with pytest.raises(InputError, match="expected shares that sum to 1"):
        Method("x", (Stage("a", 0.5),))


def test_hawq_and_random_meet_their_budget_and_uniform_is_uniform() -> None:
    for name in ("hawq", "random"):
        model = run(name).model
        report = METHODS[name].harden(model, None).report
        assert 2.5 < report.average_bits <= 3.0
    assert {layer.bits for layer in rivals.rival_layers(run("ste").model).values()} == {2}


def test_bsq_finetuning_starts_from_the_weights_that_bsq_found() -> None:
    method = METHODS["bsq"]
    at_end = run("bsq", stages=2)
    planes = {name: chain[0]().clone() for name, chain in _parametrized(at_end.model)}
    model = small_model()
    stage = method.stages[2]
    for each, plan in zip(method.stages[:2], at_end.checkpoint.plans, strict=True):
        each.install(model, plan, 10)
    model.load_state_dict(at_end.model.state_dict())
    stage.install(model, stage.plan(model, lambda n: pytest.fail("reads no data"), 0), 10)
    for name, chain in _parametrized(model):
        torch.testing.assert_close(chain[0](chain.original), planes[name], rtol=1e-5, atol=1e-6)


def _parametrized(model: nn.Module):
    return [
        (n, m.parametrizations.weight) for n, m in model.named_modules() if hasattr(m, "parametrizations")
    ]


def test_bsq_trains_on_where_its_search_has_emptied_a_layer() -> None:
    stages = (Stage("float", 0.3), BsqStage("bsq", 0.4, alpha=100.0), METHODS["bsq"].stages[2])
    method = Method("bsq", (*stages[:2], replace(stages[2], share=0.3)))
    trained = train(small_model(), method, stripes(), Recipe(20, batch_size=10, lr=0.1))
    assert trained.checkpoint.plans[-1]["emptied"] == ["0", "4", "8"]
    report = rivals.harden(trained.model).report
    assert all(bool(layer.codes.any()) for layer in report.layers)  # finetuning grew weights again
    assert [layer.bits for layer in report.layers] == [1, 1, 1]
    assert {layer.stored_bits for layer in report.layers} == {2}  # ternary: the size is counted, not waived


def test_bsqs_regularizer_prunes_bits_and_more_of_it_prunes_more() -> None:
    def bits(alpha: float) -> float:
        method = Method("bsq", (Stage("float", 0.3), BsqStage("bsq", 0.7, alpha=alpha)))
        trained = train(small_model(), method, stripes(), Recipe(60, batch_size=10, lr=0.1))
        return rivals.harden(trained.model).report.average_bits

    assert bits(0.3) < bits(1e-6)


@pytest.mark.parametrize("name", ["csq", "lsq"])
def test_hardened_models_classify_stripes(name: str) -> None:
    data, method = stripes(300), METHODS[name]
    trained = train(small_model(), method, data, Recipe(60, batch_size=20, lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hard = method.harden(trained.model, bn_batches(data, 20))
    assert top1(hard, data, data.test) > 0.9
    assert type(hard[0]) is nn.Conv2d


def test_the_soft_hard_gap_is_the_difference_of_accuracies() -> None:
    data = stripes()
    good = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    bad = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    for model, sign in ((good, 1.0), (bad, -1.0)):
        with torch.no_grad():  # difference of neighbouring rows
            wave = torch.tensor([-1.0, 1.0]).repeat(3)[:, None].expand(6, 6).reshape(-1)
            model[1].weight.copy_(torch.stack([-wave, wave]) * sign)
            model[1].bias.copy_(torch.tensor([8.0, -8.0]) * sign)
    gap = soft_hard_gap(good, bad, data, data.test)
    accuracy = top1(good, data, data.test)
    assert gap == pytest.approx(2 * accuracy - 1, abs=1e-6)
    assert accuracy > 0.9


def test_top1_is_the_share_of_images_whose_highest_score_is_right() -> None:
    data = stripes()
    model = small_model().eval()
    right = 0
    for number, label in enumerate(data.test.labels.tolist()):
        scores = model(data.inputs(data.test.read(torch.tensor([number]))))[0].tolist()
        right += scores.index(max(scores)) == label
    assert 0 < right < len(data.test.labels)
    assert top1(model, data, data.test) == pytest.approx(right / len(data.test.labels))
    with torch.no_grad():
        model[8].bias.fill_(float("nan"))
    with pytest.raises(InputError, match="model: the model's scores are not finite"):
        top1(model, data, data.test)


def test_csq_uniform_has_all_its_planes_and_csq_meets_its_target_in_the_same_loop() -> None:
    assert csq.report(run("csq-uniform").model).average_bits == 2
    assert csq.report(run("csq").model).average_bits == pytest.approx(2.0, rel=0.05)
    assert UniformStage("x", 1.0).bits == 2
