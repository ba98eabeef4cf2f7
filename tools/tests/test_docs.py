"""The site has every package, and everything that its pages ask for is there; mkdocs itself is not needed."""

import re
import textwrap
from pathlib import Path

import pytest

from tools import docs_text, workspace
from tools.docs_text import DocsError

ROOT = workspace.ROOT
PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
NAV = re.findall(r": (\S+\.md)$|- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2], re.M)
LISTED = [titled or plain for titled, plain in NAV]


@pytest.mark.parametrize("folder", ["methods", "tutorials"])
def test_the_nav_has_a_page_of_every_package(folder: str) -> None:
    pages = {Path(page).stem for page in LISTED if page.startswith(f"{folder}/")}
    assert {member.name for member in workspace.packages()} <= pages


def test_the_nav_and_the_pages_are_the_same() -> None:
    assert sorted(LISTED) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_everything_that_a_page_asks_for_is_there(page: str) -> None:
    text = docs_text.expand((ROOT / "docs" / page).read_text(), page)
    assert "<!-- readme" not in re.sub(r"^ .*$", "", text, flags=re.M), "a request that was not understood"
    assert len(text) > 300


@pytest.mark.parametrize("member", workspace.packages(), ids=lambda member: member.name)
def test_a_method_page_gives_the_figures_of_its_readme_and_the_public_names(
    member: workspace.Member,
) -> None:
    page = f"methods/{member.name}.md"
    source = (ROOT / "docs" / page).read_text()
    assert re.search(rf"^<!-- readme {member.name}:.*\b([Pp]roof|What was measured)\b", source, re.M)
    text = docs_text.expand(source, page)
    for name in docs_text.public_names(member):
        assert f"\n::: {member.import_name}.{name}\n" in f"{text}\n"


README = textwrap.dedent("""\
    # one
    Intro.
    ## First part
    See [the notes](docs/notes.md), [two](../two#x), [the web](https://example.org) and ![a](b.png).
    - an item
    | a | b |
    | --- | --- |
    ```sh
    ## no heading
    - no list [x](y)
    ```
    ## Second, honestly
    Text.
    """)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    for name in ("one", "two"):
        code = tmp_path / "packages" / name / "src" / name
        code.mkdir(parents=True)
        (code / "__init__.py").write_text('__all__ = ["b", "a"]\n')
        (tmp_path / "packages" / name / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
        (tmp_path / "packages" / name / "README.md").write_text(README)
    (tmp_path / "docs").mkdir()
    return tmp_path


def test_sections_are_told_from_code() -> None:
    assert list(docs_text.sections(README)) == ["First part", "Second, honestly"]
    assert "## no heading" in docs_text.sections(README)["First part"]


def test_links_lead_within_the_site_or_become_text_and_code_stays(root: Path) -> None:
    text = docs_text.expand("<!-- readme one: first -->", "tutorials/one.md", root)
    assert text == textwrap.dedent("""\
        ## First part

        See the notes, [two](../methods/two.md), [the web](https://example.org) and ![a](b.png).

        - an item

        | a | b |
        | --- | --- |
        ```sh
        ## no heading
        - no list [x](y)
        ```""")


def test_a_file_that_a_page_shows_is_linked(root: Path) -> None:
    (root / "packages" / "one" / "docs").mkdir()
    (root / "packages" / "one" / "docs" / "notes.md").write_text("# Notes\n")
    (root / "docs" / "notes.md").write_text("<!-- file packages/one/docs/notes.md -->\n")
    text = docs_text.expand("<!-- readme one except: Second -->", "methods/one.md", root)
    assert "[the notes](../notes.md)" in text
    assert docs_text.expand("<!-- file packages/one/docs/notes.md -->", "notes.md", root) == "# Notes"


def test_sections_in_and_except(root: Path) -> None:
    def headings(request: str) -> list[str]:
        return re.findall("^## (.*)$", docs_text.expand(request, "x.md", root), re.M)[:1]

    assert headings("<!-- readme one: Second | Third -->") == ["Second, honestly"]
    assert headings("<!-- readme one except: First | Third -->") == ["Second, honestly"]


def test_api_asks_for_each_public_name_in_order(root: Path) -> None:
    assert docs_text.expand("<!-- api one -->", "x.md", root) == "::: one.b\n\n::: one.a"


def test_what_is_not_there_is_named(root: Path) -> None:
    with pytest.raises(DocsError, match=r"docs/x\.md: one/README\.md has no section named Proof"):
        docs_text.expand("<!-- readme one: Proof -->", "x.md", root)
    with pytest.raises(DocsError, match=r"docs/x\.md: there is no file NO\.md"):
        docs_text.expand("<!-- file NO.md -->", "x.md", root)
    with pytest.raises(DocsError, match=r"docs/x\.md: not understood: readme one"):
        docs_text.expand("<!-- readme one -->", "x.md", root)


def test_changelogs_stand_below_their_packages(root: Path) -> None:
    (root / "packages" / "two" / "CHANGELOG.md").write_text("# Changes of two\n\n## 0.1.0\n\n- first\n")
    assert docs_text.changelogs(root) == "## two\n\n### 0.1.0\n\n- first"
