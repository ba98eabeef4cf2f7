"""What steering, online selection, PPLM and ROUGE of all pairs cost, each beside what one would do instead.

Run `python packages/relattn/benchmarks/bench.py --out DIR`: prints a table of ratios and writes
DIR/bench.json. Models have random weights, which changes what is written and not what it costs, and the
proof's vocabulary of 1200 words; all summaries have the same forced length. Peers run in the same process, on
one thread, and take turns. Times are the process's own CPU seconds, which other work on the machine does not
enter. The steering row's ratio is the median over turns; other times are the least of up to three.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from relattn import EmbeddingRelevance, Steerer, online_select
from relattn.controls import encode_control
from relattn.encoding import encode
from relattn.families import source_embeddings
from relattn.methods import MethodName, MethodSettings, summarize
from relattn.papers import load_papers
from relattn.pplm import PPLMCost
from relattn.relevance import RelevanceInputs
from relattn.rouge import pairwise_rouge
from relattn.selection import GRID, keep
from relattn.small_summarizer import word_tokenizer
from relattn.source import pad
from relattn.steering import context_vectors, relevant_context
from shared_core.bench import finish, in_turns, row

LARGE = {"d_model": 1024, "layers": 12, "heads": 16, "ffn": 4096}  # bart-large but for its vocabulary
SMALL = {"d_model": 512, "layers": 6, "heads": 8, "ffn": 2048}  # as t5-small and distilled models


# Models and texts.


def tokenizer_of_papers() -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer(load_papers().vocabulary)
    tokenizer.model_max_length = 1024
    return tokenizer


def summarizer(shape: dict[str, int], vocabulary: int) -> Any:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=vocabulary, d_model=shape["d_model"], encoder_layers=shape["layers"],
        decoder_layers=shape["layers"], encoder_attention_heads=shape["heads"],
        decoder_attention_heads=shape["heads"], encoder_ffn_dim=shape["ffn"], decoder_ffn_dim=shape["ffn"],
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def documents(number: int, words: int) -> list[str]:
    """Texts of the papers' frequent words."""
    vocabulary = load_papers().vocabulary
    random = np.random.default_rng(0)
    return [" ".join(random.choice(vocabulary, words)) for _ in range(number)]


