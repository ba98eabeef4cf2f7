"""Examples for few-shot learning: split by document, and batches that a steered model takes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from relattn.controls import Control, control_phrases
from relattn.source import pad, read_controls
from relattn.steerer import Steerer
from shared_core import InputError


@dataclass(frozen=True)
class FewShotExample:
    """One summary of a document about a control.

    Attributes:
        document_id: Examples of one document share it; they stay on one side of a split.
        document: The text.
        control: What the summary is about.
        summary: The reference.
    """

    document_id: str
    document: str
    control: Control
    summary: str

    @property
    def fingerprint(self) -> str:
        """Hash of all that it says."""
        parts = [self.document_id, self.document, control_phrases(self.control), self.summary]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def split_by_document(
    examples: Sequence[FewShotExample], train: int, validation: int, seed: int = 0
) -> tuple[list[FewShotExample], list[FewShotExample]]:
    """Examples of `train` documents and those of `validation` other documents, drawn at random.

    A document's examples about other controls go with it: trained on one aspect and tested on another, a
    model would have seen the document.

    Raises:
        InputError: There are fewer documents than asked for.
    """
    documents = list(dict.fromkeys(example.document_id for example in examples))
    if train + validation > len(documents):
        raise InputError(
            f"expected at least {train + validation} documents: {train} to train, {validation} to validate",
            field="examples",
            value=len(documents),
        )
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    side = {documents[n]: place < train for place, n in enumerate(order[: train + validation])}
    chosen = [example for example in examples if example.document_id in side]
    return (
        [example for example in chosen if side[example.document_id]],
        [example for example in chosen if not side[example.document_id]],
    )


class SteeredCollator:
    """Examples to the arguments of `SteeredModel`: a `data_collator` for transformers' Trainer.

    Args:
        steerer: Whose tokenizers and length limit to use.
        max_target_tokens: Longer summaries are cut.
    """

    def __init__(self, steerer: Steerer, max_target_tokens: int = 142) -> None:
        self.steerer, self.max_target_tokens = steerer, max_target_tokens

    def __call__(self, examples: Sequence[FewShotExample]) -> dict[str, Int[Tensor, "batch length"]]:
        """Padded ids and masks of sources and controls, and labels (-100 at pads).

        Raises:
            InputError: A blank document, control or summary.
        """
        steerer, pad_id = self.steerer, self.steerer.pad_id
        texts = steerer.read([e.document for e in examples])
        controls = read_controls(steerer.tokenizer, [e.control for e in examples], len(examples), "error")
        ids, mask = pad([text.ids for text in texts], pad_id)
        control_ids, control_mask = pad([control.ids for control in controls if control], pad_id)
        labels, label_mask = pad([self._target(e) for e in examples], -100)
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "control_ids": control_ids,
            "control_mask": control_mask.long(),
            "labels": labels.masked_fill(~label_mask, -100),
        }

    def _target(self, example: FewShotExample) -> list[int]:
        if not example.summary.strip():
            raise InputError(f"document {example.document_id!r} has an empty summary", field="summary")
        tokenizer = self.steerer.target_tokenizer
        return tokenizer(text_target=example.summary, truncation=True, max_length=self.max_target_tokens)[
            "input_ids"
        ]
