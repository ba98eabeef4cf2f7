"""Names of a package that import their module when they are first asked for (PEP 562)."""

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, home: Mapping[str, str], modules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__`, so that importing it costs nothing.

    Args:
        package: The package's `__name__`.
        home: Public name -> module of the package that has it.
        modules: Modules that are names of the package themselves.

    >>> get, names = lazy_names("json", {"JSONDecoder": "decoder"}, ["tool"])
    >>> get("JSONDecoder").__module__, get("tool").__name__, "JSONDecoder" in names()
    ('json.decoder', 'json.tool', True)
    """

    def get(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home, *modules})

    return get, names
