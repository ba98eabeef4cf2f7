"""From phrases to the encoder's vocabulary, and what is said when that fails."""

import pytest
import torch
from tiny_models import (
    bart_with_tokenizer,
    byte_level_tokenizer,
    family,
    t5_with_tokenizer,
    unigram_tokenizer,
    wordpiece_tokenizer,
)

from relattn import EmbeddingRelevance, Steerer
from relattn.controls import encode_control, is_byte_level, occurs_in
from shared_core import InputError


def test_only_byte_level_tokenizers_get_a_leading_space():
    assert is_byte_level(byte_level_tokenizer())
    assert not is_byte_level(unigram_tokenizer())
    assert not is_byte_level(wordpiece_tokenizer())


@pytest.mark.parametrize("make", [byte_level_tokenizer, unigram_tokenizer, wordpiece_tokenizer])
def test_a_control_has_the_ids_that_its_word_has_inside_a_text(make):
    tokenizer = make()
    inside = tokenizer("played music until", add_special_tokens=False)["input_ids"]
    control = list(encode_control("music", tokenizer).ids)
    assert any(inside[start : start + len(control)] == control for start in range(len(inside)))


@pytest.mark.parametrize("make", [bart_with_tokenizer, t5_with_tokenizer])
def test_the_best_match_of_a_word_is_where_it_stands_in_the_source(make):
    """With the identity as embedding, so that only the same token scores: "music" must find " music"."""
    model, tokenizer = make()
    table = model.get_encoder().get_input_embeddings()
    vocabulary = table.weight.shape[0]
    steerer = Steerer(model, tokenizer, EmbeddingRelevance(smooth_sigma=None))
    control = encode_control("music", tokenizer).ids
    with torch.no_grad():
        if (positions := getattr(model.get_encoder(), "embed_positions", None)) is not None:
            positions.weight.zero_()
        # control tokens point into directions of their own, all others are near zero
        table.weight.copy_(torch.randn(vocabulary, table.weight.shape[1]) * 0.01)
        table.weight[list(control)] = torch.eye(table.weight.shape[1])[: len(control)] * 5
    text = "We heard great music today."
    [found] = steerer.relevance([text], ["music"])
    start, end = found.offsets[int(found.a_rel.argmax())]
    first = text.index("music")
    assert first - 1 <= start < end <= first + len("music")


def test_phrases_are_tokenized_one_by_one_and_each_once():
    tokenizer = byte_level_tokenizer()
    one, other = (encode_control(phrase, tokenizer).ids for phrase in ("jazz", "opera house"))
    assert encode_control(["jazz", " opera house ", "jazz", ""], tokenizer).ids == one + other


def test_controls_carry_no_special_tokens():
    tokenizer = byte_level_tokenizer()
    ids = encode_control("music </s>", tokenizer).ids
    assert ids[0] == encode_control("music", tokenizer).ids[0]
    assert tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("make", [wordpiece_tokenizer, unigram_tokenizer])
def test_unknown_tokens_say_nothing_and_are_left_out(make):
    tokenizer = make()
    found = encode_control(["music", "Ж"], tokenizer)
    assert found.ids == encode_control("music", tokenizer).ids
    assert found.unknown == ("Ж",)


@pytest.mark.parametrize("make", [wordpiece_tokenizer, unigram_tokenizer])
def test_a_control_of_unknown_tokens_only_is_named(make):
    """SentencePiece leaves the mark of a word's beginning beside the unknown token: it says nothing."""
    with pytest.raises(
        InputError, match=r"control 3: the tokenizer's vocabulary knows no token of it \(got \['Ж'\]\)"
    ):
        encode_control("Ж", make(), 3)


@pytest.mark.parametrize("blank", ["", "  ", [], ["", " "]])
def test_a_blank_control_is_refused(blank):
    with pytest.raises(InputError, match="control 0 is empty: expected a word or phrase"):
        encode_control(blank, byte_level_tokenizer())


@pytest.mark.parametrize(
    ("phrase", "text", "expected"),
    [
        ("art", "They start.", False),
        ("art", "ART!", True),
        ("new york", "in New\n York,", True),
        ("C++", "written in C++.", True),
        ("café", "a café", True),
        ("ﬁne", "a fine day", True),
        ("音楽", "昔の音楽を聴く", True),
        ("海", "昔の音楽を聴く", False),
        ("", "a text", False),
    ],
)
def test_occurrence_is_of_whole_words_whatever_case_spacing_and_form(phrase, text, expected):
    assert occurs_in(phrase, text) is expected


def test_the_encoders_table_is_used_where_the_decoder_has_another():
    from relattn.families import source_embeddings

    model = family("bert2bert")
    ids = torch.tensor([[7, 8]])
    torch.testing.assert_close(
        source_embeddings(model, ids), model.encoder.embeddings.word_embeddings.weight[7:9][None]
    )
    assert not torch.equal(
        model.encoder.embeddings.word_embeddings.weight, model.decoder.bert.embeddings.word_embeddings.weight
    )
