"""What the packages' tests have in common does what it says."""

import sys

import pytest
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


README = """
```python
number = 5
```
text
```sh
tool work --size 3
```
```python
number += 1
```
"""


def test_blocks_of_a_language_run_as_one_session():
    blocks = testing.fenced_blocks(README, "python")
    session = None
    for block in blocks:
        session = testing.run_block(block, session)
    assert session is not None
    assert session["number"] == 6
    assert testing.fenced_blocks(README, "sh") == ["tool work --size 3\n"]
    with pytest.raises(NameError):
        testing.run_block(blocks[1])


def test_options_that_a_readme_names_must_exist():
    app = typer.Typer()

    @app.command()
    def work(size: int = 1) -> None:
        pass

    @app.command()
    def other() -> None:
        pass

    assert testing.check_command_lines(app, ["tool work --size=3", "tool other --debug  # --none"]) == {
        "work",
        "other",
    }
    with pytest.raises(AssertionError, match="work has no --weight"):
        testing.check_command_lines(app, ["tool work --weight 3"])
    with pytest.raises(KeyError):
        testing.check_command_lines(app, ["tool gone"])


def test_docstring_examples_and_public_names(tmp_path, monkeypatch):
    for name, text in (
        ("good_example", '"""\n>>> 1\n1\n"""\n__all__ = ["one"]\none = 1\n'),
        ("bad_example", '"""\n>>> 1\n2\n"""\n__all__ = ["one", "one"]\none = 1\n'),
        ("no_example", '__all__ = ["two"]\n'),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    testing.check_docstring_examples("good_example")
    testing.check_public_names("good_example")
    for name in ("bad_example", "no_example"):
        with pytest.raises(AssertionError):
            testing.check_docstring_examples(name)
    with pytest.raises(AssertionError):
        testing.check_public_names("bad_example")
    with pytest.raises(AttributeError):
        testing.check_public_names("no_example")
