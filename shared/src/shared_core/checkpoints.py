"""A training run's state in one safetensors file, from which it goes on to the same last bit.

Nothing is ever unpickled: safetensors hold tensors, JSON in their metadata holds the rest.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared_core.errors import InputError
from shared_core.files import atomic_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def optimizer_tensors(optimizer: "torch.optim.Optimizer") -> "dict[str, Tensor]":
    """Return the optimizer's state as tensors: ``"3.exp_avg"`` is that of its parameter 3."""
    import torch

    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if value is not None
    }


def restore_optimizer(optimizer: "torch.optim.Optimizer", tensors: "Mapping[str, Tensor]") -> None:
    """Put `optimizer_tensors` back into an optimizer of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def write_checkpoint(
    path: str | os.PathLike[str],
    kind: str,
    tensors: "Mapping[str, Mapping[str, Tensor]]",
    state: Mapping[str, Any],
) -> None:
    """Write atomically: a reader sees this checkpoint or the one before.

    Args:
        path: The file.
        kind: Whose checkpoint it is, and its format's version: "csq 3".
        tensors: Part ("model", "optimizer") -> name -> tensor; on any device, storage may be shared.
        state: The rest, as JSON can hold it.

    Raises:
        InputError: The file cannot be written.
    """
    from safetensors.torch import save_file

    flat = {
        f"{part}/{name}": value.detach().cpu().contiguous().clone()
        for part, named in tensors.items()
        for name, value in named.items()
    }
    with atomic_path(path) as temporary:
        save_file(flat, temporary, {"checkpoint": kind, "state": json.dumps(state)})


def read_checkpoint(
    path: str | os.PathLike[str], kind: str, parts: Collection[str], state: Mapping[str, type]
) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote.

    Args:
        path: The file.
        kind: As it was written.
        parts: Parts of `tensors` that must be there; one without tensors is empty.
        state: Names of the state that must be there, and their types.

    Returns:
        The state, and each part's tensors by name.

    Raises:
        InputError: There is no such file, it is of another kind, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    if not file.is_file():
        raise InputError("there is no such checkpoint", file=file)
    found: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            for key in opened.keys():  # noqa: SIM118 safe_open is no mapping
                part, _, name = key.partition("/")
                found.setdefault(part, {})[name] = opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise InputError(f"is no whole checkpoint: {error}", file=file) from error
    if metadata.get("checkpoint") != kind:
        mark = metadata.get("checkpoint", "no such mark")
        raise InputError(f"expected a checkpoint of the kind {kind!r}", file=file, value=mark)
    try:
        rest = json.loads(metadata["state"])
        if {name: type(value) for name, value in rest.items()} != dict(state):
            raise ValueError(f"expected {', '.join(state)}")
        if found.keys() != set(parts):
            raise ValueError(f"expected tensors of {', '.join(parts)}")
    except (AttributeError, KeyError, ValueError) as error:
        raise InputError(f"is damaged: {error}", file=file) from error
    return {**rest, **found}


def check_same_run(
    kept: Mapping[str, Any], ours: Mapping[str, Any], file: str | os.PathLike[str] | None = None
) -> None:
    """Refuse to go on with another run.

    Args:
        kept: What the checkpoint's run is, part by part: settings, data, shapes of the model.
        ours: The same of the run that would go on.
        file: The checkpoint.

    Raises:
        InputError: A part differs; the message names the first entry that does.
    """
    ours = json.loads(json.dumps(ours))  # as it was written: tuples are lists
    for part in {**ours, **kept}:
        theirs, own = kept.get(part), ours.get(part)
        if theirs == own:
            continue
        if isinstance(theirs, dict) and isinstance(own, dict):
            key = next(key for key in {**own, **theirs} if theirs.get(key) != own.get(key))
            theirs, own = f"{key} {theirs.get(key)}", f"{key} {own.get(key)}"
        raise InputError(f"is of a run with another {part}: expected {own}", file=file, value=theirs)


def read_tensors(path: str | os.PathLike[str]) -> "dict[str, Tensor]":
    """Read named tensors from .safetensors, or else from a file of torch.save, without running code of it.

    Raises:
        InputError: It is missing, damaged, or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torch import Tensor

    file = Path(path)
    if not file.is_file():
        raise InputError("there is no such file", file=file)
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise InputError(f"is not a whole safetensors file: {error}", file=file) from error
    found = unpickled_tensors(file)
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError("expected named tensors", file=file)
    return found


def unpickled_tensors(path: str | os.PathLike[str]) -> Any:
    """Read a file of torch.save that holds tensors and plain containers alone.

    Raises:
        InputError: It holds anything else, or is damaged.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file makes the reader stumble over
        raise InputError(
            "cannot be read without running code from it, which is refused; where you trust it, "
            "load it yourself and write it again as .safetensors",
            file=path,
        ) from error
