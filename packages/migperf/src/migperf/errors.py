"""What can be wrong with a device, a geometry or the data of a measurement, each with its exit code."""

from shared_core import InputError


class DeviceError(InputError):
    """The device, its driver or the permission to use it is not there, or it refused."""

    exit_code = 3


class GeometryError(InputError):
    """The geometry cannot exist on this device; the message says which slices or maxima are in the way."""

    exit_code = 4


class DataError(InputError):
    """The measurements are contaminated, or too few to conclude from."""

    exit_code = 5
