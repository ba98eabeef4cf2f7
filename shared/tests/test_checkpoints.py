"""A run goes on from its file to the same bits; no such file, or another run's, is refused by name."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shared_core import InputError
from shared_core.checkpoints import (
    check_same_run,
    optimizer_tensors,
    read_checkpoint,
    read_tensors,
    restore_optimizer,
    write_checkpoint,
)

PARTS, STATE = ("model", "optimizer"), {"step": int, "history": list}


def trained(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "made",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, 0.1),
    ],
    ids=["momentum", "adamw", "stateless"],
)
def test_a_run_goes_on_to_the_same_bits(made, tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = made(model.parameters())
    trained(model, optimizer, 2)
    tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    write_checkpoint(tmp_path / "c.safetensors", "test 1", tensors, {"step": 2, "history": [0.5]})
    trained(model, optimizer, 3)

    kept = read_checkpoint(tmp_path / "c.safetensors", "test 1", PARTS, STATE)
    again = nn.Linear(3, 2)
    again.load_state_dict(kept["model"])
    other = made(again.parameters())
    restore_optimizer(other, kept["optimizer"])
    assert (kept["step"], kept["history"]) == (2, [0.5])
    trained(again, other, 3)
    assert torch.equal(again.weight, model.weight)
    assert torch.equal(again.bias, model.bias)


def test_tensors_that_share_storage_are_written(tmp_path):
    weight = torch.arange(6.0)
    tensors = {"model": {"a": weight, "tied": weight, "every other": weight[::2]}}
    write_checkpoint(tmp_path / "c.safetensors", "test 1", tensors, {})
    kept = read_checkpoint(tmp_path / "c.safetensors", "test 1", ["model"], {})["model"]
    assert all(torch.equal(kept[name], value) for name, value in tensors["model"].items())


def test_what_is_no_such_checkpoint_is_named(tmp_path):
    file = tmp_path / "c.safetensors"

    def refused(message, kind="test 1", parts=PARTS):
        with pytest.raises(InputError, match=message) as told:
            read_checkpoint(file, kind, parts, STATE)
        assert str(file) in str(told.value)

    refused("there is no such checkpoint")
    write_checkpoint(file, "test 1", {"model": {"a": torch.ones(1)}}, {"step": 1, "history": []})
    assert read_checkpoint(file, "test 1", PARTS, STATE)["optimizer"] == {}
    refused(r"expected a checkpoint of the kind 'test 2' \(got 'test 1'\)", "test 2")
    refused("is damaged: expected tensors of optimizer", parts=["optimizer"])
    whole = file.read_bytes()
    for end in (0, 20, len(whole) - 1):
        file.write_bytes(whole[:end])
        refused("is no whole checkpoint")
    save_file({"model/a": torch.ones(1)}, file)
    refused("no such mark")
    for state in ('{"step": 1}', '{"step": "1", "history": []}', "[]", "{"):
        save_file({"model/a": torch.ones(1)}, file, {"checkpoint": "test 1", "state": state})
        refused("is damaged")


def test_another_run_is_refused_with_the_entry_that_differs():
    run = {"settings": {"lr": 0.1, "ends": (0, 1)}, "images": 5}
    check_same_run({"settings": {"lr": 0.1, "ends": [0, 1]}, "images": 5}, run)
    for kept, message in (
        (
            {"settings": {"lr": 0.2, "ends": [0, 1]}, "images": 5},
            r"another settings: expected lr 0\.1 .*lr 0\.2",
        ),
        ({"settings": {"lr": 0.1, "ends": [0, 1]}, "images": 6}, r"another images: expected 5 \(got 6\)"),
        ({"settings": {"lr": 0.1, "ends": [0, 1]}}, "another images: expected 5"),
        ({**run, "settings": {"lr": 0.1, "ends": [0, 1]}, "teacher": "x"}, "another teacher: expected None"),
    ):
        with pytest.raises(InputError, match=message):
            check_same_run(kept, run)


def test_weights_are_read_from_both_kinds_of_file_and_never_by_running_code(tmp_path):
    weights = {"a": torch.ones(2)}
    save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.pt")
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "nested.pth")
    for name in ("w.safetensors", "w.pt", "nested.pth"):
        assert torch.equal(read_tensors(tmp_path / name)["a"], weights["a"])
    torch.save([1], tmp_path / "list.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-1])
    for name, message in (
        ("list.pt", "expected named tensors"),
        ("module.pt", "without running code"),
        ("half.safetensors", "not a whole safetensors"),
        ("none.pt", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            read_tensors(tmp_path / name)
