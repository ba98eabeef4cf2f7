"""Classes of types: by a list, by frequency, by part of speech, by a table."""

import numpy as np
import pytest
import tiny_encoders

from isocse import types
from isocse.types import CLASSES, Kind, classify, kinds_of_words
from shared_core import InputError


def names(numbers):
    return [CLASSES[number] for number in numbers]


def test_word_pieces_are_excluded_in_each_vocabulary():
    wordpiece = tiny_encoders.wordpiece()
    kinds = types.kinds_of_tokenizer(wordpiece, range(len(wordpiece)))
    pieces = [kind for kind in kinds if kind.token.startswith("##") and kind.text.isalpha()]
    assert pieces
    assert set(types.stopwords(pieces)) == {"subword"}
    byte = tiny_encoders.byte_pairs()
    kinds = {kind.token: kind for kind in types.kinds_of_tokenizer(byte, range(len(byte)))}
    assert (kinds["Ġriver"].text, kinds["Ġriver"].whole) == ("river", True)
    assert not kinds["r"].whole
    assert kinds["<|end|>"].special
    assert types.stopwords([kinds["."], kinds["Ġthe"], kinds["Ġriver"]]) == [
        "functional", "functional", "semantic",
    ]  # fmt: skip


def test_words_are_the_same_for_every_tokenizer():
    text = "It's the river’s 5% (x)."
    assert [text[a:b] for a, b in types.word_spans(text)] == [
        "It's", "the", "river’s", "5", "%", "(", "x", ")", ".",
    ]  # fmt: skip


def test_frequency_takes_the_most_frequent_words():
    kinds = kinds_of_words(["the", "river", "anthropology", "lugubrious", ",", "7"])
    assert names(classify(kinds, "frequency")) == [
        "functional", "semantic", "semantic", "semantic", "functional", "other",
    ]  # fmt: skip
    assert types.by_frequency(kinds, share=0.5)[:2] == ["functional", "functional"]


class Tagged:
    def __init__(self, text, pos_):
        self.text, self.pos_ = text, pos_


def test_parts_of_speech_decide_by_the_commonest_tag():
    tags = {"the": "DET", "light": "NOUN", "near": "ADP"}

    def nlp(sentence):
        first = sentence.startswith("odd")
        return [Tagged(w, "DET" if first and w == "light" else tags.get(w, "X")) for w in sentence.split()]

    how = types.by_part_of_speech(nlp, ["the light near", "the light", "odd light"])
    kinds = kinds_of_words(["the", "light", "near", "."])
    assert names(classify(kinds, how)) == ["functional", "semantic", "functional", "functional"]


def test_a_table_decides_by_text():
    kinds = [*kinds_of_words(["river", "the"]), Kind("[CLS]", "[cls]", True, True)]
    assert names(classify(kinds, {"river": "functional"})) == ["functional", "other", "special"]
    with pytest.raises(InputError, match=r"classes: expected one of .* \(got \['noun'\]\)"):
        classify(kinds, {"river": "noun"})
    assert classify([], "stopwords").dtype == np.int64
