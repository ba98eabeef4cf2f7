"""dcgm-exporter's page: fields by their number or either of their names, of a GPU or of one GPU instance."""

import re
from collections.abc import Callable, Mapping
from urllib.parse import urlparse
from urllib.request import urlopen

from migperf.errors import DeviceError
from shared_core import InputError
from shared_core.errors import needs_extra

URL = "http://127.0.0.1:9400/metrics"

FIELDS: dict[int, tuple[str, tuple[str, ...]]] = {
    155: ("power_watts", ("DCGM_FI_DEV_POWER_USAGE",)),
    156: ("energy_joules_total", ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION",)),
    203: ("busy", ("DCGM_FI_DEV_GPU_UTIL",)),
    251: ("memory_free_mib", ("DCGM_FI_DEV_FB_FREE",)),
    252: ("memory_used_mib", ("DCGM_FI_DEV_FB_USED",)),
    1001: ("gr_active", ("DCGM_FI_PROF_GR_ENGINE_ACTIVE",)),
    1002: ("sm_active", ("DCGM_FI_PROF_SM_ACTIVE",)),
    1003: ("sm_occupancy", ("DCGM_FI_PROF_SM_OCCUPANCY",)),
    1004: ("tensor_active", ("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",)),
    1005: ("dram_active", ("DCGM_FI_PROF_DRAM_ACTIVE",)),
}
"""Number of the field -> our metric, its names."""

_NEWER = ("_UTIL_RATIO", "_RATIO", "_PERCENT")
_BY_NAME = {name: number for number, (_, names) in FIELDS.items() for name in names}


def field_number(name: str, labels: Mapping[str, str] = {}) -> int | None:
    """Return which field a metric of the page is, None if it is none that is read here.

    Args:
        name: Of the metric: the field's own, one that newer releases gave it, or one with its number in it.
        labels: A `field_id` among them decides.

    >>> field_number("DCGM_FI_PROF_GR_ENGINE_ACTIVE"), field_number("DCGM_FI_PROF_GR_ENGINE_UTIL_RATIO")
    (1001, 1001)
    """
    if labels.get("field_id", "").isdigit():
        return int(labels["field_id"]) if int(labels["field_id"]) in FIELDS else None
    name = name.upper().removesuffix("_TOTAL")  # the parser of pages adds it to counters
    if name in _BY_NAME:
        return _BY_NAME[name]
    for suffix in _NEWER:
        if name.endswith(suffix):
            stem = name.removesuffix(suffix)
            return _BY_NAME.get(stem) or _BY_NAME.get(f"{stem}_ACTIVE") or _BY_NAME.get(f"{stem}_UTIL")
    if found := re.search(r"(?:^|_)(\d{3,4})$", name):
        return int(found[1]) if int(found[1]) in FIELDS else None
    return None


def read_page(text: str) -> dict[tuple[str, str], dict[str, float]]:
    """Return (GPU, id of the GPU instance or "") -> metric -> value.

    Raises:
        InputError: The text is no page of metrics.
    """
    with needs_extra("dcgm", "migperf"):
        from prometheus_client.parser import text_string_to_metric_families
    found: dict[tuple[str, str], dict[str, float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                number = field_number(sample.name, sample.labels)
                if number is None:
                    continue
                place = sample.labels.get("gpu", "0"), sample.labels.get("GPU_I_ID", "")
                scale = 1e-3 if number == 156 else 1e-2 if number == 203 else 1.0  # mJ, percent
                found.setdefault(place, {})[FIELDS[number][0]] = sample.value * scale
    except ValueError as error:
        raise InputError(f"is no page of dcgm-exporter: {error}", field="dcgm") from error
    return found


class DcgmSampler:
    """Reads the page of a dcgm-exporter on this machine.

    Args:
        gpu: Its number there.
        gpu_instance: Id of the GPU instance; None for the whole GPU.
        url: Of the page; another machine's is refused unless `remote`.
        remote: Whether it may be another machine's.
        read: Gets the page; by default over HTTP.
    """

    def __init__(
        self,
        gpu: int = 0,
        gpu_instance: int | None = None,
        url: str = URL,
        *,
        remote: bool = False,
        read: Callable[[str], str] | None = None,
    ) -> None:
        if not remote and urlparse(url).hostname not in ("127.0.0.1", "localhost", "::1"):
            raise InputError(
                "is another machine, expected this one unless remote is asked for", field="url", value=url
            )
        self.name = "dcgm" if gpu_instance is None else f"dcgm{gpu_instance}"
        self.gpu, self.gpu_instance, self.url = gpu, gpu_instance, url
        self._read = read or _get

    def sample(self) -> Mapping[str, float]:
        """Return the metrics that the page has.

        Raises:
            DeviceError: The page does not answer, or has no such GPU or GPU instance.
        """
        try:
            page = read_page(self._read(self.url))
        except OSError as error:
            raise DeviceError(f"dcgm-exporter does not answer at {self.url}: {error}") from error
        place = str(self.gpu), "" if self.gpu_instance is None else str(self.gpu_instance)
        if place not in page:
            raise DeviceError(self._missing(page, place))
        board = page.get((place[0], ""), {})
        return {**{k: v for k, v in board.items() if k.startswith(("power", "energy"))}, **page[place]}

    def _missing(self, page: Mapping[tuple[str, str], object], place: tuple[str, str]) -> str:
        if not page:
            return f"the page at {self.url} has none of the fields that are read here"
        instances = sorted(instance for gpu, instance in page if gpu == place[0] and instance)
        if place[0] not in {gpu for gpu, _ in page}:
            has = ", ".join(sorted({gpu for gpu, _ in page}))
            return f"dcgm-exporter does not report GPU {place[0]}: it has {has}"
        if not place[1]:
            return f"dcgm-exporter reports only GPU instances of GPU {place[0]}: {', '.join(instances)}"
        has = f"those it has are {', '.join(instances)}" if instances else "it has none"
        return (
            f"dcgm-exporter does not report GPU instance {place[1]} of GPU {place[0]}: {has}; "
            "restart it, for it lists instances when it starts"
        )


def _get(url: str) -> str:
    with urlopen(url, timeout=2) as answer:
        return answer.read().decode("utf-8", "replace")
