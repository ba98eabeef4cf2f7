"""Samples are trimmed to the window, counters read at its edges, and pages of any DCGM are understood."""

import os
import threading
import time

import pytest

from migperf.errors import DeviceError
from migperf.samplers import Recorder, device_activity, of_device
from migperf.samplers.dcgm import DcgmSampler, field_number, read_page
from migperf.samplers.gpm import GpmSampler
from migperf.samplers.nvml import NvmlSampler, slowdowns
from migperf.samplers.procfs import CpuSampler, ProcessSampler
from migperf.samplers.psi import PressureSampler
from shared_core import InputError

MS = 1_000_000


class Steps:
    """A sampler whose values and times the test decides."""

    name = "fake"

    def __init__(self, function):
        self.function = function

    def sample(self):
        return self.function()


def recorded(metric, points, period=0.1):
    recorder = Recorder([], period)
    recorder.times[metric] = [moment for moment, _ in points]
    recorder.values[metric] = [value for _, value in points]
    return recorder


def test_activity_is_averaged_over_the_window_only_never_over_idle_time():
    points = [(t * MS, 0.9 if 500 <= t <= 1000 else 0.0) for t in range(0, 2000, 100)]
    window = recorded("g.gr_active", points).window(500 * MS, 1000 * MS)
    assert window.means["g.gr_active"] == pytest.approx(0.9)


def test_fewer_than_three_samples_are_insufficient():
    points = [(0, 1.0), (100 * MS, 1.0), (900 * MS, 1.0)]
    window = recorded("g.x", points).window(0, 200 * MS)
    assert window.insufficient == ("g.x",)
    assert window.means == {}


def test_a_counter_is_the_difference_at_the_edges():
    points = [(t * MS, 2.0 * t / 1000) for t in range(0, 3001, 100)]
    recorder = recorded("b.energy_joules_total", points)
    assert recorder.window(1000 * MS, 2000 * MS).differences["b.energy_joules_total"] == pytest.approx(2.0)


def test_a_counter_that_went_back_or_was_cut_is_unavailable():
    back = [(t * MS, 5.0 if t < 500 else 1.0 + t / 1000) for t in range(0, 1001, 100)]
    assert recorded("b.e_total", back).window(0, 1000 * MS).differences["b.e_total"] is None
    cut = [(t * MS, 1.0 * t) for t in range(0, 500, 100)]
    assert recorded("b.e_total", cut).window(0, 1000 * MS).differences["b.e_total"] is None


def test_instances_weigh_as_much_as_they_are_large():
    assert device_activity([(0.6, 2), (0.9, 1), (0.4, 1), (0.2, 1), (0.7, 1), (0.1, 1)]) == 0.50
    assert device_activity([(1.0, 3)]) == pytest.approx(3 / 7)
    assert device_activity([(1.0, 4)], slices=4) == 1.0


def test_the_recorder_reads_at_its_rate_and_at_the_edges():
    edge = time.perf_counter_ns() + 130 * MS
    with Recorder([Steps(lambda: {"x": 1.0, "n_total": time.perf_counter()})], 0.05, [edge]) as recorder:
        time.sleep(0.4)
    times = recorder.times["fake.x"]
    assert min(abs(moment - edge) for moment in times) < 40 * MS
    assert 4 <= len(times) <= 12
    grown = recorder.window(times[0], times[-1]).differences["fake.n_total"]
    assert grown == pytest.approx((times[-1] - times[0]) / 1e9, rel=0.05)


def test_a_sampler_that_fails_is_reported_and_the_rest_goes_on():
    def broken():
        raise OSError("gone")

    recorder = Recorder([Steps(broken), ProcessSampler("me", [os.getpid()])])
    recorder.read()
    assert recorder.problems == {"fake": "OSError: gone"}
    assert recorder.values["me.rss_mib"][0] > 1


