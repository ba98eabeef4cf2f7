import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migperf.profiles import layout
from migperf.scaling import Law, Point, Refusal, complete, fit, floor_seconds
from migperf.tables import Cell, Spread, Table, official_a100

A100 = layout("a100-40gb")
BERT = "transformers/bert-base-multilingual infer"
MINILM = "transformers/minilm-l12 infer"
SIZES = {"1g": (1, 1), "2g": (2, 2), "3g": (3, 4), "4g": (4, 4), "7g": (7, 8)}


def only(table, workload, batch, *profiles):
    kept = {key: cell for key, cell in table.cells.items() if key[0] == workload and key[2] == batch}
    return Table("A100-40GB", False, {key: cell for key, cell in kept.items() if key[1] in profiles})


@pytest.mark.parametrize("workload", [BERT, MINILM])
def test_fitted_on_1g_and_7g_it_foretells_the_official_3g_and_2g(workload):
    official = official_a100()
    full = complete(only(official, workload, 256, "1g.5gb", "7g.40gb"), A100)
    for profile, tolerance in (("3g.20gb", 0.02), ("2g.10gb", 0.05)):
        cell = full.cells[workload, profile, 256]
        truth = official.cells[workload, profile, 256].throughput
        assert cell.source == "predicted"
        assert cell.throughput is not None
        assert truth is not None
        assert cell.throughput.middle == pytest.approx(truth.middle, rel=tolerance)
        assert cell.throughput.low < truth.middle < cell.throughput.high


@pytest.mark.parametrize("batch", [8, 32])
def test_an_unsaturated_whole_device_is_refused_with_the_reason(batch):
    table = complete(only(official_a100(), BERT, batch, "1g.5gb", "7g.40gb"), A100)
    cell = table.cells[BERT, "3g.20gb", batch]
    assert cell.throughput is None
    assert cell.status == "insufficient"
    assert "not saturated" in cell.message


def test_a_known_t0_makes_an_unsaturated_pair_solvable():
    law = Law(0.010, 0.060, 0.030)
    points = [Point(*SIZES[name], law.seconds(*SIZES[name])) for name in ("1g", "7g")]
    assert isinstance(fit(points), Refusal)
    found = fit(points, t0=0.010)
    assert isinstance(found, Law)
    assert found.seconds(3, 4) == pytest.approx(law.seconds(3, 4))


shares = st.floats(0.05, 1.0)


@given(shares, shares, shares, st.permutations(list(SIZES)))
def test_a_law_is_found_again_from_four_of_its_points(t0, a, b, order):
    law = Law(t0, a, b)
    found = fit([Point(*SIZES[name], law.seconds(*SIZES[name])) for name in order[:4]])
    assert isinstance(found, Law)
    np.testing.assert_allclose(
        [found.seconds(*SIZES[name]) for name in SIZES],
        [law.seconds(*SIZES[name]) for name in SIZES],
        rtol=1e-6,
    )


def test_one_instance_or_two_of_a_size_are_no_law():
    refused = fit([Point(1, 1, 2.0), Point(1, 1, 2.1)])
    assert isinstance(refused, Refusal)
    assert "fewer than two sizes" in refused.reason


def test_measurements_that_follow_no_law_are_refused():
    flat = [Point(1, 1, 1.0), Point(2, 2, 0.99), Point(3, 4, 0.2), Point(7, 8, 0.19)]
    assert isinstance(fit(flat), Refusal)


def test_measured_cells_stay_and_all_others_are_marked():
    official = official_a100()
    full = complete(official, A100)
    for key, cell in official.cells.items():
        assert full.cells[key] is cell
    added = [cell for key, cell in full.cells.items() if key not in official.cells]
    assert added
    assert all(cell.source == "predicted" for cell in added)


def test_nothing_is_predicted_for_an_instance_larger_than_any_measured():
    table = complete(only(official_a100(), BERT, 256, "1g.5gb", "2g.10gb"), A100)
    cell = table.cells[BERT, "7g.40gb", 256]
    assert (cell.throughput, cell.message) == (None, "no instance as large was measured")


def test_what_ran_out_of_memory_runs_out_of_less_memory_and_with_more_items():
    full = complete(official_a100(), A100)
    assert full.cells["timm/vit_base_patch16 train", "1g.10gb", 128].status == "oom"
    assert full.cells["timm/vit_base_patch16 train", "1g.5gb+me", 32].status == "oom"
    assert full.cells["timm/vit_base_patch16 train", "4g.20gb", 128].status == "oom"


def test_media_engines_change_no_speed():
    full = complete(official_a100(), A100)
    plain, media = (full.cells[BERT, name, 32] for name in ("1g.5gb", "1g.5gb+me"))
    assert media.source == "predicted"
    assert media.throughput == plain.throughput


def measured(profile, rate, memory, batch=8):
    value = Spread(rate, rate, rate)
    return Cell("w infer", profile, batch, "ok", throughput=value, memory_mib=memory)


def test_memory_of_a_predicted_cell_grows_by_the_context_and_never_beyond_a_larger_instance():
    cells = [measured("1g.5gb", 100.0, 3000.0), measured("7g.40gb", 750.0, 3200.0)]
    full = complete(Table("A100-40GB", False, {(c.workload, c.profile, c.batch): c for c in cells}), A100)
    assert full.cells["w infer", "2g.10gb", 8].memory_mib == 3060.0
    assert full.cells["w infer", "3g.20gb", 8].memory_mib == 3124.0
    assert full.cells["w infer", "4g.20gb", 8].memory_mib == 3183.0


def test_the_floor_is_a_batch_that_takes_every_instance_equally_long():
    assert floor_seconds(official_a100(), BERT) == pytest.approx(1 / 90)
    assert floor_seconds(official_a100(), "transformers/distiluse-v1 infer") is None


def test_cpu_cores_scale_by_one_resource():
    cells = [measured("1c", 100.0, None), measured("4c", 250.0, None)]
    table = Table("CPU", False, {(c.workload, c.profile, c.batch): c for c in cells})
    from migperf.profiles import Layout, Profile

    cores = Layout(
        "CPU", 4, 4, tuple(Profile(f"{k}c", k, k, k, tuple(range(5 - k)), 4 // k) for k in (1, 2, 4))
    )
    found = complete(table, cores).cells["w infer", "2c", 8]
    assert found.throughput is not None
    # time = t0 + A/k through (1, 80 ms) and (4, 32 ms): t0 = 16, A = 64, so 48 ms at 2
    assert found.service_ms["mean"].middle == pytest.approx(48.0)
