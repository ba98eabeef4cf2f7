from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migperf.errors import GeometryError
from migperf.geometry import Geometry, Slot, enumerate_geometries, undominated
from migperf.profiles import Layout, Profile

NINETEEN = """
7@0; 4@0 3@4; 4@0 2@4 1@6; 4@0 1@4 1@5 1@6; 3@0 3@4; 3@0 2@4 1@6; 3@0 1@4 1@5 1@6; 2@0 2@2 3@4;
2@0 2@2 2@4 1@6;
2@0 2@2 1@4 1@5 1@6; 2@0 1@2 1@3 3@4; 2@0 1@2 1@3 2@4 1@6; 2@0 1@2 1@3 1@4 1@5 1@6; 1@0 1@1 2@2 3@4;
1@0 1@1 2@2 2@4 1@6; 1@0 1@1 2@2 1@4 1@5 1@6; 1@0 1@1 1@2 1@3 3@4; 1@0 1@1 1@2 1@3 2@4 1@6;
1@0 1@1 1@2 1@3 1@4 1@5 1@6
"""

WITH_DOUBLED = ("1g", "1g.10gb", "2g", "3g", "4g", "7g")


def short(geometry: Geometry) -> frozenset[str]:
    return frozenset(f"{slot.profile.slices}@{slot.start}" for slot in geometry.slots)


def test_the_19_maximal_geometries_of_a_seven_slice_device() -> None:
    wanted = {frozenset(line.split()) for line in NINETEEN.replace("\n", " ").split(";")}
    found = [short(geometry) for geometry in enumerate_geometries("a100-40gb", maximal=True)]
    assert len(found) == len(set(found)) == 19
    assert set(found) == wanted


@pytest.mark.parametrize("device", ["a100-40gb", "a100-80gb", "h100", "h200", "b200"])
def test_counts_of_seven_slice_devices(device: str) -> None:
    sizes = [
        len(enumerate_geometries(device, maximal=maximal, multisets=multisets))
        for multisets in (False, True)
        for maximal in (False, True)
    ]
    assert sizes == [298, 19, 38, 14]
    assert len(undominated(enumerate_geometries(device))) == 12


def test_counts_with_doubled_memory_and_media_engines() -> None:
    for profiles, counts in ((WITH_DOUBLED, (723, 78, 78)), ("all", (2319, 239, 128))):
        placed = enumerate_geometries("a100-40gb", profiles)
        maximal = enumerate_geometries("a100-40gb", profiles, maximal=True)
        multisets = enumerate_geometries("a100-40gb", profiles, multisets=True)
        assert (len(placed), len(maximal), len(multisets)) == counts


def test_counts_of_a30() -> None:
    assert len(enumerate_geometries("a30")) == 26
    assert len(enumerate_geometries("a30", maximal=True)) == 5
    assert len(enumerate_geometries("a30", multisets=True)) == 10
    maximal = enumerate_geometries("a30", maximal=True, multisets=True)
    slices = {tuple(slot.profile.slices for slot in geometry.slots) for geometry in maximal}
    assert slices == {(4,), (2, 2), (2, 1, 1), (1, 1, 1, 1)}
    counts = [
        len(enumerate_geometries("a30", "all")),
        len(enumerate_geometries("a30", "all", maximal=True)),
        len(enumerate_geometries("a30", "all", multisets=True)),
    ]
    assert counts == [76, 17, 20]


def test_drivers_before_r510_refuse_4g_beside_3g() -> None:
    legacy = enumerate_geometries("a100-40gb", maximal=True, legacy_driver=True)
    assert len(legacy) == 18
    assert frozenset({"4@0", "3@4"}) not in map(short, legacy)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("4g.20gb,4g.20gb", r"2 of 4g.20gb wanted, at most 1.*4g.20gb@0 takes slices 0-3"),
        ("1g.10gb*4,1g.5gb*3", r"4×2 \(1g.10gb\) \+ 3×1 \(1g.5gb\) = 11, .*1g.10gb@0 takes slices 0-1"),
        ("3g,3g,1g", r"no start of 1g.5gb .* is left: .*3g.20gb@0 takes slices 0-3"),
        ("3g@0,1g@3", r"3g.20gb@0 and 1g.5gb@3 collide on memory slice 3"),
        ("2g@0,3g@0", r"3g.20gb@0 and 2g.10gb@0 collide on memory slices 0-1"),
        ("1g+me*2", r"2 of 1g.5gb\+me wanted, at most 1"),
        ("3g@2", r"3g.20gb cannot start at 2: it starts at 0, 4"),
        ("2g@6", r"cannot start at 6: it starts at 0, 2, 4"),
        ("2g@2,4g", r"no start of 4g.20gb \(0\) is left: 2g.10gb@2 takes slices 2-3"),
    ],
)  # fmt: skip
def test_explanation_names_the_slices_or_the_maximum_in_the_way(text: str, why: str) -> None:
    geometry = Geometry.parse(text, "a100-40gb")
    assert not geometry.valid
    with pytest.raises(GeometryError, match=why):
        geometry.require()