def test_sampling_costs_less_than_one_percent_of_a_core_at_10_hz():
    recorder = Recorder([ProcessSampler("worker0", [os.getpid()]), CpuSampler(), PressureSampler()])
    recorder.read()
    before = time.thread_time()
    for _ in range(20):
        recorder.read()
    assert (time.thread_time() - before) / 20 * 10 < 0.01


def test_a_process_time_grows_as_it_computes():
    sampler = ProcessSampler("me", [os.getpid()])
    first, end = sampler.sample(), time.thread_time() + 0.05
    while time.thread_time() < end:
        pass
    # schedstat is brought up to date at ticks and switches
    assert sampler.sample()["cpu_seconds_total"] - first["cpu_seconds_total"] > 0.03


def test_a_thread_that_ends_takes_neither_its_time_nor_the_others_readings_with_it(monkeypatch):
    started, stop = threading.Event(), threading.Event()

    def compute():
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            pass
        started.set()
        stop.wait()

    sampler = ProcessSampler("me", [os.getpid()])
    thread = threading.Thread(target=compute)
    thread.start()
    started.wait()
    alive = sampler.sample()["cpu_seconds_total"]
    stop.set()
    thread.join()
    assert sampler.sample()["cpu_seconds_total"] >= alive

    listed, gone = os.listdir, str(thread.native_id)
    monkeypatch.setattr(os, "listdir", lambda path: [gone, *listed(path)])
    late = sampler.sample()
    assert late["rss_mib"] > 1
    assert late["cpu_seconds_total"] >= alive


def test_cpus_and_pressure_are_read_as_the_kernel_writes_them(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 0 50 800 25 0 5 20 0 0\ncpu1 1 0 0 5 0 0 0 0 0 0\nintr 5\n"
    )
    assert CpuSampler([0], stat).sample() == {"busy_seconds_total": 1.55, "steal_seconds_total": 0.2}
    assert CpuSampler(None, stat).sample()["busy_seconds_total"] == pytest.approx(1.56)
    pressure = tmp_path / "cpu"
    pressure.write_text("some avg10=1.00 avg60=0.00 avg300=0.00 total=2500000\nfull avg10=0.00 total=0\n")
    assert PressureSampler(pressure).sample() == {"cpu_some_seconds_total": 2.5}
    assert PressureSampler(tmp_path / "none").sample() == {}


PAGE = """# HELP DCGM_FI_PROF_GR_ENGINE_ACTIVE Ratio of time the graphics engine is active.
# TYPE DCGM_FI_PROF_GR_ENGINE_ACTIVE gauge
DCGM_FI_PROF_GR_ENGINE_ACTIVE{gpu="0",UUID="GPU-1",GPU_I_PROFILE="2g.10gb",GPU_I_ID="3",Hostname="h"} 0.6
DCGM_FI_PROF_GR_ENGINE_ACTIVE{gpu="0",UUID="GPU-1",GPU_I_PROFILE="1g.5gb",GPU_I_ID="9",Hostname="h"} 0.25
DCGM_FI_DEV_FB_USED{gpu="0",UUID="GPU-1",GPU_I_PROFILE="2g.10gb",GPU_I_ID="3"} 4096
# TYPE DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION counter
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="0",UUID="GPU-1"} 7250
DCGM_FI_DEV_XID_ERRORS{gpu="0"} 0
"""


def test_a_dcgm_page_is_read_by_gpu_instance_with_the_boards_energy():
    found = DcgmSampler(0, 3, read=lambda _: PAGE).sample()
    assert found == {"gr_active": 0.6, "memory_used_mib": 4096.0, "energy_joules_total": 7.25}


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("DCGM_FI_PROF_GR_ENGINE_UTIL_RATIO", {}),
        ("DCGM_FI_PROF_GR_ENGINE_ACTIVE_UTIL_RATIO", {}),
        ("dcgm_fi_prof_gr_engine_active", {}),
        ("dcgm_field_1001", {}),
        ("whatever", {"field_id": "1001"}),
    ],
)
def test_renamed_fields_are_the_same_field(name, labels):
    assert field_number(name, labels) == 1001
    text = "".join(f',{key}="{value}"' for key, value in labels.items())
    assert read_page(f'{name}{{gpu="1"{text}}} 0.4\n') == {("1", ""): {"gr_active": 0.4}}


