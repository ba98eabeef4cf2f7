from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosted_models import images, optimizer_for, small_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import csq
from csq.activations import LsqQuantizer
from csq.planes import BitPlanes
from csq.trainer import add_schedule
from shared_core import InputError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(the search kept fewer|settled at)", "ignore:hardened at temperature"
)

EXAMPLES, BATCH, EPOCHS = 32, 8, 4
STEPS = EXAMPLES // BATCH * EPOCHS


def _model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=40,
        num_hidden_layers=1,
        max_position_embeddings=8,
        num_labels=2,
        pad_token_id=None,
        **sizes,
    )
    return csq.parametrize(BertForSequenceClassification(config))


def _rows() -> list[dict[str, Any]]:
    """The first token says the class."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 40, (EXAMPLES, 6), generator=generator)
    labels = torch.randint(0, 2, (EXAMPLES,), generator=generator)
    tokens[:, 0] = labels
    return [{"input_ids": row, "labels": int(label)} for row, label in zip(tokens, labels, strict=True)]


def _trainer(folder: Path, **more: Any) -> Trainer:
    options: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": EPOCHS,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": 5,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(str(folder), **{**options, **more})
    return Trainer(_model(), arguments, train_dataset=_rows(), eval_dataset=_rows())


def _scheme(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.mask_text for layer in csq.report(model).layers}


def _same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_trainer_grows_a_scheme_that_meets_its_target(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    callback = add_schedule(trainer, 3.0, lam=0.3, on_miss="settle")
    trainer.train()
    assert callback.schedule is not None
    assert callback.schedule.step_count == STEPS
    assert callback.schedule.beta == 200
    final = csq.harden(trainer.model)
    assert final.report.average_bits == pytest.approx(3.0, rel=0.02)
    assert type(final) is BertForSequenceClassification
    logged = [entry for entry in trainer.state.log_history if "csq_precision" in entry]
    assert len(logged) == STEPS
    assert logged[-1]["csq_precision"] == pytest.approx(final.report.average_bits)
    assert [entry["csq_beta"] for entry in logged] == sorted(entry["csq_beta"] for entry in logged)


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """The model of a run without a break."""
    trainer = _trainer(tmp_path_factory.mktemp("whole"))
    add_schedule(trainer, 3.0, lam=0.3, on_miss="settle")
    trainer.train()
    return trainer.model


@pytest.mark.parametrize("stop", [6, 14])  # in the search, which ends at 12, and after it
def test_a_run_resumed_from_the_trainers_checkpoint_ends_like_one_without_a_break(
    stop: int, whole: nn.Module, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"lam": 0.3, "on_miss": "settle"}
    broken = _trainer(tmp_path, save_steps=stop)
    add_schedule(broken, 3.0, **options)
    broken.add_callback(_StopAt(stop))
    broken.train()
    assert not _same(broken.model, whole)
    resumed = _trainer(tmp_path, save_steps=stop)
    add_schedule(resumed, 3.0, **options)
    resumed.train(resume_from_checkpoint=True)
    assert _same(resumed.model, whole)
    assert _scheme(resumed.model) == _scheme(whole)


def test_resuming_with_another_target_is_refused(tmp_path: Path) -> None:
    first = _trainer(tmp_path, save_steps=4)
    add_schedule(first, 3.0, lam=0.3, on_miss="settle")
    first.add_callback(_StopAt(4))
    first.train()
    other = _trainer(tmp_path)
    add_schedule(other, 2.0, lam=0.3, on_miss="settle")
    with pytest.raises(InputError, match="target_bits 3 there, 2 here"):
        other.train(resume_from_checkpoint=True)


def test_the_penalty_is_in_the_loss_of_training_and_not_of_evaluation(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    plain = _trainer(tmp_path).evaluate()["eval_loss"]
    callback = add_schedule(trainer, 1.0, lam=1e4)
    callback.schedule = csq.Schedule(trainer.model, 1.0, STEPS, lam=1e4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain)
    batch = {"input_ids": torch.ones(2, 6, dtype=torch.long), "labels": torch.tensor([0, 1])}
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert loss > 1000
    penalty = callback.schedule.penalty().item()
    assert (loss - outputs["loss"]).item() == pytest.approx(penalty, rel=1e-3)


@pytest.mark.parametrize("accepts", [True, False])  # whether the model scales its loss itself
def test_the_penalty_counts_once_a_step_however_many_batches_are_accumulated(
    accepts: bool, tmp_path: Path
) -> None:
    def mask_gradients(parts: int) -> list[Tensor]:
        trainer = _trainer(
            tmp_path,
            per_device_train_batch_size=BATCH // parts,
            gradient_accumulation_steps=parts,
            max_steps=2,
            max_grad_norm=0.0,
        )
        trainer.model_accepts_loss_kwargs = accepts
        add_schedule(trainer, 1.0, lam=50.0, on_miss="settle")
        found: list[Tensor] = []

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                found.extend(p.mask.grad.clone() for p in csq.bit_layers(kwargs["model"]).values())

        trainer.add_callback(Look())
        trainer.train()
        return found[: len(csq.bit_layers(trainer.model))]

    for whole, split in zip(mask_gradients(1), mask_gradients(4), strict=True):
        torch.testing.assert_close(split, whole, rtol=2e-2, atol=1e-2)


def test_gates_masks_scales_and_steps_do_not_decay(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    linear = next(m for m in trainer.model.modules() if isinstance(m, nn.Linear))
    linear.add_module("input_quantizer", LsqQuantizer(4))
    add_schedule(trainer, 3.0)
    optimizer = trainer.create_optimizer()
    csq.check_param_groups(trainer.model, optimizer)  # a warning is an error here
    gates = {id(p) for m in trainer.model.modules() if isinstance(m, BitPlanes) for p in m.parameters()}
    gates.add(id(linear.input_quantizer.log_step))
    assert all(
        not group["weight_decay"]
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in gates
    )


def test_a_trainer_that_cannot_be_driven_is_refused(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.create_optimizer()
    with pytest.raises(InputError, match="has its optimizer already"):
        add_schedule(trainer, 3.0)
    plain = Trainer(csq.harden(_model()), trainer.args)
    with pytest.raises(InputError, match=r"call csq\.parametrize first"):
        add_schedule(plain, 3.0)


def _accelerated(folder: Path | None, stop: int | None, resume: bool) -> nn.Module:
    """Sixteen steps under accelerate; saves its state at `stop` and ends there."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = csq.parametrize(small_net(), kernel="eager")
    loader = DataLoader(TensorDataset(*images(32)), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer_for(model), loader)
    if resume:
        accelerator.load_state(str(folder))
    schedule = csq.Schedule(model, 3.0, STEPS, lam=0.3, on_miss="settle")
    while schedule.step_count < STEPS:
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y) + schedule.penalty()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if schedule.step_count == stop:
            accelerator.save_state(str(folder))
            break
    return accelerator.unwrap_model(model)


def test_accelerates_own_checkpoints_resume_the_schedule(tmp_path: Path) -> None:
    whole = _accelerated(None, None, resume=False)
    assert not _same(_accelerated(tmp_path, 8, resume=False), whole)
    assert _same(_accelerated(tmp_path, None, resume=True), whole)
    for planes in csq.bit_layers(whole).values():
        assert (int(planes.step), float(planes.temperature)) == (STEPS, 200)
