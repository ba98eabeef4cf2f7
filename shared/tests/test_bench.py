import itertools
import json

import numpy as np
import pytest

from shared_core import InputError
from shared_core.bench import finish, in_turns, row


def test_a_ratio_says_how_many_times_better_ours_is():
    about = {"peer": "numpy", "version": "2", "unit": "s"}
    assert row("sort", 2.0, 6.0, **about)["ratio"] == 3
    assert row("sort", 6.0, 2.0, **about, more_is_better=True)["ratio"] == 3


def test_works_take_turns_forwards_and_backwards_and_each_has_its_own_time():
    done, now = [], itertools.count()
    clock = {"a": 0.0}

    def work(name, seconds):
        def run():
            done.append(name)
            clock["a"] += seconds + 10 * (next(now) < 2)  # the first round is slow

        return run

    times = in_turns([work("a", 1.0), work("b", 2.0)], 2, warm_up=1, clock=lambda: clock["a"])
    assert done == ["a", "b", "b", "a", "a", "b"]
    assert np.array_equal(times, [[1, 2], [1, 2]])


def test_rows_are_written_and_shown_with_the_peers_version(tmp_path, capsys):
    rows = [row("sort", 2.0, 6.0, peer="numpy", version="2.1", unit="ms") | {"items": 5}]
    finish("pkg", rows, tmp_path / "new" / "folder", threads=1)
    written = json.loads((tmp_path / "new" / "folder" / "bench.json").read_text())
    assert written["package"] == "pkg"
    assert written["rows"] == rows
    assert written["machine"]["threads"] == 1
    shown = capsys.readouterr().out
    assert "numpy 2.1" in shown
    assert "3" in shown
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be made"):
        finish("pkg", rows, tmp_path / "file" / "x")
