"""The controller of MIG, on NVML or whatever else has NVML's calls."""

from collections.abc import Iterator, Mapping, Sequence
from ctypes import byref, c_uint
from typing import Any, Literal

from migperf.backends import Instance, Kind, Launch, Sampler
from migperf.backends.driver_errors import (
    FUNCTION_NOT_FOUND,
    IN_USE,
    INVALID_ARGUMENT,
    NOT_FOUND,
    NOT_SUPPORTED,
    RESET_REQUIRED,
    VERSION_MISMATCH,
    driver_error,
)
from migperf.errors import DeviceError, GeometryError
from migperf.geometry import Slot, cells_text
from migperf.profiles import Layout, Profile, memory_in_name, recorded, refused_before_r510

MEDIA_ENUMS = (0x7, 0x8)
"""Enums of the profiles with media extensions, for drivers that give profiles no names."""


class MigBackend:
    """One GPU in MIG mode.

    Args:
        api: A module or object with the names of NVIDIA's Python bindings.
        index: Of the GPU.
        spec: What opened it.
        kind: `nvml` or `simulated`; it labels records and changes nothing here.
        allow_mode_change: Whether MIG mode may be turned on and off.
        durable: Whether instances outlive this process, as they do on any GPU that is more than a table.

    Raises:
        DeviceError: No driver, no such GPU, or a GPU without MIG.
    """

    not_isolated: tuple[str, ...] = ("power and clocks", "PCIe and host memory", "NVLink")

    def __init__(
        self,
        api: Any,
        index: int = 0,
        *,
        spec: str,
        kind: Literal["nvml", "simulated"],
        allow_mode_change: bool = False,
        durable: bool = True,
    ) -> None:
        self.api = api
        self.durable = durable
        self.spec = spec
        self.kind: Kind = kind
        self.simulated = kind == "simulated"
        self.allow_mode_change = allow_mode_change
        self._call("start NVML", "nvmlInit")
        self.device = self._device(index)
        self.identity = _text(self._call("read the GPU's UUID", "nvmlDeviceGetUUID", self.device))
        self.layout = self._read_layout()
        self._profiles = {profile.id: profile for profile in self.layout.profiles}

    def _call(self, doing: str, function: str, *arguments: object) -> Any:
        try:
            return getattr(self.api, function)(*arguments)
        except self.api.NVMLError as error:
            raise driver_error(error.value, doing) from error

    def _device(self, index: int) -> Any:
        count = self._call("count GPUs", "nvmlDeviceGetCount")
        if index >= count:
            has = f"GPUs 0 to {count - 1}" if count else "no GPU"
            raise DeviceError(f"{self.spec}: the driver has {has}")
        return self._call(f"open GPU {index}", "nvmlDeviceGetHandleByIndex", index)

    def _read_layout(self) -> Layout:
        name = _text(self._call("read the GPU's name", "nvmlDeviceGetName", self.device))
        total = self._call("read the GPU's memory", "nvmlDeviceGetMemoryInfo", self.device).total / 2**20
        infos = [(enum, self._info(enum)) for enum in range(self.api.NVML_GPU_INSTANCE_PROFILE_COUNT)]
        profiles = tuple(self._profile(enum, info, total) for enum, info in infos if info is not None)
        if not profiles:
            raise DeviceError(
                f"{name} has no MIG: open it as cuda:N to share it whole, time-sliced or by MPS"
            )
        axis = max(start + profile.size for profile in profiles for start in profile.starts)
        return Layout(
            name,
            axis,
            max(profile.slices for profile in profiles),
            profiles,
            total_mib=total,
            refused_before_r510=refused_before_r510(profiles),
        )

    def _info(self, enum: int) -> Any:
        """Return what the driver says of a profile, None where this GPU or driver does not have it."""
        for version in (2, 1):  # drivers before R510 do not know version 2
            try:
                return self.api.nvmlDeviceGetGpuInstanceProfileInfo(self.device, enum, version)
            except self.api.NVMLError as error:
                if error.value in (NOT_SUPPORTED, INVALID_ARGUMENT):
                    return None
                if error.value not in (FUNCTION_NOT_FOUND, VERSION_MISMATCH) or version == 1:
                    raise driver_error(error.value, "list the GPU's profiles") from error
        return None

    def _profile(self, enum: int, info: Any, total_mib: float) -> Profile:
        doing = "list where profiles may start"
        count = c_uint(0)
        function = "nvmlDeviceGetGpuInstancePossiblePlacements"
        self._call(doing, function, self.device, info.id, None, byref(count))
        places = (self.api.c_nvmlGpuInstancePlacement_t * max(1, count.value))()
        self._call(doing, function, self.device, info.id, places, byref(count))
        starts = tuple(sorted(place.start for place in places[: count.value]))
        name = _text(getattr(info, "name", "")).removeprefix("MIG ")
        if not name:
            gb = memory_in_name(info.memorySizeMB, total_mib)
            name = f"{info.sliceCount}g.{gb}gb{'+me' if enum in MEDIA_ENUMS else ''}"
        return Profile(
            name=name,
            id=info.id,
            slices=info.sliceCount,
            size=places[0].size,
            starts=starts,
            maximum=info.instanceCount,
            memory_mib=float(info.memorySizeMB),
            sms=info.multiprocessorCount or None,
            enum=enum,
            copy_engines=info.copyEngineCount,
            preference=recorded(info.id, starts),
        )

    # Mode.

    def enabled(self) -> bool:
        """Return whether MIG mode is on now."""
        return self._mode()[0] == self.api.NVML_DEVICE_MIG_ENABLE

    def _mode(self) -> Sequence[int]:
        return self._call("read the MIG mode", "nvmlDeviceGetMigMode", self.device)

    def enable(self, on: bool) -> None:
        """Turn MIG mode on or off.

        Raises:
            DeviceError: The user has not consented, the GPU is in use, or it needs a reset.
        """
        word = "on" if on else "off"
        doing = f"turn MIG mode {word} on {self.layout.device}"
        if not self.allow_mode_change:
            raise DeviceError(f"to {doing} needs your consent: --allow-mode-change (allow_mode_change=True); "
                              "it ends all other use of the GPU")  # fmt: skip
        wanted = self.api.NVML_DEVICE_MIG_ENABLE if on else self.api.NVML_DEVICE_MIG_DISABLE
        status = self._call(doing, "nvmlDeviceSetMigMode", self.device, wanted)
        if status:  # the call succeeds also when the mode cannot change yet
            raise driver_error(status, doing, self.processes())
        if self._mode()[0] != wanted:
            raise driver_error(RESET_REQUIRED, doing)

    def _require_mode(self) -> None:
        now, pending = self._mode()
        if now == self.api.NVML_DEVICE_MIG_ENABLE:
            return
        if pending != now:
            raise driver_error(RESET_REQUIRED, f"cut {self.layout.device}: MIG mode is pending")
        raise DeviceError(f"MIG mode is off on {self.layout.device}: turn it on by --allow-mode-change "
                          "(allow_mode_change=True), or open the GPU as cuda:N")  # fmt: skip

    # Instances.

    def profiles(self) -> Sequence[Profile]:
        """Return all profiles, as the driver lists them."""
        return self.layout.profiles

    def placements(self, profile: Profile) -> Sequence[int]:
        """Return the starts that are free now; instances that come and go leave holes, so it asks."""
        self._require_mode()
        doing = f"ask for room for {profile.name}"
        function = "nvmlDeviceGetGpuInstanceRemainingCapacity"
        if not self._call(doing, function, self.device, profile.id):
            return ()
        taken = 0
        for _, slot, _ in self._gpu_instances():
            taken |= slot.mask
        return tuple(start for start in profile.starts if not Slot(profile, start).mask & taken)

    def _gpu_instances(self) -> Iterator[tuple[Any, Slot, int]]:
        """Yield handle, slot and id of each GPU instance."""
        doing = "list instances"
        count = c_uint(0)
        for profile in self.layout.profiles:
            handles = (self.api.c_nvmlGpuInstance_t * profile.maximum)()
            self._call(doing, "nvmlDeviceGetGpuInstances", self.device, profile.id, handles, byref(count))
            for handle in handles[: count.value]:
                info = self._call(doing, "nvmlGpuInstanceGetInfo", handle)
                yield handle, Slot(self._profiles[info.profileId], info.placement.start), info.id

    def _compute_instances(self, gpu_instance: Any) -> list[tuple[int, int, Any]]:
        """Return id, slices and handle of each compute instance in a GPU instance, by id."""
        found: list[tuple[int, int, Any]] = []
        count = c_uint(0)
        for info in self._compute_profiles(gpu_instance):
            handles = (self.api.c_nvmlComputeInstance_t * max(1, info.instanceCount))()
            arguments = (gpu_instance, info.id, handles, byref(count))
            self._call("list compute instances", "nvmlGpuInstanceGetComputeInstances", *arguments)
            for handle in handles[: count.value]:
                there = self._call("list compute instances", "nvmlComputeInstanceGetInfo_v2", handle)
                found.append((there.id, info.sliceCount, handle))
        return sorted(found, key=lambda one: one[0])

    def _compute_profiles(self, gpu_instance: Any) -> Iterator[Any]:
        shared = self.api.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED
        for enum in range(self.api.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
            try:
                yield self.api.nvmlGpuInstanceGetComputeInstanceProfileInfo(gpu_instance, enum, shared)
            except self.api.NVMLError as error:
                if error.value not in (NOT_SUPPORTED, INVALID_ARGUMENT):
                    raise driver_error(error.value, "list sizes of compute instances") from error

    def _mig_devices(self) -> dict[tuple[int, int], Any]:
        """Return the MIG devices by the ids of their GPU and compute instance."""
        found: dict[tuple[int, int], Any] = {}
        doing = "list MIG devices"
        for index in range(self._call(doing, "nvmlDeviceGetMaxMigDeviceCount", self.device)):
            try:
                device = self.api.nvmlDeviceGetMigDeviceHandleByIndex(self.device, index)
            except self.api.NVMLError as error:
                if error.value == NOT_FOUND:  # a hole; others may follow
                    continue
                raise driver_error(error.value, doing) from error
            ids = (
                self._call(doing, "nvmlDeviceGetGpuInstanceId", device),
                self._call(doing, "nvmlDeviceGetComputeInstanceId", device),
            )
            found[ids] = device
        return found

    def instances(self) -> Sequence[Instance]:
        """Return the instances that exist now, by start; none while MIG mode is off."""
        if not self.enabled():
            return ()
        devices = self._mig_devices()
        found = [self._instance(devices, *instance) for instance in self._gpu_instances()]
        return tuple(sorted(found, key=lambda instance: instance.start))

    def _instance(
        self, devices: Mapping[tuple[int, int], Any], gpu_instance: Any, slot: Slot, gi: int
    ) -> Instance:
        parts = [(ci, slices) for ci, slices, _ in self._compute_instances(gpu_instance)]
        handle: dict[str, Any] = {"gi": gi, "cis": tuple(ci for ci, _ in parts)}
        start = slot.cells.start
        device = devices.get((gi, parts[0][0])) if parts else None
        if device is None:
            return Instance(slot.profile, start, "", handle, compute=())
        uuid = _text(self._call("read a UUID", "nvmlDeviceGetUUID", device))
        attributes = self._call("read a MIG device", "nvmlDeviceGetAttributes_v2", device)
        handle |= {"sms": attributes.multiprocessorCount, "memory_mib": float(attributes.memorySizeMB)}
        if len(parts) > 1:
            return Instance(slot.profile, start, uuid, handle, compute=tuple(slices for _, slices in parts))
        profile = self.layout.profile(f"{parts[0][1]}c.{slot.profile.name}")
        return Instance(profile, start, uuid, handle)

    def create(
        self, profile: Profile, start: int | None = None, compute: tuple[int, ...] | None = None
    ) -> Instance:
        """Make a GPU instance and the compute instances in it; nothing is left when a part fails.

        Args:
            profile: Its size.
            start: Where; None leaves it to the driver.
            compute: Slices of its compute instances; one of `profile.slices` unless given.

        Raises:
            GeometryError: The profile cannot start there, or another instance is in the way.
            DeviceError: MIG mode is off, or the driver refused.
        """
        self._require_mode()
        slot = Slot(profile, start)
        doing = f"create {slot}"
        if start is None:
            made = self._call(doing, "nvmlDeviceCreateGpuInstance", self.device, profile.id)
        else:
            self._require_free(slot)
            place = byref(self.api.c_nvmlGpuInstancePlacement_t(start, profile.size))
            function = "nvmlDeviceCreateGpuInstanceWithPlacement"
            made = self._call(doing, function, self.device, profile.id, place)
        try:
            for slices in (profile.slices,) if compute is None else compute:
                ids = [info.id for info in self._compute_profiles(made) if info.sliceCount == slices]
                if not ids:
                    raise GeometryError(f"{slot} cannot hold a compute instance of {slices} slices")
                self._call(doing, "nvmlGpuInstanceCreateComputeInstance", made, ids[0])
        except BaseException:
            self._destroy(made, doing)
            raise
        gi = self._call(doing, "nvmlGpuInstanceGetInfo", made).id
        return next(instance for instance in self.instances() if instance.handle["gi"] == gi)

    def _require_free(self, slot: Slot) -> None:
        if slot.start not in slot.profile.starts:
            starts = ", ".join(map(str, slot.profile.starts))
            raise GeometryError(f"{slot.profile.name} cannot start at {slot.start}: it starts at {starts}")
        for _, other, gi in self._gpu_instances():
            if slot.mask & other.mask:
                common = cells_text(set(slot.cells) & set(other.cells))
                raise GeometryError(f"no room for {slot}: {other} (GPU instance {gi}) has memory {common}")

    def destroy(self, instance: Instance) -> None:
        """Remove the compute instances of an instance, then itself.

        Raises:
            DeviceError: A process works in it; the message has its id. Or the instance is no longer there.
        """
        slot = Slot(instance.profile, instance.start)
        doing = f"destroy {slot}"
        users = self.processes(instance)
        if users:
            raise driver_error(IN_USE, doing, users)
        made = self._call(doing, "nvmlDeviceGetGpuInstanceById", self.device, instance.handle["gi"])
        info = self._call(doing, "nvmlGpuInstanceGetInfo", made)
        if (info.profileId, info.placement.start) != (instance.profile.id, instance.start):
            raise driver_error(NOT_FOUND, doing)
        self._destroy(made, doing)

    def _destroy(self, gpu_instance: Any, doing: str) -> None:
        for _, _, handle in self._compute_instances(gpu_instance):
            self._call(doing, "nvmlComputeInstanceDestroy", handle)
        self._call(doing, "nvmlGpuInstanceDestroy", gpu_instance)

    def processes(self, instance: Instance | None = None) -> Sequence[int]:
        """Return the ids of the processes in an instance, or on the GPU."""
        devices = [self.device]
        if instance is not None:
            gi = instance.handle["gi"]
            devices = [device for (its_gi, _), device in self._mig_devices().items() if its_gi == gi]
        try:
            found = [self.api.nvmlDeviceGetComputeRunningProcesses(device) for device in devices]
        except self.api.NVMLError as error:
            if error.value in (FUNCTION_NOT_FOUND, NOT_SUPPORTED):
                return ()  # a driver that cannot tell still refuses to destroy what is in use
            raise driver_error(error.value, "list processes") from error
        return tuple(sorted({process.pid for processes in found for process in processes}))

    # Work in instances.

    def launch(self, instance: Instance) -> Launch:
        """Return how a worker gets into the instance: by the UUID of its MIG device, before it imports CUDA.

        Raises:
            DeviceError: The instance has no compute instance.
        """
        if not instance.uuid:
            slot = Slot(instance.profile, instance.start)
            raise DeviceError(f"nobody can work in {slot}: it has no compute instance")
        return Launch(
            environment={"CUDA_VISIBLE_DEVICES": instance.uuid},
            torch_device="cuda:0",
            expected_memory_mib=instance.handle["memory_mib"],
            expected_sms=instance.handle["sms"] or None,
        )

    def samplers(self, instance: Instance | None = None) -> Sequence[Sampler]:
        """Return the sources of measurements: the whole board's, or GPM of an instance (Hopper and later)."""
        from migperf.samplers import of_device
        from migperf.samplers.gpm import GpmSampler

        if instance is None:
            return of_device(self)
        if GpmSampler.supported(self.api, self.device):
            return (GpmSampler(self.api, self.device, instance.handle["gi"]),)
        return ()

    def facts(self) -> Mapping[str, Any]:
        """Return name, UUID, driver, memory and mode of the GPU."""
        return {
            "device": self.layout.device,
            "uuid": self.identity,
            "driver": _text(self._call("read the driver's version", "nvmlSystemGetDriverVersion")),
            "memory_mib": self.layout.total_mib,
            "mig": self.enabled(),
            "simulated": self.simulated,
        }


def _text(value: str | bytes) -> str:
    """Return a name as text: older bindings give bytes."""
    return value.decode() if isinstance(value, bytes) else value
