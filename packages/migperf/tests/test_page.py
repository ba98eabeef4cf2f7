"""Rows, the page, and Prometheus: what was measured is what is shown, and marked as what it is."""

import re
import time

import numpy as np
import pytest
from made_records import poisson, record

from migperf import page, summaries
from migperf.errors import DataError
from migperf.prometheus import prometheus_text
from migperf.records import Writer


def write(folder, records, raws=None, simulated=False):
    Writer(folder, simulated).append(records, raws or {})
    return records


def test_percentiles_of_a_row_are_of_all_clean_requests_pooled(tmp_path):
    fast, slow = np.full(900, 10_000_000), np.full(100, 500_000_000)
    dirty = np.full(1000, 9_000_000_000)
    found = [
        record(worker=0, workers=2, raw="raw/a.npy"),
        record(worker=1, workers=2, raw="raw/b.npy"),
        *(record(worker=w, workers=2, repeat=1, raw="raw/c.npy", contaminated="somebody") for w in (0, 1)),
    ]
    write(tmp_path, found, {"raw/a.npy": fast, "raw/b.npy": slow, "raw/c.npy": dirty})
    (row,) = summaries.rows(found, tmp_path)
    everything = np.concatenate([fast, slow]) / 1e6
    assert row.latency_ms["p99"] == np.percentile(everything, 99) == 500
    assert row.latency_ms["p50"] == 10
    assert (row.repeats, row.clean, row.samples, row.workers) == (2, 1, 1000, 2)
    assert row.items_per_second == 200
    assert "somebody" in row.notes


def test_jobs_of_one_cell_are_not_mixed_into_one_row():
    train = {"mode": "train", "batch": 8}
    found = [record(worker=0, workers=2), record(worker=1, workers=2, workload=train, items_per_second=7.0)]
    one, other = summaries.rows(found)
    assert (one.items_per_second, other.items_per_second) == (100, 7)
    assert (one.neighbours, other.neighbours) == (1, 1)
    assert summaries.comparisons([one, other]) == []


def test_energy_is_the_boards_over_the_items_of_all_and_never_counted_twice():
    found = [record(worker=w, workers=2, energy_joules=400.0, extra={"idle_watts": 50.0}) for w in (0, 1)]
    (row,) = summaries.rows(found)
    assert row.joules_per_item == pytest.approx(400 / 2000)
    assert row.idle_watts == 50
    html = page.render(found)
    assert "whole board" in html
    assert "idle 50 W" in html


def test_a_way_of_sharing_stands_beside_the_whole_device():
    whole = record("7g.40gb", cell="w", mode="whole", geometry="7g.40gb@0")
    parts = [
        record(cell="p", worker=w, workers=7, geometry=",".join(f"1g.5gb@{i}" for i in range(7)),
               items_per_second=50.0) for w in range(7)
    ]  # fmt: skip
    alone = record(cell="a", items_per_second=100.0)  # as fast as the whole, and yet not the whole
    (one,) = summaries.comparisons(summaries.rows([alone, whole, *parts]))
    assert one.gain == 3.5
    assert one.whole.geometry == "7g.40gb@0"
    assert "3.50" in page.render([whole, *parts])


def test_out_of_memory_is_shown_as_such_and_never_as_a_number(tmp_path):
    found = [
        record(status="oom", items_per_second=None, latency_ms={}, samples=0, message="CUDA out of memory")
    ]
    write(tmp_path, found)
    html = page.report(tmp_path, tmp_path / "r.html").read_text()
    assert "oom" in html
    assert "CUDA out of memory" in html
    assert "0 items/s" not in html
    (row,) = summaries.rows(found)
    assert row.items_per_second is None
    assert row.usable


def test_the_page_loads_nothing_from_elsewhere_and_escapes_what_it_shows(tmp_path):
    found = [
        record(cell="x", message="<script>alert(1)</script>", load=poisson(50)),
        record("7g.40gb", cell="y"),
    ]
    write(tmp_path, found)
    html = page.report(tmp_path, tmp_path / "r.html").read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    links = re.findall(r'(?:src|href)="([^"]{0,12})', html)
    assert links
    assert all(link.startswith("data:image/") for link in links)
    assert "from arrival" in html
    assert "service time" in html


