# ruff: noqa: D102 - the calls are NVML's, and its reference documents them
"""A driver without a GPU: NVML's MIG calls, answered from the placement tables.

`SimulatedNvml` stands where NVIDIA's bindings stand, and the controller in `migperf.backends.mig` runs on it
unchanged. It refuses what a driver refuses, with the same error numbers. What it does not have is speed:
numbers of work on it come from a model and are labelled so.
"""

import uuid
from ctypes import Array, c_void_p, cast
from pathlib import Path
from typing import Any

from migperf.backends import nvml_types as types
from migperf.backends.nvml_types import NVMLError, address
from migperf.backends.simulated_library import Compute, Gpu, GpuInstance, SimulatedLibrary, driver_call
from migperf.profiles import Layout, Profile

# Handles are numbers that nobody dereferences; the ranges keep the kinds apart.
_DEVICE, _GI, _CI, _MIG = 0x1000, 0x100000, 0x200000, 0x400000

_COMPUTE_SLICES = (1, 2, 3, 4, 7)
"""Sizes of compute instances, by enum and id alike."""


class SimulatedNvml(SimulatedLibrary):
    """NVIDIA's Python bindings, as far as MIG goes, for one GPU that exists only as a table.

    Args:
        layout: The table.
        state: File in which the GPU outlives the process; without it, it ends with this object.
        mig: Whether MIG mode is on at first.
        driver: Version. Before 510 the driver gives profiles no names, does not know those with doubled
            memory, and refuses what the table says it refused; before 470 it cannot be told where to put an
            instance and does not know media extensions.
        resets: Whether the driver can reset the GPU itself when the mode changes (rare in virtual machines).
        permitted: Whether the caller may change anything.
    """

    NVMLError = NVMLError
    NVML_SUCCESS = types.NVML_SUCCESS
    NVML_DEVICE_MIG_DISABLE = types.NVML_DEVICE_MIG_DISABLE
    NVML_DEVICE_MIG_ENABLE = types.NVML_DEVICE_MIG_ENABLE
    NVML_GPU_INSTANCE_PROFILE_COUNT = types.NVML_GPU_INSTANCE_PROFILE_COUNT
    NVML_COMPUTE_INSTANCE_PROFILE_COUNT = types.NVML_COMPUTE_INSTANCE_PROFILE_COUNT
    NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED = types.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED
    c_nvmlGpuInstance_t = types.c_nvmlGpuInstance_t
    c_nvmlComputeInstance_t = types.c_nvmlComputeInstance_t
    c_nvmlGpuInstancePlacement_t = types.c_nvmlGpuInstancePlacement_t

    def __init__(
        self,
        layout: Layout,
        *,
        state: Path | None = None,
        mig: bool = True,
        driver: str = "580.95",
        resets: bool = True,
        permitted: bool = True,
    ) -> None:
        super().__init__(Gpu(layout.device, int(mig), int(mig)), state)
        self.layout = layout
        self.driver = driver
        self.resets = resets
        self.permitted = permitted
        self._release = int(driver.partition(".")[0])
        self._profiles = {profile.id: profile for profile in layout.profiles}
        self._enums = {profile.enum: profile for profile in layout.profiles if self._knows(profile)}
        self._uuid = uuid.uuid5(uuid.NAMESPACE_OID, f"{layout.device}/{state and state.resolve()}")

    def _knows(self, profile: Profile) -> bool:
        enum = profile.enum or 0
        return enum < (0x12 if self._release >= 510 else 0x9 if self._release >= 470 else 0x7)

    # The device.

    @driver_call
    def nvmlSystemGetDriverVersion(self) -> str:
        return self.driver

    @driver_call
    def nvmlDeviceGetCount(self) -> int:
        return 1

    @driver_call
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        if index:
            raise NVMLError(types.NVML_ERROR_INVALID_ARGUMENT)
        return _handle(types.c_nvmlDevice_t, _DEVICE)

    @driver_call
    def nvmlDeviceGetName(self, handle: Any) -> str:
        return f"{self.layout.device} (simulated)"

    @driver_call
    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        if address(handle) == _DEVICE:
            return f"GPU-{self._uuid}"
        return self._mig_uuid(*self._mig(handle))

    @driver_call
    def nvmlDeviceGetMemoryInfo(self, handle: Any, version: int | None = None) -> types.c_nvmlMemory_t:
        if address(handle) == _DEVICE:
            mib = self.layout.total_mib or 0
        else:
            mib = self._memory(self._profiles[self._mig(handle)[0].profile])
        return types.c_nvmlMemory_t(int(mib * 2**20), int(mib * 2**20), 0)

    @driver_call
    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[types.c_nvmlProcessInfo_t]:
        clients = self.gpu.clients.items()
        if address(handle) != _DEVICE:
            here = self._mig_uuid(*self._mig(handle))
            clients = [(process, device) for process, device in clients if device == here]
        return [types.c_nvmlProcessInfo_t(process) for process, _ in clients]

    # Mode.

    @driver_call
    def nvmlDeviceGetMigMode(self, device: Any) -> list[int]:
        return [self.gpu.current, self.gpu.pending]

    @driver_call
    def nvmlDeviceSetMigMode(self, device: Any, mode: int) -> int:
        self._require_permission()
        self.gpu.pending = mode
        if mode == self.gpu.current:
            return types.NVML_SUCCESS
        if self.gpu.clients or self.gpu.instances:
            return types.NVML_ERROR_IN_USE
        if self.layout.reset_for_mig and not self.resets:
            return types.NVML_ERROR_RESET_REQUIRED
        self.gpu.current = mode
        return types.NVML_SUCCESS

    def _require_permission(self) -> None:
        if not self.permitted:
            raise NVMLError(types.NVML_ERROR_NO_PERMISSION)

    def _require_mode(self) -> None:
        if self.gpu.current != types.NVML_DEVICE_MIG_ENABLE:
            raise NVMLError(types.NVML_ERROR_NOT_SUPPORTED)

    # Profiles.

    @driver_call
    def nvmlDeviceGetGpuInstanceProfileInfo(self, device: Any, profile: int, version: int = 2) -> Any:
        if version == 2 and self._release < 510:
            raise NVMLError(types.NVML_ERROR_FUNCTION_NOT_FOUND)
        if profile not in self._enums:
            old = any(profile == known.enum for known in self.layout.profiles)
            raise NVMLError(types.NVML_ERROR_INVALID_ARGUMENT if old else types.NVML_ERROR_NOT_SUPPORTED)
        return self._profile_info(self._enums[profile], version)

    @driver_call
    def nvmlDeviceGetGpuInstanceProfileInfoById(self, device: Any, profileId: int) -> Any:
        return self._profile_info(self._known(profileId), 2)

    def _profile_info(self, profile: Profile, version: int) -> Any:
        named = version == 2
        info = types.c_nvmlGpuInstanceProfileInfo_v2_t() if named else types.c_nvmlGpuInstanceProfileInfo_t()
        info.id = profile.id
        info.sliceCount = profile.slices
        info.instanceCount = profile.maximum
        info.multiprocessorCount = profile.sms or 0
        info.copyEngineCount = profile.copy_engines or 0
        info.memorySizeMB = int(self._memory(profile))
        if named:
            info.name = f"MIG {profile.name}".encode()
        return info

    def _memory(self, profile: Profile) -> float:
        return profile.memory_mib or (self.layout.total_mib or 0) * profile.size / self.layout.axis

    def _known(self, profile_id: int) -> Profile:
        profile = self._profiles.get(profile_id)
        if profile is None or profile.enum not in self._enums:
            raise NVMLError(types.NVML_ERROR_INVALID_ARGUMENT)
        return profile

    @driver_call
    def nvmlDeviceGetGpuInstancePossiblePlacements(
        self, device: Any, profileId: int, placementsRef: Any, countRef: Any
    ) -> int:
        profile = self._known(profileId)
        places = [types.c_nvmlGpuInstancePlacement_t(start, profile.size) for start in profile.starts]
        return _fill(places, placementsRef, countRef, sized=True)

    @driver_call
    def nvmlDeviceGetGpuInstanceRemainingCapacity(self, device: Any, profileId: int) -> int:
        self._require_mode()
        profile = self._known(profileId)
        room, end = 0, 0
        for start in profile.starts:  # instances of one length: taking each first free start packs the most
            if start >= end and self._free(profile, start):
                room, end = room + 1, start + profile.size
        return min(room, self._left(profile))

    # GPU instances.

    def _free(self, profile: Profile, start: int) -> bool:
        cells = range(start, start + profile.size)
        return all(
            cells.stop <= other.start or other.start + self._profiles[other.profile].size <= cells.start
            for other in self.gpu.instances.values()
        )

    def _left(self, profile: Profile) -> int:
        """Return how many more of a profile the maxima allow."""
        there = [self._profiles[other.profile] for other in self.gpu.instances.values()]
        if profile.media and any(other.media for other in there):
            return 0
        if self._release < 510 and any(
            {profile.id, other.id} == set(pair) for other in there for pair in self.layout.refused_before_r510
        ):
            return 0
        return profile.maximum - sum(other.id == profile.id for other in there)

    @driver_call
    def nvmlDeviceCreateGpuInstance(self, device: Any, profileId: int) -> Any:
        return self._create(profileId, None)

    @driver_call
    def nvmlDeviceCreateGpuInstanceWithPlacement(self, device: Any, profileId: int, placement: Any) -> Any:
        if self._release < 470:
            raise NVMLError(types.NVML_ERROR_FUNCTION_NOT_FOUND)
        return self._create(profileId, _target(placement))

    def _create(self, profile_id: int, place: Any) -> Any:
        self._require_permission()
        self._require_mode()
        profile = self._known(profile_id)
        starts = profile.preference
        if place is not None:
            if place.start not in profile.starts or place.size != profile.size:
                raise NVMLError(types.NVML_ERROR_INVALID_ARGUMENT)
            starts = (place.start,)
        start = next((start for start in starts if self._free(profile, start)), None)
        if start is None or not self._left(profile):
            raise NVMLError(types.NVML_ERROR_INSUFFICIENT_RESOURCES)
        gi = self.layout.axis // profile.size - 1
        while gi in self.gpu.instances:
            gi += 1
        self.gpu.instances[gi] = GpuInstance(gi, profile.id, start)
        return _handle(types.c_nvmlGpuInstance_t, _GI + gi)

    def _gi(self, handle: Any) -> GpuInstance:
        try:
            return self.gpu.instances[address(handle) - _GI]
        except KeyError:
            raise NVMLError(types.NVML_ERROR_INVALID_ARGUMENT) from None

    @driver_call
    def nvmlDeviceGetGpuInstances(
        self, device: Any, profileId: int, gpuInstancesRef: Any, countRef: Any
    ) -> int:
        self._require_mode()
        self._known(profileId)
        found = [
            _handle(types.c_nvmlGpuInstance_t, _GI + instance.id)
            for instance in self.gpu.instances.values()
            if instance.profile == profileId
        ]
        return _fill(found, gpuInstancesRef, countRef)

    @driver_call
    def nvmlDeviceGetGpuInstanceById(self, device: Any, gpuInstanceId: int) -> Any:
        if gpuInstanceId not in self.gpu.instances:
            raise NVMLError(types.NVML_ERROR_NOT_FOUND)
        return _handle(types.c_nvmlGpuInstance_t, _GI + gpuInstanceId)

    @driver_call
    def nvmlGpuInstanceGetInfo(self, gpuInstance: Any) -> types.c_nvmlGpuInstanceInfo_t:
        instance = self._gi(gpuInstance)
        place = types.c_nvmlGpuInstancePlacement_t(instance.start, self._profiles[instance.profile].size)
        device = _handle(types.c_nvmlDevice_t, _DEVICE)
        return types.c_nvmlGpuInstanceInfo_t(device, instance.id, instance.profile, place)

    @driver_call
    def nvmlGpuInstanceDestroy(self, gpuInstance: Any) -> int:
        self._require_permission()
        instance = self._gi(gpuInstance)
        if instance.computes:
            raise NVMLError(types.NVML_ERROR_IN_USE)
        del self.gpu.instances[instance.id]
        return types.NVML_SUCCESS

    # Compute instances and MIG devices.

    @driver_call
    def nvmlGpuInstanceGetComputeInstanceProfileInfo(
        self, device: Any, profile: int, engProfile: int, version: int = 2
    ) -> types.c_nvmlComputeInstanceProfileInfo_v2_t:
        whole = self._profiles[self._gi(device).profile]
        if profile >= len(_COMPUTE_SLICES) or _COMPUTE_SLICES[profile] > whole.slices:
            raise NVMLError(types.NVML_ERROR_NOT_SUPPORTED)
        slices = _COMPUTE_SLICES[profile]
        info = types.c_nvmlComputeInstanceProfileInfo_v2_t()
        info.id = profile
        info.sliceCount = slices
        info.instanceCount = whole.slices // slices
        info.multiprocessorCount = self._sms(whole, slices)
        return info

    def _sms(self, whole: Profile, slices: int) -> int:
        if slices == whole.slices:
            return whole.sms or 0
        return self.layout.profile(f"{slices}c.{whole.name}").sms or 0

    @driver_call
    def nvmlGpuInstanceCreateComputeInstance(self, gpuInstance: Any, profileId: int) -> Any:
        self._require_permission()
        instance = self._gi(gpuInstance)
        whole = self._profiles[instance.profile].slices
        if profileId >= len(_COMPUTE_SLICES) or _COMPUTE_SLICES[profileId] > whole:
            raise NVMLError(types.NVML_ERROR_INVALID_ARGUMENT)
        slices = _COMPUTE_SLICES[profileId]
        if sum(part.slices for part in instance.computes) + slices > whole:
            raise NVMLError(types.NVML_ERROR_INSUFFICIENT_RESOURCES)
        indices = {part.index for other in self.gpu.instances.values() for part in other.computes}
        ids = {part.id for part in instance.computes}
        part = Compute(_unused(ids), slices, _unused(indices))
        instance.computes.append(part)
        return _handle(types.c_nvmlComputeInstance_t, _CI + (instance.id << 8) + part.id)

    def _part(self, handle: Any, base: int) -> tuple[GpuInstance, Compute]:
        gi, ci = divmod(address(handle) - base, 1 << 8)
        instance = self.gpu.instances.get(gi)
        for part in instance.computes if instance else ():
            if instance and part.id == ci:
                return instance, part
        raise NVMLError(types.NVML_ERROR_INVALID_ARGUMENT)

    @driver_call
    def nvmlGpuInstanceGetComputeInstances(
        self, gpuInstance: Any, profileId: int, computeInstancesRef: Any, countRef: Any
    ) -> int:
        instance = self._gi(gpuInstance)
        if profileId >= len(_COMPUTE_SLICES):
            raise NVMLError(types.NVML_ERROR_INVALID_ARGUMENT)
        found = [
            _handle(types.c_nvmlComputeInstance_t, _CI + (instance.id << 8) + part.id)
            for part in instance.computes
            if part.slices == _COMPUTE_SLICES[profileId]
        ]
        return _fill(found, computeInstancesRef, countRef)

    @driver_call
    def nvmlComputeInstanceGetInfo_v2(self, computeInstance: Any) -> types.c_nvmlComputeInstanceInfo_t:
        instance, part = self._part(computeInstance, _CI)
        info = types.c_nvmlComputeInstanceInfo_t()
        info.device = _handle(types.c_nvmlDevice_t, _DEVICE)
        info.gpuInstance = _handle(types.c_nvmlGpuInstance_t, _GI + instance.id)
        info.id = part.id
        info.profileId = _COMPUTE_SLICES.index(part.slices)
        info.placement.size = part.slices
        return info

    @driver_call
    def nvmlComputeInstanceDestroy(self, computeInstance: Any) -> int:
        self._require_permission()
        instance, part = self._part(computeInstance, _CI)
        if self._mig_uuid(instance, part) in self.gpu.clients.values():
            raise NVMLError(types.NVML_ERROR_IN_USE)
        instance.computes.remove(part)
        return types.NVML_SUCCESS

    def _mig(self, handle: Any) -> tuple[GpuInstance, Compute]:
        return self._part(handle, _MIG)

    def _mig_uuid(self, instance: GpuInstance, part: Compute) -> str:
        return f"MIG-{uuid.uuid5(self._uuid, f'{instance.id}/{part.id}')}"

    @driver_call
    def nvmlDeviceGetMaxMigDeviceCount(self, device: Any) -> int:
        return self.layout.slices

    @driver_call
    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Any, index: int) -> Any:
        for instance in self.gpu.instances.values():
            for part in instance.computes:
                if part.index == index:
                    return _handle(types.c_nvmlDevice_t, _MIG + (instance.id << 8) + part.id)
        raise NVMLError(types.NVML_ERROR_NOT_FOUND)

    @driver_call
    def nvmlDeviceGetGpuInstanceId(self, device: Any) -> int:
        return self._mig(device)[0].id

    @driver_call
    def nvmlDeviceGetComputeInstanceId(self, device: Any) -> int:
        return self._mig(device)[1].id

    @driver_call
    def nvmlDeviceGetAttributes_v2(self, device: Any) -> types.c_nvmlDeviceAttributes:
        instance, part = self._mig(device)
        profile = self._profiles[instance.profile]
        attributes = types.c_nvmlDeviceAttributes()
        attributes.multiprocessorCount = self._sms(profile, part.slices)
        attributes.gpuInstanceSliceCount = profile.slices
        attributes.computeInstanceSliceCount = part.slices
        attributes.memorySizeMB = int(self._memory(profile))
        return attributes


def _unused(numbers: set[int]) -> int:
    return next(number for number in range(len(numbers) + 1) if number not in numbers)


def _handle(kind: Any, number: int) -> Any:
    return cast(c_void_p(number), kind)


def _target(reference: Any) -> Any:
    """Return what `byref(x)` refers to."""
    return reference._obj


def _fill(found: list[Any], array: "Array[Any] | None", count: Any, *, sized: bool = False) -> int:
    """Answer as C does: write the elements to the array, and their number to the counter.

    `sized`: the counter says on entry how long the array is; else that is the caller's care.
    """
    counter = _target(count)
    if array is not None:
        if len(found) > (counter.value if sized else len(array)):
            raise NVMLError(types.NVML_ERROR_INSUFFICIENT_SIZE)
        for index, element in enumerate(found):
            array[index] = element
    counter.value = len(found)
    return types.NVML_SUCCESS
