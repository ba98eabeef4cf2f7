"""Any encoder as one thing: a tokenizer, a pooling, and the hidden states of every layer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from isocse.cosines import Mask, States
from shared_core import InputError

Pooling = Literal["cls", "mean", "max", "last"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

_POOLING_NAMES = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last"}


@dataclass(frozen=True)
class Encoder:
    """A transformer encoder with its tokenizer.

    Attributes:
        model: The transformer, whose forward gives hidden states.
        tokenizer: Its tokenizer.
        pooling: How token states become one vector of a sentence.
        max_length: Longest input in tokens; longer ones are cut.
        name: For people.
        causal: Whether a token sees only those before it.
    """

    model: nn.Module
    tokenizer: Any
    pooling: Pooling
    max_length: int
    name: str
    causal: bool = False

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Dropout and gradients off, and the model's mode as it was afterwards."""
        with _measuring(self.model):
            yield

    def hidden_states(
        self, ids: Int[Tensor, "sentences tokens"], mask: Mask
    ) -> list[Float[Tensor, "sentences tokens d"]]:
        """States of the embedding layer and of each layer after it; the last ones are the model's output.

        Token states are raw: a module that normalises sentence embeddings comes later and has no part in
        them.
        """
        output = self.model(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), output_hidden_states=True
        )
        states = list(output.hidden_states)
        # Some models normalise once more after the layer that they list last; the output is what users get.
        states[-1] = output.last_hidden_state
        return states

    def pool(self, h: States, mask: Mask) -> Float[Tensor, "sentences d"]:
        """One vector a sentence."""
        return pool(h, mask, self.pooling)


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def pool(h: States, mask: Mask, pooling: str) -> Float[Tensor, "sentences d"]:
    """One vector a sentence, from the states of its tokens.

    Args:
        h: Token states.
        mask: 1 at tokens, 0 at padding, which may stand on either side.
        pooling: "cls" takes the first token, "last" the last, "mean" and "max" all.
    """
    attended = mask.bool()
    if pooling == "mean":
        kept = h.masked_fill(~attended[..., None], 0)
        return kept.sum(1) / attended.sum(1, keepdim=True)
    if pooling == "max":
        return h.masked_fill(~attended[..., None], float("-inf")).amax(1)
    if pooling not in POOLINGS:
        raise InputError(f"expected one of {', '.join(POOLINGS)}", field="pooling", value=pooling)
    positions = torch.arange(h.shape[1], device=h.device).expand(attended.shape)
    if pooling == "cls":
        index = positions.masked_fill(~attended, h.shape[1]).amin(1)
    else:
        index = positions.masked_fill(~attended, -1).amax(1)
    return h[torch.arange(len(h), device=h.device), index]


def load_encoder(
    model: Any,
    tokenizer: Any = None,
    *,
    pooling: str | None = None,
    max_length: int | None = None,
    device: str | None = None,
    cut: int | None = None,
) -> Encoder:
    """An encoder from a folder, a name, or a model that is there already.

    Args:
        model: A SentenceTransformer, a transformers model (then with its tokenizer), or a folder or name of
            one.
        tokenizer: Of a transformers model; loaded from the model's folder where it has one.
        pooling: "cls", "mean", "max" or "last"; where None, the model's own, or "mean" ("last" for a
            decoder).
        max_length: Longest input in tokens; the model's own where None.
        device: Where to put it; where it is, or the CPU, where None.
        cut: Keep only so many of the lowest layers.

    Raises:
        InputError: It cannot be loaded, or is of another kind.
    """
    if isinstance(model, Encoder):
        return model
    if pooling is not None and pooling not in POOLINGS:
        raise InputError(f"expected one of {', '.join(POOLINGS)}", field="pooling", value=pooling)
    name = str(model) if isinstance(model, str | os.PathLike) else type(model).__name__
    loaded = _load(model) if isinstance(model, str | os.PathLike) else model
    found_pooling, limit = None, None
    if hasattr(loaded, "encode") and hasattr(loaded, "max_seq_length"):  # a SentenceTransformer
        transformer = _transformer_module(loaded)
        found_pooling, limit = _pooling_of(loaded), loaded.max_seq_length
        tokenizer = tokenizer or transformer.tokenizer
        inner = transformer.auto_model
    else:
        inner = loaded
    config = getattr(inner, "config", None)
    if config is None:
        raise InputError(
            "expected a SentenceTransformer, a transformers model, or a folder of one",
            field="model",
            value=type(model).__name__,
        )
    tokenizer = tokenizer or _tokenizer_of(inner, model)
    if getattr(config, "is_encoder_decoder", False):
        inner = inner.get_encoder()
    inner = _without_head(inner)
    if cut is not None:
        _cut_layers(inner, cut)
    causal = _is_causal(inner)
    if device is not None:
        inner = inner.to(device)
    own = pooling or found_pooling or ("last" if causal else "mean")
    length = _length(max_length, limit, tokenizer, config)
    return Encoder(inner, tokenizer, own, length, name, causal)  # pyright: ignore[reportArgumentType]