def decoding(tokens: int) -> dict[str, Any]:
    """Beams of four that all write the same number of tokens."""
    return {"num_beams": 4, "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}


# (a) Steering.


def steering_rows(rounds: int, tokens: int) -> Iterator[dict[str, Any]]:
    tokenizer = tokenizer_of_papers()
    model = summarizer(LARGE, len(tokenizer))
    steerer = Steerer(model, tokenizer, EmbeddingRelevance(temperature="auto"), 0.3)
    texts = documents(4, 126)
    controls = [text.split()[5] for text in texts]
    batch = tokenizer(texts, return_tensors="pt")
    settings = decoding(tokens)

    def plain() -> torch.Tensor:
        return model.generate(**batch, **settings)

    def steered() -> torch.Tensor:
        with steerer.steer(batch, controls) as inputs:
            return model.generate(**inputs, **settings)

    with torch.no_grad():
        first, second = plain(), steered()  # and warm up
        assert first.shape == second.shape == (4, tokens + 1)
        assert not torch.equal(first, second)
        times = in_turns([plain, steered], rounds)
    theirs = statistics.median(times[:, 0])
    ours = theirs * statistics.median(times[:, 1] / times[:, 0])
    what = f"steered generate, bart-large's shape, batch 4, 4 beams, 128 tokens to {tokens}, encoder included"
    yield row(what, ours, theirs, "plain generate", version("transformers"), "s")
    yield relevance_row(steerer, batch["input_ids"], controls)


@torch.no_grad()
def relevance_row(steerer: Steerer, ids: torch.Tensor, controls: Sequence[str]) -> dict[str, Any]:
    """What is computed once a document, behind the encoder, beside one of the encoder's layers."""
    model, settings = steerer.model, steerer.relevance_settings
    encoded = encode(model, ids, torch.ones_like(ids).bool())
    asked = [encode_control(control, steerer.tokenizer).ids for control in controls]
    control_ids, control_mask = pad(asked, steerer.pad_id)

    def once_a_document() -> None:
        vectors = source_embeddings(model, control_ids)
        inputs = RelevanceInputs(control_ids, control_mask, vectors, encoded.source_vectors, encoded.mask)
        context = relevant_context(settings(inputs), encoded.decoder_states)
        context_vectors(steerer.layers, context, encoded.decoder_states.dtype)

    def layer() -> None:
        model.get_encoder().layers[0](encoded.source_vectors, None)

    once_a_document()
    layer()
    ours, theirs = 1e3 * in_turns([once_a_document, layer], 9).min(0)
    what = "relevance (auto) and context vectors of 12 layers, batch 4, 128 tokens"
    return row(what, ours, theirs, "one encoder layer", version("transformers"), "ms")


# (b) Online selection, (c) PPLM.


def similarity_by_calls(texts: Sequence[str]) -> np.ndarray:
    """ROUGE-1 of all pairs as one writes it first: one scorer, one call a pair."""
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    found = np.zeros((len(texts), len(texts)))
    for i, first in enumerate(texts):
        for j in range(i):
            found[i, j] = found[j, i] = scorer.score(first, texts[j])["rouge1"].fmeasure
    return found


def selection_rows(tokens: int) -> Iterator[dict[str, Any]]:
    tokenizer = tokenizer_of_papers()
    model = summarizer(SMALL, len(tokenizer))
    steerer = Steerer(model, tokenizer, EmbeddingRelevance(temperature="auto"))
    (text,) = documents(1, 254)
    control = text.split()[5]
    settings = decoding(tokens) | {"no_repeat_ngram_size": 1}  # else random weights repeat one word
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = steerer.generate([text], [control], "online", **settings)[0]

    def one(weight: float) -> str:
        batch = tokenizer([text], return_tensors="pt")
        with torch.no_grad(), steerer.steer(batch, [control], weight) as inputs:
            ids = model.generate(**inputs, **settings)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip()

    def loop() -> None:
        tried = [one(weight) for weight in GRID]
        found["tried"], found["theirs"] = tried, tried[online_select(tried, similarity_by_calls)]

    one(0.1)  # warm up
    least, looped = in_turns([ours, loop], 1)[0]
    assert [candidate.text for candidate in found["ours"].candidates] == found["tried"]
    assert found["ours"].text == found["theirs"]
    assert len(keep(found["tried"])) > 1, "the selection has nothing to select from"
    what = f"online selection, 6+6 layers of width 512, one document, 4 beams, 256 tokens to {tokens}"
    peer = "30 encoder passes, 30 generates, rouge-score a pair"
    yield row(what, least, looped, peer, version("rouge-score"), "s")

    cost = PPLMCost()
    fixed = MethodSettings(generate=settings, pplm={"step_size": 0.01})
    names: tuple[MethodName, ...] = ("relattn", "plain", "pplm")
    calls = [partial(summarize, name, steerer, [text], [control], fixed, cost) for name in names]
    steered, plain, pplm = in_turns(calls, 2).min(0)
    passes = (cost.forward_passes + cost.backward_passes) / cost.steps
    what = f"one steered summary, 6+6 layers of width 512, 4 beams, 256 tokens to {tokens}"
    yield row(what, steered, plain, "the same without steering", version("relattn"), "s")
    yield row(what, steered, pplm, f"PPLM, {passes:.0f} passes a step", version("relattn"), "s")


# (d) ROUGE of all pairs.


def rouge_rows() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    vocabulary = load_papers().vocabulary
    words = random.choice(vocabulary, 60)
    texts = []
    for _ in range(30):  # summaries of one document under thirty weights: much in common
        changed = random.random(60) < 0.3
        texts.append(" ".join(np.where(changed, random.choice(vocabulary, 60), words)))
    assert np.abs(pairwise_rouge(texts) - similarity_by_calls(texts))[~np.eye(30, dtype=bool)].max() < 1e-12
    ours, theirs = in_turns([lambda: pairwise_rouge(texts), lambda: similarity_by_calls(texts)], 3).min(0)
    what = "ROUGE-1 of all pairs of 30 summaries of 60 words"
    yield row(what, 1e3 * ours, 1e3 * theirs, "rouge-score, a call a pair", version("rouge-score"), "ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/relattn"))
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of steered and plain decoding")
    parser.add_argument("--tokens", type=int, default=60, help="length of the summaries")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    console = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    for title, part in (
        ("ROUGE", rouge_rows()),
        ("online selection and PPLM", selection_rows(arguments.tokens)),
        ("steering", steering_rows(arguments.rounds, arguments.tokens)),
    ):
        start = time.perf_counter()
        rows += part
        console.print(f"{title}: {time.perf_counter() - start:.0f} s")
    finish("relattn", rows, arguments.out, threads=1)


if __name__ == "__main__":
    main()