def test_simulated_pages_say_so_in_title_name_plots_and_rows(tmp_path):
    found = [record(simulated=True, latency_ms={"p50": 9.0, "p99": 10.0})]
    write(tmp_path, found, simulated=True)
    made = page.report(tmp_path, tmp_path / "r.html")
    html = made.read_text()
    assert made.name == "r.simulated.html"
    assert "<title>migperf: A100-40GB (SIMULATED)</title>" in html
    assert "Throughput by geometry (SIMULATED)" in html
    assert "p99 by geometry (SIMULATED)" in html
    assert "<small>simulated</small>" in html


def test_contamination_is_told_on_the_page_and_all_contaminated_cells_tell_nothing():
    found = [record(contaminated="other processes used 1.90 of 2 cores")]
    assert "Contaminated:" in page.render(found)
    assert "1.90 of 2 cores" in page.render(found)
    with pytest.raises(DataError, match="1 of 1 cells tell nothing"):
        summaries.require_usable(summaries.rows(found))


def test_raw_latencies_that_are_gone_are_said():
    found = [record(raw="raw/gone.npy"), record(raw="raw/gone2.npy", repeat=1)]
    (row,) = summaries.rows(found, "/nowhere")
    assert not row.latency_ms
    assert any("missing" in note for note in row.notes)


def test_prometheus_reads_its_page_back():
    from prometheus_client.parser import text_string_to_metric_families

    text = prometheus_text([record(latency_ms={"mean": 9.0, "p50": 8.0, "p99": 20.0}, energy_joules=5.0,
                                   peak_memory_mib=2.0, device='a "quoted" GPU')])  # fmt: skip
    found = {family.name: family.samples for family in text_string_to_metric_families(text)}
    quantiles = {s.labels["quantile"]: s.value for s in found["migperf_latency_seconds"]}
    assert quantiles == {"0.5": 0.008, "0.99": 0.02}
    (rate,) = found["migperf_items_per_second"]
    assert rate.value == 100
    assert rate.labels["device"] == 'a "quoted" GPU'
    assert rate.labels["simulated"] == "false"
    assert found["migperf_peak_memory_bytes"][0].value == 2 * 2**20


def test_a_run_without_a_number_has_a_status_and_no_rate():
    text = prometheus_text([record(status="oom", items_per_second=None, latency_ms={})])
    assert 'status="oom"' in text
    assert "migperf_items_per_second{" not in text


def test_the_boards_idle_power_is_read_before_anything_runs(monkeypatch):
    from types import SimpleNamespace

    from migperf import measuring

    class Api:
        NVMLError = RuntimeError
        begin = time.perf_counter()

        def nvmlDeviceGetTotalEnergyConsumption(self, device):
            return round((time.perf_counter() - self.begin) * 60_000)  # mJ: 60 W

    monkeypatch.setattr(measuring, "IDLE_SECONDS", 0.2)
    gpu = SimpleNamespace(kind="gpu", api=Api(), device=None)
    assert measuring.CellRun._idle_watts(SimpleNamespace(backend=gpu)) == pytest.approx(60, rel=0.05)
    assert measuring.CellRun._idle_watts(SimpleNamespace(backend=SimpleNamespace(kind="cpu"))) is None


def test_activity_of_the_device_weighs_each_instance_and_is_none_if_one_is_unknown():
    from migperf import Geometry, measuring, partitioned, workloads
    from migperf.backends.opening import open as open_device
    from migperf.parts import assign
    from migperf.samplers import Window

    device = open_device("sim:a100-40gb")
    with partitioned(device, Geometry.parse("2g,1g*5", device)) as instances:
        parts = assign(workloads.torchvision("resnet18"), instances, device)
    active = dict(zip((p.instance.handle["gi"] for p in parts), (0.6, 0.9, 0.4, 0.2, 0.7, 0.1), strict=True))
    means = {f"gpm{gi}.gr_active": value for gi, value in active.items()}
    assert measuring._activity(parts, Window(means), 7) == {"device_activity": 0.5}
    means.popitem()
    assert measuring._activity(parts, Window(means), 7) == {}
