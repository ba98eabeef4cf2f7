import re

import pytest
from made_records import poisson, record

from migperf.errors import DataError
from migperf.tables import Spread, official_a100, table_from_records, workload_key
from shared_core import InputError

KEY = "torchvision/resnet18 infer"


def cell(*records, **options):
    table = table_from_records(records, **options)
    (only,) = table.cells.values()
    return only


def test_a_cell_is_median_and_range_over_repeats_not_their_mean():
    found = cell(*(record(repeat=i, items_per_second=rate) for i, rate in enumerate([90.0, 100.0, 140.0])))
    assert found.throughput == Spread(100.0, 90.0, 140.0, 3)


def test_latency_range_covers_the_intervals_of_each_repeat():
    one = record(latency_ms={"p99": 20.0}, latency_interval_ms={"p99": (17.0, 31.0)})
    two = record(repeat=1, latency_ms={"p99": 22.0}, latency_interval_ms={"p99": (19.0, 25.0)})
    assert cell(one, two).service_ms["p99"] == Spread(21.0, 17.0, 31.0, 2)


def test_contaminated_records_are_left_out_and_counted():
    clean, foul = record(), record(repeat=1, items_per_second=1.0, contaminated="17 % of a core")
    table = table_from_records([clean, foul])
    assert (table.records, table.contaminated) == (2, 1)
    assert table.cells[KEY, "1g.5gb", 1].throughput == Spread(100.0, 100.0, 100.0, 1)
    with pytest.raises(DataError, match="no clean record of a partition among 1 \\(1 contaminated\\)"):
        table_from_records([foul])


def test_out_of_memory_stays_so_and_is_never_a_number():
    oom = record(status="oom", message="CUDA out of memory", items_per_second=None, latency_ms={})
    found = cell(record(repeat=1), oom)
    assert (found.status, found.throughput, found.message) == ("oom", None, "CUDA out of memory")


def test_a_failed_repeat_does_not_pull_the_others_down():
    found = cell(record(), record(repeat=1, status="failed", items_per_second=None, latency_ms={}))
    assert found.status == "ok"
    assert found.throughput == Spread(100.0, 100.0, 100.0, 1)


def test_a_saturated_load_has_what_it_achieved_and_no_percentile():
    slow = record(load=poisson(80), items_per_second=80.0, latency_ms={"p99": 30.0})
    over = record(load=poisson(120), status="saturated", items_per_second=99.0, latency_ms={})
    first, second = cell(slow, over).open_loop
    assert (first.rate, first.status, first.latency_ms["p99"].middle) == (80.0, "ok", 30.0)
    assert (second.rate, second.status, second.latency_ms) == (120.0, "saturated", {})
    assert second.achieved == Spread(99.0, 99.0, 99.0, 1)


def test_open_loop_latency_is_not_taken_for_service_time():
    found = cell(record(), record(load=poisson(80), latency_ms={"mean": 25.0, "p99": 80.0}))
    assert found.service_ms["mean"].middle == 10.0
    assert found.throughput == Spread(100.0, 100.0, 100.0, 1)


def test_a_percentile_that_one_repeat_refused_is_refused():
    few = record(repeat=1, load=poisson(80), latency_ms={"p50": 12.0}, samples=60)
    found = cell(record(load=poisson(80), latency_ms={"p50": 11.0, "p99": 30.0}), few)
    assert set(found.open_loop[0].latency_ms) == {"p50"}


def test_throughput_is_of_the_most_threads_and_service_time_of_the_fewest():
    alone = record(items_per_second=100.0)
    four = record(
        load={"kind": "closed", "concurrency": 4}, items_per_second=160.0, latency_ms={"mean": 25.0}
    )
    found = cell(alone, four)
    assert found.throughput == Spread(160.0, 160.0, 160.0, 1)
    assert found.service_ms["mean"].middle == 10.0