def _load(place: str | os.PathLike[str]) -> Any:
    """A sentence-transformers folder or a name as such, any other folder as a plain transformers model."""
    folder = Path(place)
    local = folder.is_dir()
    if not local and (folder.is_file() or os.fspath(place).startswith((".", "/", "~"))):
        raise InputError("expected a model's folder", field="model", value=os.fspath(place))
    try:
        if local and not (folder / "modules.json").is_file():
            from transformers import AutoModel, AutoTokenizer

            model = AutoModel.from_pretrained(os.fspath(place))
            model.isocse_tokenizer = AutoTokenizer.from_pretrained(os.fspath(place))
            return model
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(os.fspath(place), device="cpu")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot be loaded: {reason}", field="model", value=os.fspath(place)) from error


def _transformer_module(model: Any) -> Any:
    first = model[0]
    if not hasattr(first, "auto_model"):
        raise InputError(
            f"its first module is {type(first).__name__}, which has no layers: expected a Transformer",
            field="model",
        )
    return first


def _pooling_of(model: Any) -> Pooling | None:
    """The pooling of a SentenceTransformer, where it is one of ours."""
    for module in model:
        mode = getattr(module, "pooling_mode", None)
        if isinstance(mode, str):
            return _POOLING_NAMES.get(mode)  # pyright: ignore[reportReturnType]
    return None


def _tokenizer_of(inner: Any, given: Any) -> Any:
    tokenizer = getattr(inner, "isocse_tokenizer", None)
    if tokenizer is None:
        raise InputError("is missing: a transformers model needs its tokenizer", field="tokenizer")
    return tokenizer


def _without_head(model: Any) -> Any:
    """The body of a model with a head, such as BertForMaskedLM."""
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None) if prefix else None
    return body if isinstance(body, nn.Module) else model


def _cut_layers(model: Any, count: int) -> None:
    """Drop the upper layers of a BERT-like stack, in place."""
    for holder in (getattr(model, "encoder", model), model):
        for attribute in ("layer", "layers", "block", "h"):
            layers = getattr(holder, attribute, None)
            if isinstance(layers, nn.ModuleList):
                if not 1 <= count <= len(layers):
                    raise InputError(f"expected 1 to {len(layers)} layers", field="cut", value=count)
                setattr(holder, attribute, nn.ModuleList(list(layers)[:count]))
                for name in ("num_hidden_layers", "num_layers", "n_layer"):
                    if hasattr(model.config, name):
                        setattr(model.config, name, count)
                return
    raise InputError("cannot cut the layers of this architecture", field="cut", value=type(model).__name__)


def _is_causal(model: Any) -> bool:
    """Whether tokens see only those before them, by trying: the last token is changed."""
    config = model.config
    size = int(getattr(config, "vocab_size", 0) or 0)
    if size < 3:
        return bool(getattr(config, "is_decoder", False))
    probe = torch.tensor([[1, 2, 1, 2], [1, 2, 1, size - 1]], device=next(model.parameters()).device)
    with _measuring(model):
        states = model(input_ids=probe, attention_mask=torch.ones_like(probe)).last_hidden_state
    return bool(torch.allclose(states[0, 0], states[1, 0], rtol=1e-4, atol=1e-6))


