"""Online selection: known answers, and what it must not look at."""

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relattn import coverage_select, online_select
from relattn.rouge import rouge_f1
from relattn.selection import GRID, coarse_to_fine, consensus, distinct_word_ratio, filled, keep
from shared_core import InputError

ANCHOR = "the council votes on a new park"


def test_the_grid_is_thirty_weights_from_one_to_thirty_percent():
    assert np.allclose(GRID, np.arange(1, 31) / 100, rtol=0, atol=1e-12)


def test_the_candidate_that_agrees_most_with_the_others_wins():
    candidates = [
        ANCHOR,
        "the council votes on a new bridge",
        "the council votes on a new bridge today",
        "the council meets about a bridge",
    ]
    scores = [sum(rouge_f1(a, b) for b in candidates if b is not a) for a in candidates]
    assert online_select(candidates) == int(np.argmax(scores)) == 1


def test_duplicates_count_once_and_do_not_inflate_the_consensus():
    """Kept twice, the anchor's copies would agree with it perfectly and win."""
    middle = "the council votes on a bridge today"
    candidates = [ANCHOR, ANCHOR, ANCHOR, middle, "the mayor votes on a bridge today", ANCHOR]
    assert keep(candidates) == (0, 3, 4)
    assert online_select(candidates) == 3
    assert online_select([ANCHOR, middle, "the mayor votes on a bridge today"]) == 1


def test_a_candidate_that_drifts_from_the_first_is_dropped_even_if_the_others_agree_with_it():
    drifted = ["lions sleep in the grass", "lions sleep in the tall grass", "lions sleep in tall grass today"]
    assert keep([ANCHOR, *drifted]) == (0,)
    assert online_select([ANCHOR, *drifted]) == 0


def test_the_anchor_is_the_first_candidate_not_the_previous_one():
    """A chain in which each is near its neighbour: the end is far from the first and is dropped."""
    chain = ["a b c d e f", "c d e f g h", "f g h i j k", "h i j k l m"]
    assert min(rouge_f1(chain[n], chain[n + 1]) for n in range(3)) > 0.2
    assert keep(chain) == (0, 1)  # the third shares 1 of 6 words with the first


def test_repetitive_candidates_are_dropped():
    repetitive = "the council the council the council"  # 2 of 6 words
    assert keep([ANCHOR, repetitive]) == (0,)
    exactly = "the council votes the council"  # 3 of 5: 0.6 is not above 0.6
    assert distinct_word_ratio(exactly) == 0.6
    assert keep([ANCHOR, exactly]) == (0,)


def test_the_anchor_itself_is_filtered_too():
    assert keep(["the the the council council votes", "the council votes"]) == (1,)


def test_a_tie_goes_to_the_smallest_weight():
    matrix = np.array([[9, 0.1, 0.7], [0.7, 9, 0.1], [0.1, 0.7, 9]])  # the same two numbers in another order
    assert consensus(["a b c", "a b d", "a b e"], lambda texts: matrix).agreement == (0.1 + 0.7,) * 3
    assert online_select(["a b c", "a b d", "a b e"], lambda texts: matrix) == 0
    assert online_select([ANCHOR, "the council votes on a bridge"]) == 0


def test_the_diagonal_does_not_count():
    matrix = np.array([[0.0, 0.5, 0.5], [0.5, 5.0, 0.0], [0.5, 0.0, 5.0]])
    assert online_select(["a b c", "a b d", "a b e"], lambda texts: matrix) == 0


def test_the_callers_matrix_is_not_changed():
    matrix = np.eye(2)
    online_select(["a b c", "a b d"], lambda texts: matrix)
    assert np.array_equal(matrix, np.eye(2))


@pytest.mark.parametrize("candidates", [["", ""], ["!!!", "?"], ["word word word"], ["", "a summary"]])
def test_empty_and_degenerate_candidates_give_the_first(candidates):
    assert keep(candidates) == ()
    assert online_select(candidates) == 0


def test_selection_takes_candidates_only_and_no_reference_or_control():
    assert list(inspect.signature(online_select).parameters) == ["candidates", "similarity"]


def test_no_candidate_is_refused():
    with pytest.raises(InputError, match="candidates: expected one candidate or more"):
        online_select([])


def test_similarities_of_another_shape_are_refused():
    with pytest.raises(
        InputError, match=r"similarity: expected similarities of shape \(2, 2\), got \(1, 1\)"
    ):
        online_select(["a b c", "a b d"], lambda texts: np.eye(1))


def test_other_rouge_kinds_can_decide():
    # same words in another order: rouge1 sees no difference, rougeL does
    candidates = ["a b c d e f", "f e d c b a", "a b c d e g"]
    assert consensus(candidates, "rouge1").agreement[1] == consensus(candidates, "rouge1").agreement[0]
    assert consensus(candidates, "rougeL").agreement[1] < consensus(candidates, "rougeL").agreement[0]


@given(
    runs=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    stride=st.integers(1, 12),
    more=st.integers(1, 3),
)
def test_a_coarse_grid_finds_every_candidate_where_equal_ones_stand_side_by_side(runs, stride, more):
    """Runs at least as long as the stride are all found; of shorter ones, those between different ends."""
    texts = [[str(n) for n, run in enumerate(runs) for _ in range(run)]] * more
    asked = []

    def decode(pairs):
        asked.extend(pairs)
        return [texts[row][index] for row, index in pairs]

    decoded = coarse_to_fine([len(each) for each in texts], stride, decode)
    assert [filled(known, len(texts[0])) for known in decoded] == texts
    assert len(asked) == len(set(asked)) == sum(map(len, decoded))
    assert stride > 1 or len(asked) == more * len(texts[0])


def test_a_coarse_grid_takes_equal_neighbours_for_the_whole_between_them():
    """The price: a summary that only one weight in the middle gives is not seen."""
    texts = ["a", "a", "b", "a", "a"]
    (decoded,) = coarse_to_fine([5], 4, lambda pairs: [texts[index] for _, index in pairs])
    assert decoded == {0: "a", 4: "a"}
    assert filled(decoded, 5) == ["a"] * 5
    with pytest.raises(InputError, match="coarse: expected 1 or more"):
        coarse_to_fine([5], 0, lambda pairs: [])


def test_coverage_takes_the_summary_whose_words_hold_the_most_relevance():
    source, relevance = [10, 11, 12, 11, 13], [0.1, 0.2, 0.1, 0.2, 0.4]
    texts = ["one two", "one three", "two four"]
    # masses: 0.1 + 0.1; 0.2 + 0.2 (token 11 stands twice); 0.4
    assert coverage_select(texts, [[10, 12], [11], [99]], source, relevance) == 1
    assert coverage_select(texts, [[10, 12], [11], [13, 12]], source, relevance) == 2


def test_coverage_drops_degenerate_summaries_and_breaks_ties_downwards():
    source, relevance = [10, 11], [0.4, 0.6]
    assert coverage_select(["go go go go", "a b"], [[10, 11], [10]], source, relevance) == 1
    assert coverage_select(["a b", "c d"], [[11], [11]], source, relevance) == 0
    assert coverage_select(["x x x", "y y y"], [[11], [11]], source, relevance) == 0


def test_coverage_refuses_lists_that_do_not_match():
    with pytest.raises(InputError, match="one relevance a source token"):
        coverage_select(["a"], [[1]], [1, 2], [1.0])
    with pytest.raises(InputError, match="one candidate or more"):
        coverage_select([], [], [], [])