@pytest.mark.parametrize(
    ("gpu", "instance", "page", "message"),
    [
        (0, 5, PAGE, "does not report GPU instance 5 of GPU 0: those it has are 3, 9; restart it"),
        (2, None, PAGE, "does not report GPU 2: it has 0"),
        (0, 1, "up 1\n", "has none of the fields"),
    ],
)
def test_a_page_without_what_was_asked_for_says_what_it_has(gpu, instance, page, message):
    with pytest.raises(DeviceError, match=message):
        DcgmSampler(gpu, instance, read=lambda _: page).sample()


def test_another_machine_and_no_answer_are_refused():
    with pytest.raises(InputError, match="is another machine"):
        DcgmSampler(url="http://example.org:9400/metrics")
    with pytest.raises(DeviceError, match="does not answer"):
        DcgmSampler(url="http://127.0.0.1:9/metrics").sample()


class FakeNvml:
    """A board with a counter; utilisation is not supported."""

    NVML_GPM_METRICS_GET_VERSION = 1

    class NVMLError(Exception):
        value = 3

    def __init__(self):
        self.energy, self.asked, self.samples = 1_000, 0, []

    def nvmlDeviceGetTotalEnergyConsumption(self, device):
        self.energy += 500
        return self.energy

    def nvmlDeviceGetPowerUsage(self, device):
        return 250_000

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device):
        return 0x04 | 0x40

    def nvmlDeviceGetUtilizationRates(self, device):
        self.asked += 1
        raise self.NVMLError

    def nvmlGpmSampleAlloc(self):
        self.samples.append(object())
        return self.samples[-1]

    def nvmlGpmMigSampleGet(self, device, instance, sample):
        self.instance = instance

    def nvmlGpmSampleFree(self, sample):
        self.samples.remove(sample)

    class c_nvmlGpmMetricsGet_t:
        def __init__(self):
            self.metrics = [type("Metric", (), {"nvmlReturn": 0, "value": 0.0})() for _ in range(10)]

    def nvmlGpmMetricsGet(self, asked):
        for index in range(asked.numMetrics):
            asked.metrics[index].value = 10.0 * asked.metrics[index].metricId
            asked.metrics[index].nvmlReturn = 3 if asked.metrics[index].metricId == 5 else 0
        return asked


def test_nvml_is_read_in_joules_and_what_is_not_supported_is_asked_once():
    api = FakeNvml()
    sampler = NvmlSampler(api, None)
    first, second = sampler.sample(), sampler.sample()
    assert second["energy_joules_total"] - first["energy_joules_total"] == 0.5
    assert first["power_watts"] == 250
    assert first["slowdown"] == first["power_cap"] == 1
    assert "busy" not in first
    assert api.asked == 1
    assert slowdowns(api, None) == ("hardware thermal slowdown",)


def test_gpm_gives_an_instances_activity_since_the_last_sample_and_frees_it():
    api = FakeNvml()
    sampler = GpmSampler(api, None, 4)
    assert sampler.sample() == {}
    found = sampler.sample()
    assert api.instance == 4
    assert found["sm_active"] == 0.2
    assert found["dram_active"] == 1.0
    assert "tensor_active" not in found
    assert len(api.samples) == 1


def test_a_mig_device_is_read_as_a_board_and_by_instance_others_not_at_all():
    class Hopper(FakeNvml):
        def nvmlGpmQueryDeviceSupport(self, device):
            return type("Support", (), {"isSupportedDevice": 1})()

    class Backend:
        kind, api, device = "nvml", Hopper(), None

    assert [sampler.name for sampler in of_device(Backend(), (3, 9))] == ["board", "gpm3", "gpm9"]
    Backend.api = FakeNvml()  # Ampere
    assert [sampler.name for sampler in of_device(Backend(), (3, 9))] == ["board"]
    Backend.kind = "simulated"
    assert of_device(Backend()) == []
