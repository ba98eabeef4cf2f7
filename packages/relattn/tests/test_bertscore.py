"""BERTScore F1 of pairs, against the greedy matching written as loops."""

import numpy as np
import pytest
import torch
import transformers as hf
from tiny_models import CORPUS, bart_with_tokenizer, wordpiece_tokenizer

from relattn import Steerer, online_select
from relattn.bertscore import BertScore


@pytest.fixture
def score() -> BertScore:
    tokenizer = wordpiece_tokenizer()
    config = hf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, initializer_range=0.5,
    )  # fmt: skip
    return BertScore(hf.BertModel(config, add_pooling_layer=False), tokenizer, layer=1)


def _by_hand(score: BertScore, first: str, second: str) -> float:
    """Mean of best cosines in both directions, special tokens left out, one pair at a time."""
    sides = []
    for text in (first, second):
        encoded = score.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            sides.append(score.model(**encoded, output_hidden_states=True).hidden_states[1][0, 1:-1].tolist())

    def cosine(a, b):
        return np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)

    a, b = sides
    recall = np.mean([max(cosine(x, y) for y in b) for x in a])
    precision = np.mean([max(cosine(x, y) for x in a) for y in b])
    return 2 * precision * recall / (precision + recall)


def test_pairs_equal_greedy_matching_by_hand(score):
    texts = [CORPUS[0], CORPUS[1][:40], CORPUS[4]]
    found = score(texts)
    for i, first in enumerate(texts):
        for j, second in enumerate(texts):
            assert found[i, j] == pytest.approx(_by_hand(score, first, second), abs=1e-5)
    assert np.array_equal(found, found.T)
    assert np.diag(found) == pytest.approx(1, abs=1e-5)


def test_a_text_without_words_agrees_with_none(score):
    assert score([CORPUS[0], ""])[0, 1] == 0


def test_the_model_is_loaded_once_for_all_documents_on_the_summarizers_device(score, monkeypatch):
    loads = []
    monkeypatch.setattr(BertScore, "from_pretrained", lambda **options: loads.append(options) or score)
    model, tokenizer = bart_with_tokenizer()
    found = Steerer(model, tokenizer).generate(
        list(CORPUS[:3]), ["music", "opera", "river"], "online", similarity="bertscore", grid=(0.1, 0.9),
        batch_size=1, max_new_tokens=4, num_beams=1,
    )  # fmt: skip
    assert len(found) == 3
    assert loads == [{"device": model.device}]


def test_the_model_is_put_on_the_device_asked_for(score, tmp_path):
    for part in (score.model, score.tokenizer):
        part.save_pretrained(tmp_path)
    assert BertScore.from_pretrained(str(tmp_path), 1, "meta").model.device.type == "meta"
    assert BertScore.from_pretrained(str(tmp_path), 1).model.device.type == "cpu"


def test_it_can_decide_online_selection(score):
    candidates = [CORPUS[0][:50], CORPUS[0][:60], CORPUS[0][:70]]
    expected = [sum(_by_hand(score, a, b) for b in candidates if b != a) for a in candidates]
    assert online_select(candidates, score) == int(np.argmax(expected))
