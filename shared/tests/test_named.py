import re
import sys

import pytest

from shared_core import InputError, named


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


def test_a_module_of_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "of_the_user.py").write_text(
        "class Kit:\n    @staticmethod\n    def make(a, b=1):\n        return a, b\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    assert named.imported("of_the_user:Kit.make", "model")(1) == (1, 1)
    assert named.made("of_the_user:Kit.make", "model", 2, b=3) == (2, 3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("not_here_at_all:make", "model: there is no such module here (got 'not_here_at_all:make')"),
        ("not_here.at_all:make", "model: there is no such module here"),
        ("json:nothing", "model: the module has no nothing"),
        ("json:decoder.nothing", "model: the module has no decoder.nothing"),
        ("wants:make", "model: needs a module not_here_either"),
        ("broken:make", "model: cannot be imported: ZeroDivisionError: division by zero"),
        ("json:loads", "model: cannot be made by a call without arguments: TypeError: "),
        ("refuses:make", "too small"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line(name, words, tmp_path, monkeypatch):
    (tmp_path / "wants.py").write_text("import not_here_either\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "refuses.py").write_text(
        "from shared_core import InputError\n\ndef make():\n    raise InputError('too small')\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        named.made(name, "model")
    assert "\n" not in str(caught.value)


def test_a_failing_call_names_what_it_was_given():
    with pytest.raises(InputError, match="by a call with int, device: TypeError"):
        named.made("json:loads", "model", 1, device="cpu")
