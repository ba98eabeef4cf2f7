import pytest
import yaml

from migperf import exports, plans
from migperf.backends.opening import open as open_device
from migperf.errors import GeometryError
from migperf.geometry import Geometry


def geometry(text: str) -> Geometry:
    return Geometry.parse(text, "a100-40gb")


def test_mig_parted_reads_the_profiles_and_their_numbers() -> None:
    text = exports.mig_parted(geometry("3g@4,1g*2,1g+me"), "mix")
    assert yaml.safe_load(text) == {
        "version": "v1",
        "mig-configs": {
            "mix": [
                {
                    "devices": "all",
                    "mig-enabled": True,
                    "mig-devices": {"3g.20gb": 1, "1g.5gb": 2, "1g.5gb+me": 1},
                }
            ]
        },
    }
    assert text.startswith("# 3g.20gb@4,1g.5gb,1g.5gb,1g.5gb+me on A100-40GB\n")


def test_mixed_strategy_has_a_resource_for_each_profile() -> None:
    offered = exports.resources(geometry("3g,2g,1g,1g+me"))
    assert offered == {
        "nvidia.com/mig-3g.20gb": 1,
        "nvidia.com/mig-2g.10gb": 1,
        "nvidia.com/mig-1g.5gb": 1,
        "nvidia.com/mig-1g.5gb.me": 1,
    }


def test_single_strategy_has_one_resource_and_only_like_instances() -> None:
    assert exports.resources(geometry("1g*7"), "single") == {"nvidia.com/gpu": 7}
    with pytest.raises(GeometryError, match=r"one profile, not 3g\.20gb and 2g\.10gb: use mixed"):
        exports.resources(geometry("3g,2g"), "single")


def test_kubernetes_gets_label_configuration_and_a_pod_for_each_resource() -> None:
    text = exports.kubernetes(geometry("3g,1g*2"), "inference")
    assert "# kubectl label node NODE nvidia.com/mig.config=inference --overwrite\n" in text
    assert "nvidia.com/mig-3g.20gb: 1, nvidia.com/mig-1g.5gb: 2\n" in text
    config, *pods = yaml.safe_load_all(text)
    inner = yaml.safe_load(config["data"]["config.yaml"])
    assert inner["mig-configs"]["inference"][0]["mig-devices"] == {"3g.20gb": 1, "1g.5gb": 2}
    limits = [pod["spec"]["containers"][0]["resources"]["limits"] for pod in pods]
    assert limits == [{"nvidia.com/mig-3g.20gb": 1}, {"nvidia.com/mig-1g.5gb": 1}]
    with pytest.raises(GeometryError, match="a label cannot be 'two words'"):
        exports.kubernetes(geometry("3g"), "two words")


def test_nothing_invalid_or_empty_is_exported() -> None:
    for export in (exports.mig_parted, exports.kubernetes, exports.resources):
        with pytest.raises(GeometryError, match="cannot exist on A100-40GB"):
            export(geometry("4g,4g"))
        with pytest.raises(GeometryError, match="at least one instance"):
            export(geometry("empty"))


def test_commands_name_ids_and_starts_and_go_through_the_steps_in_order() -> None:
    device = open_device("sim:a100-40gb")
    plans.apply(device, plans.plan(device, geometry("3g@4,2g@0")))
    gi = device.instances()[0].handle["gi"]
    commands = exports.nvidia_smi(plans.plan(device, geometry("3g@4,1g@1")), gpu=2)
    assert commands == (
        f"nvidia-smi mig -i 2 -gi {gi} -dci",
        f"nvidia-smi mig -i 2 -gi {gi} -dgi",
        "nvidia-smi mig -i 2 -cgi 19:1 -C",
    )
    with pytest.raises(GeometryError, match=r"1c\.3g\.20gb@0: a part of a GPU instance has no one command"):
        exports.nvidia_smi(plans.plan(device, geometry("1c.3g@0")))
    cpu = open_device("cpu")
    with pytest.raises(GeometryError, match="1c@0 is no MIG profile"):
        exports.nvidia_smi(plans.plan(cpu, Geometry.parse("1c", cpu)))
