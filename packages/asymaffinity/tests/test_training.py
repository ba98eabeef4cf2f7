"""Training: one step by hand, the same bits after a kill, several processes, what goes wrong."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import trees
from torch import multiprocessing
from training_runs import run, settings
from two_processes import work

from asymaffinity.checkpoints import CHECKPOINT, load_model, read_checkpoint
from asymaffinity.settings import Settings, plain, restored
from asymaffinity.training import Batches, build_criterion, load_data
from shared_core import InputError
from shared_core.checkpoints import read_tensors
from shared_core.errors import TrainingDiverged

# accelerate's and tensorboard's own use of deprecated calls; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_killed_run_resumes_to_the_same_last_bit(tmp_path: Path):
    trees.coco(tmp_path / "data")
    script = Path(__file__).with_name("training_runs.py")
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, script, tmp_path / "data", out], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / CHECKPOINT).exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_checkpoint(out / CHECKPOINT).step < 6
    resumed = run(tmp_path / "data", out, resume=True)
    whole = run(tmp_path / "data", tmp_path / "whole")
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert same(resumed.checkpoint.optimizer, whole.checkpoint.optimizer)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert {"masks/trivial", "masks/fill", "loss_prj", "loss_aff_depthgrad", "lr"} <= lines[-1].keys()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "whole" / "tensorboard"))
    board.Reload()
    assert {"masks/trivial", "loss/loss_prj", "lr"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("masks/trivial")] == [3, 6]
    loaded = load_model(out)
    assert loaded.classes == ("square", "disc")
    assert same(loaded.model.state_dict(), whole.model.state_dict())


def test_two_processes_train_as_one(tmp_path: Path):
    trees.coco(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (str(tmp_path), port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(first, second)
    assert all(value.isfinite().all() for value in first.values())
    fresh = run(tmp_path, steps=1).model.state_dict()
    assert not same(first, fresh)


def test_processes_share_each_batch():
    whole = list(Batches(10, 4, 1, 6, seed=3))
    halves = [list(Batches(10, 4, 1, 6, 3, rank, 2)) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert sorted(batch) == sorted(parts[0] + parts[1])
    keys = [key for batch in Batches(10, 5, 0, 4, 0) for key in batch]
    assert sorted(keys) == [(epoch, index) for epoch in range(2) for index in range(10)]
    assert list(Batches(10, 4, 0, 6, 3))[1:] == whole
    with pytest.raises(InputError, match="batch_size: expected a multiple of the 2 processes"):
        Batches(10, 5, 0, 1, 0, 0, 2)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    trees.coco(tmp_path)
    run(tmp_path, tmp_path / "out", steps=2)
    with pytest.raises(InputError, match=r"run with another settings: expected lr 0\.5 \(got 'lr 0\.002'\)"):
        run(tmp_path, tmp_path / "out", resume=True, steps=2, lr=0.5)
    (tmp_path / "out" / CHECKPOINT).write_bytes(b"no")
    with pytest.raises(InputError, match="is no whole checkpoint"):
        run(tmp_path, tmp_path / "out", resume=True, steps=2)
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json: is no model's description"):
        load_model(tmp_path / "out")
    torch.save({"a": 1}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="expected named tensors"):
        read_tensors(tmp_path / "a.pth")


def test_a_run_that_diverges_says_so(tmp_path: Path):
    trees.coco(tmp_path)
    with pytest.raises(
        TrainingDiverged, match=r"the loss is (nan|inf) at step \d: try a lower learning rate"
    ):
        run(tmp_path, lr=1e30, clip=1e30, optimizer="sgd", steps=6, lr_warmup=0)


def test_vanished_masks_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trees.coco(tmp_path)
    monkeypatch.setattr("asymaffinity.training._EMPTY_SHARE", -1.0)
    monkeypatch.setattr("asymaffinity.training._EMPTY_LOGS", 2)
    with pytest.warns(
        UserWarning, match="nearly all masks have been empty for 2 steps: lengthen the warm-up"
    ):
        run(tmp_path, steps=3, log_every=1, warmup=0)


def test_settings_become_the_loss(tmp_path: Path):
    for affinity, terms in (("color", {"color": 1.0}), ("depthgrad", {"depthgrad": 1.0}), ("none", {})):
        assert build_criterion(settings(tmp_path, affinity=affinity)).weights() == terms
    both = build_criterion(settings(tmp_path, depth_weight=0.2))
    assert both.weights() == {"color": 0.5, "depthgrad": 0.2}
    assert (both.rule.form, both.rule.outside, both.warmup) == ("asymmetric", "known", 3)
    assert build_criterion(settings(tmp_path, affinity="and")).weights() == {"joined": 1.0}
    assert build_criterion(settings(tmp_path, form="symmetric")).rule.outside == "predicted"
    assert Settings("x", steps=90_000).affinity_warmup == 10_000  # BoxInst's


def test_learning_rates_are_boxinsts():
    asked = Settings("x")
    assert asked.learning_rate(1000) == asked.learning_rate(59_999) == 0.01
    assert asked.learning_rate(0) == pytest.approx(1e-5)
    assert asked.learning_rate(60_000) == pytest.approx(1e-3)
    assert asked.learning_rate(80_000) == pytest.approx(1e-4)


def test_settings_survive_json_and_wrong_ones_are_said(tmp_path: Path):
    asked = settings(tmp_path)
    assert restored(json.loads(json.dumps(plain(asked)))) == asked
    with pytest.raises(InputError, match="the settings are of another version"):
        restored({"data": "x", "colour": 1})
    with pytest.raises(InputError, match="steps: expected at least 1"):
        Settings("x", steps=0)
    with pytest.raises(InputError, match="affinity: expected one of none, color"):
        Settings("x", affinity="colour")
    with pytest.raises(InputError, match="lr: expected a number above 0"):
        Settings("x", lr=float("nan"))
    with pytest.raises(InputError, match="min_size: expected sides of at least 8"):
        Settings("x", min_size=(4,))
    trees.coco(tmp_path)
    with pytest.raises(InputError, match="affinity both needs depth maps: --depth FOLDER"):
        load_data(settings(tmp_path, depth=None))
