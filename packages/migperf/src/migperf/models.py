"""Models by name with random weights, and how they are trained, asked and made to generate."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor, nn

from migperf.inputs import Inputs, inputs_of
from migperf.workloads import Task, Workload
from shared_core import InputError
from shared_core.errors import needs_extra

_KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base-cased": ("bert", {"vocab_size": 28996}),
    "bert-large-cased": (
        "bert",
        {
            "vocab_size": 28996,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "distilbert-base-cased": ("distilbert", {"vocab_size": 28996}),
}
"""Names of the paper's text models whose sizes are known without a download; other names are model types."""

Forward = Callable[[Tensor], Tensor]


def build(workload: Workload, device: str, requests: int) -> Task:
    """Make the model and its inputs.

    Args:
        workload: One of torchvision, timm or transformers.
        device: `cpu` or `cuda:0`.
        requests: The most that one step must serve.
    """
    torch.manual_seed(workload.seed)
    model = _transformer(workload) if workload.source == "transformers" else _vision(workload)
    model = model.to(device=torch.device(device), dtype=getattr(torch, workload.dtype))
    vocabulary = 0
    if workload.source == "transformers":
        vocabulary = int(model.config.get_text_config().vocab_size)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    inputs = inputs_of(workload, vocabulary, device, requests)
    if workload.mode == "train":
        return Training(workload, model, inputs, device)
    if workload.mode == "generate":
        return Generation(workload, model, inputs, device)
    return Inference(workload, model, inputs, device)


def _vision(workload: Workload) -> nn.Module:
    options = {"num_classes": workload.classes, **workload.config}
    if workload.source == "torchvision":
        with needs_extra("torch", "migperf"):
            import torchvision
        known, make = (
            torchvision.models.list_models(),
            lambda: torchvision.models.get_model(workload.model, weights=None, **options),
        )
    else:
        with needs_extra("timm", "migperf"):
            import timm
        known, make = (
            timm.list_models(),
            lambda: timm.create_model(workload.model, pretrained=False, **options),
        )
    if workload.model.partition(".")[0] not in known:  # timm: a tag of weights may follow the name
        raise _unknown(workload, known)
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot be made: {error}", field="workload", value=workload.name) from error


def _transformer(workload: Workload) -> nn.Module:
    with needs_extra("transformers", "migperf"):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    kind, options = _KNOWN.get(workload.model, (workload.model, {}))
    options = {**options, **workload.config}
    if Path(kind, "config.json").is_file():
        config = AutoConfig.from_pretrained(kind, local_files_only=True, **options)
    elif kind in CONFIG_MAPPING:
        config = AutoConfig.for_model(kind, **options)
    else:
        raise _unknown(workload, [*_KNOWN, *CONFIG_MAPPING.keys()])
    try:
        if workload.mode == "generate":
            return AutoModelForCausalLM.from_config(config)
        config.num_labels = workload.classes
        if config.pad_token_id is None:
            config.pad_token_id = 0
        return AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise InputError(f"cannot {workload.mode}: {error}", field="workload", value=workload.name) from error


def _unknown(workload: Workload, known: list[str]) -> InputError:
    import difflib

    near = difflib.get_close_matches(workload.model, known, 1)
    hint = f", did you mean {near[0]}?" if near else ""
    return InputError(f"{workload.source} has no such model{hint}", field="workload", value=workload.model)


class _OnDevice:
    """What the three modes share: inputs that travel to the device, and waiting for it."""

    def __init__(self, workload: Workload, model: nn.Module, inputs: Inputs, device: str) -> None:
        self.workload, self.model, self.inputs = workload, model, inputs
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.facts: dict[str, Any] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "weights": "random",
            "inputs": workload.image_folder or workload.dataset or "synthetic",
        }

    def synchronize(self) -> None:
        """Wait for the device; the CPU has done its work when it returns."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def move(self, items: int, phases: dict[str, float]) -> tuple[Tensor, Tensor]:
        """Return the inputs on the device; the copy is timed as `h2d`."""
        batch, labels = self.inputs.next(items, phases)
        if not self.cuda:
            return batch, labels
        begin = time.perf_counter_ns()
        batch, labels = batch.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        self.synchronize()
        phases["h2d"] = time.perf_counter_ns() - begin
        return batch, labels

    def logits(self, batch: Shaped[Tensor, " items *shape"]) -> Shaped[Tensor, " items classes"]:
        """Return the scores, whatever the model wraps them in."""
        output = self.model(batch)
        for name in ("logits", "main"):
            output = getattr(output, name, output)
        return output[0] if isinstance(output, tuple) else output


class Inference(_OnDevice):
    """Evaluation mode and inference mode: no graph is built, no statistics move."""

    def __init__(self, workload: Workload, model: nn.Module, inputs: Inputs, device: str) -> None:
        super().__init__(workload, model.eval(), inputs, device)
        self.facts |= {"evaluation": not model.training, "inference_mode": True}
        self.output: Tensor | None = None

    def step(self, requests: int) -> Mapping[str, float]:
        """Answer the requests."""
        phases: dict[str, float] = {}
        with torch.inference_mode():
            batch, _ = self.move(requests * self.workload.batch, phases)
            self.output = self.logits(batch)
        return phases


class Training(_OnDevice):
    """SGD on cross entropy; times of data, forward, and backward with the optimizer."""

    def __init__(self, workload: Workload, model: nn.Module, inputs: Inputs, device: str) -> None:
        super().__init__(workload, model.train(), inputs, device)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=workload.learning_rate, momentum=0.9)
        self.losses: list[float] = []
        self.facts |= {"evaluation": False, "inference_mode": False, "optimizer": "sgd, momentum 0.9"}

    def step(self, requests: int) -> Mapping[str, float]:
        """Take one step of training."""
        phases: dict[str, float] = {}
        begin = time.perf_counter_ns()
        batch, labels = self.move(self.workload.batch, phases)
        data = time.perf_counter_ns()
        loss = nn.functional.cross_entropy(self.logits(batch).float(), labels)
        self.synchronize()
        forward = time.perf_counter_ns()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.synchronize()
        end = time.perf_counter_ns()
        return {**phases, "data": data - begin, "forward": forward - data, "backward": end - forward}


class Generation(_OnDevice):
    """Greedy generation with a cache of keys and values: time to the first token, and per token after it."""

    def __init__(self, workload: Workload, model: nn.Module, inputs: Inputs, device: str) -> None:
        super().__init__(workload, model.eval(), inputs, device)
        self.facts |= {"evaluation": not model.training, "inference_mode": True, "cache": True}
        self.tokens: Int64[Tensor, "items tokens"] = torch.empty(0, 0, dtype=torch.int64)

    def step(self, requests: int) -> Mapping[str, float]:
        """Generate `new_tokens` for each prompt."""
        phases: dict[str, float] = {}
        begin = time.perf_counter_ns()
        with torch.inference_mode():
            prompt, _ = self.move(requests * self.workload.batch, phases)
            output = self.model(prompt, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
            self.synchronize()
            first = time.perf_counter_ns()
            tokens = [token]
            for _ in range(self.workload.new_tokens - 1):
                output = self.model(token, past_key_values=output.past_key_values, use_cache=True)
                token = output.logits[:, -1:].argmax(-1)
                tokens.append(token)
            self.synchronize()
        phases["first_token"] = first - begin
        if len(tokens) > 1:
            phases["per_token"] = (time.perf_counter_ns() - first) / (len(tokens) - 1)
        self.tokens = torch.cat(tokens, dim=1)
        return phases
