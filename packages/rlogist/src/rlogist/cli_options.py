"""Options that several commands share, as dataclasses: a command takes one as a parameter.

Nothing here imports torch or OpenSlide: help answers at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from shared_core.command import Device

if TYPE_CHECKING:
    from rlogist.slide_jobs import Encoding, Opening


class Backend(StrEnum):
    """What runs many slides side by side."""

    PROCESS = "process"
    RAY = "ray"


@dataclass(frozen=True)
class SlideOptions:
    """How slides are opened."""

    scan_mpp: Annotated[
        float | None, typer.Option(help="microns per pixel of the scan; 2.0 (5x), or the model's")
    ] = None
    deep_mpp: Annotated[
        float | None, typer.Option(help="microns per pixel of the deep look; 0.5 (20x), or the model's")
    ] = None
    patch: Annotated[
        int | None,
        typer.Option(min=16, help="side of a patch in pixels at both magnifications; 256, or the model's"),
    ] = None
    mpp: Annotated[
        float | None, typer.Option(help="microns per pixel of level 0, where files do not state it")
    ] = None
    threshold: Annotated[
        int, typer.Option(min=0, max=255, help="saturation above which a pixel is tissue")
    ] = 8
    otsu: Annotated[
        bool, typer.Option("--otsu", help="Otsu's threshold of each slide in the fixed one's place")
    ] = False
    tissue_area: Annotated[
        float, typer.Option(min=0, help="least area of a piece of tissue, in 512 x 512 level-0 squares")
    ] = 100.0

    def opening(self, trained: Mapping[str, float] | None = None) -> "Opening":
        """As the jobs take it; what is not given is as a model was `trained`."""
        from rlogist.slide_jobs import Opening
        from rlogist.tissue import Segmentation

        settings = Segmentation(threshold=self.threshold, otsu=self.otsu, tissue_area=self.tissue_area)
        given = {"scan_mpp": self.scan_mpp, "deep_mpp": self.deep_mpp, "patch": self.patch}
        known = {"scan_mpp": 2.0, "deep_mpp": 0.5, "patch": 256, **(trained or {})}
        wanted = {key: known[key] if own is None else own for key, own in given.items()}
        patch = int(wanted["patch"])
        return Opening(wanted["scan_mpp"], wanted["deep_mpp"], patch, self.mpp, settings)


@dataclass(frozen=True)
class EncoderOptions:
    """Where an encoder's weights come from, and where it and a model's networks run."""

    weights: Annotated[
        Path | None, typer.Option(help="state dict of the encoder, .safetensors", exists=True, dir_okay=False)
    ] = None
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--random", help="the library's weights, or random ones")
    ] = True
    device: Device = "auto"
    batch_size: Annotated[int, typer.Option(min=1, help="patches a forward pass")] = 32

    def encoding(self, extractor: str, deep: bool = False, here: bool = True) -> "Encoding":
        """As the jobs take it.

        Args:
            extractor: Name for `load_extractor`.
            deep: Whether regions are read at depth.
            here: Whether work is done on this machine, and not on others that may have other devices.
        """
        from rlogist.slide_jobs import Encoding
        from shared_core.command import usable_device

        device = usable_device(self.device) if here or self.device == "auto" else self.device
        weights = None if self.weights is None else self.weights.absolute()
        return Encoding(extractor, self.pretrained, weights, device, self.batch_size, deep)


@dataclass(frozen=True)
class FolderOptions:
    """How many slides are worked on side by side."""

    jobs: Annotated[
        int, typer.Option(min=1, help="processes; on a cluster, what Ray may use on this machine")
    ] = 1
    backend: Annotated[Backend, typer.Option(help="ray: the cluster of `ray start`, extra [ray]")] = (
        Backend.PROCESS
    )

    @property
    def here(self) -> bool:
        """Whether all work is done on this machine."""
        return self.backend is Backend.PROCESS


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose parameters that are dataclasses are given as one option for each of their fields."""
    own = signature(command, eval_str=True)
    groups: dict[str, type[Any]] = {}
    parameters: list[Parameter] = []
    for parameter in own.parameters.values():
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parameters += _options(parameter.annotation)
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))

    @wraps(command)
    def run(**given: Any) -> Any:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        return command(**given)

    # What typer reads. The order is the command's own.
    run.__dict__["__signature__"] = own.replace(parameters=parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options(group: type[Any]) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
        for field in fields(group)
    ]
