"""Every supported family, with random weights: the fast path against the formula in probability space."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers as hf
from number_tokenizer import NumberTokenizer
from tiny_models import FAMILIES, VOCAB, WITHOUT_INTERFACE, family
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from relattn import Steerer
from relattn.families import (
    SUPPORTED,
    CrossAttention,
    cross_attentions,
    decoder_view,
    encoder_arguments,
    encoder_of,
    uses_attention_interface,
)
from relattn.reference import steered_reference
from relattn.steering import context_vectors, relevant_context, steered
from shared_core import InputError

LENGTHS = (23, 37, 11)
TARGET = torch.tensor([[2, 17, 40, 8, 66], [2, 9, 9, 51, 30], [2, 77, 6, 12, 81]])
WITH_INTERFACE = [name for name in FAMILIES if name not in WITHOUT_INTERFACE]


class Case:
    """A model, a padded batch behind its encoder, and a random relevance and weight for it."""

    def __init__(self, name: str, extra_pads: int = 0, pad_id: int | None = None) -> None:
        self.model = family(name)
        self.layers = cross_attentions(self.model)
        g = torch.Generator().manual_seed(1)
        length = max(LENGTHS)
        self.mask = (torch.arange(length + extra_pads)[None] < torch.tensor(LENGTHS)[:, None]).long()
        pad = self.model.config.pad_token_id if pad_id is None else pad_id
        ids = torch.randint(5, VOCAB, (3, length), generator=g)
        ids = nn.functional.pad(ids, (0, extra_pads))
        self.ids = torch.where(self.mask.bool(), ids, pad)
        relevance = nn.functional.pad(torch.rand(3, length, generator=g), (0, extra_pads)) * self.mask
        self.relevance = relevance / relevance.sum(1, keepdim=True)
        self.weight = torch.rand(3, len(self.layers), self.layers[0].heads, generator=g)
        with torch.no_grad():
            arguments = encoder_arguments(self.model, self.mask)
            encoded = encoder_of(self.model)(input_ids=self.ids, attention_mask=self.mask, **arguments)
            self.states = encoded.last_hidden_state
            context = relevant_context(self.relevance, decoder_view(self.model, self.states))
            self.contexts = context_vectors(self.layers, context, self.states.dtype)

    def steered(self, weight: Tensor | None = None):
        return steered(self.layers, self.contexts, self.weight if weight is None else weight)

    @torch.no_grad()
    def logits(self) -> Tensor:
        encoded = BaseModelOutput(last_hidden_state=self.states)
        return self.model(encoder_outputs=encoded, attention_mask=self.mask, decoder_input_ids=TARGET).logits

    @torch.no_grad()
    def generate(self, **settings) -> Tensor:
        settings = {"num_beams": 4, "max_new_tokens": 6, "do_sample": False} | settings
        encoded = BaseModelOutput(last_hidden_state=self.states)
        return self.model.generate(
            input_ids=self.ids, encoder_outputs=encoded, attention_mask=self.mask, **settings
        )


@contextmanager
def probabilities_mixed(
    layers: Sequence[CrossAttention], relevance: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[int]]:
    """An oracle for models without the attention interface: each of them passes its probabilities to dropout
    right behind the softmax, as (rows x heads, targets, tokens) or (rows, heads, targets, tokens). There they
    become (1 - w) A + w a_rel.
    """
    dropout = nn.functional.dropout
    running: list[int] = []
    mixed: list[int] = []

    def mixing_dropout(probabilities: Tensor, *args, **kwargs) -> Tensor:
        if running:
            n = running.pop()
            mixed.append(n)
            shape = probabilities.shape
            full = probabilities.reshape(-1, layers[n].heads, *shape[-2:])
            torch.testing.assert_close(full.sum(-1), torch.ones(full.shape[:-1]))  # these are probabilities
            copies = len(full) // len(relevance)
            w = weight[:, n].repeat_interleave(copies, 0)[:, :, None, None]
            a = relevance.repeat_interleave(copies, 0)[:, None, None]
            probabilities = ((1 - w) * full + w * a).reshape(shape)
        return dropout(probabilities, *args, **kwargs)

    handles = [
        layer.attention.register_forward_pre_hook(lambda *_, n=n: running.append(n))
        for n, layer in enumerate(layers)
    ]
    monkeypatch.setattr(nn.functional, "dropout", mixing_dropout)
    try:
        yield mixed
    finally:
        monkeypatch.undo()
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", WITH_INTERFACE)
def test_fast_path_equals_mixed_probabilities_in_the_attention_interface(name):
    case = Case(name)
    with case.steered():
        fast = case.logits()
    with steered_reference(case.model, case.layers, case.relevance, case.weight):
        reference = case.logits()
    assert (fast - reference).abs().max() < 1e-5
    assert (fast - case.logits()).abs().max() > 1e-2  # the comparison says something


@pytest.mark.parametrize("name", [*WITHOUT_INTERFACE, "t5"])
def test_fast_path_equals_probabilities_mixed_by_hand(name, monkeypatch):
    case = Case(name)
    if name == "t5":
        case.model.set_attn_implementation("eager")
    with case.steered():
        fast = case.logits()
    with probabilities_mixed(case.layers, case.relevance, case.weight, monkeypatch) as mixed:
        expected = case.logits()
    assert sorted(mixed) == list(range(len(case.layers)))
    assert (fast - expected).abs().max() < 1e-5
    assert (fast - case.logits()).abs().max() > 1e-2


@pytest.mark.parametrize("name", WITH_INTERFACE)
def test_beam_search_with_a_cache_is_the_same_by_both_paths(name):
    case = Case(name)
    with case.steered():
        fast = case.generate()
    with steered_reference(case.model, case.layers, case.relevance, case.weight):
        reference = case.generate()
    assert torch.equal(fast, reference)


@pytest.mark.parametrize("name", WITHOUT_INTERFACE)
def test_beam_search_with_a_cache_equals_probabilities_mixed_by_hand(name, monkeypatch):
    case = Case(name)
    with case.steered():
        fast = case.generate()
    with probabilities_mixed(case.layers, case.relevance, case.weight, monkeypatch):
        expected = case.generate()
    assert torch.equal(fast, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_weight_one_makes_every_cross_attention_the_context_vector_whatever_the_query(name):
    case = Case(name)
    seen: dict[int, Tensor] = {}
    with case.steered(torch.ones_like(case.weight)):
        handles = [  # behind ours, and so they see what ours returned
            layer.output.register_forward_pre_hook(lambda _, inputs, n=n: seen.update({n: inputs[0]}))
            for n, layer in enumerate(case.layers)
        ]
        case.logits()
    for handle in handles:
        handle.remove()
    for n, layer in enumerate(case.layers):
        heads = seen[n].movedim(layer.batch_dim, 0)
        assert torch.equal(heads, case.contexts[n][:, None].expand_as(heads))


@pytest.mark.parametrize("name", FAMILIES)
def test_one_hook_a_decoder_layer_and_none_in_encoder_or_self_attention(name):
    case = Case(name)
    with case.steered():
        hooked = [n for n, module in case.model.named_modules() if module._forward_pre_hooks]
        with torch.no_grad():
            arguments = encoder_arguments(case.model, case.mask)
            again = encoder_of(case.model)(input_ids=case.ids, attention_mask=case.mask, **arguments)
    assert len(hooked) == 2  # each of these models has 2 decoder layers
    crossing = ("encoder_attn", "EncDecAttention", "cross_attn", "crossattention")
    assert all("decoder" in n and any(part in n for part in crossing) for n in hooked)
    assert torch.equal(again.last_hidden_state, case.states)
    assert not [n for n, module in case.model.named_modules() if module._forward_pre_hooks]


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_weight_zero_are_bit_identical_to_plain_generation(name):
    case = Case(name)
    settings = {"return_dict_in_generate": True, "output_scores": True}
    plain = case.generate(**settings)
    case.weight[1] = 0
    with case.steered():
        found = case.generate(**settings)
    assert torch.equal(found.sequences[1], plain.sequences[1])
    for ours, theirs in zip(found.scores, plain.scores, strict=True):
        assert torch.equal(ours[4:8], theirs[4:8])  # four beams
    assert not torch.equal(found.scores[0][:4], plain.scores[0][:4])


def test_rows_of_weight_zero_do_not_see_a_context_that_overflowed():
    case = Case("bart")
    plain = case.logits()
    case.weight[1] = 0
    for context in case.contexts:
        context[1] = torch.inf  # half precision overflows to it; 0 x inf would be NaN
    with case.steered():
        assert torch.equal(case.logits()[1], plain[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_more_padding_and_other_pad_ids_change_nothing(name):
    if name == "bigbird_pegasus_sparse":
        pytest.skip("its block-sparse encoder lays out blocks by the padded length")
    case, padded = Case(name), Case(name, extra_pads=6, pad_id=50)
    with case.steered():
        expected = case.logits()
    with padded.steered():
        found = padded.logits()
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_three_controls_with_four_beams_equal_each_example_alone(name):
    if name == "bigbird_pegasus_sparse":
        pytest.skip("its block-sparse encoder lays out blocks by the padded length")
    model = family(name)
    steerer = Steerer(model, NumberTokenizer(model.config.pad_token_id))
    documents = [" ".join(map(str, torch.randint(5, VOCAB, (n,)).tolist())) for n in LENGTHS]
    controls, weights = ["12 40", "7", ["88", "51 9", "30"]], [0.3, 0.7, 0.5]
    settings = {"num_beams": 4, "max_new_tokens": 6}
    together = steerer.generate(documents, controls, weights, **settings)
    for n in range(3):
        [alone] = steerer.generate(documents[n : n + 1], controls[n : n + 1], weights[n], **settings)
        assert together[n].weight == weights[n]
        assert together[n].text == alone.text
        torch.testing.assert_close(together[n].relevance.a_rel, alone.relevance.a_rel, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_source_keys_are_not_copied_between_beams_and_the_summaries_are_generates_own(name, monkeypatch):
    model = family(name)
    steerer = Steerer(model, NumberTokenizer(model.config.pad_token_id))
    documents = [" ".join(map(str, torch.randint(5, VOCAB, (n,)).tolist())) for n in (23, 23, 23)]
    controls, weights = ["12 40", "7", "88 51"], [0.3, 0.0, 0.5]
    settings = {"num_beams": 4, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    ids = torch.tensor([steerer.tokenizer(text)["input_ids"] for text in documents])
    with torch.no_grad(), steerer.steer({"input_ids": ids}, controls, weights) as inputs:
        expected = steerer.tokenizer.batch_decode(model.generate(**inputs, **settings))
    reordered: list[int] = []
    copy = DynamicLayer.reorder_cache
    monkeypatch.setattr(
        DynamicLayer,
        "reorder_cache",
        lambda layer, beams: reordered.append(layer.get_seq_length()) or copy(layer, beams),
    )
    found = steerer.generate(documents, controls, weights, **settings)
    assert [summary.text for summary in found] == expected
    assert reordered
    assert max(reordered) < len(ids[0])  # what beams have written, never the source


@pytest.mark.parametrize("name", ["bart", "pegasus", "mbart", "marian"])
@pytest.mark.parametrize("kernel", ["eager", SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_steering_works_under_any_attention_kernel(name, kernel):
    """Flash attention too, which never holds the probabilities that the formula mixes."""
    case = Case(name)
    with steered_reference(case.model, case.layers, case.relevance, case.weight):
        expected = case.logits()
    case.model.set_attn_implementation("eager" if kernel == "eager" else "sdpa")
    with case.steered(), nullcontext() if kernel == "eager" else sdpa_kernel(kernel), profile() as profiled:
        found = case.logits()
    assert (found - expected).abs().max() < 1e-5
    ran = {event.key for event in profiled.key_averages()}
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in ran) == (
        kernel == SDPBackend.FLASH_ATTENTION
    )


@pytest.mark.parametrize("name", WITHOUT_INTERFACE)
def test_the_reference_refuses_models_without_the_attention_interface(name):
    case = Case(name)
    assert not uses_attention_interface(case.model)
    with (
        pytest.raises(InputError, match="does not use transformers' attention interface"),
        steered_reference(case.model, case.layers, case.relevance, case.weight),
    ):
        pass


def test_the_reference_gives_mixed_probabilities_and_restores_the_implementation():
    case = Case("bart")
    before = case.model.config._attn_implementation
    plain = case.logits()
    encoded = BaseModelOutput(last_hidden_state=case.states)
    arguments = {"encoder_outputs": encoded, "attention_mask": case.mask, "decoder_input_ids": TARGET}
    with (
        steered_reference(case.model, case.layers, case.relevance, torch.ones_like(case.weight)),
        torch.no_grad(),
    ):
        output = case.model(**arguments, output_attentions=True)
    for probabilities in output.cross_attentions:
        expected = case.relevance[:, None, None].expand_as(probabilities)
        torch.testing.assert_close(probabilities, expected)
    assert case.model.config._attn_implementation == before
    assert torch.equal(case.logits(), plain)
    assert not [key for key in hf.AttentionInterface._global_mapping if key.startswith("relattn")]


def test_the_reference_says_so_if_the_switch_of_the_implementation_did_nothing(monkeypatch):
    case = Case("bart")
    monkeypatch.setattr(case.model, "set_attn_implementation", lambda *_: None)
    with (
        pytest.raises(RuntimeError, match="steering reached 0 of 2 cross-attentions that ran"),
        steered_reference(case.model, case.layers, case.relevance, case.weight),
    ):
        case.logits()
    with steered_reference(case.model, case.layers, case.relevance, case.weight):
        pass  # nothing ran, so nothing was missed
    assert not [n for n, module in case.model.named_modules() if module._forward_pre_hooks]


def test_the_reference_says_so_if_a_layer_is_left_out_of_evaluation(monkeypatch):
    case = Case("bart")
    layer = case.model.model.decoder.layers[0]
    monkeypatch.setattr(layer, "forward", lambda states, *_, **__: states)
    with (
        pytest.raises(RuntimeError, match="steering reached 1 of 2 cross-attentions"),
        steered_reference(case.model, case.layers, case.relevance, case.weight),
    ):
        case.logits()


def test_the_reference_lets_training_drop_layers():
    case = Case("m2m_100")
    decoder = case.model.model.decoder
    decoder.layerdrop = 0.5
    ran = []
    for number, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    decoder.training = True  # and no other module: no dropout here
    for _ in range(12):
        with steered_reference(case.model, case.layers, case.relevance, case.weight):
            case.logits()
    assert 0 < len(ran) < 24  # layers were dropped


def test_the_reference_restores_the_implementation_after_an_exception():
    case = Case("bert2bert")
    before = [case.model.encoder.config._attn_implementation, case.model.decoder.config._attn_implementation]
    with (
        pytest.raises(KeyError, match="stop"),
        steered_reference(case.model, case.layers, case.relevance, case.weight),
    ):
        raise KeyError("stop")
    after = [case.model.encoder.config._attn_implementation, case.model.decoder.config._attn_implementation]
    assert before == after


def test_attention_dropout_acts_on_the_mixed_probabilities_in_the_reference():
    """With dropout 0.5 and w = 1 an output is 2 x the kept part of a_rel V, never the undropped vector."""
    case = Case("bart")
    for layer in case.layers:
        layer.attention.dropout = 0.5
        layer.attention.training = True
    seen = []
    handle = case.layers[0].output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ones = torch.ones_like(case.weight)
    with steered_reference(case.model, case.layers, case.relevance, ones), torch.no_grad():
        for _ in range(400):
            case.logits()
    handle.remove()
    draws = torch.stack(seen)
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws.mean((0, 2)), case.contexts[0], atol=0.15, rtol=0.1)


def test_grouped_query_attention_repeats_each_value_head_for_its_group():
    """T5Gemma's cross-attention has fewer value heads than heads, and caps its logits: both paths must
    agree."""
    part = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "sliding_window": 64,
        "layer_types": ["full_attention", "sliding_attention"], "pad_token_id": 1,
    }  # fmt: skip
    config = hf.T5GemmaConfig(
        encoder=part, decoder=part | {"cross_attention_hidden_size": 16}, vocab_size=VOCAB
    )
    config.pad_token_id = 1
    model = hf.T5GemmaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    layers = cross_attentions(model)
    ids = torch.randint(5, VOCAB, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    relevance = (torch.rand(2, 12) * mask).softmax(1) * mask
    relevance = relevance / relevance.sum(1, keepdim=True)
    weight = torch.rand(2, 2, 4)
    with torch.no_grad():
        states = encoder_of(model)(input_ids=ids, attention_mask=mask).last_hidden_state
        contexts = context_vectors(layers, relevant_context(relevance, states), states.dtype)

        def logits():
            encoded = BaseModelOutput(last_hidden_state=states)
            return model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=TARGET[:2]).logits

        with steered(layers, contexts, weight):
            fast = logits()
        with steered_reference(model, layers, relevance, weight):
            reference = logits()
        assert (fast - reference).abs().max() < 1e-5
        assert (fast - logits()).abs().max() > 1e-2


def test_decoder_only_models_are_refused_with_the_supported_families():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(InputError, match="model: GPT2LMHeadModel is not an encoder-decoder model") as caught:
        cross_attentions(model)
    assert all(name in str(caught.value) for name in SUPPORTED)


def test_merged_attention_is_refused_and_never_steered_in_silence():
    """As in T5Gemma 2, whose decoder layers have one attention over both source and target."""
    model = family("bart")
    for layer in model.model.decoder.layers:
        del layer.encoder_attn
    with pytest.raises(
        InputError, match="has no cross-attention of its own in its decoder: expected one of BART"
    ):
        cross_attentions(model)


def test_a_layer_that_cannot_be_steered_is_an_error_not_a_gap():
    model = family("bart")
    model.model.decoder.layers[1].encoder_attn = nn.Identity()
    with pytest.raises(InputError, match=r"layers\.1\.encoder_attn has no value projection"):
        cross_attentions(model)
    model = family("bart")
    del model.model.decoder.layers[1].encoder_attn
    with pytest.raises(InputError, match="has 2 decoder layers but 1 cross-attentions"):
        cross_attentions(model)
