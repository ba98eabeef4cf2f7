"""Section 3.1: the relevance distribution, against a loop over plain numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import bart_with_tokenizer, family

from relattn import EmbeddingRelevance, RelAttnModule, SimilarityRelevance, Steerer
from relattn.relevance import (
    RelevanceInputs,
    effective_support,
    gaussian_kernel,
    masked_softmax,
    mean_over_control,
    smooth,
    temperature_for_support,
)
from shared_core import InputError


def _inputs(batch: int, controls: int, tokens: int, width: int = 5, seed: int = 0) -> RelevanceInputs:
    """Random vectors; every row has another number of real control and source tokens, at least one."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, controls + 1, (batch, 1), generator=g)
    source = torch.randint(1, tokens + 1, (batch, 1), generator=g)
    return RelevanceInputs(
        torch.randint(5, 90, (batch, controls), generator=g),
        torch.arange(controls)[None] < lengths,
        torch.randn(batch, controls, width, generator=g),
        torch.randn(batch, tokens, width, generator=g),
        torch.arange(tokens)[None] < source,
    )


def _by_hand(
    inputs: RelevanceInputs, row: int, sigma: float | None, half: int, temperature: float
) -> list[float]:
    """a_rel of one row by the paper's formulas (Section 3.1), number by number, real tokens only."""
    controls = [
        c for c, m in zip(inputs.control_vectors[row].tolist(), inputs.control_mask[row], strict=True) if m
    ]
    source = [
        k for k, m in zip(inputs.source_vectors[row].tolist(), inputs.source_mask[row], strict=True) if m
    ]
    s = [sum(sum(a * b for a, b in zip(e, k, strict=True)) for e in controls) / len(controls) for k in source]
    if sigma is not None:
        taps = {
            r: math.exp(-(r**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
            for r in range(-half, half + 1)
        }
        s = [sum(g * s[j + r] for r, g in taps.items() if 0 <= j + r < len(s)) for j in range(len(s))]
    powers = [math.exp((x - max(s)) / temperature) for x in s]
    return [p / sum(powers) for p in powers]


@given(
    seed=st.integers(0, 10_000),
    sigma=st.sampled_from([None, 0.5, 1.0, 3.0]),
    half=st.integers(0, 12),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
)
def test_equals_the_formula_computed_number_by_number(seed, sigma, half, temperature):
    inputs = _inputs(batch=3, controls=4, tokens=17, seed=seed)
    found = EmbeddingRelevance(sigma, half, temperature)(inputs)
    for row in range(3):
        expected = torch.tensor(_by_hand(inputs, row, sigma, half, temperature))
        torch.testing.assert_close(found[row][inputs.source_mask[row]], expected, atol=2e-6, rtol=1e-4)


@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([1.0, 0.1, "auto"]))
def test_rows_sum_to_one_and_pads_get_exactly_zero(seed, temperature):
    inputs = _inputs(batch=4, controls=3, tokens=20, seed=seed)
    found = EmbeddingRelevance(temperature=temperature)(inputs)
    torch.testing.assert_close(found.sum(1), torch.ones(4))
    assert (found[~inputs.source_mask] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, "auto"])
def test_a_document_alone_and_in_a_padded_batch_have_the_same_relevance(temperature):
    inputs = _inputs(batch=6, controls=5, tokens=40)
    relevance = EmbeddingRelevance(temperature=temperature)
    together = relevance(inputs)
    for row in range(6):
        k, n = int(inputs.control_mask[row].sum()), int(inputs.source_mask[row].sum())
        one = slice(row, row + 1)
        alone = relevance(
            RelevanceInputs(
                inputs.control_ids[one, :k],
                inputs.control_mask[one, :k],
                inputs.control_vectors[one, :k],
                inputs.source_vectors[one, :n],
                inputs.source_mask[one, :n],
            )
        )
        assert (together[row, :n] - alone[0]).abs().max() < 1e-6


def test_what_stands_at_pads_does_not_matter_on_either_side():
    inputs = _inputs(batch=1, controls=1, tokens=12)
    mask = torch.tensor([[False] * 4 + [True] * 6 + [False] * 2])  # padded left and right
    found = []
    for filler in (0.0, 1e6):
        source = inputs.source_vectors.masked_fill(~mask[:, :, None], filler)
        padded = RelevanceInputs(
            inputs.control_ids, inputs.control_mask, inputs.control_vectors, source, mask
        )
        found.append(EmbeddingRelevance()(padded))
    assert torch.equal(*found)


