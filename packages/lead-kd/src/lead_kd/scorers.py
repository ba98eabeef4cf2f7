"""Teachers and students: models that score a step's queries against its candidates from every layer.

A scorer turns texts into tensors (`collate`) and those into scores (`forward`); it keeps one vector a layer
and text (one a token for ColBERT), never the hidden states of all tokens of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lead_kd.scores import (
    Gather,
    Scores,
    gather_padded,
    gather_with_gradient,
    layer_scores,
    maxsim,
)
from shared_core import InputError

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer

COSINE_SCALE = 20.0
"""Cosines lie in [-1, 1], over which a softmax is flat; sentence-transformers' losses multiply them by 20."""

Batch = dict[str, Any]


class Scorer(nn.Module):
    """What the losses want of a model.

    Attributes:
        n_layers: Layers, without the embeddings.
        in_batch: Whether every passage of the step is a candidate of every query; else only a query's own.
    """

    n_layers: int
    in_batch: bool = True

    def collate(self, queries: Sequence[str], passages: Sequence[str]) -> Batch:
        """Turn texts into tensors; passages in the order [q1+, q1-1, ..., q2+, ...]."""
        raise TypeError(f"{type(self).__name__} reads no texts")

    def forward(self, batch: Batch, layers: Sequence[int] | None = None) -> Scores:
        """Score what `collate` gave; `layers` names the layers that are wanted, all where None.

        Layers that are not wanted are left out of `Scores.layers`, whose order is that of `layers`.
        """
        raise TypeError(f"{type(self).__name__} gives no scores")


class DualEncoder(Scorer):
    """A sentence-transformers model as student or teacher: s_l(q, p) = h_l(q) . h_l(p).

    A layer's feature is its hidden states, pooled as the model pools its last ([CLS] in the paper's models),
    and normalized where the model normalizes. Dense projections are left out of all but the final score.
    A model that does not normalize ranks by dot products here, and is told so: its `similarity_fn_name`
    becomes "dot" where it was not set.

    Args:
        model: A SentenceTransformer around a transformers encoder.
        scale: Multiplies scores; by default 20 where the model normalizes (cosines), else 1 as published.
        query_length: Longest query in tokens; the model's own limit where None.
        passage_length: Longest passage in tokens.

    Raises:
        InputError: The model's first module shows no hidden states, or it has no pooling; or it says that it
            ranks by something that is no inner product of its embeddings.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | None = None,
        query_length: int | None = None,
        passage_length: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.query_length, self.passage_length = query_length, passage_length
        self.pooling = _one_module(model, "Pooling")
        self.normalized = bool(_modules(model, "Normalize"))
        if not self.normalized:
            said = model._similarity_fn_name  # the property would set it to cosine
            if said not in (None, "dot"):
                raise InputError(
                    "ranks by this, and its embeddings are not normalized; append a Normalize module, or set "
                    'similarity_fn_name = "dot"',
                    field="model.similarity_fn_name",
                    value=said,
                )
            model.similarity_fn_name = "dot"
        self.scale = (COSINE_SCALE if self.normalized else 1.0) if scale is None else scale
        self.n_layers = count_layers(model)

    def collate(self, queries: Sequence[str], passages: Sequence[str]) -> Batch:
        """Tokenize, each text cut at its kind's length."""
        return {
            "queries": tokens_of(self.model, queries, "query", self.query_length),
            "passages": tokens_of(self.model, passages, "document", self.passage_length),
        }

    def forward(self, batch: Batch, layers: Sequence[int] | None = None) -> Scores:
        """Score every query against the passages of all processes."""
        q_layers, q_final = self.vectors(batch["queries"], layers)
        p_layers, p_final = self.vectors(batch["passages"], layers)
        return vector_scores(q_layers, q_final, p_layers, p_final, self.scale)

    def vectors(
        self,
        features: Batch,
        layers: Sequence[int] | None = None,
        run: Callable[[Batch], Batch] | None = None,
    ) -> tuple[Float[Tensor, "texts layers dim"], Float[Tensor, "texts final_dim"]]:
        """One vector a layer, and the model's own embedding.

        Args:
            features: Tokens.
            layers: The layers that are wanted; all where None.
            run: Runs the model, where a trainer has wrapped it.
        """
        out, hidden = hidden_states(self.model, features, run or self.model)
        wanted = range(self.n_layers) if layers is None else layers
        pooled = [self._pool(out, hidden[number]) for number in wanted]
        return torch.stack(pooled, 1), out["sentence_embedding"]

    def _pool(self, features: Batch, states: Tensor) -> Tensor:
        vector = self.pooling({**features, "token_embeddings": states})["sentence_embedding"]
        return F.normalize(vector, dim=-1) if self.normalized else vector


