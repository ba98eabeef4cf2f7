"""The picture of relevance holds the whole text, the right colours, and nothing from elsewhere."""

import html
import io
import json
import re

import pytest
import torch
from rich.console import Console

from relattn.explain import explain, shades, to_html, to_json, to_terminal
from relattn.results import RelevanceResult

DOCUMENT = "Cats sleep. Dogs <b>bark</b> & run."


@pytest.fixture
def explanation():
    offsets = ((0, 0), (0, 4), (4, 10), (10, 11), (11, 16), (16, 28), (28, 30), (30, 34), (34, 35), (0, 0))
    a_rel = torch.tensor([0.0, 0.02, 0.02, 0.0, 0.5, 0.25, 0.05, 0.1, 0.06, 0.0])
    tokens = tuple(DOCUMENT[a:b] or "</s>" for a, b in offsets)
    result = RelevanceResult(a_rel, a_rel, tokens, offsets, 4.0, ("dogs",), ("look & see",))
    return explain(DOCUMENT, result, summary="Dogs <bark>.", title="dogs & cats")


def test_the_page_holds_the_text_unchanged_and_escaped(explanation):
    page = to_html(explanation)
    (source,) = re.findall(r'<p class="source">(.*?)</p>\n', page, re.DOTALL)
    assert html.unescape(re.sub(r"</?span[^>]*>", "", source)) == DOCUMENT
    assert "<b>" not in page
    for text in ("look &amp; see", "Dogs &lt;bark&gt;.", "<title>dogs &amp; cats</title>"):
        assert text in page


def test_the_page_needs_nothing_from_elsewhere(explanation):
    page = to_html(explanation)
    assert not re.search(r"https?:|src=|<link|<script|@import|url\(", page)
    assert page.startswith("<!doctype html>")


def test_colour_grows_with_relevance_and_the_most_relevant_is_full(explanation):
    pieces = shades(explanation)
    assert [(DOCUMENT[b:e], round(s, 3)) for b, e, _, s in pieces if s > 0.15] == [
        ("Dogs", 1.0), ("<b>bark</b>", 0.5), ("run", 0.2),
    ]  # fmt: skip
    assert 'style="--s:1.000" title="50.00%">Dogs<' in to_html(explanation)


def test_pieces_that_share_a_character_are_joined():
    offsets = ((0, 1), (0, 1), (1, 3))  # two byte tokens of one character
    a_rel = torch.tensor([0.2, 0.3, 0.5])
    result = RelevanceResult(a_rel, a_rel, ("é", "é", "at"), offsets, 2.0, ("x",), ())
    found = shades(explain("éat", result))
    assert [(b, e) for b, e, _, _ in found] == [(0, 1), (1, 3)]
    assert [a for _, _, a, _ in found] == pytest.approx([0.5, 0.5])


def test_the_terminal_shows_shares_also_without_colour(explanation):
    plain = io.StringIO()
    Console(file=plain, width=100, color_system=None).print(to_terminal(explanation))
    text = plain.getvalue()
    assert DOCUMENT in text
    lines = [line for line in text.splitlines() if "%" in line]
    assert lines[0].startswith("96.0%")
    assert "Dogs <b>bark</b> & run." in lines[0]
    assert lines[1].startswith("4.0%")
    assert "warning: look & see" in text
    assert "summary: Dogs <bark>." in text
    colour = io.StringIO()
    Console(file=colour, width=100, color_system="truecolor", force_terminal=True).print(
        to_terminal(explanation)
    )
    assert "48;2;249;115;22" in colour.getvalue()  # the most relevant word's background


def test_a_terminal_gets_no_control_characters_from_a_text_and_colours_stay_on_their_words():
    document = "Cats\x07\x08\x0b\x0c\r\x1b[2J\x7f\x9b3m sleep.\nDogs\tbark."
    begin = document.index("Dogs")
    a_rel = torch.tensor([0.1, 0.9])
    offsets = ((0, 4), (begin, begin + 4))
    result = RelevanceResult(a_rel, a_rel, ("Cats", "Dogs"), offsets, 1.2, ("do\x1bgs",), ("a\x1b[2Jb",))
    shown = to_terminal(explain(document, result, summary="Dogs\x1b[2J."))
    colour = io.StringIO()
    Console(file=colour, width=100, color_system="truecolor", force_terminal=True).print(shown)
    assert "48;2;249;115;22mDogs\x1b[0m" in colour.getvalue()  # the whole word, and no more
    plain = io.StringIO()
    Console(file=plain, width=100, color_system=None).print(shown)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", plain.getvalue())
    assert plain.getvalue().startswith("Cats      ")


def test_the_numbers_add_up(explanation):
    found = json.loads(to_json(explanation))
    assert sum(t["a_rel"] for t in found["tokens"]) == pytest.approx(1.0)
    assert sum(s["mass"] for s in found["sentences"]) == pytest.approx(1.0)
    assert found["control"] == ["dogs"]
    assert all(DOCUMENT[t["begin"] : t["end"]] == t["text"] for t in found["tokens"])


def test_the_part_behind_the_length_limit_is_marked_as_lost():
    a_rel = torch.tensor([0.9, 0.1])
    result = RelevanceResult(a_rel, a_rel, ("One", " two"), ((0, 3), (3, 7)), 1.2, ("x",), ())
    page = to_html(explain("One two. Three & four.", result))
    assert '<span class="lost" title="behind the length limit">. Three &amp; four.</span>' in page
    assert "lost" not in to_html(explain("One two", result)).partition("<body>")[2]
