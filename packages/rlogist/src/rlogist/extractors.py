"""Patch encoders: pixels in, one vector a patch out. Any timm or transformers image encoder, or a fixed one.

An extractor is a callable with `dim`, `name` and `fingerprint`; features of two fingerprints are never mixed.
"""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from rlogist.stain import StainExtractor
from shared_core import InputError, named

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@runtime_checkable
class Extractor(Protocol):
    """What the rest of the package needs of an encoder."""

    name: str
    dim: int

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes features: weights, normalization, input size."""
        ...

    def __call__(self, patches: UInt8[np.ndarray, "batch height width 3"]) -> Float[Tensor, "batch dim"]:
        """Encode RGB patches; the result lies on the CPU."""
        ...


class NormalizationWarning(UserWarning):
    """An encoder does not say how its images are normalized."""


class EncoderExtractor:
    """A torch encoder as an extractor: evaluation mode, no gradients, the same bits in every run.

    Args:
        encoder: Maps normalized images (batch, 3, height, width) to (batch, dim), or to feature maps
            (batch, dim, h, w), or to tokens (batch, tokens, dim); the latter two are averaged.
        name: Shown to people and stored with features.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
        input_size: Patches are resized to this side; None leaves them as they are.
        device: Where the encoder runs: cpu, cuda, mps.
        batch_size: Patches a forward pass.

    Raises:
        InputError: The encoder's result has none of these shapes.
    """

    def __init__(
        self,
        encoder: nn.Module,
        name: str,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        input_size: int | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise InputError("expected at least 1", field="batch_size", value=batch_size)
        self.name, self.input_size, self.batch_size = name, input_size, batch_size
        self.device = torch.device(device)
        self.encoder = encoder.eval().requires_grad_(False).to(self.device)
        self._mean = torch.tensor(mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=self.device).view(1, 3, 1, 1)
        self._fingerprint: str | None = None
        self.dim = self(np.zeros((1, input_size or 64, input_size or 64, 3), np.uint8)).shape[1]

    @property
    def fingerprint(self) -> str:
        """A hash of the weights and of how images are prepared."""
        if self._fingerprint is None:
            # Numbers, not tensors: those are printed with their device, and a GPU's features are a CPU's.
            prepared = self.name, self.input_size, self._mean.flatten().tolist(), self._std.flatten().tolist()
            digest = hashlib.sha256(repr(prepared).encode())
            for key, value in self.encoder.state_dict().items():
                digest.update(key.encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    @torch.inference_mode()
    def __call__(self, patches: UInt8[np.ndarray, "batch height width 3"]) -> Float[Tensor, "batch dim"]:
        """Encode RGB patches, `batch_size` at a time."""
        self.encoder.eval()  # the caller may have put a shared module into training mode
        found = [
            self._encode(patches[start : start + self.batch_size])
            for start in range(0, len(patches), self.batch_size)
        ]
        return torch.cat(found) if found else torch.empty(0, self.dim)

    def _encode(self, patches: np.ndarray) -> Tensor:
        images = torch.from_numpy(np.array(patches)).to(self.device).permute(0, 3, 1, 2).float() / 255
        if self.input_size is not None and images.shape[-1] != self.input_size:
            images = nn.functional.interpolate(
                images, self.input_size, mode="bilinear", align_corners=False, antialias=True
            )
        return _one_vector(self.encoder((images - self._mean) / self._std), len(patches), self.name).cpu()


def load_extractor(
    name: str = "resnet50",
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    device: str = "cpu",
    batch_size: int = 32,
    seed: int = 0,
) -> Extractor:
    """Make an extractor from its name.

    | name | encoder |
    | --- | --- |
    | `resnet50` | the paper's: ImageNet ResNet-50 cut after stage 3, averaged over positions, 1024-d |
    | `stain` | colour and texture statistics after stain separation; fixed, fast, no weights |
    | `timm/NAME` | any timm model, without its head |
    | `hf/NAME-OR-FOLDER` | any transformers image encoder |
    | `module:callable` | `callable(device=..., batch_size=...)` gives an extractor |

    Args:
        name: As above.
        pretrained: The library's weights, which may have to be downloaded; or else random ones from `seed`.
        weights: A .safetensors state dict of the encoder, in the place of the library's.
        device: Where it runs.
        batch_size: Patches a forward pass.
        seed: Of random weights.

    Raises:
        InputError: No such encoder or device, weights that do not fit, or weights that cannot be had.
    """
    if name == "stain":
        if weights is not None:
            raise InputError("stain is fixed and has no weights", field="weights", value=weights)
        return StainExtractor()
    check_device(device)
    if name == "resnet50":
        encoder, prepare = _timm("resnet50", pretrained and weights is None, seed, truncated=True)
    elif name.startswith("timm/"):
        encoder, prepare = _timm(name.removeprefix("timm/"), pretrained and weights is None, seed)
    elif name.startswith("hf/"):
        encoder, prepare = _transformers(name.removeprefix("hf/"), pretrained and weights is None, seed)
    elif ":" in name:
        return _custom(name, device, batch_size)
    else:
        raise InputError(
            "expected resnet50, stain, timm/NAME, hf/NAME-OR-FOLDER or module:callable",
            field="extractor",
            value=name,
        )
    if weights is not None:
        _load_weights(encoder, Path(weights))
    return EncoderExtractor(encoder, name, device=device, batch_size=batch_size, **prepare)


def _timm(
    name: str, pretrained: bool, seed: int, truncated: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        import timm
        from timm.data.config import resolve_data_config
    except ModuleNotFoundError as error:
        raise InputError("timm is not installed: pip install 'rlogist[timm]'") from error
    if not timm.is_model(name.partition(".")[0]):
        raise InputError("timm has no such model", field="extractor", value=name)
    # out_indices=[3] ends after stage 3, 1024 channels at 1/16, as CLAM's extractor does.
    options: dict[str, Any] = {"features_only": True, "out_indices": [3]} if truncated else {"num_classes": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _fetched(lambda: timm.create_model(name, pretrained=pretrained, **options), name)
    config = resolve_data_config({}, model=model)
    fixed = getattr(getattr(model, "patch_embed", None), "strict_img_size", False)
    prepare = {"mean": config["mean"], "std": config["std"]}
    if fixed:
        prepare["input_size"] = config["input_size"][-1]
    return (_LastMap(model) if truncated else model), prepare


def _transformers(name: str, pretrained: bool, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise InputError("transformers is not installed: pip install 'rlogist[transformers]'") from error

    def make() -> Any:
        if pretrained:
            return transformers.AutoModel.from_pretrained(name)
        return transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(name))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _fetched(make, name)
    model = getattr(model, "vision_model", model)  # the image half of CLIP-like models
    prepare: dict[str, Any] = {}
    size = getattr(model.config, "image_size", None)
    if isinstance(size, int):
        prepare["input_size"] = size
    return _Pooled(model), prepare | _normalization(name)


def _normalization(name: str) -> dict[str, tuple[float, ...]]:
    """Mean and deviation of a transformers model's images; with a warning ImageNet's where it has none."""
    import transformers

    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        return {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        warnings.warn(
            f"{name}: how its images are normalized cannot be read ({reason}); ImageNet's mean and deviation "
            "are used",
            NormalizationWarning,
            stacklevel=2,
        )
        return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def check_device(device: str) -> None:
    """Raise InputError unless this device can be used here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"cannot be used here: {reason}", field="device", value=device) from error


