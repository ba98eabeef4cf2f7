"""BERTScore F1 between candidates, the alternative similarity of online selection.

Each text is encoded once (a library call per pair would do so 29 times); the score is the greedy matching of
Zhang et al., "BERTScore: Evaluating Text Generation with BERT", ICLR 2020, without idf weights or rescaling.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel


class BertScore:
    """Pairwise BERTScore F1: `online_select(candidates, similarity=BertScore.from_pretrained())`.

    Args:
        model: An encoder of transformers.
        tokenizer: Its tokenizer.
        layer: Which hidden state to compare, 0 being the embeddings.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, layer: int) -> None:
        self.model, self.tokenizer, self.layer = model.eval(), tokenizer, layer

    @classmethod
    def from_pretrained(
        cls, name: str = "roberta-large", layer: int = 17, device: str | torch.device = "cpu"
    ) -> "BertScore":
        """Load an encoder; the default pair is that of the BERTScore library for English."""
        model = AutoModel.from_pretrained(name).to(device)
        return cls(model, AutoTokenizer.from_pretrained(name), layer)

    def __call__(self, texts: Sequence[str]) -> Float[ndarray, "texts texts"]:
        """F1 of each text with each other, symmetric."""
        vectors = [self._vectors(text) for text in texts]
        found = np.zeros((len(texts), len(texts)))
        for i, first in enumerate(vectors):
            for j in range(i, len(vectors)):
                found[i, j] = found[j, i] = _matching_f1(first, vectors[j])
        return found

    @torch.no_grad()
    def _vectors(self, text: str) -> Float[Tensor, "tokens width"]:
        encoded = self.tokenizer(text, return_tensors="pt", truncation=True).to(self.model.device)
        states = self.model(**encoded, output_hidden_states=True).hidden_states[self.layer][0]
        real = encoded["input_ids"][0, :, None] == torch.tensor(self._ends, device=states.device)
        return torch.nn.functional.normalize(states[~real.any(1)].float(), dim=1)

    @property
    def _ends(self) -> list[int]:
        t = self.tokenizer  # begin and end of a text weigh nothing: they have no word
        return [i for i in (t.cls_token_id, t.sep_token_id, t.bos_token_id, t.eos_token_id) if i is not None]


def _matching_f1(first: Float[Tensor, "some width"], second: Float[Tensor, "others width"]) -> float:
    if not (len(first) and len(second)):
        return 0.0
    similarity = first @ second.T
    recall, precision = similarity.amax(1).mean().item(), similarity.amax(0).mean().item()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
