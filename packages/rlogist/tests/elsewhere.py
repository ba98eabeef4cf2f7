"""A second device for machines that have none: CPU memory that says it lies on `meta`.

PyTorch's meta device has no data; inside `elsewhere()` its tensors have some. Every operation that gets
tensors of both devices is an error, as on a GPU, with the same exceptions: numbers (tensors without
dimensions) and indices may come from the CPU, and only `.to`, `.cpu` and reading a number out move anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class Elsewhere(Tensor):
    """A tensor on the other device; `held` are its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=DEVICE, requires_grad=False
        )
        made.held = held
        return made

    def tolist(self) -> list[Any]:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    leaves = tree_flatten((args, kwargs))[0]
    there = [leaf for leaf in leaves if isinstance(leaf, Elsewhere)]
    wanted = kwargs.get("device")
    goal = torch.device(wanted).type if wanted is not None else "meta" if there else "cpu"
    inner_args, inner_kwargs = tree_map(lambda x: x.held if isinstance(x, Elsewhere) else x, (args, kwargs))
    if wanted is not None:
        inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")}
    if func is aten.copy_.default:  # this alone may go from one device to the other
        func(*inner_args, **inner_kwargs)
        return args[0]
    if there and func is not aten._to_copy.default:
        here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Elsewhere)]
        strangers = [leaf for leaf in here if leaf.ndim]
        if func in INDEXED:
            values = (args[0], *args[2:3])
            strangers = [
                v for v in values if isinstance(v, Tensor) and not isinstance(v, Elsewhere) and v.ndim
            ]
        if strangers:
            raise RuntimeError(f"{func}: tensors on two devices, one of them {tuple(strangers[0].shape)}")
    if any(isinstance(leaf, torch.Generator) for leaf in leaves) and goal == "meta":
        raise RuntimeError(f"{func}: a generator of the CPU for a tensor on another device")
    out = func(*inner_args, **inner_kwargs)
    if goal == "cpu":
        return out
    known = {id(leaf.held): leaf for leaf in there}  # in place: the same tensor comes back

    def outside(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else Elsewhere(x)

    return tree_map(outside, out)


@contextmanager
def elsewhere() -> Iterator[str]:
    """Inside, `meta` is a device that computes; gives its name."""
    make = torch.tensor

    def tensor(data: Any, *, dtype: torch.dtype | None = None, device: Any = "cpu") -> Tensor:
        return make(data, dtype=dtype).to(
            device
        )  # its own way to a device is not an operation that a mode sees

    with _Mode(), mock.patch("torch.tensor", tensor):
        yield "meta"
