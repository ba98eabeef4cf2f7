import pytest

from shared_core import InputError
from shared_core.datasets import wikipedia_introductions


def test_the_english_articles_are_those_of_the_package():
    rows = wikipedia_introductions()
    assert rows.column_names == ["title", "extract", "description", "topic"]
    assert len(set(rows["extract"])) == len(rows) == 10_033
    assert sum(bool(text) for text in rows["description"]) == 9_862
    assert rows[1]["title"] == "2001: A Space Odyssey"
    assert rows[1]["extract"].startswith("2001: A Space Odyssey is a 1968 epic")
    assert len(set(rows["topic"])) == 12


def test_other_languages_and_no_other():
    assert len(wikipedia_introductions("fr")) == 9_955
    assert len(wikipedia_introductions("es")) == 6_239
    with pytest.raises(InputError, match=r"language: expected one of en, fr, es \(got 'de'\)"):
        wikipedia_introductions("de")