def test_gaussian_has_21_taps_that_sum_to_one_at_sigma_one():
    taps = gaussian_kernel(1.0, 10)
    assert len(taps) == 21
    assert taps.double().sum().item() == pytest.approx(1, abs=1e-6)
    assert taps[10].item() == pytest.approx(0.3989423)  # 1 / sqrt(2 pi)
    assert taps[11].item() == pytest.approx(0.2419707)  # exp(-1/2) / sqrt(2 pi)


def test_smoothing_loses_mass_at_the_ends_and_takes_none_from_pads():
    scores, mask = torch.tensor([[1.0, 0.0, 0.0, 7.0]]), torch.tensor([[True, True, True, False]])
    found = smooth(scores, mask, 1.0, 10)[0]
    torch.testing.assert_close(found[:3], torch.tensor([0.3989423, 0.2419707, 0.0539910]))


def test_scores_are_the_mean_over_real_control_tokens_only():
    scores = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    found = mean_over_control(scores, torch.tensor([[True, True, False]]))
    assert found.tolist() == [[2.0, 4.0]]


def test_id_weighted_multiplies_each_control_tokens_scores_by_its_id():
    inputs = _inputs(batch=1, controls=3, tokens=8, seed=3)
    k = int(inputs.control_mask.sum())
    plain = torch.einsum("kd,nd->kn", inputs.control_vectors[0, :k], inputs.source_vectors[0])
    expected = (plain * inputs.control_ids[0, :k, None]).mean(0)
    torch.testing.assert_close(EmbeddingRelevance(id_weighted=True).scores(inputs)[0], expected)
    assert not EmbeddingRelevance().id_weighted


@given(seed=st.integers(0, 10_000), support=st.sampled_from([1.5, 4.0, 8.0, 12.0]))
def test_auto_sharpness_gives_the_effective_support_that_was_asked_for(seed, support):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 60, generator=g) * torch.tensor([[1e-3], [1.0], [1e3]])
    mask = torch.arange(60)[None] < torch.tensor([[60], [24], [40]])
    temperature = temperature_for_support(scores, mask, support)
    found = effective_support(masked_softmax(scores / temperature[:, None], mask))
    torch.testing.assert_close(found, torch.full((3,), support), rtol=1e-3, atol=1e-3)


def test_auto_sharpness_of_a_short_document_aims_at_half_of_its_tokens():
    scores, mask = torch.tensor([[0.1, 0.5, 0.2, 0.9, 0.0, 0.4]]), torch.ones(1, 6, dtype=torch.bool)
    temperature = temperature_for_support(scores, mask, 8.0)
    assert effective_support(masked_softmax(scores / temperature, mask)).item() == pytest.approx(3, abs=1e-3)


