"""What a user names as ``module:attribute``: their own model, extractor, workload."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from shared_core.errors import InputError


def imported(name: str, field: str) -> Any:
    """Return what a user names, from a module that is installed or in the current folder.

    Args:
        name: ``module:attribute``; both may have dots.
        field: The option or argument that names it, for errors.

    Raises:
        InputError: There is no such module or attribute, or the module cannot be imported.

    >>> imported("os:path.basename", "model")("a/b")
    'b'
    """
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it, and an installed command has not
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"needs a module {error.name}", field=field, value=name) from error
        raise InputError("there is no such module here", field=field, value=name) from error
    except Exception as error:  # whatever the user's module raises
        raise InputError(f"cannot be imported: {in_one_line(error)}", field=field, value=name) from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise InputError(f"the module has no {attribute}", field=field, value=name) from error
    return found


def made(name: str, field: str, /, *arguments: Any, **options: Any) -> Any:
    """Return what comes of a call of what a user names.

    Args:
        name: ``module:callable``.
        field: The option or argument that names it, for errors.
        arguments: Of the call.
        options: Of the call.

    Raises:
        InputError: As `imported`, or the call fails.
    """
    make = imported(name, field)
    try:
        return make(*arguments, **options)
    except InputError:
        raise
    except Exception as error:  # whatever the user's function raises
        given = [*(type(argument).__name__ for argument in arguments), *options]
        how = f"with {', '.join(given)}" if given else "without arguments"
        message = f"cannot be made by a call {how}: {in_one_line(error)}"
        raise InputError(message, field=field, value=name) from error


def in_one_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
