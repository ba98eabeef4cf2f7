"""Several calibration batches as one: their forward passes run in turn and meet at every quantizer.

The paper calibrates on one batch, each layer on inputs that the layers before it already quantized. Where
that batch does not fit in memory it can be given as several smaller ones. Each runs in a thread of its own;
at an uncalibrated quantizer all of them stop, the last to arrive calibrates it from the tensors of all, and
they go on. One thread runs at a time, so that the memory is that of one batch's working set plus the tensors
held at the meeting point, and the result is that of the single batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from repqvit.quantizers import Quantizer

_current = threading.local()
_DIFFERENT_WAYS = "the calibration batches take different ways through the model: give them as one batch"


class _Meeting:
    """A turnstile for n threads of which one runs at a time, and a barrier where they pool their tensors."""

    def __init__(self, parties: int) -> None:
        self.turn = threading.Lock()
        self.tensors: list[Tensor | None] = [None] * parties
        self.quantizer: Quantizer | None = None  # where some batch waits; changed only by who has the turn
        self.ended = False  # whether a batch has come to the end of the model
        self.barrier = threading.Barrier(parties, action=self._fit)

    def _fit(self) -> None:
        assert self.quantizer is not None
        self.quantizer.fit_from([x for x in self.tensors if x is not None])
        self.tensors = [None] * len(self.tensors)
        self.quantizer = None

    def arrive(self, index: int, quantizer: Quantizer, x: Tensor) -> None:
        """Wait for the other batches at a quantizer; raises ValueError if they wait at another one."""
        if self.ended or self.quantizer not in (None, quantizer):
            raise ValueError(_DIFFERENT_WAYS)
        self.tensors[index] = x
        self.quantizer = quantizer
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


def meet(quantizer: Quantizer, x: Tensor) -> None:
    """Calibrate the quantizer on x, or on the tensors of all batches where several run in lockstep."""
    meeting: tuple[_Meeting, int] | None = getattr(_current, "meeting", None)
    if meeting is None:
        quantizer.fit_from([x])
    else:
        meeting[0].arrive(meeting[1], quantizer, x)


def run(forwards: Sequence[Callable[[], Any]]) -> None:
    """Run the forward passes in lockstep, without gradients. The first error stops all and is raised."""
    if len(forwards) == 1:
        with torch.no_grad():
            forwards[0]()
        return
    meeting = _Meeting(len(forwards))
    errors: list[BaseException] = []

    def work(index: int, forward: Callable[[], Any]) -> None:
        _current.meeting = (meeting, index)
        with meeting.turn:
            try:
                with torch.no_grad():
                    forward()
                meeting.ended = True
                if meeting.quantizer is not None:
                    raise ValueError(_DIFFERENT_WAYS)
            except threading.BrokenBarrierError:
                pass  # another thread failed first; its error is the one to show
            except BaseException as error:
                errors.append(error)
                meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in enumerate(forwards)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
