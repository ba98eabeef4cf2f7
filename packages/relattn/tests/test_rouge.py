"""ROUGE from cached stems equals the rouge-score library."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize
from tiny_models import CORPUS

from relattn.rouge import _stemmer, pairwise_rouge, rouge_f1, stems
from shared_core import InputError

KINDS = ["rouge1", "rouge2", "rougeL"]
SCORER = RougeScorer(KINDS, use_stemmer=True)

_words = st.sampled_from(
    [*" ".join(CORPUS).split(), "İstanbul", "don't", "x_y", "3.5", "ﬁne", "...", "naïve", "\n", "ß"]
)
_texts = st.lists(_words, max_size=40).map(" ".join) | st.text(max_size=60)


@given(text=_texts)
def test_stems_are_rouge_scores_tokens(text):
    assert list(stems(text)) == tokenize(text, _stemmer)


@given(first=_texts, second=_texts)
def test_each_rouge_equals_rouge_score(first, second):
    expected = SCORER.score(first, second)
    for kind in KINDS:
        assert abs(rouge_f1(first, second, kind) - expected[kind].fmeasure) < 1e-12


@given(texts=st.lists(_texts, max_size=6))
def test_all_pairs_equal_a_scorer_call_per_pair(texts):
    for kind in KINDS:
        found = pairwise_rouge(texts, kind)
        assert found.shape == (len(texts), len(texts))
        for i, first in enumerate(texts):
            for j, second in enumerate(texts):
                assert abs(found[i, j] - SCORER.score(first, second)[kind].fmeasure) < 1e-12


def test_pairwise_is_symmetric_to_the_bit():
    texts = [" ".join(CORPUS[i:]) for i in range(6)]
    for kind in KINDS:
        matrix = pairwise_rouge(texts, kind)
        assert np.array_equal(matrix, matrix.T)


@pytest.mark.parametrize(
    "call", [lambda: rouge_f1("a", "b", "rouge9"), lambda: pairwise_rouge(["a"], "bleu")]
)
def test_an_unknown_kind_is_refused(call):
    with pytest.raises(InputError, match='similarity: expected "rouge1", "rouge2" or "rougeL"'):
        call()
