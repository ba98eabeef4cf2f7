"""How good a quantized model is: accuracy, likeness to the floating-point model layer by layer, latency."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repqvit.layers import AttentionQuantizers, QuantConv2d, QuantLinear
from repqvit.quantized import Batch, QuantizedModel, prepared_copy
from shared_core import InputError


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`; shares lie in [0, 1]."""

    images: int
    accuracy: dict[str, float] = field(default_factory=dict)
    """`top1`, `top5`; empty for unlabelled data."""
    reference_accuracy: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None
    """Share of outputs whose highest score is at the class that the reference chooses."""
    sqnr_db: float | None = None
    """10 log10(|y|^2 / |y - y_q|^2) over all outputs; infinite where they are equal."""


@dataclass(frozen=True)
class LayerComparison:
    """One layer's output in the quantized model against the floating-point one."""

    name: str
    kind: str
    """`linear`, `convolution`, `attention`, `block` or `output`."""
    sqnr_db: float
    cosine: float
    """Cosine of the angle between both outputs, taken as one vector over all images."""


@dataclass(frozen=True)
class Latency:
    """Wall time of one forward pass, in milliseconds."""

    p50_ms: float
    p90_ms: float


class _Noise:
    """Energies that stream over batches, in float64."""

    def __init__(self) -> None:
        self.signal = self.noise = self.approx = self.product = 0.0

    def add(self, reference: Tensor, approx: Tensor) -> None:
        exact, near = reference.detach().double(), approx.detach().double()
        self.signal += float(exact.square().sum())
        self.approx += float(near.square().sum())
        self.noise += float((exact - near).square().sum())
        self.product += float((exact * near).sum())

    @property
    def sqnr_db(self) -> float:
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        scale = math.sqrt(self.signal) * math.sqrt(self.approx)
        return self.product / scale if scale else float(self.signal == self.approx)