class _WithoutFloat64(torch.Tensor):
    """Stands in for a tensor on a device that has no float64, such as Apple's GPUs."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu:
            return found.as_subclass(torch.Tensor)
        if isinstance(found, cls) and found.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return found


def test_auto_sharpness_needs_no_float64_on_the_device():
    scores, mask = torch.randn(2, 30), torch.ones(2, 30, dtype=torch.bool)
    with pytest.raises(TypeError, match="no float64"):
        scores.as_subclass(_WithoutFloat64).double()
    found = temperature_for_support(scores.as_subclass(_WithoutFloat64), mask)
    assert torch.equal(found, temperature_for_support(scores, mask))


def test_auto_sharpness_leaves_equal_scores_alone():
    mask = torch.tensor([[True] * 5 + [False] * 3])
    assert temperature_for_support(torch.full((1, 8), 2.0), mask).tolist() == [1.0]
    assert temperature_for_support(torch.full((1, 8), 2.0), mask[:, :1].expand(1, 8)).tolist() == [1.0]


def test_temperature_one_is_the_default():
    assert EmbeddingRelevance().temperature == 1.0


def test_relevance_is_raw_embedding_times_the_encoders_input_representation():
    model, tokenizer = bart_with_tokenizer()
    text = "The opera house opened its season with music and dance."
    [found] = Steerer(model, tokenizer).relevance([text], ["music"])
    ids = tokenizer(text, return_tensors="pt").input_ids
    table = model.model.shared.weight
    first = model.model.encoder(ids, output_hidden_states=True).hidden_states[0][0]
    control = table[tokenizer(" music", add_special_tokens=False).input_ids]
    expected = (control @ first.T).mean(0)
    torch.testing.assert_close(found.scores, expected)
    with torch.no_grad():
        last = model.model.encoder(ids).last_hidden_state[0]
        cosine = torch.nn.functional.cosine_similarity(control.mean(0)[None], first)
    assert (found.scores - (control @ last.T).mean(0)).abs().max() > 0.01
    assert (found.scores - cosine).abs().max() > 0.01


def test_pegasus_control_vectors_are_not_scaled_but_its_source_vectors_are():
    model = family("pegasus")
    from relattn.families import source_embeddings

    ids = torch.tensor([[7, 9]])
    encoder = model.model.encoder
    first = encoder(ids, output_hidden_states=True).hidden_states[0]
    position = encoder.embed_positions.weight[:2]
    torch.testing.assert_close(source_embeddings(model, ids) * 4, first - position)  # sqrt(16)


def test_trained_projections_start_as_the_untrained_relevance():
    inputs = _inputs(batch=2, controls=3, tokens=9, width=16)
    module = RelAttnModule.for_model(family("bart"), relevance="trained")
    torch.testing.assert_close(module.relevance(inputs), EmbeddingRelevance()(inputs))


def test_trained_projections_enter_with_weight_and_bias_on_both_sides():
    inputs = _inputs(batch=1, controls=2, tokens=6)
    query, key = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)
    k = inputs.control_mask[0]
    e = inputs.control_vectors[0][k] @ query.weight.T + query.bias
    expected = (e @ (inputs.source_vectors[0] @ key.weight.T + key.bias).T).mean(0)
    torch.testing.assert_close(EmbeddingRelevance(query=query, key=key).scores(inputs)[0], expected)


def test_half_precision_scores_that_would_overflow_are_computed_in_float32():
    big = RelevanceInputs(
        torch.tensor([[5]]),
        torch.tensor([[True]]),
        torch.full((1, 1, 64), 50.0, dtype=torch.float16),
        torch.full((1, 3, 64), 50.0, dtype=torch.float16),  # dot product 160,000: beyond float16's 65,504
        torch.tensor([[True, True, True]]),
    )
    scores = EmbeddingRelevance().scores(big)
    assert scores.dtype == torch.float32
    assert scores[0, 0] == 160_000
    assert EmbeddingRelevance(smooth_sigma=None)(big).isfinite().all()


def test_a_similarity_of_ones_own_scores_the_real_tokens_where_they_stand():
    seen = []

    def longer_is_better(phrases, tokens):
        seen.append((list(phrases), list(tokens)))
        return [float(len(token)) for token in tokens]

    mask = torch.tensor([[False, True, True, True]])
    inputs = RelevanceInputs(
        torch.tensor([[5]]),
        torch.tensor([[True]]),
        torch.zeros(1, 1, 2),
        torch.zeros(1, 4, 3),
        mask,
        [("a", "b")],
        [["x", "xxx", "xx"]],
    )
    found = SimilarityRelevance(similarity=longer_is_better, smooth_sigma=None)(inputs)
    torch.testing.assert_close(found[0, 1:], torch.tensor([1.0, 3.0, 2.0]).softmax(0))
    assert found[0, 0] == 0
    assert seen == [(["a", "b"], ["x", "xxx", "xx"])]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"smooth_sigma": 0.25}, "smooth_sigma: expected 0.5 or more"),
        ({"smooth_sigma": float("nan")}, "smooth_sigma: expected 0.5 or more"),
        ({"half_window": -1}, "half_window: expected 0 or more"),
        ({"temperature": 0.0}, 'temperature: expected a number above 0, or "auto"'),
        ({"temperature": float("inf")}, 'temperature: expected a number above 0, or "auto"'),
        ({"support": 0.5}, "support: expected 1 token or more"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        EmbeddingRelevance(**settings)


def test_a_similarity_that_returns_another_number_of_scores_is_refused():
    model, tokenizer = bart_with_tokenizer()
    steerer = Steerer(model, tokenizer, SimilarityRelevance(similarity=lambda phrases, tokens: [1.0]))
    with pytest.raises(
        InputError, match=r"similarity: expected \d+ scores, one a source token, got shape \(1,\)"
    ):
        steerer.relevance(["The opera house."], ["opera"])


def test_scores_that_are_not_finite_are_refused():
    model, tokenizer = bart_with_tokenizer()
    nan = SimilarityRelevance(similarity=lambda phrases, tokens: [float("nan")] * len(tokens))
    with pytest.raises(InputError, match="relevance scores are not finite"):
        Steerer(model, tokenizer, nan).relevance(["The opera house."], ["opera"])
