"""Small models with real tokenizers of their own, made at random: a student or teacher of a user."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules.dense import Dense
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
)

WORDS = [
    "a", "an", "the", "of", "in", "city", "river", "king", "queen", "music", "war", "planet", "animal",
    "metal", "who", "what", "where", "old", "new", "large", "small", "capital", "song", "battle", "star",
    "cat", "iron", "france", "moon", "ruled", "sang", "fought", "shines", "flows", "lives", "melts",
]  # fmt: skip


def tokenizer(offset: int = 0, limit: int = 32) -> PreTrainedTokenizerFast:
    """Words and the five special tokens of BERT; `offset` gives all words other numbers."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"[unused{number}]" for number in range(offset)), *WORDS]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=limit,
    )  # fmt: skip


def save_bert(
    folder: Path, *, width: int = 16, layers: int = 2, heads: int = 2, offset: int = 0, seed: int = 0,
    classifier: bool = False,
) -> Path:  # fmt: skip
    torch.manual_seed(seed)
    words = tokenizer(offset)
    config = BertConfig(
        vocab_size=len(words), hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=2 * width, max_position_embeddings=40, num_labels=1,
    )  # fmt: skip
    model = BertForSequenceClassification(config) if classifier else BertModel(config)
    _wider(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_distilbert(
    folder: Path, *, width: int = 24, layers: int = 3, offset: int = 7, seed: int = 3
) -> Path:
    torch.manual_seed(seed)
    words = tokenizer(offset)
    config = DistilBertConfig(
        vocab_size=len(words), dim=width, n_layers=layers, n_heads=2, hidden_dim=2 * width,
        max_position_embeddings=40,
    )  # fmt: skip
    model = DistilBertModel(config)
    _wider(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _wider(model: torch.nn.Module) -> None:
    """Weights so large that texts differ: those of a fresh model make all texts nearly alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)


def dual_encoder(folder: Path, mode: str = "cls", *, normalize: bool = False) -> SentenceTransformer:
    transformer = Transformer(str(folder))
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), mode)]
    return SentenceTransformer(modules=[*modules, *([Normalize()] if normalize else [])], device="cpu")


def colbert(folder: Path, dim: int = 8, expansion: int | None = None) -> MultiVectorEncoder:
    transformer = Transformer(str(folder))
    width = transformer.get_embedding_dimension()
    if expansion is not None:
        transformer.query_expansion = {"strategy": "fixed", "attend": True, "length": expansion}
    modules = [
        transformer,
        Dense(
            width, dim, bias=False, activation_function=torch.nn.Identity(),
            module_input_name="token_embeddings", module_output_name="token_embeddings",
        ),
        MultiVectorMask(),
        Normalize(module_input_name="token_embeddings", module_output_name="token_embeddings"),
    ]  # fmt: skip
    return MultiVectorEncoder(modules=modules, device="cpu")


def cross_encoder(folder: Path) -> CrossEncoder:
    return CrossEncoder(str(folder), num_labels=1, device="cpu")


QUERIES = ["who ruled france", "what shines", "where the river flows", "what melts"]
PASSAGES = [
    "the old king ruled france", "the queen sang a song",
    "the moon shines", "a cat lives in the city",
    "the river flows in the capital of france", "iron melts",
    "metal melts in war", "a small planet",
]  # fmt: skip
"""One positive and one negative a query, in the order of a step."""
