"""What the packages' own tests have in common; needs the packages' `test` extra."""

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
