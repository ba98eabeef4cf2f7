"""MiniLM's rival term (Wang et al. 2020, 2021): relations among tokens inside the last layer's attention.

It needs the same tokens on both sides; widths and heads may differ, through relation heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lead_kd.losses import Pairs
from lead_kd.objectives import Candidates, Objective, Response, StepLoss
from lead_kd.pruning import layer_stack
from lead_kd.scores import Scores
from shared_core import InputError

_NAMES: tuple[tuple[str, ...], ...] = (
    ("query", "q_lin", "q_proj"),
    ("key", "k_lin", "k_proj"),
    ("value", "v_lin", "v_proj"),
)


def relation_log(
    left: Float[Tensor, "texts tokens width"],
    right: Float[Tensor, "texts tokens width"],
    mask: Bool[Tensor, "texts tokens"],
    heads: int,
) -> Float[Tensor, "texts heads tokens tokens"]:
    """Log of softmax(A Bᵀ / √d) for each relation head, over tokens that are no padding."""
    texts, tokens, width = left.shape
    a, b = (x.view(texts, tokens, heads, width // heads).transpose(1, 2) for x in (left, right))
    scores = (a @ b.transpose(2, 3)).float() / (width // heads) ** 0.5
    return scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min).log_softmax(-1)


def relation_kl(
    teacher: Sequence[Tensor], student: Sequence[Tensor], mask: Bool[Tensor, "texts tokens"], heads: int
) -> Float[Tensor, ""]:
    """KL of the query-key and the value-value relations, a mean over heads and tokens.

    Args:
        teacher: Its queries, keys and values, each (texts, tokens, width).
        student: The student's.
        mask: Tokens that are no padding.
        heads: Relation heads; they divide both widths.
    """
    total = torch.zeros((), device=mask.device)
    for first, second in ((0, 1), (2, 2)):
        t = relation_log(teacher[first], teacher[second], mask, heads).detach()
        s = relation_log(student[first], student[second], mask, heads)
        kl = (t.exp() * (t - s)).sum(-1)  # texts, heads, tokens
        total = total + (kl * mask[:, None, :]).sum() / (mask.sum() * heads)
    return total


class Watch:
    """Keeps queries, keys and values of an encoder's last layer, of each forward pass while it is on."""

    def __init__(self, encoder: nn.Module) -> None:
        self.on = False
        self.calls: list[list[Tensor]] = []
        last = layer_stack(encoder)[-1]
        parts = [
            next((part for name, part in last.named_modules() if name.rpartition(".")[2] in names), None)
            for names in _NAMES
        ]
        if any(part is None for part in parts):
            raise InputError(
                "expected separate query, key and value projections in its last layer",
                field="model",
                value=type(encoder).__name__,
            )
        self._kept: list[Tensor] = []
        for part in parts:
            assert part is not None
            part.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if not self.on:
            return
        self._kept.append(output)
        if len(self._kept) == 3:
            self.calls.append(self._kept)
            self._kept = []

    def turn(self, on: bool) -> None:
        """Begin to watch, or stop; what was seen is forgotten."""
        self.on, self.calls, self._kept = on, [], []


class MiniLM(Objective):
    """MiniLM: relations of the last layer, beside L_stu and L_rep.

    Args:
        student: The student's encoder (a DualEncoder's `model[0].model`).
        teacher: The teacher's; it must run in each step, so that a cache does not do.
        heads: Relation heads.

    Raises:
        InputError: Heads do not divide both widths, or an encoder's projections cannot be found.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, heads: int = 12) -> None:
        super().__init__()
        for encoder in (student, teacher):
            config: Any = encoder.config
            width: int = config.hidden_size
            if width % heads:
                raise InputError(f"expected relation heads that divide {width}", field="heads", value=heads)
        self.heads = heads
        self.student, self.teacher = Watch(student), Watch(teacher)
        self.response = Response()
        self.masks: list[Tensor] = []

    @contextmanager
    def step(self, masks: Sequence[Tensor]) -> Iterator[None]:
        """Watch one step, whose texts have these attention masks (queries, then passages)."""
        self.masks = [mask.bool() for mask in masks]
        for watch in (self.student, self.teacher):
            watch.turn(on=True)
        try:
            yield
        finally:
            for watch in (self.student, self.teacher):
                watch.turn(on=False)

    def forward(self, student: Scores, teacher: Scores | None, on: Candidates, pairs: Pairs) -> StepLoss:
        """L_stu + L_rep + relations."""
        both = self.response(student, teacher, on, pairs)
        if not len(self.student.calls) == len(self.teacher.calls) == len(self.masks):
            raise InputError("student and teacher must both run in each step", field="minilm")
        relations = torch.zeros((), device=both.total.device)
        for t, s, mask in zip(self.teacher.calls, self.student.calls, self.masks, strict=True):
            if t[0].shape[:2] != s[0].shape[:2]:
                raise InputError(
                    "minilm needs the same tokens on both sides: the same tokenizer and lengths",
                    field="tokens",
                    value=(tuple(t[0].shape[:2]), tuple(s[0].shape[:2])),
                )
            relations = relations + relation_kl(t, s, mask, self.heads) / len(self.masks)
        return StepLoss(both.total + relations, {**both.log, "relations": relations.item()})
