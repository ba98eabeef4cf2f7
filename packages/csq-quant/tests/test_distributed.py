"""Two processes over gloo, and accelerate: the temperature grows, masks stay alike, runs resume."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hosted_models import optimizer_for, small_net, train
from torch import multiprocessing
from two_processes import STEPS, work

import csq


@pytest.mark.usefixtures("process_server")
def test_two_processes_grow_the_same_scheme(tmp_path: Path):
    multiprocessing.start_processes(work, (str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    betas = [record["beta"] for record in first["trace"]]
    assert betas[:19] == pytest.approx([200 ** (t / 18) for t in range(19)])
    assert first["temperatures"] == [200.0, 200.0]
    assert not first["trace"][-1]["searching"]
    assert first["trace"] == second["trace"]
    for key, value in first["state"].items():
        if "running" not in key:  # each process has its own batch statistics until rank 0's are broadcast
            assert torch.equal(value, second["state"][key]), key


# accelerate's own use of a deprecated torch call; nothing of ours.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_accelerate_saves_and_resumes_to_the_last_bit(tmp_path: Path):
    from accelerate import Accelerator

    start = small_net()

    def begin():
        model = csq.parametrize(copy.deepcopy(start))
        accelerator = Accelerator(cpu=True)
        prepared, optimizer = accelerator.prepare(model, optimizer_for(model))
        return accelerator, prepared, optimizer, csq.Schedule(prepared, 3.0, STEPS, lam=0.3, on_miss="settle")

    _, whole, optimizer, schedule = begin()
    train(whole, optimizer, schedule, STEPS)
    accelerator, model, optimizer, schedule = begin()
    train(model, optimizer, schedule, 9)
    accelerator.save_state(str(tmp_path))
    accelerator, model, optimizer, schedule = begin()
    accelerator.load_state(str(tmp_path))
    assert schedule.step_count == 9
    train(model, optimizer, schedule, STEPS - 9)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
