"""How strongly to steer: the variants of the weight w, and the module that learns them.

| weight | shape | definition |
| --- | --- | --- |
| fixed | one number | the same in all layers and heads, not trained |
| per_layer | layers | sigmoid of a trained logit |
| per_head | layers x heads | sigmoid of a trained logit |
| linear | batch x layers x heads | sigmoid(W x + b) |

x is the mean encoder state, with the mean control embedding in front of it unless that is switched off. All
trained variants start as the fixed weight: their logits (or b) are logit(w0), W is 0.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from relattn.families import cross_attentions, source_embeddings
from relattn.relevance import EmbeddingRelevance, Temperature
from shared_core import InputError
from shared_core.files import atomic_path, write_json

CONFIG_FILE = "relattn_config.json"
WEIGHTS_FILE = "relattn.safetensors"


@dataclass(frozen=True)
class RelAttnConfig:
    """Shape and variants of a `RelAttnModule`.

    Attributes:
        width: Width of the encoder's states (and embeddings).
        layers: Decoder layers.
        heads: Heads of each cross-attention.
        relevance: "fixed" (E K^T), or "trained" with W_q and W_k, which start as the identity.
        weight: Variant of w, see the module's table.
        control_embedding: The linear weight sees the mean control embedding beside the mean encoder state.
        initial_weight: w0, between 0 and 1. The paper's few-shot example starts at 0.07.
        smooth_sigma: See `Relevance`, as for the next three.
        half_window: See `Relevance`.
        temperature: See `Relevance`.
        support: See `Relevance`.
    """

    width: int
    layers: int
    heads: int
    relevance: str = "fixed"
    weight: str = "fixed"
    control_embedding: bool = True
    initial_weight: float = 0.12
    smooth_sigma: float | int | None = 1.0
    half_window: int = 10
    temperature: Temperature = 1.0
    support: float | int = 8.0

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError("expected 1 or more", field=name, value=getattr(self, name))
        if self.relevance not in ("fixed", "trained"):
            raise InputError('expected "fixed" or "trained"', field="relevance", value=self.relevance)
        if self.weight not in ("fixed", "per_layer", "per_head", "linear"):
            raise InputError(
                'expected "fixed", "per_layer", "per_head" or "linear"', field="weight", value=self.weight
            )
        if not 0 < self.initial_weight < 1:
            raise InputError(
                "expected a number between 0 and 1", field="initial_weight", value=self.initial_weight
            )
        EmbeddingRelevance(self.smooth_sigma, self.half_window, self.temperature, self.support)


def masked_mean(
    vectors: Float[Tensor, "batch length width"], mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch width"]:
    """Mean over the real positions, float32; zeros where there is none."""
    weights = mask.float()
    total = torch.einsum("bn,bnd->bd", weights, vectors.float().masked_fill(~mask[:, :, None], 0.0))
    return total / weights.sum(1, keepdim=True).clamp(min=1)


class RelAttnModule(nn.Module):
    """The few parameters that relevance attention adds to a summarizer: W_q and W_k, and those of w.

    Give it to `Steerer(model, tokenizer, module=...)`, train it with `relattn.fewshot.fit` or with a trainer
    of your own through `relattn.fewshot.SteeredModel`.

    Args:
        config: See `RelAttnConfig`; `RelAttnModule.for_model(model, weight="linear")` fills in the shapes.
    """

    def __init__(self, config: RelAttnConfig) -> None:
        super().__init__()
        self.config = config
        logit = math.log(config.initial_weight / (1 - config.initial_weight))
        self.query = self.key = None
        if config.relevance == "trained":
            self.query, self.key = _identity(config.width), _identity(config.width)
        self.logits = self.linear = None
        if config.weight in ("per_layer", "per_head"):
            shape = (config.layers, config.heads if config.weight == "per_head" else 1)
            self.logits = nn.Parameter(torch.full(shape, logit))
        elif config.weight == "linear":
            inputs = config.width * (2 if config.control_embedding else 1)
            self.linear = _uninitialized(inputs, config.layers * config.heads)
            nn.init.zeros_(self.linear.weight)
            nn.init.constant_(self.linear.bias, logit)

    @classmethod
    def for_model(cls, model: PreTrainedModel, **settings: Any) -> "RelAttnModule":
        """A module of the right shapes for a model; `settings` are `RelAttnConfig`'s other fields.

        Raises:
            InputError: The model is not supported, or a setting is wrong or unknown.
        """
        layers = cross_attentions(model)
        known = {field.name for field in fields(RelAttnConfig)} - {"width", "layers", "heads"}
        for name in settings.keys() - known:
            raise InputError(f"expected one of {', '.join(sorted(known))}", field="settings", value=name)
        width = source_embeddings(model, torch.zeros(1, dtype=torch.long)).shape[1]
        shapes: dict[str, Any] = {"width": width, "layers": len(layers), "heads": layers[0].heads}
        return cls(RelAttnConfig(**(shapes | settings))).to(model.device)

    @property
    def relevance(self) -> EmbeddingRelevance:
        """The relevance with this module's W_q and W_k."""
        c = self.config
        return EmbeddingRelevance(
            c.smooth_sigma, c.half_window, c.temperature, c.support, query=self.query, key=self.key
        )

    def forward(
        self, control_mean: Float[Tensor, "batch width"], source_mean: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch layers heads"]:
        """Weight w of each document, layer and head, between 0 and 1.

        Args:
            control_mean: Mean of the control's raw embeddings over its real tokens.
            source_mean: Mean of the encoder's last states over real source tokens.
        """
        c = self.config
        if self.linear is not None:
            parts = [control_mean, source_mean] if c.control_embedding else [source_mean]
            weight = torch.sigmoid(self.linear(torch.cat(parts, dim=1).to(self.linear.weight.dtype)))
            return weight.unflatten(1, (c.layers, c.heads))
        if self.logits is not None:
            weight = torch.sigmoid(self.logits)
        else:
            weight = source_mean.new_full((1, 1), c.initial_weight)
        return weight.expand(len(source_mean), c.layers, c.heads)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `relattn_config.json` and `relattn.safetensors` into a folder; it may be the model's own."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().contiguous().cpu() for name, value in self.state_dict().items()}
        with atomic_path(target / WEIGHTS_FILE) as temporary:
            save_file(state, temporary)
        write_json(target / CONFIG_FILE, asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "RelAttnModule":
        """Read what `save_pretrained` wrote.

        Raises:
            InputError: A file is missing, is not JSON or safetensors, or does not fit the other.
        """
        config_file, weights_file = Path(folder, CONFIG_FILE), Path(folder, WEIGHTS_FILE)
        for file in (config_file, weights_file):
            if not file.is_file():
                raise InputError(
                    "is missing: expected a folder written by RelAttnModule.save_pretrained", file=file
                )
        try:
            settings = json.loads(config_file.read_text(encoding="utf-8"))
            module = cls(RelAttnConfig(**settings))
        except (json.JSONDecodeError, TypeError) as error:
            raise InputError(f"is not a RelAttnModule's configuration: {error}", file=config_file) from error
        try:
            module.load_state_dict(load_file(weights_file))
        except (SafetensorError, RuntimeError) as error:
            raise InputError(f"does not hold this module's weights: {error}", file=weights_file) from error
        return module


def _identity(width: int) -> nn.Linear:
    layer = _uninitialized(width, width)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _uninitialized(inputs: int, outputs: int) -> nn.Linear:
    """A layer whose making draws no random number: the caller's generator stays where it is."""
    return cast(nn.Linear, nn.utils.skip_init(nn.Linear, inputs, outputs))