def vector_scores(
    q_layers: Float[Tensor, "queries layers dim"],
    q_final: Float[Tensor, "queries final_dim"],
    p_layers: Float[Tensor, "passages layers dim"],
    p_final: Float[Tensor, "passages final_dim"],
    scale: float,
    gather: Gather = gather_with_gradient,
) -> Scores:
    """Score vectors of queries against those of the passages of all processes."""
    p_layers, p_final = gather(p_layers), gather(p_final)
    of_queries, of_passages = q_layers.transpose(0, 1), p_layers.transpose(0, 1)
    return Scores(
        scale * layer_scores(of_queries, of_passages),
        scale * layer_scores(q_final[None], p_final[None])[0],
        (of_queries, of_passages),
    )


class ColBERT(Scorer):
    """A late-interaction teacher (MultiVectorEncoder, also PyLate's models): MaxSim from every layer.

    Layers between are taken as they are; projection and normalization belong to the final score alone.
    Added query tokens ([MASK] in ColBERT) count in the sum, as the model's own mask says.

    Args:
        model: A MultiVectorEncoder.
        scale: Multiplies scores.
    """

    def __init__(self, model: MultiVectorEncoder, scale: float = 1.0) -> None:
        super().__init__()
        self.model, self.scale = model, scale
        self.masking = _modules(model, "MultiVectorMask")
        self.n_layers = count_layers(model)

    def collate(self, queries: Sequence[str], passages: Sequence[str]) -> Batch:
        """Tokenize, with the model's own markers and lengths."""
        return {
            "queries": tokens_of(self.model, queries, "query", None),
            "passages": tokens_of(self.model, passages, "document", None),
        }

    def forward(self, batch: Batch, layers: Sequence[int] | None = None) -> Scores:
        """Score every query against the passages of all processes."""
        q_layers, q_final, q_mask = self._tokens(batch["queries"], "query", layers)
        p_layers, p_final, p_mask = self._tokens(batch["passages"], "document", layers)
        counted = gather_padded(p_mask.to(q_final.dtype)).bool()
        of_layers = [
            maxsim(q, gather_padded(p), q_mask, counted) for q, p in zip(q_layers, p_layers, strict=True)
        ]
        final = maxsim(q_final, gather_padded(p_final), q_mask, counted)
        return Scores(self.scale * torch.stack(of_layers), self.scale * final)

    def _tokens(
        self, features: Batch, task: str, layers: Sequence[int] | None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        out, hidden = hidden_states(self.model, features, self.model[0])
        final = {**out, "token_embeddings": hidden[-1]}
        for module in list(self.model)[1:]:
            accepted = getattr(module, "forward_kwargs", set())
            final = module(final, **({"task": task} if "task" in accepted else {}))
        wanted = range(self.n_layers) if layers is None else layers
        return (
            [hidden[number] for number in wanted],
            final["token_embeddings"],
            final["attention_mask"].bool(),
        )


class CrossEncoderScorer(Scorer):
    """A cross-encoder as teacher: its own classification head on every layer's [CLS].

    It reads query and passage together, so that only a query's own passages are candidates, for the student
    too.

    Args:
        model: A CrossEncoder with one label.
        max_length: Longest pair in tokens.

    Raises:
        InputError: It has more than one label, or its head is of a kind that is not known here.
    """

    in_batch = False

    def __init__(self, model: CrossEncoder, max_length: int | None = None) -> None:
        super().__init__()
        if model.num_labels != 1:
            raise InputError(
                "expected a cross-encoder with one label", field="labels", value=model.num_labels
            )
        self.model, self.max_length = model, max_length
        self.n_layers = count_layers(model)
        self.classifier = cast(Any, model.model)
        _head(self.classifier)

    def collate(self, queries: Sequence[str], passages: Sequence[str]) -> Batch:
        """Tokenize each query with each of its own passages."""
        if len(passages) % max(len(queries), 1):
            raise InputError(
                f"expected as many passages for each of {len(queries)} queries",
                field="passages",
                value=len(passages),
            )
        each = len(passages) // len(queries)
        pairs = [(queries[number // each], text) for number, text in enumerate(passages)]
        return {"pairs": _preprocess(self.model, pairs, None, self.max_length), "queries": len(queries)}

    def forward(self, batch: Batch, layers: Sequence[int] | None = None) -> Scores:
        """Score each query's own passages: (layers, queries, own passages)."""
        inputs = {name: value for name, value in batch["pairs"].items() if name in _MODEL_INPUTS}
        backbone = getattr(self.classifier, self.classifier.base_model_prefix)
        hidden = backbone(**inputs, output_hidden_states=True, return_dict=True).hidden_states[1:]
        wanted = range(self.n_layers) if layers is None else layers
        head = _head(self.classifier)
        mask = inputs["attention_mask"]
        rows = [head(hidden[number], mask).view(batch["queries"], -1) for number in wanted]
        final = rows[-1] if wanted and wanted[-1] == self.n_layers - 1 else head(hidden[-1], mask)
        return Scores(torch.stack(rows), final.view(batch["queries"], -1))


_MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


Head = Callable[[Tensor, Tensor], Tensor]
"""From hidden states (texts, tokens, dim) and the attention mask to scores (texts, 1)."""


def _head(model: Any) -> Head:
    """Find the model's own head.

    Raises:
        InputError: It is of a kind that is not known here.
    """
    backbone = getattr(model, model.base_model_prefix)
    classifier = getattr(model, "classifier", None)
    pooler = getattr(backbone, "pooler", None)
    dropout = getattr(model, "dropout", nn.Identity())
    if isinstance(classifier, nn.Linear):
        if hasattr(model, "pre_classifier"):  # DistilBERT
            return lambda states, mask: classifier(dropout(model.pre_classifier(states[:, 0]).relu()))
        if hasattr(model, "head"):  # ModernBERT
            mean = model.config.classifier_pooling == "mean"
            return lambda states, mask: classifier(
                model.drop(model.head(_mean(states, mask) if mean else states[:, 0]))
            )
        if hasattr(model, "pooler"):  # DeBERTa
            return lambda states, mask: classifier(dropout(model.pooler(states)))
        if isinstance(pooler, nn.Linear):  # ALBERT
            return lambda states, mask: classifier(dropout(backbone.pooler_activation(pooler(states[:, 0]))))
        if pooler is not None:  # BERT, ERNIE
            return lambda states, mask: classifier(dropout(pooler(states)))
    if classifier is not None and hasattr(classifier, "out_proj"):  # RoBERTa, XLM-R, ELECTRA, MPNet
        return lambda states, mask: classifier(states)
    raise InputError(
        "expected a cross-encoder of the kind of BERT, ALBERT, DeBERTa, DistilBERT, ModernBERT, RoBERTa, "
        "XLM-RoBERTa, ELECTRA or MPNet",
        field="teacher",
        value=type(model).__name__,
    )


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@contextmanager
def _all_hidden_states(encoder: Any) -> Iterator[None]:
    before = encoder.config.output_hidden_states
    encoder.config.output_hidden_states = True
    try:
        yield
    finally:
        encoder.config.output_hidden_states = before


def hidden_states(
    model: Any, features: Batch, run: Callable[[Batch], Batch]
) -> tuple[Batch, tuple[Tensor, ...]]:
    """Run a model or its encoder; give its features and the states after each layer, without the embeddings.

    Raises:
        InputError: The encoder shows no hidden states.
    """
    with _all_hidden_states(model[0].model):
        out = run(dict(features))
    states = out.pop("all_layer_embeddings", None)
    if not states or len(states) < 2:
        raise InputError(
            "shows no hidden states of its layers", field="model", value=type(model[0].model).__name__
        )
    return out, tuple(states[1:])


def count_layers(model: Any) -> int:
    """Layers of a model's encoder.

    Raises:
        InputError: Its first module is no transformers encoder.
    """
    encoder = getattr(model[0], "model", None)
    config = getattr(encoder, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int) or not hasattr(config, "output_hidden_states"):
        raise InputError(
            "expected a model around a transformers encoder that shows its hidden states",
            field="model",
            value=type(model[0]).__name__,
        )
    return depth


def tokens_of(model: Any, texts: Sequence[str], task: str, length: int | None) -> Batch:
    """Tokenize as `encode_query` and `encode_document` do, with the model's prompt for the task."""
    return _preprocess(model, list(texts), _prompt(model, task) or None, length, task=task)


def count_cut(model: Any, texts: Sequence[str], task: str, length: int) -> int:
    """Count the texts that are longer than `length` tokens, with prompt and special tokens."""
    prompt = _prompt(model, task)
    whole = model.tokenizer([prompt + text for text in texts], truncation=False, verbose=False)["input_ids"]
    return sum(len(tokens) > length for tokens in whole)


def _prompt(model: Any, task: str) -> str:
    names = ("query",) if task == "query" else ("document", "passage", "corpus")
    prompts = getattr(model, "prompts", None) or {}
    return next((prompts[name] for name in names if prompts.get(name)), "")


def _preprocess(model: Any, texts: list[Any], prompt: str | None, length: int | None, **extra: Any) -> Batch:
    if length is not None:
        extra["max_length"] = length
    return dict(model.preprocess(texts, prompt=prompt, **extra))


def _modules(model: Any, kind: str) -> list[nn.Module]:
    return [module for module in model if type(module).__name__ == kind]


def _one_module(model: Any, kind: str) -> nn.Module:
    found = _modules(model, kind)
    if len(found) != 1:
        raise InputError(f"expected a model with one {kind} module", field="model", value=len(found))
    return found[0]


def to_device(batch: Any, device: torch.device) -> Any:
    """Move a batch's tensors."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch
