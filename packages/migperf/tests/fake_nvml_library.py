"""A C library of NVML, as NVIDIA's Python bindings see one, with the simulated driver behind it.

It lets the real bindings run: their structures, their byref arguments, their errors.
"""

import ctypes
from collections.abc import Callable
from typing import Any

from migperf.backends import nvml_types
from migperf.backends.simulated import SimulatedNvml

_ARRAYS = {
    "nvmlDeviceGetGpuInstancePossiblePlacements": nvml_types.c_nvmlGpuInstancePlacement_t,
    "nvmlDeviceGetGpuInstances": nvml_types.c_nvmlGpuInstance_t,
    "nvmlGpuInstanceGetComputeInstances": nvml_types.c_nvmlComputeInstance_t,
}


class FakeLibrary:
    """Stands for the loaded `libnvidia-ml.so.1`."""

    def __init__(self, driver: SimulatedNvml) -> None:
        self.driver = driver

    def nvmlInitWithFlags(self, flags: int) -> int:
        self.driver.nvmlInit()
        return 0

    def nvmlErrorString(self, code: int) -> bytes:
        return b"an error"

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, array: Any) -> int:
        count._obj.value = len(self.driver.nvmlDeviceGetComputeRunningProcesses(handle))
        assert not count._obj.value, "not bridged"
        return 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        for ending in ("", "_v2", "V"):
            function = getattr(self.driver, name.removesuffix(ending), None)
            if function is not None:
                plain = name.removesuffix(ending)
                return lambda *arguments: self._call(plain, function, arguments)
        raise AttributeError(name)

    def _call(self, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
        try:
            if name in _ARRAYS:
                _fill(_ARRAYS[name], function, arguments)
            elif name.endswith("MigMode") and "Get" in name:
                for reference, value in zip(arguments[1:], function(arguments[0]), strict=True):
                    reference._obj.value = value
            elif isinstance(arguments[-1], ctypes.c_uint):  # handle, buffer, its length
                arguments[-2].value = function(*arguments[:-2]).encode()
            elif hasattr(arguments[-1], "_obj"):
                _answer(arguments[-1]._obj, function(*map(_plain, arguments[:-1])))
            else:
                function(*arguments)
        except nvml_types.NVMLError as error:
            return error.value
        return 0


def _plain(argument: Any) -> Any:
    return argument.value if isinstance(argument, ctypes.c_uint) else argument


def _answer(target: Any, result: Any) -> None:
    if isinstance(result, int):
        target.value = result
    else:
        assert ctypes.sizeof(target) == ctypes.sizeof(result)
        ctypes.memmove(ctypes.byref(target), ctypes.byref(result), ctypes.sizeof(target))


def _fill(kind: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    owner, number, array, count = arguments
    mine = None if array is None else (kind * len(array))()
    function(owner, number, mine, count)
    if mine is not None:
        ctypes.memmove(array, mine, ctypes.sizeof(mine))
