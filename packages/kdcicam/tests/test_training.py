"""Training: it learns, resumes to the same bits after a kill, adds up the pool over processes."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trees
from torch import multiprocessing
from training_runs import DATA, Shapes, settings, student
from two_processes import work

from kdcicam.checkpoints import read_checkpoint
from kdcicam.data import load_images
from kdcicam.flagged import EpochBatches, FlaggedImages, draw_flag
from kdcicam.functional import class_sums, updated_pool
from kdcicam.images import Augmentation
from kdcicam.losses import ClassifierLoss, TwoTeacherLoss
from kdcicam.settings import PRESETS, Settings, settings_from
from kdcicam.training import CHECKPOINT, loss_for, parameter_groups, train
from shared_core import InputError
from shared_core.errors import TrainingDiverged

# accelerate's own use of deprecated torch calls; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_it_learns_and_fills_the_pool():
    trained = train(tiny.model(3), DATA, settings(epochs=6))
    assert trained.history[-1]["train_top1"] == 1.0
    assert trained.history[-1]["classes_in_pool"] == 3
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]


@pytest.mark.parametrize("role", ["cls", "loc", "nl-ccam", "cam"])
def test_every_role_trains(role: str):
    auxiliary = {"cls": "fore", "loc": "diff_aux"}.get(role, "none")
    model = tiny.model(3, context=role in ("cls", "loc"))
    asked = settings(role=role, auxiliary=auxiliary, area=0.01, threshold=0.1, epochs=2)
    history = train(model, DATA, asked).history
    assert ("aux" in history[0]) == (auxiliary != "none")
    assert ("ce_raw" in history[0]) == (role in ("cls", "loc"))


def test_one_step_is_adams_on_the_loss_and_one_update_of_the_pool():
    asked = settings(epochs=1, batch_size=12, lr_ratio=0.1)
    trained = train(tiny.model(3), DATA, asked)
    by_hand = tiny.model(3)
    keys = next(iter(EpochBatches(12, 12, 0, 1, 0)))
    images, labels, _ = zip(*(DATA[key] for key in keys), strict=True)
    x, y = torch.stack(images), torch.tensor(labels)
    out = by_hand(x)
    slow = [*by_hand.context_conv.parameters(), *by_hand.backbone.parameters()]
    optimizers = [torch.optim.Adam(by_hand.classifier.parameters(), 0.01), torch.optim.Adam(slow, 0.001)]
    (
        torch.nn.functional.cross_entropy(out.logits, y)
        + torch.nn.functional.cross_entropy(out.logits_raw, y)
    ).backward()
    sums = class_sums(out.cam_raw[range(12), y].detach(), y, out.predicted, 3)
    for optimizer in optimizers:
        optimizer.step()
    for name, value in by_hand.named_parameters():
        torch.testing.assert_close(dict(trained.model.named_parameters())[name], value)
    torch.testing.assert_close(trained.model.pool, updated_pool(torch.zeros(3, 6, 6), sums, 0.01))


def test_a_killed_run_resumes_to_the_same_last_bit(tmp_path: Path):
    script = Path(__file__).with_name("training_runs.py")
    process = subprocess.Popen([sys.executable, script, tmp_path], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / CHECKPOINT).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < read_checkpoint(tmp_path / CHECKPOINT).step < 12
    resumed, whole = student(tmp_path, resume=True), student()
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert same(resumed.checkpoint.optimizer, whole.checkpoint.optimizer)
    assert resumed.history == whole.history
    steps = []
    again = settings(role="student", temperature_cls=4.0, temperature_loc=4.0)
    train(tiny.model(3), DATA, again, folder=tmp_path, resume=True, progress=lambda *done: steps.append(done))
    assert not steps  # a finished run is not trained on


def test_two_processes_train_as_one_and_add_up_their_pools(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (str(tmp_path), port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(first["state"], second["state"])
    alone = train(tiny.model(3), DATA, settings(epochs=2))
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(first["state"][name], value, rtol=1e-3, atol=1e-4)
    assert first["state"]["pool"].flatten(1).any(1).all()
    # The lottery gives each process another number of images of each teacher.
    flags = [
        [[draw_flag((0, 1, 2), 0, *key) for key in batch] for batch in EpochBatches(12, 4, 0, 6, 0, *part)]
        for part in ((0, 2), ())
    ]
    assert any(2 * half.count(1) != whole.count(1) for half, whole in zip(*flags, strict=True))
    for name, value in student(epochs=2).model.state_dict().items():
        torch.testing.assert_close(first["student"][name], value, rtol=1e-3, atol=1e-4)


def test_two_processes_share_a_batch():
    whole = list(EpochBatches(10, 4, 1, 5, seed=3))
    halves = [list(EpochBatches(10, 4, 1, 5, 3, rank, 2)) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert sorted(batch) == sorted(parts[0] + parts[1])
    assert [batch[0][0] for batch in whole] == [0, 1, 1, 2]  # two batches an epoch
    epoch = [index for batch in EpochBatches(10, 5, 0, 2, 0) for _, index in batch]
    assert sorted(epoch) == list(range(10))
    with pytest.raises(InputError, match="batch_size: expected a multiple of the 2 processes"):
        EpochBatches(10, 5, 0, 2, 0, 0, 2)


def test_flags_are_uniform_and_of_each_image_its_own():
    drawn = torch.tensor(
        [[draw_flag((0, 1, 2), 0, epoch, index) for index in range(300)] for epoch in range(4)]
    )
    counts = torch.bincount(drawn.flatten())
    assert counts.sub(400).abs().max() < 70  # deviation 16
    assert (drawn[0] != drawn[1]).float().mean() == pytest.approx(2 / 3, abs=0.1)
    assert {draw_flag((1, 2), 0, 0, index) for index in range(20)} == {1, 2}


def test_the_flag_decides_the_augmentation_and_the_seed_the_rest(tmp_path: Path):
    images = load_images(trees.class_folders(tmp_path), "train", validation=0)
    by_flag = {0: Augmentation.parse("whole"), 1: Augmentation.parse("crop:0.1,0.2")}
    data = FlaggedImages(images, 24, by_flag, (0, 1), seed=2)
    plain = FlaggedImages(images, 24, by_flag, (0,), seed=2)
    seen = set()
    for index in range(len(data)):
        image, label, flag = data[0, index]
        seen.add(flag)
        assert label == images.labels[index]
        assert torch.equal(image, plain[0, index][0]) == (flag == 0)
        before = torch.get_rng_state()
        assert torch.equal(image, data[0, index][0])
        assert torch.equal(torch.get_rng_state(), before)
    assert seen == {0, 1}
    kept = FlaggedImages(images, 24, by_flag, (0, 1), seed=2, keep=True)
    first = [kept[0, index][0] for index in range(len(kept))]
    for file in images.files:
        file.unlink()  # so that a second reading would fail
    assert all(torch.equal(image, kept[0, index][0]) for index, image in enumerate(first))
    with pytest.raises(InputError, match="no augmentation for this flag"):
        FlaggedImages(images, 24, by_flag, (0, 2))


def test_a_student_without_teachers_is_the_control_with_the_same_images():
    """Trap 12."""
    asked = settings(role="student")
    loss = loss_for(asked)
    assert isinstance(loss, TwoTeacherLoss)
    assert loss.alpha == 0
    history = train(tiny.model(3), Shapes((0, 1, 2)), asked).history
    assert "cls" not in history[0]
    assert "loc" not in history[0]
    assert history[-1]["step"] == student().history[-1]["step"]


def test_the_groups_of_adam():
    groups = parameter_groups(tiny.model(3), settings(lr=0.2, lr_ratio=0.1))
    assert [round(group["lr"], 6) for group in groups] == [0.2, 0.02, 0.02]
    assert sum(len(group["params"]) for group in groups) == len(list(tiny.model(3).parameters()))
    assert len(parameter_groups(tiny.model(3, context=False), settings())) == 2


def test_learning_rates_of_the_recipes():
    vgg = settings_from("cub-vgg16-student", {})
    assert vgg.learning_rate(0) == 5e-4
    assert vgg.learning_rate(45) == pytest.approx(5e-4 * 0.55**0.9 * 0.5)
    assert settings_from("cub-vgg16-cls", {}).learning_rate(30) == pytest.approx(5e-4 * 0.7**0.9 * 0.25)
    inception = settings_from("cub-inception-student", {})
    assert inception.learning_rate(90) == pytest.approx(1e-4 * 0.1**0.9 * 0.5 * 0.1)
    assert settings_from("ilsvrc-vgg16-student", {}).learning_rate(12) == pytest.approx(8e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cub-vgg16-cls", {"auxiliary": "fore", "eta": 1.0, "area": 0.04, "area_mode": 2, "threshold": 0.08,
                           "epochs": 100, "batch_size": 6, "decay_every": 14}),
        ("cub-vgg16-loc", {"auxiliary": "diff_aux", "eta": 0.5, "area": 0.0, "threshold": 0.0,
                           "augmentation": "resize:336+flip"}),
        ("cub-vgg16-loc-top1", {"auxiliary": "diff_aux", "eta": 0.5, "area": 0.0, "threshold": 0.0,
                                "augmentation": "crop:0.1,1+flip"}),
        ("cub-vgg16-student", {"alpha": 0.8, "beta": 1.0, "temperature_cls": 15.0, "temperature_loc": 15.0,
                               "lr": 5e-4, "lr_ratio": 0.1, "update_rate": 0.002, "decay_every": 40,
                               "flags": (0, 1, 2), "augmentation": "crop:0.2,1+flip+randaugment:3,10",
                               "augmentation_cls": "crop:0.2,1+flip", "augmentation_loc": "crop:0.1,1+flip",
                               "kl": "standard", "t_squared": False, "combine": "quadratic"}),
        ("cub-inception-cls", {"auxiliary": "fore", "eta": 0.6, "threshold": 0.15, "lr": 1e-4,
                               "lr_ratio": 0.6, "decay_every": 50, "drop_epoch": 85}),
        ("cub-inception-loc", {"auxiliary": "diff_aux", "eta": 0.2, "threshold": 0.25, "area": 2e-8,
                               "augmentation": "crop:0.1,1+flip+randaugment:3,10"}),
        ("cub-inception-student", {"update_rate": 0.015, "image_size": 299}),
        ("ilsvrc-vgg16-cls", {"auxiliary": "fore", "eta": 1.0, "area": 0.04, "area_mode": 1,
                              "augmentation": "crop:0.4,1+flip"}),
        ("ilsvrc-vgg16-loc", {"auxiliary": "diff_aux", "eta": 1.0, "area": 1e-6,
                              "augmentation": "resize:240+flip"}),
        ("ilsvrc-vgg16-student", {"lr": 8e-5, "lr_ratio": 1.0, "batch_size": 78, "epochs": 20,
                                  "temperature_cls": 1.1, "temperature_loc": 1.1,
                                  "augmentation_loc": "crop:0.9,1.1+flip"}),
    ],
)  # fmt: skip
def test_recipes_have_the_papers_values(name: str, expected: dict[str, Any]):
    """Sections 3.6 to 3.8, and the released settings."""
    asked = settings_from(name, {})
    assert {key: getattr(asked, key) for key in expected} == expected


@pytest.mark.parametrize("name", PRESETS)
def test_every_recipe_is_one_and_can_be_overridden(name: str):
    asked = settings_from(name, {"lr": 0.5, "epochs": 2})
    assert (asked.lr, asked.epochs, asked.role) == (0.5, 2, PRESETS[name]["role"])
    for part in ("augmentation", "augmentation_cls", "augmentation_loc"):
        Augmentation.parse(getattr(asked, part))
    loss = loss_for(asked)
    if isinstance(loss, ClassifierLoss):
        assert loss.auxiliary == PRESETS[name].get("auxiliary", "none")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 1.5}, "alpha: expected 0 to 1"),
        ({"epochs": 0}, "epochs: expected at least 1"),
        ({"kl": "reverse"}, "kl: expected one of standard, released"),
        ({"flags": ()}, "flags: expected some of 0, 1, 2"),
        ({"lr": float("nan")}, "lr: expected a number above 0"),
    ],
)
def test_settings_out_of_range(options, words):
    with pytest.raises(InputError, match=words):
        Settings("cls", **options)
    with pytest.raises(InputError, match="is a recipe for cls"):
        settings_from("cub-vgg16-cls", {"role": "loc"})


def test_a_run_that_diverges_says_so_and_keeps_its_checkpoint(tmp_path: Path):
    class Broken(Shapes):
        def __getitem__(self, key):
            image, label, flag = super().__getitem__(key)
            return image * (float("nan") if key[0] == 2 else 1), label, flag

    with pytest.raises(
        TrainingDiverged, match=r"the loss is nan at step 6: try a lower learning rate; the last"
    ):
        train(tiny.model(3), Broken(), settings(), folder=tmp_path)
    assert read_checkpoint(tmp_path / CHECKPOINT).step == 6


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    train(tiny.model(3), DATA, settings(epochs=1), folder=tmp_path)
    with pytest.raises(InputError, match=r"run with another settings: expected lr 0\.5 \(got 'lr 0\.01'\)"):
        train(tiny.model(3), DATA, settings(epochs=1, lr=0.5), folder=tmp_path, resume=True)


def test_an_empty_pool_is_said_in_the_log():
    class Wrong(Shapes):
        def __getitem__(self, key):
            return super().__getitem__(key)[0] * 0, 2, 0

    model = tiny.model(3)
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([50.0, 0.0, -50.0])
    entry = train(model, Wrong(), settings(epochs=1, lr=1e-4)).history[0]
    assert entry["classes_in_pool"] == 0
    assert "ever predicted right: the context pool is still empty" in entry["note"]


def test_bfloat16_trains():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # one process may not mix precisions else
    try:
        trained = train(tiny.model(3), DATA, settings(mixed_precision="bf16", epochs=6))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert trained.model.pool.dtype == torch.float32
    assert trained.model.classes_in_pool == 3
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
    assert not torch.equal(trained.model.pool, train(tiny.model(3), DATA, settings(epochs=6)).model.pool)
