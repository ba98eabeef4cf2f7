import json
import math
import os
import random
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_core import InputError
from shared_core.files import atomic_path, check_no_run, check_writable, write_bytes, write_json, write_text


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_half_way_the_previous_file_is_whole(tmp_path):
    target = tmp_path / "a.bin"
    write_bytes(target, b"old" * 1000)
    code = """
import sys, time
from shared_core.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    with open(temporary, "wb") as file:
        file.write(b"new" * 500)
        file.flush()
        print("half", flush=True)
        time.sleep(60)
"""
    with start(code, target) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        writer.send_signal(signal.SIGKILL)
    assert target.read_bytes() == b"old" * 1000


def test_killed_at_any_moment_the_file_is_one_version_or_the_other(tmp_path):
    target = tmp_path / "a.bin"
    versions = {letter * 1_000_000 for letter in (b"a", b"b")}
    code = """
import sys
from shared_core.files import write_bytes
write_bytes(sys.argv[1], b"a" * 1_000_000)
print("ready", flush=True)
while True:
    for letter in (b"b", b"a"):
        write_bytes(sys.argv[1], letter * 1_000_000)
"""
    moments = random.Random(0)
    for _ in range(5):
        with start(code, target) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0, 0.05))
            writer.send_signal(signal.SIGKILL)
        assert target.read_bytes() in versions


def test_an_exception_leaves_the_target_and_no_temporary_file(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def write_half_and_stop():
        with atomic_path(target) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half_and_stop()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_bytes_are_on_disk_before_the_name_changes(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: (calls.append(name), real(*given)))
    write_text(tmp_path / "a.txt", "x")
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_that_open_would_give(tmp_path, umask):
    code = """
import os, sys
from shared_core.files import write_text
os.umask(int(sys.argv[2]))
write_text(sys.argv[1] + "/ours", "")
open(sys.argv[1] + "/theirs", "w").close()
"""
    with start(code, tmp_path, umask) as child:
        _, errors = child.communicate()
    assert child.returncode == 0, errors
    ours, theirs = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "theirs"))
    assert ours == theirs == 0o666 & ~umask


def test_a_replaced_file_keeps_its_permissions_also_when_the_writer_makes_its_own_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    target.chmod(0o640)
    with atomic_path(target) as temporary:
        temporary.unlink()
        temporary.write_text("new")
    assert (target.read_text(), stat.S_IMODE(target.stat().st_mode)) == ("new", 0o640)


def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "real.txt", tmp_path / "link.txt"
    link.symlink_to(real)
    for text in ("through a dangling link", "again"):
        write_text(link, text)
        assert link.is_symlink()
        assert real.read_text() == text


def test_the_temporary_file_lies_beside_the_target_with_its_suffix(tmp_path):
    with atomic_path(tmp_path / "weights.safetensors") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".safetensors"


@pytest.mark.parametrize("length", [1, 251])  # 255 bytes with the suffix is the most a file name may have
def test_names_of_any_length(tmp_path, length):
    write_text(tmp_path / ("n" * length + ".txt"), "x")
    assert len(os.listdir(tmp_path)) == 1


def test_bad_places_are_input_errors_that_name_the_target(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"missing/a\.txt: cannot be written: there is no folder .*missing"):
        write_text(tmp_path / "missing" / "a.txt", "")
    with pytest.raises(InputError, match=r"file/a\.txt: cannot be written: .*file is not a folder"):
        write_text(tmp_path / "file" / "a.txt", "")
    with pytest.raises(InputError, match="is a folder, expected the name of a file"):
        write_text(tmp_path, "")


def test_what_cannot_be_written_is_told_beforehand_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "missing" / "a.txt", tmp_path / "file" / "a.txt", tmp_path):
        with pytest.raises(InputError, match=r"no folder|not a folder|is a folder"):
            check_writable(place)
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new.txt")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]


def test_an_unwritable_folder_is_an_input_error(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    for parent in (tmp_path, *tmp_path.parents):  # let another user reach the folder
        if parent.owner() == folder.owner() and parent != parent.parent:
            parent.chmod(parent.stat().st_mode | 0o011)
    code = """
import os, sys
from shared_core import InputError
from shared_core.files import write_text
if os.geteuid() == 0:
    os.setuid(65534)  # to root no folder is closed
try:
    write_text(sys.argv[1] + "/a.txt", "")
except InputError as error:
    print(error)
"""
    with start(code, folder) as child:
        output, errors = child.communicate()
    assert "a.txt: cannot be written: Permission denied in" in output, errors


@given(st.binary())
def test_bytes_come_back(tmp_path_factory, data):
    target = tmp_path_factory.mktemp("bytes") / "a"
    write_bytes(target, data)
    assert target.read_bytes() == data


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(json_values)
def test_json_comes_back(tmp_path_factory, value):
    target = tmp_path_factory.mktemp("json") / "a.json"
    write_json(target, value)
    assert json.loads(target.read_text(encoding="utf-8")) == value


def test_json_keeps_the_order_and_takes_numpy(tmp_path):
    write_json(tmp_path / "a.json", {"b": np.float32(0.5), "a": np.arange(2), "c": (np.int64(3), True)})
    assert (tmp_path / "a.json").read_text() == json.dumps(
        {"b": 0.5, "a": [0, 1], "c": [3, True]}, indent=2
    ) + "\n"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan"), np.array(np.inf)])
def test_json_refuses_what_is_not_finite_and_says_where(tmp_path, bad):
    target = tmp_path / "a.json"
    write_json(target, 1)
    with pytest.raises(ValueError, match=r"\$\.methods\.ours\[1\] is (nan|inf|-inf), which JSON cannot hold"):
        write_json(target, {"methods": {"ours": [0.5, bad]}})
    assert target.read_text() == "1\n"


def test_json_refuses_what_has_no_form(tmp_path):
    with pytest.raises(TypeError, match="complex has no JSON form"):
        write_json(tmp_path / "a.json", {"z": 1j})
    assert os.listdir(tmp_path) == []


def test_a_folder_that_holds_a_run_takes_no_other(tmp_path):
    file = tmp_path / "run" / "checkpoint.safetensors"
    check_no_run(file, resume=False)
    check_no_run(file, resume=True)
    file.parent.mkdir()
    file.touch()
    check_no_run(file, resume=True)
    with pytest.raises(InputError, match="run: holds a run already; --resume goes on"):
        check_no_run(file, resume=False)
