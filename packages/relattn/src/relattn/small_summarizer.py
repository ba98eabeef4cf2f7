"""A small BART of whole words, trained here: fluent, extractive, and without any idea of control."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from relattn.papers import (
    CONTROL_WORDS,
    LEAD_WORDS,
    PASSAGES,
    SEPARATOR,
    UNKNOWN,
    Papers,
    control_words,
    draw_passages,
)
from relattn.prefix import SEPARATOR as PREFIX_SEPARATOR

_BOS, _PAD, _EOS = "<s>", "<pad>", "</s>"
_ARROW = PREFIX_SEPARATOR.strip()


@dataclass(frozen=True)
class TrainingPlan:
    """How the small summarizer is trained. Settings were chosen on training loss and validation documents.

    Attributes:
        steps: Updates.
        batch: Documents an update, drawn anew each time.
        learning_rate: AdamW's at its highest, behind 100 steps of warm-up; then linear decay.
        prefix_share: Share of the training documents with a prefix in front, as CA+Doc will show them. Its
            words come from a passage drawn apart from the summary's, so that the model reads past prefixes
            without learning control from them: a model that never saw a prefix is thrown off by one.
        encoder_layers: Of the model.
        decoder_layers: Of the model.
        width: Of the model.
    """

    steps: int = 1300
    batch: int = 32
    learning_rate: float = 2.5e-3
    prefix_share: float = 0.1
    encoder_layers: int = 2
    decoder_layers: int = 2
    width: int = 64


def word_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words. The unknown token is a word among others: decoding shows it."""
    words = [_BOS, _PAD, _EOS, UNKNOWN, SEPARATOR, _ARROW, *vocabulary]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A {_EOS}", special_tokens=[(_BOS, 0), (_EOS, 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=_BOS, pad_token=_PAD, eos_token=_EOS, model_max_length=64
    )


def new_summarizer(vocabulary: int, plan: TrainingPlan, seed: int) -> BartForConditionalGeneration:
    """A BART with random weights; the global random state is as before.

    No dropout: no document is seen twice in training, and it would take a third of the time.
    """
    config = BartConfig(
        vocab_size=vocabulary, d_model=plan.width, encoder_layers=plan.encoder_layers,
        decoder_layers=plan.decoder_layers, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=2 * plan.width, decoder_ffn_dim=2 * plan.width, max_position_embeddings=64,
        dropout=0.0, init_std=0.05, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
        forced_eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BartForConditionalGeneration(config)


def train_summarizer(
    papers: Papers,
    plan: TrainingPlan,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[BartForConditionalGeneration, PreTrainedTokenizerFast]:
    """Train a summarizer that writes the lead of one of three passages, whichever.

    Args:
        papers: Its training papers are read.
        plan: How to train.
        seed: Of weights and documents. The same seed gives the same model on a CPU.
        on_step: Called after each update with its number, from 1, and its loss.
    """
    tokenizer = word_tokenizer(papers.vocabulary)
    model = new_summarizer(len(tokenizer), plan, seed).train()
    batches = _Batches(papers, tokenizer, plan, np.random.default_rng([seed, 1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=0.01, fused=True)
    loss = torch.tensor(torch.nan)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(plan.steps):
            for group in optimizer.param_groups:
                warm, left = (step + 1) / 100, (plan.steps - step) / plan.steps
                group["lr"] = plan.learning_rate * min(1.0, warm) * left
            ids, mask, labels = batches.draw()
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            on_step(step + 1, loss.item())
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"training of seed {seed} did not converge")
    return model.eval(), tokenizer


class _Batches:
    """Training documents without end: three passages, the lead of one of them as the summary."""

    def __init__(
        self,
        papers: Papers,
        tokenizer: PreTrainedTokenizerFast,
        plan: TrainingPlan,
        generator: np.random.Generator,
    ) -> None:
        self._papers, self._plan, self._generator = papers.train, plan, generator
        self._rank = {word: number for number, word in enumerate(papers.vocabulary)}
        self._ids = tokenizer.get_vocab()

    def draw(
        self,
    ) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"], Int[Tensor, "batch target"]]:
        """Ids, mask and labels of a batch."""
        pairs = [self._pair() for _ in range(self._plan.batch)]
        width = max(len(source) for source, _ in pairs)
        ids = torch.tensor([source + [1] * (width - len(source)) for source, _ in pairs])
        return ids, (ids != 1).long(), torch.tensor([target for _, target in pairs])

    def _pair(self) -> tuple[list[int], list[int]]:
        passages = draw_passages(self._papers, self._generator)
        chosen = passages[int(self._generator.integers(PASSAGES))]
        words: list[str] = []
        if self._generator.random() < self._plan.prefix_share:
            named = int(self._generator.integers(PASSAGES))  # apart from the summary's passage, on purpose
            control = control_words(passages, named, self._rank)[:CONTROL_WORDS]
            words += [*control, _ARROW] if control else []
        for number, passage in enumerate(passages):
            words += [SEPARATOR, *passage] if number else passage
        source = [0, *(self._ids[word] for word in words), 2]
        return source, [*(self._ids[word] for word in chosen[:LEAD_WORDS]), 2]