def test_a_rate_counts_items_whether_they_come_in_batches_or_are_gathered():
    whole = record(workload={"batch": 8}, load=poisson(10), latency_ms={"p99": 30.0})
    gathered = record(workload={"batch": 1}, load=poisson(80, collect=8), latency_ms={"p99": 30.0})
    assert cell(whole).open_loop[0].rate == 80.0
    assert (cell(gathered).batch, cell(gathered).open_loop[0].rate) == (8, 80.0)


def test_shared_modes_say_nothing_of_a_profile():
    with pytest.raises(DataError, match="no clean record"):
        table_from_records([record(mode="mps"), record(mode="unpinned")])


def test_real_and_simulated_are_mixed_only_when_asked_and_then_count_as_simulated():
    both = [record(), record(profile="7g.40gb", simulated=True, backend="simulated")]
    with pytest.raises(InputError, match="real and simulated records are not mixed"):
        table_from_records(both)
    assert table_from_records(both, mixed=True).simulated


def test_records_of_two_devices_need_a_choice():
    both = [record(), record(device="H100-80GB")]
    with pytest.raises(InputError, match=re.escape("choose one: A100-40GB, H100-80GB")):
        table_from_records(both)
    assert table_from_records(both, device="H100-80GB").device == "H100-80GB"


def test_energy_an_item_is_of_the_window():
    found = cell(record(energy_joules=500.0, items_per_second=100.0, window_seconds=10.0))
    assert found.joules_per_item == Spread(0.5, 0.5, 0.5, 1)
    assert cell(record(energy_joules=None)).joules_per_item is None


def test_memory_is_the_largest_peak():
    peaks = (900.0, 1100.0, 1000.0)
    assert cell(*(record(repeat=i, peak_memory_mib=p) for i, p in enumerate(peaks))).memory_mib == 1100.0


def test_workloads_that_differ_in_shape_are_two():
    assert workload_key({"source": "timm", "model": "vit", "mode": "infer", "image": 64, "batch": 4}) != (
        workload_key({"source": "timm", "model": "vit", "mode": "infer", "image": 224, "batch": 4})
    )


def test_a_name_means_the_one_workload_it_fits():
    table = table_from_records(
        [record(workload={"image": 64}), record(workload={"image": 224}), record(workload={"mode": "train"})]
    )
    assert table.resolve("resnet18", "train") == "torchvision/resnet18 train"
    assert table.resolve("resnet18 image=64", "infer") == "torchvision/resnet18 infer image=64"
    with pytest.raises(InputError, match=r"means several: .*image=224; .*image=64"):
        table.resolve("torchvision/resnet18", "infer")
    with pytest.raises(InputError, match="did you mean torchvision/resnet18"):
        table.resolve("resnet81", "train")


def test_official_figures_hold_the_published_ratios():
    table = official_a100()
    ratios = {
        ("transformers/bert-base-multilingual infer", 1): 7.00,
        ("transformers/bert-base-multilingual infer", 8): 5.26,
        ("transformers/bert-base-multilingual infer", 32): 1.42,
        ("transformers/bert-base-multilingual infer", 256): 0.93,
        ("transformers/minilm-l12 infer", 32): 3.37,
        ("transformers/minilm-l12 infer", 256): 0.94,
        ("transformers/distiluse-v1 infer", 32): 1.43,
        ("timm/vit_base_patch16 train", 8): 1.41,
        ("torchvision/moco-v2-resnet50 train", 8): 2.16,
    }
    for (workload, batch), ratio in ratios.items():
        small, large = (table.cells[workload, name, batch].throughput for name in ("1g.5gb", "7g.40gb"))
        assert small is not None
        assert large is not None
        assert 7 * small.middle / large.middle == pytest.approx(ratio, abs=0.0051)
    ooms = [key for key, found in table.cells.items() if found.status == "oom"]
    assert len(ooms) == 7
    assert all(table.cells[key].throughput is None for key in ooms)
