"""What can be wrong with a device, a geometry or the data of a measurement, each with its exit code."""

from shared_core import InputError


class DeviceError(InputError):
    """The device, its driver or the permission to use it is not there, or it refused."""

    exit_code = 3


class DriverError(DeviceError):
    """The driver answered a call with an error.

    Attributes:
        code: NVML's number of the error, 23 for insufficient resources.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class GeometryError(InputError):
    """The geometry cannot exist on this device; the message says which slices or maxima are in the way."""

    exit_code = 4


class DataError(InputError):
    """The measurements are contaminated, or too few to conclude from."""

    exit_code = 5
