"""What the documentation site takes from elsewhere in the repository, as text; standard library only.

A page under docs/ asks for it by a comment on a line of its own:

- ``<!-- readme NAME: Proof | Limits -->`` the README sections of package NAME (``.`` for the root's) whose
  headings begin with one of these words,
- ``<!-- readme NAME except: Install | Citation -->`` all other sections of that README,
- ``<!-- api NAME -->`` the public names of the package, rendered from its source by mkdocstrings,
- ``<!-- file PATH -->`` a whole Markdown file of the repository,
- ``<!-- changelogs -->`` the changelog of every member.

So figures and tested examples stand once, in the READMEs.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from tools import workspace
from tools.workspace import Member, WorkspaceError

DIRECTIVE = re.compile(r"^<!-- (readme|api|file|changelogs)(?: (\S.*?))? -->$", re.M)
_FENCE = re.compile(r"^ *(```+|~~~+)")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
_LIST = re.compile(r"^ {0,3}(?:[-*+]|\d+\.) ")


class DocsError(WorkspaceError):
    """A page asks for something that is not there; the message names the page's request."""


def expand(text: str, page: str, root: Path = workspace.ROOT) -> str:
    """The text of ``page`` (its path below docs/) with every request replaced by what it asks for."""
    return DIRECTIVE.sub(lambda match: _answer(match[1], match[2], page, root), text)


def _answer(what: str, argument: str, page: str, root: Path) -> str:
    if what == "api":
        return api(workspace.packages(root, argument)[0])
    if what == "changelogs":
        return changelogs(root)
    if what == "file":
        file = root / argument
        if not file.is_file():
            raise DocsError(f"docs/{page}: there is no file {argument}")
        return adapted(file.read_text(encoding="utf-8"), posixpath.dirname(argument), page, root)
    head, found, listed = argument.partition(":")
    name, _, condition = head.strip().partition(" ")
    if not found or condition not in ("", "except") or not name:
        raise DocsError(f"docs/{page}: not understood: {what} {argument}")
    folder = root if name == "." else workspace.packages(root, name)[0].folder
    wanted = [word.strip().lower() for word in listed.split("|")]
    parts = sections((folder / "README.md").read_text(encoding="utf-8"))
    named = [heading for heading in parts if heading.lower().startswith(tuple(wanted))]
    kept = [heading for heading in parts if (heading in named) != (condition == "except")]
    if not kept:
        raise DocsError(f"docs/{page}: {folder.name}/README.md has no section named {listed.strip()}")
    text = "\n\n".join(f"## {heading}\n\n{parts[heading]}" for heading in kept)
    return adapted(text, folder.relative_to(root).as_posix(), page, root)


def _outside_code(text: str, change: Callable[[list[str], str], None]) -> list[str]:
    """The lines that ``change`` appends for each line outside fenced code, and those inside as they are."""
    lines: list[str] = []
    fence = ""
    for line in text.splitlines():
        mark = _FENCE.match(line)
        if fence or mark:
            lines.append(line)
            if mark and not fence:
                fence = mark[1]
            elif mark and line.strip() == fence:
                fence = ""
        else:
            change(lines, line)
    return lines


def sections(readme: str) -> dict[str, str]:
    """The second-level sections of a README by heading; what stands before the first is left out."""
    found: dict[str, str] = {}
    marked = _outside_code(readme, lambda lines, line: lines.append(re.sub(r"^## ", "\0", line)))
    for part in "\n".join(marked).split("\0")[1:]:
        heading, _, body = part.partition("\n")
        found[heading.strip()] = body.strip()
    return found


def adapted(text: str, folder: str, page: str, root: Path = workspace.ROOT) -> str:
    """Markdown of the repository's ``folder`` as ``page`` of the site needs it.

    Links to what the site shows lead there, other links within the repository become their text, and lists
    and tables get the empty line before them that Python-Markdown asks for and GitHub does not.
    """
    site = places(root)

    def link(match: re.Match[str]) -> str:
        label, target = match[1], match[2]
        if target.startswith(("http://", "https://", "mailto:", "#")):
            return match[0]
        shown = site.get(posixpath.normpath(posixpath.join(folder, target.partition("#")[0])))
        return f"[{label}]({posixpath.relpath(shown, posixpath.dirname(page) or '.')})" if shown else label

    def change(lines: list[str], line: str) -> None:
        before = lines[-1] if lines else ""
        starts_list = _LIST.match(line) and not _LIST.match(before) and not before.startswith(" ")
        starts_table = line.startswith("|") and not before.startswith("|")
        if before.strip() and (starts_list or starts_table):
            lines.append("")
        lines.append(_LINK.sub(link, line))

    return "\n".join(_outside_code(text, change))


def places(root: Path = workspace.ROOT) -> dict[str, str]:
    """What of the repository the site shows: its path, and the page below docs/."""
    shown = {f"packages/{member.name}": f"methods/{member.name}.md" for member in workspace.packages(root)}
    for page in sorted((root / "docs").rglob("*.md")):
        for what, argument in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            if what == "file":
                shown[argument] = page.relative_to(root / "docs").as_posix()
    return shown


def public_names(member: Member) -> list[str]:
    """The names in ``__all__`` of the package's ``__init__``, read from its source."""
    file = member.folder / "src" / member.import_name / "__init__.py"
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and [ast.unparse(one) for one in statement.targets] == [
            "__all__"
        ]:
            return list(ast.literal_eval(statement.value))
    raise DocsError(f"{file}: no list __all__ of public names")


def api(member: Member) -> str:
    """The requests to mkdocstrings for every public name of the package."""
    return "\n\n".join(f"::: {member.import_name}.{name}" for name in public_names(member))


def changelogs(root: Path = workspace.ROOT) -> str:
    """The changelogs of all members that have one, each below its distribution's name."""
    texts = []
    for member in workspace.members(root):
        file = member.folder / "CHANGELOG.md"
        if file.is_file():
            body = re.sub(r"^# .*\n+", "", file.read_text(encoding="utf-8"))
            body = re.sub(r"^#", "##", body, flags=re.M)
            texts.append(
                f"## {member.distribution}\n\n{adapted(body, str(member.folder.relative_to(root)), '', root)}"
            )
    return "\n\n".join(texts)
