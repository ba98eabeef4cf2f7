"""Keyword boost: the control's tokens get a bonus in every step's scores, whatever the source says.

It asks for words, not for content: the tokens of a phrase are boosted one by one, in any order and place, and
a part of a word as much as the whole word.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from shared_core import InputError


def rows_per_document(rows: int, documents: int) -> int:
    """How many rows (beams, samples) each document has; they stand side by side.

    Raises:
        InputError: The rows do not divide evenly.
    """
    if rows % documents:
        raise InputError(f"expected a multiple of {documents} rows, one document's side by side, got {rows}")
    return rows // documents


class KeywordBoost(LogitsProcessor):
    """Adds a bonus to the scores of each row's own words; give it to `generate` in `logits_processor`.

    Args:
        bags: Token ids of each document's words, in the decoder's vocabulary; an empty bag boosts nothing.
        boost: Added to the score, in nats. For the next token of greedy search or sampling that is exp(boost)
            times its odds. Beam search adds scores up without normalising them again: there a hypothesis
            keeps the bonus of each boosted token that it has written, and ranks higher by it to the end.
        once: A token that a row has written already (or that starts it) is not boosted again, which would
            make it stutter.

    Raises:
        InputError: There is no bag, or the boost is not finite.

    >>> boost = KeywordBoost([[2], []], boost=1.5)
    >>> boost(torch.tensor([[0], [0]]), torch.zeros(2, 4))
    tensor([[0.0000, 0.0000, 1.5000, 0.0000],
            [0.0000, 0.0000, 0.0000, 0.0000]])
    """

    def __init__(self, bags: Sequence[Sequence[int]], boost: float = 2.0, once: bool = True) -> None:
        if not bags:
            raise InputError("expected a bag of words for each document, got none", field="bags")
        if not torch.isfinite(torch.tensor(boost)):
            raise InputError("expected a number", field="boost", value=boost)
        self.bags = [torch.tensor(sorted(set(bag)), dtype=torch.long) for bag in bags]
        self.boost = boost
        self.once = once

    def for_documents(self, numbers: Sequence[int]) -> "KeywordBoost":
        """The same boost for a batch of these documents: `Steerer.generate` decodes them in its own order.

        Raises:
            InputError: There is no bag for one of them.
        """
        if max(numbers) >= len(self.bags):
            raise InputError(f"expected a bag for each document, got {len(self.bags)}", field="bags")
        return KeywordBoost([self.bags[n].tolist() for n in numbers], self.boost, self.once)

    def __call__(
        self, input_ids: Int[Tensor, "rows written"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """The scores with the bonus; rows of beam search belong to their document's bag.

        Forbidden tokens (minus infinity) stay forbidden.
        """
        copies = rows_per_document(len(scores), len(self.bags))
        bonus = torch.zeros_like(scores)
        for row in range(len(scores)):
            bonus[row, self.bags[row // copies].to(scores.device)] = self.boost
        if self.once:
            bonus.scatter_(1, input_ids.to(scores.device), 0.0)
        return scores + bonus