def _fetched(make: Any, name: str) -> nn.Module:
    try:
        return make()
    except (OSError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"its weights cannot be had ({reason}): give a file (--weights) or use random ones (--random)",
            field="extractor",
            value=name,
        ) from error


def _load_weights(encoder: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError("there is no such file", file=path)
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise InputError(f"not a whole .safetensors file: {error}", file=path) from error
    inner = encoder.model if isinstance(encoder, _LastMap | _Pooled) else encoder
    own = inner.state_dict()
    absent = [key for key in own if key not in state]
    unlike = [key for key in own if key in state and own[key].shape != state[key].shape]
    if absent or unlike:
        raise InputError(
            f"does not fit the encoder: {len(absent)} tensors missing, {len(unlike)} of other shape, "
            f"the first {(absent + unlike)[0]}",
            file=path,
        )
    # Tensors beyond the encoder's (a classifier's head, later stages) are not needed.
    inner.load_state_dict({key: state[key] for key in own})


def _custom(name: str, device: str, batch_size: int) -> Extractor:
    found = named.made(name, "extractor", device=device, batch_size=batch_size)
    if not isinstance(found, Extractor):
        raise InputError(
            "expected a callable with name, dim and fingerprint, from patches to (batch, dim)",
            field="extractor",
            value=type(found).__name__,
        )
    return found


def _one_vector(result: Any, batch: int, name: str) -> Tensor:
    if isinstance(result, Tensor) and len(result) == batch:
        if result.ndim == 4:
            result = result.mean(dim=(2, 3))
        elif result.ndim == 3:
            result = result.mean(dim=1)
        if result.ndim == 2:
            return result.float()
    shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
    raise InputError("expected an encoder that gives (batch, dim)", field=name, value=shape)


class _LastMap(nn.Module):
    """A timm feature extractor with one map, given as the map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[-1]


class _Pooled(nn.Module):
    """A transformers vision model: its pooled output, or else the mean of its positions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        found = self.model(pixel_values=images)
        pooled = getattr(found, "pooler_output", None)
        return found.last_hidden_state if pooled is None else pooled.flatten(1)
