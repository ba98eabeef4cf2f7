"""Tiny encoders with random weights, as a user's own models."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

WORDS = ("river mountain city music water history people language science stone light garden").split()  # noqa: SIM905
SENTENCES = [
    f"The {a} of the {b} is near a {c}, and it was {n} years old."
    for n, (a, b, c) in enumerate(
        (WORDS[i % 12], WORDS[(5 * i + 1) % 12], WORDS[(7 * i + 3) % 12]) for i in range(40)
    )
] + ["Musicians played.", "Water!", "In the city people speak the languages of the mountains and the rivers."]


@functools.cache  # training breaks ties at random: one tokenizer for all models
def wordpiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=64,
    )  # fmt: skip


def byte_pairs() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def bert(seed: int = 0, layers: int = 2, size: int = 16) -> tuple[BertModel, PreTrainedTokenizerFast]:
    torch.manual_seed(seed)
    tokenizer = wordpiece()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=size, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=2 * size, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return BertModel(config).eval(), tokenizer


def save_bert(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    for part in bert(seed, layers):
        part.save_pretrained(folder)
    return folder


def gpt() -> tuple[GPT2Model, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    tokenizer = byte_pairs()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return GPT2Model(config).eval(), tokenizer


def save_sentence_transformer(folder: Path, pooling: str = "mean", seed: int = 0) -> Path:
    """A sentence-transformers folder with a Normalize module, as all-MiniLM has."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    save_bert(folder / "plain", seed)
    transformer = Transformer(str(folder / "plain"))
    model = SentenceTransformer(
        modules=[transformer, Pooling(16, pooling_mode=pooling), Normalize()], device="cpu"
    )
    model.save_pretrained(str(folder / "st"), create_model_card=False)
    return folder / "st"
