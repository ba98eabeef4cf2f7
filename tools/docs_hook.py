"""What mkdocs calls while it builds the site: see mkdocs.yml and tools/docs_text.py."""

from __future__ import annotations

import html
import re
from typing import Any

# Installed by `make docs` into an environment of its own, where no type checker looks.
from latex2mathml.converter import convert  # pyright: ignore[reportMissingImports]

from tools import docs_text

_EQUATION = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((.+?)\\\)|\\\[(.+?)\\\])</\1>',
    re.S,
)
_REFERENCE = re.compile(r'<autoref\b[^>]*\bidentifier="([^"]*)"[^>]*>(.*?)</autoref>', re.S)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replaces what the page asks for from elsewhere in the repository."""
    return docs_text.expand(markdown, page.file.src_uri)


def on_page_content(content: str, **_: Any) -> str:
    """Writes equations as MathML, which needs no script, and leaves code in docstrings alone.

    Two pairs of brackets in a docstring, as in ``weights[0, 1][2, 3]``, look like a cross-reference.
    """

    def equation(match: re.Match[str]) -> str:
        block = match[1] == "div"
        formula = convert(html.unescape(match[2] or match[3]), display="block" if block else "inline")
        return f'<div class="equation">{formula}</div>' if block else formula

    def reference(match: re.Match[str]) -> str:
        is_name = re.fullmatch(r"[\w.-]+", html.unescape(match[1]))
        return match[0] if is_name else f"[{match[2]}][{match[1]}]"

    return _REFERENCE.sub(reference, _EQUATION.sub(equation, content))