@pytest.mark.parametrize(
    "text", ["3g,3g", "4g@0,3g@4", "1g*7", "3g,2g,1g,1g", "1g.10gb*3,1g", "empty", "1c.3g"]
)
def test_what_fits_is_valid(text: str) -> None:
    geometry = Geometry.parse(text, "a100-40gb")
    assert geometry.valid
    assert "is valid on A100-40GB" in geometry.explain()


def test_sum_of_compute_slices_is_not_the_rule() -> None:
    for text, valid in (("3g,3g", True), ("3g,3g,1g", False), ("1g.10gb*4,1g*3", False), ("4g,3g", True)):
        geometry = Geometry.parse(text, "a100-40gb")
        assert sum(slot.profile.slices for slot in geometry.slots) <= 7
        assert geometry.valid is valid


def test_only_one_instance_has_the_media_engines_whatever_its_profile() -> None:
    geometry = Geometry.parse("2g+me,1g+me", "a30")
    assert (
        geometry.explain() == "2g.12gb+me and 1g.6gb+me: at most 1 instance can have the media engines (+me)"
    )


def test_3g_of_hopper_has_four_memory_slices() -> None:
    assert not Geometry.parse("3g@0,1g@3", "h100").valid


def test_parse_reads_starts_multipliers_and_spaces() -> None:
    geometry = Geometry.parse(" 3G.20gb@4 , 2g@0, 1g.5gb*2", "a100-40gb")
    assert str(geometry) == "3g.20gb@4,2g.10gb@0,1g.5gb,1g.5gb"
    assert geometry.profiles == Counter({"1g.5gb": 2, "3g.20gb": 1, "2g.10gb": 1})
    assert not geometry.placed
    assert Geometry.parse("1g*2,3g@4,2g@0", "a100-40gb") == geometry


@pytest.mark.parametrize("text", ["", "3g,,1g", "3g@", "3g@-1", "1g*0", "3g@4@0", "3g 1g"])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(GeometryError, match=r"geometry: expected instances like 3g.20gb@4,1g.5gb\*2"):
        Geometry.parse(text, "a100-40gb")


@pytest.mark.parametrize("device", ["a100-40gb", "a30", "rtx-pro-6000"])
def test_every_enumerated_geometry_is_valid_and_reads_back(device: str) -> None:
    for geometry in enumerate_geometries(device):
        assert geometry.placed
        assert geometry.valid
        assert Geometry.parse(str(geometry), device) == geometry


@st.composite
def small_tables(draw: st.DrawFn) -> tuple[int, list[tuple[int, tuple[int, ...], int]]]:
    """Length of the axis, and size, starts and maximum of each profile."""
    axis = draw(st.integers(2, 5))
    rows: list[tuple[int, tuple[int, ...], int]] = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, axis))
        starts = draw(st.sets(st.integers(0, axis - size), min_size=1, max_size=3))
        rows.append((size, tuple(sorted(starts)), draw(st.integers(1, 3))))
    return axis, rows


@given(small_tables())
def test_enumeration_is_what_trying_all_subsets_gives(
    table: tuple[int, list[tuple[int, tuple[int, ...], int]]],
) -> None:
    axis, rows = table
    profiles = tuple(
        Profile(f"{index}g.{size}gb", index, index, size, starts, maximum)
        for index, (size, starts, maximum) in enumerate(rows, 1)
    )
    small = Layout("small", axis, 7, profiles)
    slots = [Slot(p, start) for p in small.profiles for start in p.starts]

    def allowed(chosen: tuple[Slot, ...]) -> bool:
        cells = [cell for slot in chosen for cell in slot.cells]
        counts = Counter(slot.profile.id for slot in chosen)
        return len(cells) == len(set(cells)) and all(counts[p.id] <= p.maximum for p in small.profiles)

    states = {
        frozenset(chosen)
        for size in range(small.axis + 1)
        for chosen in combinations(slots, size)
        if allowed(chosen)
    }
    names = [p.name for p in small.profiles]
    found = [frozenset(g.slots) for g in enumerate_geometries(small, names)]
    assert len(found) == len(set(found))
    assert set(found) == states
    maximal = {state for state in states if not any(state < other for other in states)}
    assert {frozenset(g.slots) for g in enumerate_geometries(small, names, maximal=True)} == maximal


def test_too_many_geometries_are_refused_and_not_waited_for() -> None:
    cores = 24
    many = tuple(
        Profile(f"{n}c", n, n, n, tuple(range(cores - n + 1)), cores // n) for n in range(1, cores + 1)
    )
    with pytest.raises(GeometryError, match="more than 50000 geometries"):
        enumerate_geometries(Layout("many cores", cores, cores, many))
    assert enumerate_geometries(Layout("many cores", cores, cores, many), ["12c"], maximal=True)


def test_profiles_to_enumerate_are_a_list() -> None:
    with pytest.raises(GeometryError, match='expected "base", "all" or a list of names'):
        enumerate_geometries("a100", "3g")  # pyright: ignore[reportArgumentType]
