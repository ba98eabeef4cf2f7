"""Sentences begin and end where a reader says they do."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relattn import sentences as module
from relattn.sentences import sentence_spans, sentences

# After the "golden rules" that splitters are compared on, and sentences from news and papers.
KNOWN = [
    ["Hello World.", "My name is Jonas."],
    ["What is your name?", "My name is Jonas."],
    ["There it is!", "I found it."],
    ["My name is Jonas E. Smith."],
    ["Please turn to p. 55."],
    ["Were Jane and co. at the party?"],
    ["They closed the deal with Pitt, Briggs & Co. at noon."],
    ["St. Michael's Church is on 5th st. near the light."],
    ["That is JFK Jr.'s book."],
    ["I visited the U.S.A. last year."],
    ["I live in the E.U.", "How about you?"],
    ["I work for the U.S. Government in Virginia."],
    ["She has $100.00 in her bag."],
    ["She has $100.00.", "It is in her bag."],
    ['She turned to him, "This is great." she said.'],
    ['He asked "Why?"', "Nobody knew."],
    ["Hello!!", "Long time no see."],
    ["Thoughts and opinions...", "They differ."],
    ["We follow Smith et al. (2019) in Sec. 3.2 here.", "See Fig. 2 for details."],
    ["The F1 is 0.85, i.e. better than before.", "Eq. 5 shows why."],
    ["He said no.", "Then he left."],
    ["It ended at 5 p.m.", "The crowd went home."],
    ["Acme Inc. bought it.", "Prices rose."],
    ["これは文です。", "次の文です。"],
]


@pytest.mark.parametrize("expected", KNOWN, ids=lambda s: s[0][:30])
def test_known_texts_split_where_expected(expected):
    joint = "" if expected[0].endswith("。") else " "
    assert sentences(joint.join(expected)) == expected


def test_an_empty_line_ends_a_sentence_and_a_line_break_does_not():
    assert sentences("A headline\n\nThe text goes\non here. End") == [
        "A headline",
        "The text goes\non here.",
        "End",
    ]


@given(st.text(alphabet="aB.! ?\n\"'1", max_size=60))
def test_every_character_that_is_not_white_space_lies_in_one_sentence(text):
    spans = sentence_spans(text)
    covered = [place for begin, end in spans for place in range(begin, end)]
    assert covered == sorted(set(covered))
    assert {n for n, c in enumerate(text) if not c.isspace()} <= set(covered)
    assert all(text[begin:end] == text[begin:end].strip() != "" for begin, end in spans)


def test_docstring_examples():
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0
