"""Steerer: a summarizer and its tokenizer in, summaries about what each reader asked for out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from relattn.controls import Control, EncodedControl
from relattn.encoding import SteerableBatch, prepare
from relattn.families import cross_attentions, source_limit
from relattn.generation import RowDecoder, evaluating, generation_settings, rows_that_fit, setting
from relattn.relevance import EmbeddingRelevance, Relevance, effective_support
from relattn.results import Candidate, ControlledSummary, RelevanceResult
from relattn.selection import (
    GRID,
    Similarity,
    coarse_to_fine,
    consensus,
    coverage_select,
    filled,
    loaded,
)
from relattn.source import SourceDocument, pad, read_controls, read_documents, warnings_about
from relattn.steering import check_weight, steered
from relattn.weights import RelAttnModule
from shared_core import InputError

__all__ = ["Candidate", "ControlledSummary", "RelevanceResult", "Steerer"]

Weight = float | int | Sequence[float] | Tensor


class Steerer:
    """Steers any encoder-decoder summarizer by relevance attention.

    Args:
        model: A transformers encoder-decoder model with a language-model head, see
            `relattn.families.SUPPORTED`. It is not changed; between calls it generates as ever.
        tokenizer: The tokenizer of the source text.
        relevance: How relevance is computed; the paper's by default. See `relattn.relevance.Relevance` about
            its temperature: "auto" often steers better than the paper's 1.
        weight: w, 0 (plain) to 1. 0.12 is the released code's example for BART.
        module: A trained `RelAttnModule`, in place of relevance and weight.
        target_tokenizer: The tokenizer of the summary where it is another one (EncoderDecoderModel).
        max_source_tokens: Longer documents are cut, with a warning. By default the model's or tokenizer's
            limit.
        source_prefix: What the model wants in front of each document, such as T5's "summarize: ". Its tokens
            stand for no text: offsets are those of the document alone. (`steer` takes tokens as they come.)

    Raises:
        InputError: The model is not supported, or an argument is wrong.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        relevance: Relevance | None = None,
        weight: Weight = 0.12,
        *,
        module: RelAttnModule | None = None,
        target_tokenizer: Any = None,
        max_source_tokens: int | None = None,
        source_prefix: str = "",
    ) -> None:
        self.model = model
        self.layers = cross_attentions(model)
        self.tokenizer = tokenizer
        self.target_tokenizer = tokenizer if target_tokenizer is None else target_tokenizer
        if module is not None and relevance is not None:
            raise InputError(
                "expected a module or a relevance, got both: a module has its own", field="relevance"
            )
        self.module = module
        self._relevance = EmbeddingRelevance() if relevance is None else relevance
        self.weight = weight
        if module is not None and (module.config.layers, module.config.heads) != self._shape:
            raise InputError(
                f"expected {self._shape[0]} layers and {self._shape[1]} heads as the model has,"
                f" got {module.config.layers} and {module.config.heads}",
                field="module",
            )
        self.max_source_tokens = self._limit(max_source_tokens)
        self.source_prefix = source_prefix

    @property
    def relevance_settings(self) -> Relevance:
        """The relevance in use."""
        return self._relevance if self.module is None else self.module.relevance

    def relevance(
        self,
        documents: Sequence[str],
        controls: Sequence[Control | None],
        *,
        batch_size: int = 8,
        on_empty: str = "error",
    ) -> list[RelevanceResult]:
        """The relevance of each document's tokens to its control. Errors as for `generate`."""
        texts, asked = self._read(documents, controls, on_empty)
        found: dict[int, RelevanceResult] = {}
        with torch.no_grad(), evaluating(self.model):
            for members in _batches(texts, batch_size):
                batch = self._prepare([texts[n] for n in members], [asked[n] for n in members])
                for row, n in enumerate(members):
                    found[n] = self._result(batch, row, texts[n], asked[n])
        return [found[n] for n in range(len(texts))]

    @contextmanager
    def steer(
        self, batch: Any, controls: Sequence[Control | None], weight: Weight | None = None
    ) -> Iterator[dict[str, Any]]:
        """Inside the block the model is steered: call `model.generate`, or the model itself.

        Differentiable: gradients reach the model, and the module's parameters where the steerer has one.

        Args:
            batch: What the tokenizer gives: a mapping with input_ids (batch, tokens) and attention_mask;
                without the latter, ids that are the pad's are pads, as `generate` takes them. LED's
                global_attention_mask is honoured; without one, each row's first real token is global.
            controls: One control a row; None or blank leaves its row as it is.
            weight: As for `generate`, without "online"; the steerer's by default.

        Yields:
            Arguments for `generate` or a forward pass that save a second encoder pass:
            ``with steerer.steer(batch, controls) as inputs: model.generate(**inputs)``. Calling
            ``model.generate(**batch)`` gives the same (for LED if the batch has a global_attention_mask: the
            model alone uses none).

        Raises:
            InputError: As for `generate`.
        """
        ids = batch["input_ids"]
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else self._real_tokens(ids)
        asked = read_controls(self.tokenizer, controls, len(ids), "plain")
        tokens = [self.tokenizer.convert_ids_to_tokens(i[m].tolist()) for i, m in zip(ids, mask, strict=True)]
        wide = batch.get("global_attention_mask")
        prepared = self._behind_encoder(ids, mask, asked, tokens, wide)
        w = self._weights(prepared, weight, range(len(ids)), asked)
        with steered(self.layers, prepared.contexts, w.to(prepared.a_rel)):
            yield prepared.encoded.rows(torch.arange(len(ids), device=ids.device))

    def generate(
        self,
        documents: Sequence[str],
        controls: Sequence[Control | None],
        weight: Weight | str | None = None,
        **options: Any,
    ) -> list[ControlledSummary]:
        """Summaries, one a document, each about its own control.

        Args:
            documents: The texts.
            controls: One control a document: a phrase or several.
            weight: w, from 0 to 1: a number for all, one a document, or a tensor of shape (documents or 1,),
                (documents or 1, layers) or (documents or 1, layers, heads); "online" tries a grid of weights
                for each document and selects without a reference. The steerer's (or its module's) by default.
            **options: `iterate`'s options, and any argument of the model's `generate` (num_beams,
                max_length...) that means the same for all documents. A logits processor may tell documents
                apart if it has `for_documents`, as `relattn.logit_boost.KeywordBoost` has
                (`relattn.generation.PerDocument`). What is not given comes from the model's generation
                settings; beam search with 4 beams, no sampling and 142 new tokens where these say nothing.

        Raises:
            InputError: A blank document; another number of controls than documents; a blank control, or one
                of unknown tokens only; a weight outside [0, 1] or of another shape; an argument of `generate`
                that has a row a document (`steer` is for these); a model that is being steered already;
                online selection with sampling but no seed.
        """
        found = dict(self.iterate(documents, controls, weight, **options))
        return [found[number] for number in range(len(documents))]

    def iterate(
        self,
        documents: Sequence[str],
        controls: Sequence[Control | None],
        weight: Weight | str | None = None,
        *,
        batch_size: int = 8,
        max_rows: int | None = None,
        grid: Sequence[float] = GRID,
        similarity: Similarity = "rouge1",
        select: str = "consensus",
        coarse: int = 1,
        on_empty: str = "error",
        seed: int | None = None,
        **generate_arguments: Any,
    ) -> Iterator[tuple[int, ControlledSummary]]:
        """As `generate`, but gives (number of the document, summary) as soon as a batch is done.

        Args:
            documents: See `generate`.
            controls: See `generate`.
            weight: See `generate`.
            batch_size: Documents encoded together; documents of like length go together.
            max_rows: (Document, weight) rows decoded together; by default as many as fit into memory.
            grid: Weights that online selection tries, ascending; the first is its anchor.
            similarity: What online selection compares candidates with, see `online_select`.
            select: "consensus" is the paper's selection; "coverage" takes the candidate that covers the most
                relevance (`coverage_select`), which is not.
            coarse: With 5, online selection decodes every fifth weight first, and those between two of them
                only where they differ (`relattn.selection.coarse_to_fine`): faster, and not always the same
                choice. 1 decodes the whole grid.
            on_empty: What a blank control means: an "error", or a "plain" summary.
            seed: Makes sampling repeatable; the global random state is not touched then.
            **generate_arguments: See `generate`.
        """
        texts, asked = self._read(documents, controls, on_empty)
        settings = generation_settings(self.model, generate_arguments)
        online = isinstance(weight, str)
        if online:
            if coarse < 1:
                raise InputError("expected 1 or more", field="coarse", value=coarse)
            _check_online(weight, grid, select, seed, setting(self.model, settings, "do_sample", False))
            similarity = loaded(similarity, self.model.device)
        elif weight is not None or self.module is None:
            self._given_weight(self.weight if weight is None else weight, len(texts))
        for number, members in enumerate(_batches(texts, batch_size)):
            # Gradients are off for the batch only: at a yield the caller's own code runs.
            with torch.no_grad():
                with evaluating(self.model):
                    batch = self._prepare([texts[n] for n in members], [asked[n] for n in members])
                fit = rows_that_fit(self.model, settings, len(self.layers), batch.encoded.mask.shape[1])
                start = None if seed is None else seed + 1_000_003 * number
                decode = RowDecoder(
                    self.model, self.layers, self.target_tokenizer, batch, members, settings,
                    min(max_rows or fit, fit), start,
                )  # fmt: skip
                results = [self._result(batch, row, texts[n], asked[n]) for row, n in enumerate(members)]
                if online:
                    summaries = self._online(
                        results, texts, members, decode, grid, similarity, select, coarse
                    )
                else:
                    w = self._weights(batch, weight, members, asked)
                    lines = decode(torch.arange(len(members)), w)
                    means = w.mean((1, 2)).tolist()
                    summaries = [ControlledSummary(*row) for row in zip(lines, means, results, strict=True)]
            yield from zip(members, summaries, strict=True)

    def _online(
        self,
        results: Sequence[RelevanceResult],
        texts: Sequence[SourceDocument],
        members: Sequence[int],
        decode: Callable[[Tensor, Tensor], list[str]],
        grid: Sequence[float],
        similarity: Similarity,
        select: str,
        coarse: int,
    ) -> list[ControlledSummary]:
        """Every document under the weights of the grid, then the selection. No control: decoded once."""
        grids = [grid if result.controls else (0.0,) for result in results]

        def lines(pairs: Sequence[tuple[int, int]]) -> list[str]:
            weights = torch.tensor([grids[row][i] for row, i in pairs], dtype=torch.float64)
            rows = torch.tensor([row for row, _ in pairs])
            return decode(rows, weights[:, None, None].expand(-1, *self._shape))

        decoded = coarse_to_fine([len(weights) for weights in grids], coarse, lines)
        found = []
        for row, result in enumerate(results):
            weights = grids[row]
            candidates = filled(decoded[row], len(weights))
            chosen = consensus(candidates, similarity)
            kept, best = set(chosen.kept), chosen.index
            if select == "coverage":
                best = self._covering(candidates, texts[members[row]], result)
            tried = tuple(
                Candidate(w, line, i in kept, i in decoded[row])
                for i, (w, line) in enumerate(zip(weights, candidates, strict=True))
            )
            listed = tried if result.controls else ()
            found.append(ControlledSummary(candidates[best], weights[best], result, listed))
        return found

    def _covering(self, candidates: Sequence[str], document: SourceDocument, result: RelevanceResult) -> int:
        # A leading space gives a summary's first word the form that it has inside the source.
        tokens = [self.tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in candidates]
        return coverage_select(candidates, tokens, document.ids, result.a_rel.tolist())

    def _limit(self, given: int | None) -> int | None:
        if given is not None and given < 1:
            raise InputError("expected 1 or more", field="max_source_tokens", value=given)
        named = getattr(self.tokenizer, "model_max_length", None)
        limits = [given, source_limit(self.model), named if named is not None and named < 1e9 else None]
        return min((n for n in limits if n is not None), default=None)

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self.layers), self.layers[0].heads

    def read(self, documents: Sequence[str]) -> list[SourceDocument]:
        """Documents as the encoder reads them. Errors as for `generate`."""
        return read_documents(self.tokenizer, documents, self.max_source_tokens, self.source_prefix)

    def _read(
        self, documents: Sequence[str], controls: Sequence[Control | None], on_empty: str
    ) -> tuple[list[SourceDocument], list[EncodedControl | None]]:
        texts = self.read(documents)
        return texts, read_controls(self.tokenizer, controls, len(texts), on_empty)

    def _prepare(
        self, texts: Sequence[SourceDocument], asked: Sequence[EncodedControl | None]
    ) -> SteerableBatch:
        ids, mask = pad([text.ids for text in texts], self.pad_id)
        return self._behind_encoder(ids, mask, asked, [text.tokens for text in texts])

    @property
    def pad_id(self) -> int:
        """The id that fills short rows."""
        found = (self.model.config.pad_token_id, self.tokenizer.pad_token_id, 0)
        return next(i for i in found if i is not None)

    def _real_tokens(self, ids: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """Where no mask is given: all but pads, unless the pad ends texts, too (transformers' rule)."""
        pad, ends = self.model.config.pad_token_id, self.model.generation_config.eos_token_id
        if pad is None or pad in (ends if isinstance(ends, list) else [ends]):
            return torch.ones_like(ids).bool()
        return ids != pad

    def _behind_encoder(
        self,
        ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        asked: Sequence[EncodedControl | None],
        tokens: Sequence[Sequence[str]],
        global_attention: Int[Tensor, "batch tokens"] | None = None,
    ) -> SteerableBatch:
        # A document without control is never steered; a pad stands in for it, so that shapes fit.
        control_ids, control_mask = pad([c.ids if c else [self.pad_id] for c in asked], self.pad_id)
        phrases = [c.phrases if c else () for c in asked]
        settings = self.relevance_settings
        return prepare(
            self.model, self.layers, settings, ids, mask, control_ids, control_mask, phrases, tokens,
            global_attention,
        )  # fmt: skip

    def _result(
        self, batch: SteerableBatch, row: int, document: SourceDocument, control: EncodedControl | None
    ) -> RelevanceResult:
        real = batch.encoded.mask[row]
        scores, a_rel = batch.scores[row][real].cpu(), batch.a_rel[row][real].cpu()
        best = int(scores.masked_fill(torch.tensor(document.special), -torch.inf).argmax())
        return RelevanceResult(
            a_rel,
            scores,
            document.tokens,
            document.offsets,
            effective_support(a_rel[None]).item(),
            () if control is None else control.phrases,
            warnings_about(document, control, best),
        )

    def _weights(
        self,
        batch: SteerableBatch,
        weight: Weight | None,
        members: Sequence[int],
        asked: Sequence[EncodedControl | None],
    ) -> Float[Tensor, "batch layers heads"]:
        """Weights of the documents of a batch; 0 where there is no control."""
        if weight is None and self.module is not None:
            w = self.module(batch.control_mean, batch.source_mean)
        else:
            w = self._given_weight(self.weight if weight is None else weight, len(asked))[list(members)]
        steerable = torch.tensor([asked[n] is not None for n in members], device=w.device)
        return torch.where(steerable[:, None, None], w, torch.zeros_like(w))

    def _given_weight(self, weight: Weight, documents: int) -> Float[Tensor, "documents layers heads"]:
        w = torch.as_tensor(weight, dtype=torch.float64)  # 0.12 stays 0.12 in what is reported
        shape = (documents, *self._shape)
        full = w[(...,) + (None,) * (3 - w.ndim)] if 0 < w.ndim <= 3 else w
        if w.ndim > 3 or any(have not in (1, want) for have, want in zip(full.shape, shape, strict=False)):
            raise InputError(
                f"expected a number, or shape ({documents},), {shape[:2]} or {shape}"
                f" (1 may stand for {documents}), got shape {tuple(w.shape)}",
                field="weight",
            )
        full = full.expand(shape)
        check_weight(full.detach())
        return full


def _batches(texts: Sequence[SourceDocument], batch_size: int) -> Iterator[list[int]]:
    """Numbers of documents in batches of like length: less padding, and nothing else."""
    if batch_size < 1:
        raise InputError("expected 1 or more", field="batch_size", value=batch_size)
    order = sorted(range(len(texts)), key=lambda n: len(texts[n].ids))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _check_online(weight: str, grid: Sequence[float], select: str, seed: int | None, sampling: bool) -> None:
    if weight != "online":
        raise InputError('expected a number from 0 to 1, or "online"', field="weight", value=weight)
    if not grid or list(grid) != sorted(set(grid)) or not all(0 <= w <= 1 for w in grid):
        raise InputError("expected weights from 0 to 1, ascending", field="grid", value=list(grid))
    if select not in ("consensus", "coverage"):
        raise InputError('expected "consensus" or "coverage"', field="select", value=select)
    if sampling and seed is None:
        raise InputError("online selection among sampled summaries needs a seed", field="seed", value=seed)
