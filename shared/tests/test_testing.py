"""What the packages' tests have in common does what it says."""

import sys

import typer

from shared_core import InputError, testing


def test_an_exit_code_is_the_commands():
    app = typer.Typer()

    @app.command()
    def main(number: int) -> int:
        if number < 0:
            raise InputError("expected 0 or more", field="number", value=number)
        return number

    assert testing.exit_code(app, 0) == 0
    assert testing.exit_code(app, 1) == 1
    assert testing.exit_code(app, "--", -1) == 2


def test_annotations_of_a_package_are_checked(tmp_path, monkeypatch):
    import pytest

    for name, tower in (("strict_example", False), ("tower_example", True)):
        (tmp_path / f"{name}.py").write_text("def half(x: float) -> float:\n    return x / 2\n")
        monkeypatch.syspath_prepend(tmp_path)
        testing.check_annotations(name, int_for_float=tower)
        half = __import__(name).half
        monkeypatch.delitem(sys.modules, name)
        assert half(1.0) == 0.5
        with pytest.raises(Exception, match="half"):
            half("one")
        if tower:
            assert half(1) == 0.5
        else:
            with pytest.raises(Exception, match="half"):
                half(1)