def logits_of(output: Any) -> Tensor:
    """The scores in an output: a tensor, `.logits`, `["logits"]`, or the first tensor of a tuple or mapping.

    Raises:
        InputError: there is no tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    members = output.values() if isinstance(output, Mapping) else output
    if isinstance(members, Iterable):
        for member in members:
            if isinstance(member, Tensor):
                return member
    raise InputError(
        "expected as the model's output a tensor, one with logits, or a tuple or mapping with a tensor",
        value=type(output).__name__,
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    reference: nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    topk: Sequence[int] = (1, 5),
    progress: bool = False,
    batches: int | None = None,
) -> Evaluation:
    """Measure a model on data that streams by, and its likeness to a reference.

    Args:
        model: the quantized model, or any model.
        data: batches `images` or `(images, labels)`; images are a tensor `(images, channels, height, width)`
            or a mapping of keyword arguments of the model's forward, labels are integers `(images,)` or None.
        reference: the floating-point model, for `reference_accuracy`, `agreement` and `sqnr_db`.
        device: both models are moved there, in place; where None, data go to where each model is.
        topk: the accuracies to measure; one above the number of classes is left out.
        progress: show a bar on stderr.
        batches: number of batches, for the bar.

    Both models run in evaluation mode and get their own mode back.

    Raises:
        InputError: no batch, labels that do not fit the outputs, outputs that are not finite or no tensor.
    """
    models = [model] if reference is None else [model, reference]
    if device is not None:
        for each in models:
            each.to(device)
    images = outputs = agreed = 0
    correct: list[dict[str, float]] = [{} for _ in models]
    noise = _Noise()
    with evaluating(*models):
        for batch in _bar(data, batches) if progress else data:
            pixels, labels = batch if isinstance(batch, tuple | list) else (batch, None)
            scores = [_scores(each, pixels) for each in models]
            images += len(scores[0])
            if labels is not None:
                for total, logits in zip(correct, scores, strict=True):
                    for name, share in _accuracy(logits, labels, topk).items():
                        total[name] = total.get(name, 0.0) + share * len(logits)
            if reference is not None:
                ours, exact = scores
                noise.add(exact, ours)
                same = ours.argmax(-1) == exact.argmax(-1)
                agreed, outputs = agreed + int(same.sum()), outputs + same.numel()
    if not images:
        raise InputError("there is no image to evaluate on")
    accuracies = [{name: round(count) / images for name, count in total.items()} for total in correct]
    if reference is None:
        return Evaluation(images, accuracies[0])
    return Evaluation(images, accuracies[0], accuracies[1], agreed / outputs, noise.sqnr_db)


def _scores(model: nn.Module, pixels: Batch) -> Float[Tensor, "images *outputs classes"]:
    logits = logits_of(forward(model, pixels)).float().cpu()
    if not torch.isfinite(logits).all():
        raise InputError(f"the outputs of {type(model).__name__} must be finite, and NaN or infinity came")
    return logits


def _accuracy(logits: Tensor, labels: Tensor, topk: Sequence[int]) -> dict[str, float]:
    from shared_core.metrics import classification

    if logits.ndim != 2:
        raise InputError("labels need a classifier with outputs (images, classes)", value=tuple(logits.shape))
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != len(logits):
        raise InputError(
            f"labels must be integers, one for each of {len(logits)} images",
            value=f"{labels.dtype} {tuple(labels.shape)}",
        )
    try:
        return classification(logits, labels.cpu().long(), topk)
    except ValueError as error:
        raise InputError(str(error)) from error


def forward(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch, moved to the device of its first parameter."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    return model(**{key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()})


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _bar(data: Iterable[Any], total: int | None) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    return track(data, "evaluating", total=total, console=Console(stderr=True), transient=True)


@torch.no_grad()
def compare(
    reference: nn.Module, quantized: QuantizedModel, images: Batch | Iterable[Batch]
) -> list[LayerComparison]:
    """Where the error arises: every layer's output in the quantized model against the floating-point one.

    Errors accumulate from layer to layer, as they do in use. LayerNorm outputs are left out:
    reparameterization changes them on purpose, and the next linear layer's output is what must agree.

    Args:
        reference: the floating-point model that was quantized; left unchanged.
        quantized: the result of `quantize` or `load`.
        images: a batch, or several; see `evaluate`.

    Returns:
        Linear and convolution layers, attentions, blocks (members of a list of modules that hold attention)
        and the output, in order of execution.
    """
    exact = prepared_copy(reference)
    kinds = compared_layers(quantized.model)
    modules = dict(exact.named_modules())
    missing = [name for name in kinds if name not in modules]
    if missing:
        raise InputError(f"the reference is another model: it has no layer {missing[0]}")
    energies: dict[str, _Noise] = {}
    pending: dict[str, list[Tensor]] = {}

    def keep(name: str, output: Any) -> None:
        pending.setdefault(name, []).append(logits_of(output))

    def judge(name: str, output: Any) -> None:
        calls = pending.get(name)
        near = logits_of(output)
        if not calls or calls[0].shape != near.shape:
            raise InputError(
                f"the reference is another model: the outputs of {name} differ in number or shape"
            )
        energies.setdefault(name, _Noise()).add(calls.pop(0), near)

    with evaluating(quantized), _outputs(exact, kinds, keep), _outputs(quantized.model, kinds, judge):
        batches: Iterable[Any] = [images] if isinstance(images, Tensor | Mapping) else images
        for batch in batches:
            pending.clear()
            keep("output", forward(exact, batch))
            judge("output", forward(quantized, batch))
    if not energies:
        raise InputError("there is no image to compare on")
    kinds["output"] = "output"
    return [LayerComparison(name, kinds[name], n.sqnr_db, n.cosine) for name, n in energies.items()]


def compared_layers(model: nn.Module) -> dict[str, str]:
    """Name -> kind of the layers that `compare` looks at."""
    kinds = {}
    attentions = [
        name.rpartition(".")[0] for name, m in model.named_modules() if isinstance(m, AttentionQuantizers)
    ]
    lists = {name for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            kinds[name] = "linear"
        elif isinstance(module, QuantConv2d):
            kinds[name] = "convolution"
        elif name in attentions:
            kinds[name] = "attention"
        elif _is_member(name, lists) and any(attention.startswith(f"{name}.") for attention in attentions):
            kinds[name] = "block"
    return kinds


def _is_member(name: str, lists: set[str]) -> bool:
    return bool(name) and name.rpartition(".")[0] in lists and name not in lists


@contextmanager
def _outputs(model: nn.Module, names: Iterable[str], receive: Callable[[str, Any], None]) -> Iterator[None]:
    """Hand the outputs of the named modules to `receive` while the block runs."""
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, args, out, n=name: receive(n, out))
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def norm_ranges(
    model: nn.Module, norms: Iterable[str], images: Batch
) -> dict[str, tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]]:
    """Minimum and maximum of every channel of the named LayerNorms' outputs over a batch."""
    ranges = {}

    def receive(name: str, output: Tensor) -> None:
        rows = output.detach().float().reshape(-1, output.shape[-1]).cpu()
        ranges[name] = (rows.amin(0), rows.amax(0))

    with evaluating(model), _outputs(model, norms, receive):
        forward(model, images)
    return ranges


@torch.no_grad()
def latency(models: Sequence[nn.Module], images: Batch, repeats: int = 20, warmup: int = 3) -> list[Latency]:
    """Median and 90th percentile of the time of a forward pass on the batch, for each model.

    The models take turns, so that whatever else the machine does slows all of them. A quantized model
    simulates integer arithmetic in floating point and is slower than the original; the exported model is the
    one to time for deployment.
    """
    times: list[list[float]] = [[] for _ in models]
    with evaluating(*models):
        for number in range(warmup + repeats):
            for model, taken in zip(models, times, strict=True):
                begin = time.perf_counter()
                logits = logits_of(forward(model, images))
                if logits.is_cuda:
                    torch.cuda.synchronize(logits.device)
                if number >= warmup:
                    taken.append((time.perf_counter() - begin) * 1e3)
    ends = torch.tensor([0.5, 0.9], dtype=torch.float64)
    return [Latency(*torch.tensor(taken, dtype=torch.float64).quantile(ends).tolist()) for taken in times]


def float_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers in float32, each shared tensor once: its size before."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()] if t.numel()}
    return 4 * sum(t.numel() for t in tensors.values())
