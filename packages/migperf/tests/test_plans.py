from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migperf import plans
from migperf.backends import Instance
from migperf.backends.mig import MigBackend
from migperf.backends.simulated import SimulatedNvml
from migperf.errors import GeometryError
from migperf.geometry import Geometry, Slot, enumerate_geometries
from migperf.profiles import Profile, layout

A100 = layout("a100-40gb")


def slots(text: str) -> tuple[Slot, ...]:
    return () if not text else Geometry.parse(text, A100).slots


def best_by_trying_all(wanted: Sequence[Slot], live: Sequence[Slot], occupied: Sequence[Slot]) -> int | None:
    """Return the most live instances that any placement keeps, None if there is no placement."""
    best = None
    for starts in product(*(slot.profile.starts for slot in wanted)):
        placed = [Slot(slot.profile, start) for slot, start in zip(wanted, starts, strict=True)]
        cells = [cell for slot in (*placed, *occupied) for cell in slot.cells]
        if len(cells) == len(set(cells)):
            kept = len(set(placed) & set(live))
            best = kept if best is None else max(best, kept)
    return best


@st.composite
def small_tables(draw: st.DrawFn) -> list[tuple[int, list[int]]]:
    """Size and preferred starts of each profile."""
    axis = draw(st.integers(2, 6))
    rows: list[tuple[int, list[int]]] = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, axis // 2 + 1))
        starts = draw(st.lists(st.integers(0, axis - size), min_size=1, max_size=4, unique=True))
        rows.append((size, starts))
    return rows


@given(small_tables(), st.data())
def test_planner_is_exact(rows: list[tuple[int, list[int]]], data: st.DataObject) -> None:
    profiles = [
        Profile(f"p{index}", index, 1, size, tuple(sorted(starts)), 9, preference=tuple(starts))
        for index, (size, starts) in enumerate(rows)
    ]
    places = [Slot(profile, start) for profile in profiles for start in profile.starts]
    wanted = [Slot(profile) for profile in data.draw(st.lists(st.sampled_from(profiles), max_size=4))]
    live = data.draw(st.lists(st.sampled_from(places), max_size=3))
    occupied = data.draw(st.lists(st.sampled_from(places), max_size=1))
    found = plans.arrange(wanted, live, occupied)
    best = best_by_trying_all(wanted, live, occupied)
    if found is None:
        assert best is None
        return
    cells = [cell for slot in (*found, *occupied) for cell in slot.cells]
    assert len(cells) == len(set(cells))
    assert [slot.profile for slot in found] == [slot.profile for slot in wanted]
    assert all(slot.start in slot.profile.starts for slot in found)
    assert len(set(found) & set(live)) == best


def test_every_valid_multiset_of_a_seven_slice_device_is_placed() -> None:
    for multiset in enumerate_geometries(A100, "all", multisets=True):
        placed = plans.place(multiset)
        assert placed.valid
        assert placed.placed
        assert placed.profiles == multiset.profiles


def test_live_instances_stay_where_they_are() -> None:
    wanted = Geometry.parse("3g,2g,1g", A100)
    assert str(plans.place(wanted)) == "3g.20gb@4,2g.10gb@0,1g.5gb@2"
    # 2g starts at 0, 2 or 4: beside 3g@0 only at 4, so 1g@5 cannot stay too; 1g@6 can.
    assert str(plans.place(wanted, live=slots("3g@0,1g@5"))) == "3g.20gb@0,2g.10gb@4,1g.5gb@6"
    assert str(plans.place(wanted, live=slots("3g@4,1g@0"))) == "3g.20gb@4,2g.10gb@2,1g.5gb@0"


def test_what_must_stay_is_planned_around() -> None:
    assert str(plans.place(Geometry.parse("3g", A100), occupied=slots("1g@6"))) == "3g.20gb@0"
    with pytest.raises(GeometryError, match=r"does not fit beside 1g\.5gb@0,1g\.5gb@6"):
        plans.place(Geometry.parse("3g", A100), occupied=slots("1g@0,1g@6"))


def backend(text: str = "", driver: str = "580.95") -> MigBackend:
    api = SimulatedNvml(A100, driver=driver)
    device = MigBackend(api, spec="sim:a100-40gb", kind="simulated")
    for slot in slots(text):
        device.create(slot.profile, slot.start)
    return device


def test_plan_destroys_first_keeps_what_fits_and_changes_nothing() -> None:
    device = backend("3g@4,2g@0")
    before = device.instances()
    steps = plans.plan(device, Geometry.parse("3g,1g,1g,1g", device))
    assert [instance.profile.name for instance in steps.kept] == ["3g.20gb"]
    actions = [step.action for step in steps.steps]
    assert actions == ["destroy", "create", "create", "create"]
    assert str(steps).startswith(f"destroy 2g.10gb@0 ({before[0].uuid})\ncreate 1g.5gb@0")
    assert device.instances() == before