def _length(asked: int | None, own: int | None, tokenizer: Any, config: Any) -> int:
    limits = [own, getattr(tokenizer, "model_max_length", None)]
    limits.append(getattr(config, "max_position_embeddings", None))
    known = [int(limit) for limit in limits if limit and 0 < limit < 10**9]
    # RoBERTa's positions begin after the padding index, so two of them are not for tokens.
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        known = [limit - 2 if limit == config.max_position_embeddings else limit for limit in known]
    most = min(known, default=512)
    if asked is None:
        return most
    if not 3 <= asked <= most:
        raise InputError(f"expected 3 to {most} tokens", field="max_length", value=asked)
    return asked


@dataclass(frozen=True)
class Tokens:
    """Tokens of some sentences, ragged.

    Attributes:
        ids: By sentence, its token ids.
        special: By sentence, which of them are special tokens.
        words: By sentence, the number of the word that each token belongs to, -1 for special tokens; None
            where tokens are not put together.
        texts: By sentence, the words; None as above.
        cut: Sentences that were longer than the limit.
    """

    ids: list[np.ndarray]
    special: list[np.ndarray]
    words: list[np.ndarray] | None
    texts: list[list[str]] | None
    cut: int


def tokenize(encoder: Encoder, sentences: Sequence[str], *, words: bool = False) -> Tokens:
    """Tokens of sentences, cut at the encoder's limit.

    Args:
        encoder: Whose tokenizer.
        sentences: Texts.
        words: Also tell to which word each token belongs. Words are runs of letters and digits, or single
            other signs, whatever the tokenizer: so they are the same for every model.
    """
    if words and not getattr(encoder.tokenizer, "is_fast", False):
        raise InputError(
            "needs a fast tokenizer, which tells where tokens stand in the text",
            field="unit",
            value=type(encoder.tokenizer).__name__,
        )
    whole = encoder.tokenizer(list(sentences), add_special_tokens=True, truncation=False, verbose=False)
    cut = sum(len(ids) > encoder.max_length for ids in whole["input_ids"])
    encoded = encoder.tokenizer(
        list(sentences),
        truncation=True,
        max_length=encoder.max_length,
        return_special_tokens_mask=True,
        return_offsets_mapping=words,
        verbose=False,
    ) if cut or words else whole  # fmt: skip
    ids = [np.asarray(row, dtype=np.int64) for row in encoded["input_ids"]]
    special_ids = sorted(set(encoder.tokenizer.all_special_ids) - {_unknown(encoder.tokenizer)})
    flags = np.isin(np.concatenate(ids), np.array(special_ids, dtype=np.int64))
    special = np.split(flags, np.cumsum([len(row) for row in ids])[:-1])
    if not words:
        return Tokens(ids, special, None, None, cut)
    from isocse.types import word_spans

    numbers, texts = [], []
    for sentence, offsets, flags in zip(sentences, encoded["offset_mapping"], special, strict=True):
        spans = word_spans(sentence)
        starts = np.array([start for start, _ in spans] or [0])
        middles = np.array([(start + end - 1) // 2 if end > start else start for start, end in offsets])
        found = np.searchsorted(starts, middles, side="right") - 1 if spans else np.full(len(offsets), -1)
        numbers.append(np.where(flags, -1, found))
        texts.append([sentence[start:end].lower() for start, end in spans])
    return Tokens(ids, special, numbers, texts, cut)


def _unknown(tokenizer: Any) -> int:
    """The id of the unknown token, which stands for text and is no special token here; -1 for none."""
    found = tokenizer.unk_token_id
    return -1 if found is None or found == tokenizer.eos_token_id else int(found)


def pad(
    rows: Sequence[np.ndarray], fill: int, length: int | None = None
) -> tuple[Int[Tensor, "sentences tokens"], Bool[Tensor, "sentences tokens"]]:
    """Rows as one tensor, padded on the right, and its mask."""
    lengths = np.array([len(row) for row in rows])
    width = max(int(lengths.max(initial=0)), length or 0)
    mask = np.arange(width)[None, :] < lengths[:, None]
    ids = np.full((len(rows), width), fill, dtype=np.int64)
    ids[mask] = np.concatenate(rows) if len(rows) else []
    return torch.as_tensor(ids), torch.as_tensor(mask)
