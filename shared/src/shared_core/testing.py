"""What the packages' own tests have in common; needs the packages' `test` extra."""

import re
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest
    import typer


def check_annotations(package: str, *, int_for_float: bool = False) -> None:
    """Check shapes and types that a package's annotations state, in every call while tests run.

    Call it before anything imports the package.

    Args:
        package: Import name.
        int_for_float: Whether an int may stand for a float (PEP 484's numeric tower).
    """
    from beartype import BeartypeConf, beartype
    from jaxtyping import install_import_hook

    if not int_for_float:
        install_import_hook(package, "beartype.beartype")
        return
    checker: Any = types.ModuleType(f"{package}_type_checker")  # the hook wants a name to import
    checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))
    sys.modules[checker.__name__] = checker
    install_import_hook(package, f"{checker.__name__}.check")


def hypothesis_profile(max_examples: int = 25, *, slow_data: bool = False) -> None:
    """Use the same examples in every run, and no deadline: machines that run the tests are slow at times.

    Args:
        max_examples: Examples of a law.
        slow_data: Whether making an example may take long.
    """
    from hypothesis import HealthCheck, settings

    skipped = [HealthCheck.too_slow] if slow_data else []
    settings.register_profile(
        "house", deadline=None, max_examples=max_examples, derandomize=True, suppress_health_check=skipped
    )
    settings.load_profile("house")


def ignore_torchao_docstrings(config: "pytest.Config") -> None:
    """Ignore the warnings that Python gives when it first compiles torchao 0.18, which transformers imports.

    Its docstrings have unescaped backslashes. May go when torchao has none.
    """
    for category in ("DeprecationWarning", "SyntaxWarning"):  # the latter from Python 3.12 on
        config.addinivalue_line("filterwarnings", f"ignore:.*invalid escape sequence:{category}")


def exit_code(app: "typer.Typer", *arguments: object) -> int:
    """Run a command in this process as `shared_core.command.run` does, and return its exit code."""
    from shared_core import command

    try:
        command.run(app, [str(argument) for argument in arguments])
    except SystemExit as ended:
        if not isinstance(ended.code, int):
            raise
        return ended.code


def fenced_blocks(text: str, language: str) -> list[str]:
    """Return the fenced code blocks of a language in a Markdown text."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run_block(block: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run an example of a README, and return its names; `names` are those that an earlier one left."""
    session: dict[str, Any] = {"__name__": "readme"} if names is None else names
    exec(compile(block, "README.md", "exec"), session)
    return session


def check_docstring_examples(module: str) -> None:
    """Run the examples in a module's docstrings, of which there must be some."""
    import doctest
    import importlib

    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0, f"{module} has no example"
    assert results.failed == 0


def check_command_lines(app: "typer.Typer", lines: "list[str]") -> set[str]:
    """Check that commands in lines of a README have the options that they are given; return their names.

    Args:
        app: The package's app.
        lines: ``"repqvit quantize --model timm/NAME ..."``.
    """
    import typer.main

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in lines:
        _, name, *rest = line.split("#")[0].split()
        known = {option for parameter in commands[name].params for option in parameter.opts}
        given = {word.partition("=")[0] for word in rest if re.match(r"--[a-z]", word)}
        assert given <= known | {"--debug"}, f"{name} has no {', '.join(sorted(given - known))}"
    return {line.split()[1] for line in lines}


def check_public_names(package: str) -> None:
    """Check that each name of `__all__` is there once, and that another one is refused as by any module."""
    import importlib

    module = importlib.import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(module.__all__) <= set(dir(module))
    assert not hasattr(module, "nothing"), "a name that is not there is found"
