import io

import matplotlib
import numpy as np
import pytest
from PIL import Image

from shared_core import InputError
from shared_core.plot import COLOURS, figure, save


def test_the_picture_has_the_width_asked_for(tmp_path):
    made, axes = figure(1, 2, width=1200, height=500, title="A claim")
    for axis in axes:
        axis.plot([0, 1], [0, 1])
    save(made, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (1200, 500)
        assert np.asarray(picture.convert("L")).std() > 1


def test_global_state_is_left_alone_and_no_window_is_made():
    before = dict(matplotlib.rcParams)
    made, _ = figure()
    made.savefig(io.BytesIO())
    assert dict(matplotlib.rcParams) == before
    import matplotlib.pyplot as pyplot

    assert pyplot.get_fignums() == []


def test_lines_take_the_colour_blind_safe_colours_in_order():
    _, (axis,) = figure()
    lines = [axis.plot([0, 1], [0, n])[0].get_color() for n in range(3)]
    assert lines == list(COLOURS[:3])


def test_a_failed_save_leaves_the_previous_picture(tmp_path):
    made, _ = figure()
    save(made, tmp_path / "a.svg")
    before = (tmp_path / "a.svg").read_bytes()
    made.savefig = None  # what a broken backend does
    with pytest.raises(TypeError, match="not callable"):
        save(made, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_bytes() == before


def test_a_suffix_that_is_no_picture_format_is_refused(tmp_path):
    made, _ = figure()
    with pytest.raises(InputError, match=r"a\.txt: the suffix must be one of .*png.* \(got 'txt'\)"):
        save(made, tmp_path / "a.txt")