def test_applied_plan_leads_there_and_kept_instances_keep_their_uuid() -> None:
    device = backend("3g@4,2g@0")
    kept = device.instances()[1].uuid
    made = plans.apply(device, plans.plan(device, Geometry.parse("3g,1g,1g", device)))
    assert [instance.profile.name for instance in made] == ["3g.20gb", "1g.5gb", "1g.5gb"]
    assert made[0].uuid == kept
    assert str(plans.current(device)) == "3g.20gb@4,1g.5gb@0,1g.5gb@1"
    assert str(plans.plan(device, Geometry.parse("3g,1g,1g", device))) == "nothing to do"


def test_geometry_of_another_model_is_refused_though_its_ids_exist_here() -> None:
    # Id 0 is 4g.24gb on A30 and 7g.40gb on A100.
    device = backend()
    with pytest.raises(GeometryError, match=r"has no profile '4g.24gb': did you mean 4g.20gb"):
        plans.plan(device, Geometry.parse("4g", "a30"))
    assert not device.instances()


def test_compute_instances_that_somebody_cut_further_are_not_mistaken_for_whole_ones() -> None:
    device = backend()
    device.create(A100.profile("3g"), 4, compute=(1, 2))
    device.create(A100.profile("2g"), 0, compute=())
    steps = plans.plan(device, Geometry.parse("3g@4,2g@0", device))
    assert not steps.kept
    back = plans.plan(device, plans.current(device))
    assert len(back.kept) == 2
    assert not back.steps


@pytest.mark.parametrize(
    "wanted", ["3g,2g,1g,1g", "2g,2g,2g", "3g,1g,1g,1g,1g", "3g@4,2g@0,1g@2,1g@3", "4g,3g", "1g*7"]
)
def test_driver_that_cannot_be_told_a_place_is_led_there_by_the_order(wanted: str) -> None:
    # 4g+3g is refused by drivers of that age.
    device = backend(driver="450.80")
    geometry = Geometry.parse(wanted, device)
    if wanted == "4g,3g":
        with pytest.raises(GeometryError, match="no order of creation leads to"):
            plans.apply(device, plans.plan(device, geometry))
        assert not device.instances()
        return
    made = plans.apply(device, plans.plan(device, geometry))
    assert Geometry(device.layout, tuple(map(plans.slot_of, made))) == plans.place(geometry)
    calls = device.api.calls
    assert calls["nvmlDeviceCreateGpuInstance"] == len(geometry.slots)  # the first order did it
    assert calls["nvmlGpuInstanceDestroy"] == 0


def test_order_is_found_by_trying_when_the_driver_has_other_preferences() -> None:
    ascending = tuple(replace(profile, preference=profile.starts) for profile in A100.profiles)
    api = SimulatedNvml(replace(A100, profiles=ascending), driver="450.80")
    device = MigBackend(api, spec="sim:other", kind="simulated")
    wanted = Geometry.parse("1g@0,2g@2,3g@4", device)
    plans.apply(device, plans.plan(device, wanted))
    assert plans.current(device) == wanted
    assert api.calls["nvmlGpuInstanceDestroy"] > 0  # the orders that should have worked did not
    plans.apply(device, plans.plan(device, Geometry.parse("empty", device)))
    with pytest.raises(GeometryError, match=r"no order of creation leads to 3g\.20gb@4"):
        plans.apply(device, plans.plan(device, Geometry.parse("3g@4", device)))
    assert not device.instances()


def test_orders_begin_with_those_that_recorded_preferences_lead_home() -> None:
    placed = plans.place(Geometry.parse("3g,2g,1g,1g", A100)).slots
    tried = list(plans.orders(placed))
    assert len(tried) == len({tuple(s.profile.name for s in order) for order in permutations(placed)}) == 12
    assert [s.profile.id for s in tried[0]][:1] == [9]  # 3g first: 1g first would take slice 6 from it
    assert all(plans.predict([s.profile for s in order]) is not None for order in tried[:1])


def test_prediction_agrees_with_the_driver_on_every_order() -> None:
    for multiset in ("3g,2g,1g,1g", "2g,1g,1g,1g", "3g,3g", "4g,2g,1g", "2g,2g,2g,1g"):
        for order in set(permutations([slot.profile for slot in slots(multiset)])):
            api = SimulatedNvml(A100)
            device = MigBackend(api, spec="sim:a100-40gb", kind="simulated")
            made: list[Instance] = []
            try:
                made += [device.create(profile) for profile in order]
            except ValueError:
                assert plans.predict(order) is None
            else:
                predicted = plans.predict(order)
                assert predicted is not None
                assert [slot.start for slot in predicted] == [instance.start for instance in made]
