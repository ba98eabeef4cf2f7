"""Geometries for other tools: mig-parted, nvidia-smi, and NVIDIA's device plugin for Kubernetes."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from migperf.errors import GeometryError
from migperf.geometry import Geometry
from migperf.plans import Plan

Strategy = Literal["mixed", "single"]


def mig_parted(geometry: Geometry, name: str = "migperf") -> str:
    """Return a configuration file of mig-parted, which also serves the GPU operator's MIG manager.

    It has no word for starts: mig-parted leaves them to the driver, and tries orders of creation.

    Args:
        geometry: A valid geometry.
        name: What the configuration is called in the file.

    Raises:
        GeometryError: The geometry is not valid, or has no instance.
    """
    import yaml

    _require_instances(geometry)
    devices = {"devices": "all", "mig-enabled": True, "mig-devices": dict(geometry.profiles)}
    note = f"# {geometry} on {geometry.layout.device}\n"
    return note + yaml.safe_dump({"version": "v1", "mig-configs": {name: [devices]}}, sort_keys=False)


def resources(geometry: Geometry, strategy: Strategy = "mixed") -> Mapping[str, int]:
    """Return what the device plugin offers on a node with this geometry: resource name -> count.

    Args:
        geometry: A valid geometry.
        strategy: `mixed`: each profile has its own resource. `single`: all instances are alike and are called
            `nvidia.com/gpu`.

    Raises:
        GeometryError: The geometry is not valid, has no instance, or has different ones under `single`.
    """
    _require_instances(geometry)
    if strategy == "mixed":
        # A resource's name may not hold a plus sign.
        return {f"nvidia.com/mig-{name.replace('+', '.')}": n for name, n in geometry.profiles.items()}
    if len(geometry.profiles) > 1:
        names = " and ".join(geometry.profiles)
        raise GeometryError(f"strategy single needs instances of one profile, not {names}: use mixed")
    return {"nvidia.com/gpu": geometry.profiles.total()}


def kubernetes(geometry: Geometry, name: str = "migperf", strategy: Strategy = "mixed") -> str:
    """Return a node's label and what its pods can ask for, as YAML documents.

    The first document is the ConfigMap of the GPU operator's MIG manager; the label makes the manager cut the
    node. Nothing here talks to a cluster.

    Args:
        geometry: A valid geometry.
        name: Of the configuration; the value of the label.
        strategy: Of the device plugin on the node.

    Raises:
        GeometryError: As for `resources`.
        ValueError: The name cannot be a label's value.
    """
    import yaml

    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", name):
        raise GeometryError(f"a label cannot be {name!r}: up to 63 letters, digits, dots, dashes")
    offered = resources(geometry, strategy)
    config: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name.lower().replace('_', '-')}-mig-parted-config"},
        "data": {"config.yaml": mig_parted(geometry, name)},
    }
    pods = [_pod(resource) for resource in offered]
    head = (
        f"# kubectl label node NODE nvidia.com/mig.config={name} --overwrite\n"
        f"# strategy {strategy}; the node then offers: "
        + ", ".join(f"{resource}: {count}" for resource, count in offered.items())
        + "\n"
    )

    class Dumper(yaml.SafeDumper):
        """Writes texts of several lines as such."""

    def lines(dumper: Any, text: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, lines)
    return head + yaml.dump_all([config, *pods], Dumper=Dumper, sort_keys=False)


def _pod(resource: str) -> dict[str, Any]:
    name = re.sub(r"[^a-z0-9-]+", "-", resource.partition("/")[2].lower())
    limits = {"limits": {resource: 1}}
    container = {"name": "worker", "image": "IMAGE", "resources": limits}
    metadata = {"name": f"on-{name}"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [container]}}


def nvidia_smi(plan: Plan, gpu: int = 0) -> tuple[str, ...]:
    """Return the commands that take a plan's steps, one compute instance in each GPU instance.

    Raises:
        GeometryError: An instance has a smaller compute instance, which takes ids that only the driver knows.
    """
    commands: list[str] = []
    for step in plan.steps:
        if step.slot.profile.enum is None:
            raise GeometryError(f"{step.slot} is no MIG profile: nvidia-smi cannot make it")
        if step.instance is not None:
            gi = step.instance.handle["gi"]
            if step.instance.uuid:
                commands.append(f"nvidia-smi mig -i {gpu} -gi {gi} -dci")
            commands.append(f"nvidia-smi mig -i {gpu} -gi {gi} -dgi")
        elif "c." in step.slot.profile.name or step.slot.compute is not None:
            raise GeometryError(
                f"{step.slot}: a part of a GPU instance has no one command; use migperf apply"
            )
        else:
            commands.append(f"nvidia-smi mig -i {gpu} -cgi {step.slot.profile.id}:{step.slot.start} -C")
    return tuple(commands)


def _require_instances(geometry: Geometry) -> None:
    if not geometry.require().slots:
        raise GeometryError("expected at least one instance to export")
