from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlogist.annotations import read_annotations, write_annotations
from shared_core import InputError

SQUARE = np.array([(100, 100), (300, 100), (300, 300), (100, 300)], float)


def asap(body: str) -> str:
    return f'<?xml version="1.0"?><ASAP_Annotations><Annotations>{body}</Annotations></ASAP_Annotations>'


def polygon(outline: np.ndarray, group: str = "_0", kind: str = "Polygon") -> str:
    points = "".join(
        f'<Coordinate Order="{i}" X="{x}" Y="{y}" />' for i, (x, y) in reversed(list(enumerate(outline)))
    )  # the order is in the attribute, not in the file
    return (
        f'<Annotation Name="A" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58">'
        f"<Coordinates>{points}</Coordinates></Annotation>"
    )


def test_a_region_is_hit_where_it_holds_lesion(tmp_path: Path):
    (tmp_path / "a.xml").write_text(asap(polygon(SQUARE)))
    found = read_annotations(tmp_path / "a.xml")
    xy = np.array([(0, 0), (0, 100), (150, 150), (50, 100), (300, 300), (0, 0)])
    # beside (touches a corner), beside (touches an edge), inside, half, touches a corner, as the first
    assert found.hits(xy, 100).tolist() == [False, False, True, True, False, False]
    assert found.hits(xy, 100, share=0.6).tolist() == [False, False, True, False, False, False]
    assert found.hits(np.empty((0, 2), np.int64), 100).shape == (0,)


def test_normal_parts_are_cut_out(tmp_path: Path):
    inner = SQUARE / 2 + 100  # 150 to 250
    (tmp_path / "a.xml").write_text(
        asap(polygon(SQUARE) + polygon(inner, "_2") + polygon(SQUARE + 900, "_1"))
    )
    found = read_annotations(tmp_path / "a.xml")
    assert list(found.groups) == ["_0", "_1"]
    assert found.lesions[0].area == 200**2 - 100**2
    assert found.hits(np.array([(160, 160), (1000, 1000)]), 50).tolist() == [False, True]


def test_outlines_that_cross_themselves_and_decimal_commas_are_taken(tmp_path: Path):
    bow = np.array([(0, 0), (100, 100), (100, 0), (0, 100)])
    (tmp_path / "a.xml").write_text(asap(polygon(bow)).replace('X="100"', 'X="100,0"'))
    assert read_annotations(tmp_path / "a.xml").lesions[0].area == pytest.approx(5000)


def test_kinds_without_area_are_left_out(tmp_path: Path):
    (tmp_path / "a.xml").write_text(asap(polygon(SQUARE[:1], kind="Dot")))
    found = read_annotations(tmp_path / "a.xml")
    assert len(found) == 0
    assert not found.hits(np.array([(0, 0)]), 999).any()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "not an XML file"),
        ("<other/>", "expected ASAP's <ASAP_Annotations>"),
        (asap(polygon(SQUARE[:2])), "A: expected an outline of at least 3 points"),
        (asap(polygon(SQUARE).replace('X="300.0"', 'X="far"')), "a coordinate needs numbers"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, words: str):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(InputError, match=words):
        read_annotations(tmp_path / "a.xml")


def test_what_is_written_is_read_again(tmp_path: Path):
    outlines = [SQUARE, SQUARE + 1000.5]
    write_annotations(tmp_path / "a.xml", outlines)
    found = read_annotations(tmp_path / "a.xml")
    assert [shape.bounds for shape in found.lesions] == [
        (100, 100, 300, 300),
        (1100.5, 1100.5, 1300.5, 1300.5),
    ]
