"""Each baseline does what its name says, row by row."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny_models import CORPUS, bart_with_tokenizer, family, t5_with_tokenizer
from transformers import LogitsProcessorList

from relattn import methods
from relattn.extract import extract, sentence_relevance
from relattn.families import cross_attentions, encoder_of
from relattn.logit_boost import KeywordBoost
from relattn.methods import METHODS, MethodSettings, bag_of_words, summarize
from relattn.pplm import PPLM, PPLMCost
from relattn.prefix import with_prefix
from relattn.results import RelevanceResult
from relattn.softmax_bias import softmax_bias
from relattn.steerer import Steerer
from shared_core import InputError

DOCUMENTS = [f"{CORPUS[0]} {CORPUS[2]}", CORPUS[3], f"{CORPUS[6]} {CORPUS[7]} {CORPUS[1]}"]
CONTROLS = ["music", "climate policy", ["grain", "treaty"]]
GREEDY = {"num_beams": 1, "max_new_tokens": 6, "do_sample": False}
BEAMS = {"num_beams": 4, "max_new_tokens": 6, "do_sample": False}


def encoded(model, lengths=(9, 5, 7)):
    """A padded batch of random ids behind the encoder."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = ids.where(mask.bool(), model.config.pad_token_id)
    with torch.no_grad():
        states = encoder_of(model)(input_ids=ids, attention_mask=mask).last_hidden_state
    return ids, mask, states


# --- prefix


def test_the_prefix_joins_phrases_before_the_arrow_and_leaves_a_blank_control_out():
    assert with_prefix(["a b", "c"], [["x y", " z ", ""], " "]) == ["x y z => a b", "c"]
    with pytest.raises(InputError, match="expected 2, one a document, got 1"):
        with_prefix(["a", "b"], ["x"])


# --- PPLM


@pytest.mark.parametrize("name", ["bart", "pegasus", "mbart", "t5", "led", "bert2bert"])
def test_a_pplm_step_raises_the_probability_of_each_rows_own_bag(name):
    model = family(name)
    _, mask, states = encoded(model)
    bags = [[11, 12], [40], [70, 71, 72]]
    written = torch.tensor([[model.config.decoder_start_token_id or 0, 8, 9]]).repeat(3, 1)
    before = model(
        encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=written
    ).logits[:, -1].softmax(1)  # fmt: skip
    pplm = PPLM(model, states, mask, bags, step_size=0.01)
    after = pplm.perturbed_logits(written).softmax(1)
    for row, bag in enumerate(bags):
        assert after[row, bag].sum() > before[row, bag].sum() * 1.01
    assert (pplm.cost.steps, pplm.cost.backward_passes, pplm.cost.forward_passes) == (1, 3, 5)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_pplm_row_is_what_it_is_alone(name):
    model = family(name)
    _, mask, states = encoded(model)
    bags = [[11, 12], [], [70]]
    start = model.config.decoder_start_token_id
    for written in (torch.tensor([[start]] * 3), torch.tensor([[start, 5, 6], [start, 7, 8], [start, 9, 5]])):
        together = PPLM(model, states, mask, bags, step_size=0.01).perturbed_logits(written)
        for row in range(3):
            real = mask[row].bool()
            alone = PPLM(model, states[[row]][:, real], mask[[row]][:, real], [bags[row]], step_size=0.01)
            assert torch.allclose(together[[row]], alone.perturbed_logits(written[[row]]), atol=2e-4)


def test_the_first_pplm_step_without_perturbation_is_the_models_own():
    model = family("bart")
    _, mask, states = encoded(model)
    written = torch.tensor([[2, 8, 9], [2, 3, 4], [2, 7, 7]])
    plain = model(encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=written).logits[:, -1]
    still = PPLM(model, states, mask, [[5], [6], [7]], step_size=1e-12).perturbed_logits(written)
    assert torch.allclose(still, plain, atol=1e-5)


def test_a_pplm_step_has_the_published_size():
    model = family("bart")
    _, mask, states = encoded(model)
    pplm = PPLM(model, states, mask, [[5], [6], [7]], gamma=1.5)
    gradient = torch.randn(3, 4, 5, 6)
    step = pplm._normalised(gradient)
    for row in range(3):
        norm = gradient[row].norm()
        assert torch.allclose(step[row], gradient[row] / norm**1.5)
    assert torch.equal(pplm._normalised(torch.zeros(3, 2)), torch.zeros(3, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pplm_steps_in_half_precision_are_those_of_full_precision(dtype):
    model = family("bart")
    _, mask, states = encoded(model)
    bags, written = [[11, 12], [], [70]], torch.tensor([[2, 8, 9]] * 3)
    plain = model(encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=written).logits[:, -1]
    full = PPLM(model, states, mask, bags, step_size=0.05).perturbed_logits(written).softmax(1)
    small = family("bart").to(dtype)
    half = PPLM(small, states.to(dtype), mask, bags, step_size=0.05)
    found = half.perturbed_logits(written).float().softmax(1)
    assert not found.isnan().any()
    for row in (0, 2):
        gain = (full[row, bags[row]].sum() / plain.softmax(1)[row, bags[row]].sum()).item()
        ratio = (found[row, bags[row]].sum() / full[row, bags[row]].sum()).item()
        assert gain > 1.05
        assert ratio == pytest.approx(1, abs=(gain - 1) / 2)
    small_gradient = torch.full((1, 4), 1e-5, dtype=dtype)
    expected = small_gradient.float() / small_gradient.float().norm() ** 1.5
    torch.testing.assert_close(half._normalised(small_gradient), expected)
    assert torch.equal(half._normalised(torch.zeros(1, 4, dtype=dtype)), torch.zeros(1, 4))


def test_pplm_fuses_logits_by_gm_and_keeps_forbidden_tokens_forbidden():
    model = family("bart")
    _, mask, states = encoded(model)
    written = torch.tensor([[2, 8]] * 3)
    scores = torch.randn(3, 99)
    scores[:, 3] = -torch.inf
    pplm = PPLM(model, states, mask, [[5], [], [7]], step_size=0.01, gm=0.4)
    perturbed = pplm.perturbed_logits(written)
    fused = pplm(written, scores)
    expected = 0.4 * perturbed + 0.6 * scores
    expected[:, 3] = -torch.inf
    for row in (0, 2):
        assert torch.allclose(fused[row], expected[row].log_softmax(0), atol=1e-5)
    assert torch.equal(fused[1], scores[1])  # no bag, no change
    everything = PPLM(model, states, mask, [[5], [], [7]], gm=1.0)(written, scores)
    assert not everything.isnan().any()


def test_pplm_leaves_the_model_without_gradients():
    model = family("bart")
    _, mask, states = encoded(model)
    with torch.no_grad():
        PPLM(model, states, mask, [[5], [6], [7]])(torch.tensor([[2]] * 3), torch.zeros(3, 99))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_pplm_refuses_wrong_settings():
    model = family("bart")
    _, mask, states = encoded(model)
    with pytest.raises(InputError, match="bags: expected 3, one a document, got 1"):
        PPLM(model, states, mask, [[5]])
    with pytest.raises(InputError, match="gm: expected a share from 0 to 1"):
        PPLM(model, states, mask, [[5]] * 3, gm=1.5)
    with pytest.raises(InputError, match="at least 1 iteration"):
        PPLM(model, states, mask, [[5]] * 3, iterations=0)


def test_pplm_for_some_documents_is_what_each_of_them_gets():
    model = family("bart")
    _, mask, states = encoded(model)
    whole = PPLM(model, states, mask, [[11, 12], [40], [70]], step_size=0.01)
    written = torch.tensor([[2, 8, 9], [2, 3, 4], [2, 7, 7]])
    expected = whole.perturbed_logits(written)
    part = whole.for_documents([2, 0])
    assert torch.allclose(part.perturbed_logits(written[[2, 0]]), expected[[2, 0]], atol=2e-4)
    assert whole.cost.steps == part.cost.steps == 2
    with pytest.raises(InputError, match="bags: expected a bag for each document, got 3"):
        whole.for_documents([3])


def test_accumulated_perturbations_are_handed_on_by_what_a_row_has_written():
    """Rows change places as in beam search; each is what it is alone, its memory carried along by hand."""
    model = family("bart")
    _, mask, states = encoded(model, (9, 5))
    options = {"step_size": 0.05, "accumulate": True}
    pplm = PPLM(model, states, mask, [[11, 12], [40]], **options)
    start = torch.tensor([[2]] * 4)  # two documents, two beams each
    second = torch.tensor([[2, 8], [2, 9], [2, 9], [2, 7]])
    third = torch.tensor([[2, 9, 5], [2, 8, 6], [2, 7, 5], [2, 7, 6]])  # beams 2 and 1; beam 2 twice
    found = [pplm.perturbed_logits(written) for written in (start, second, third)]
    for row in range(4):
        document = row // 2
        real = mask[document].bool()
        alone = PPLM(model, states[[document]][:, real], mask[[document]][:, real],
                     [[[11, 12], [40]][document]], **options)  # fmt: skip
        expected = [alone.perturbed_logits(third[[row], :length]) for length in (1, 2, 3)]
        parent = second.tolist().index(third[row, :2].tolist(), 2 * document)
        for step, place in enumerate((row, parent, row)):
            torch.testing.assert_close(found[step][[place]], expected[step], atol=5e-4, rtol=0)
    afresh = PPLM(model, states, mask, [[11, 12], [40]], step_size=0.05)
    assert torch.allclose(afresh.perturbed_logits(start), found[0], atol=1e-5)
    assert (afresh.perturbed_logits(third) - found[2]).abs().max() > 1e-2
    assert pplm.cost.forward_passes == 5 * pplm.cost.steps


def test_accumulated_perturbations_are_those_of_a_cache_that_is_never_made_anew():
    """The published loop: the cache of the pass on perturbed memory is the next step's memory."""
    model = family("bart")
    _, mask, states = encoded(model, (9,))
    pplm = PPLM(model, states, mask, [[11]], step_size=0.05, accumulate=True)
    steps = torch.tensor([[2, 8, 6]])
    found = [pplm.perturbed_logits(steps[:, :length]) for length in (1, 2, 3)]
    memory = PPLM(model, states, mask, [[11]])._memory(steps[:, :0], 1)
    for n, logits in enumerate(found):
        fresh = PPLM(model, states, mask, [[11]])._next(steps[:, :1], memory, 1)[0] if n == 0 else None
        for _ in range(3):
            parts = [part.detach().requires_grad_() for part in memory]
            p = PPLM(model, states, mask, [[11]])._next(steps[:, n : n + 1], parts, 1)[0].log_softmax(1)
            with torch.no_grad():
                plain = model(
                    encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=steps[:, : n + 1]
                ).logits[:, -1].log_softmax(1)  # fmt: skip
            loss = -p[0, 11] + 0.01 * (p.exp() * (p - plain)).sum()
            slopes = torch.autograd.grad(loss, parts, allow_unused=True)
            memory = [
                part if g is None or not g.numel() else part - 0.05 * g / g.norm() ** 1.5
                for part, g in zip(memory, slopes, strict=True)
            ]
        with torch.no_grad():
            expected, memory = PPLM(model, states, mask, [[11]])._next(steps[:, n : n + 1], memory, 1)
        torch.testing.assert_close(logits, expected, atol=5e-4, rtol=0)
        assert fresh is None or (fresh - expected).abs().max() > 1e-2


# --- keyword boost


def test_a_boost_goes_to_its_own_documents_beams_and_not_to_words_written_already():
    scores = torch.zeros(4, 6)  # two documents, two beams each
    written = torch.tensor([[0, 1], [0, 3], [0, 5], [0, 1]])
    boosted = KeywordBoost([[3, 4], [5]], boost=2.0)(written, scores)
    expected = torch.zeros(4, 6)
    expected[0, [3, 4]] = 2
    expected[1, 4] = 2
    expected[3, 5] = 2
    assert torch.equal(boosted, expected)
    again = KeywordBoost([[3, 4], [5]], boost=2.0, once=False)(written, scores)
    assert again[1, 3] == 2
    assert again[2, 5] == 2
    scores[0, 3] = -torch.inf
    assert KeywordBoost([[3, 4], [5]])(written, scores)[0, 3] == -torch.inf
    with pytest.raises(InputError, match="multiple of 3 rows"):
        KeywordBoost([[3], [4], [5]])(written, scores)
    with pytest.raises(InputError, match="boost: expected a number"):
        KeywordBoost([[3]], boost=math.nan)


def test_a_large_boost_makes_beam_search_say_each_documents_word():
    model = family("bart")
    ids, mask, _ = encoded(model)
    words = [[31], [32], [33]]
    out = model.generate(
        ids, attention_mask=mask, logits_processor=LogitsProcessorList([KeywordBoost(words, 50.0)]), **BEAMS
    )
    for row, (word,) in enumerate(words):
        assert word in out[row]
        assert not {31, 32, 33} - {word} & set(out[row].tolist()) - {31, 32, 33}


def test_under_beam_search_a_hypothesis_keeps_the_bonus_in_its_score():
    model = family("bart")
    ids, mask, _ = encoded(model, (9,))
    boost = KeywordBoost([[31]], 50.0)
    out = model.generate(
        ids, attention_mask=mask, logits_processor=LogitsProcessorList([boost]), output_scores=True,
        return_dict_in_generate=True, length_penalty=0.0, **BEAMS,
    )  # fmt: skip
    assert out.sequences[0].tolist().count(31) == 1
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, decoder_input_ids=out.sequences[:, :-1]).logits
    steps = logits.log_softmax(2).gather(2, out.sequences[:, 1:, None]).sum()
    assert out.sequences_scores[0].item() == pytest.approx(steps.item() + 50, abs=1e-3)


# --- pre-softmax bias


@pytest.mark.parametrize("name", ["bart", "t5", "pegasus_x", "bert2bert"])
def test_the_bias_leaves_outside_tokens_a_share_alpha_of_their_odds(name):
    model = family(name)
    if name != "t5":
        model.set_attn_implementation("eager")
    _, mask, states = encoded(model)
    span = torch.zeros_like(mask).bool()
    span[0, 2:4] = True
    span[1, 1] = True  # row 2: an empty span, which changes nothing
    arguments = {
        "encoder_outputs": (states,),
        "attention_mask": mask,
        "decoder_input_ids": torch.tensor([[2, 8]] * 3),
        "output_attentions": True,
    }
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model(**arguments).cross_attentions[0]  # the first layer's queries are the same in both
        with softmax_bias(model, cross_attentions(model), span, alpha=0.1):
            biased = model(**arguments).cross_attentions[0]
    width = mask.shape[1]
    for row in range(2):
        scale = torch.where(span[row], 1.0, 0.1)
        expected = plain[row, :, :, :width] * scale
        expected = expected / expected.sum(-1, keepdim=True)
        assert torch.allclose(biased[row, :, :, :width], expected, atol=1e-5)
    assert torch.allclose(biased[2], plain[2], atol=1e-6)
    assert model.config._attn_implementation == "eager"


def test_the_bias_reaches_only_the_block_and_leaves_nothing_behind_an_exception():
    model = family("bart")
    ids, mask, _ = encoded(model)
    before = model.generate(ids, attention_mask=mask, **BEAMS)
    span = torch.zeros_like(mask).bool()
    span[:, 1] = True
    with pytest.raises(RuntimeError, match="stop"), softmax_bias(model, cross_attentions(model), span, 1e-4):
        raise RuntimeError("stop")
    assert torch.equal(model.generate(ids, attention_mask=mask, **BEAMS), before)


def test_the_bias_refuses_models_without_the_interface_and_wrong_shares():
    led, bart = family("led"), family("bart")
    span = torch.ones(1, 4).bool()
    with (
        pytest.raises(InputError, match="does not use transformers' attention interface"),
        softmax_bias(led, cross_attentions(led), span),
    ):
        pass
    with (
        pytest.raises(InputError, match="alpha: expected a share above 0"),
        softmax_bias(bart, cross_attentions(bart), span, 0.0),
    ):
        pass


def test_the_bias_method_keeps_special_tokens_and_the_relevant_sentences_in_the_span(monkeypatch):
    model, tokenizer = bart_with_tokenizer()
    spans = []

    def spy(model, layers, span, alpha):
        spans.append(span)
        return softmax_bias(model, layers, span, alpha)

    monkeypatch.setattr(methods, "softmax_bias", spy)
    documents = [f"{CORPUS[0]} {CORPUS[2]}", CORPUS[3]]
    summarize("bias", Steerer(model, tokenizer), documents, ["music", "trees"],
              MethodSettings(sentences=1, generate=GREEDY))  # fmt: skip
    encoded = tokenizer(documents[0])["input_ids"]
    first = len(tokenizer(CORPUS[0], add_special_tokens=False)["input_ids"])
    kept = [0, *range(1, first + 1), len(encoded) - 1]  # <s>, the sentence about music, </s>
    (span,) = spans
    assert span[0].nonzero().flatten().tolist() == kept
    assert span[1].sum() == len(tokenizer(documents[1])["input_ids"])  # no pad


# --- all methods, by name


@pytest.fixture(scope="module", params=["bart", "t5"])
def steerer(request):
    model, tokenizer = bart_with_tokenizer() if request.param == "bart" else t5_with_tokenizer()
    for layer in cross_attentions(model):
        layer.output.weight.data *= 6  # random weights hardly look at the source otherwise
    return Steerer(model, tokenizer, weight=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_each_document_of_a_batch_gets_the_summary_it_gets_alone(steerer, method):
    settings = MethodSettings(
        boost=3.0, sentences=1, pplm={"step_size": 0.05}, generate=BEAMS, online={"grid": (0.1, 0.5, 0.9)}
    )
    together = summarize(method, steerer, DOCUMENTS, CONTROLS, settings)
    assert len(together) == 3
    for n in range(3):
        alone = summarize(method, steerer, [DOCUMENTS[n]], [CONTROLS[n]], settings)
        assert alone[0] == together[n]


def test_every_method_but_plain_changes_a_summary(steerer):
    if steerer.model.config.model_type == "t5":
        pytest.skip("the random T5 repeats one token whatever its source says")
    settings = MethodSettings(
        boost=20.0, alpha=1e-6, sentences=1, pplm={"step_size": 0.5, "gm": 1.0}, generate=GREEDY,
        online={"grid": (0.5, 0.6)},
    )  # fmt: skip
    texts = {m: [s.text for s in summarize(m, steerer, DOCUMENTS, CONTROLS, settings)] for m in METHODS}
    assert [m for m in METHODS if texts[m] == texts["plain"]] == ["plain"]


@pytest.mark.parametrize("method", ["plain", "boost", "bias", "relattn"])
def test_a_users_own_boost_meets_its_document_in_every_method_and_batch(steerer, method):
    words = [steerer.tokenizer(f" {w}", add_special_tokens=False)["input_ids"][-1:]
             for w in ("night", "trees", "winter")]  # fmt: skip
    own = {**GREEDY, "max_new_tokens": 3, "logits_processor": [KeywordBoost(words, 60.0)]}
    settings = MethodSettings(boost=0.0, batch_size=2, generate=own)
    found = summarize(method, steerer, DOCUMENTS, CONTROLS, settings)
    for summary, (word,) in zip(found, words, strict=True):
        assert steerer.tokenizer.decode([word]).strip() in summary.text


def test_plain_is_generate(steerer):
    found = summarize("plain", steerer, DOCUMENTS, CONTROLS, MethodSettings(generate=BEAMS))
    inputs = steerer.tokenizer(DOCUMENTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = steerer.model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **BEAMS)
    assert [s.text for s in found] == [t.strip() for t in steerer.tokenizer.batch_decode(out, True)]


def test_pplm_reports_its_cost(steerer):
    cost = PPLMCost()
    summarize("pplm", steerer, DOCUMENTS[:1], CONTROLS[:1], MethodSettings(generate=GREEDY), cost)
    assert 1 <= cost.steps <= 6
    assert cost.backward_passes == 3 * cost.steps
    assert cost.forward_passes == 5 * cost.steps


def test_sentences_are_ranked_by_what_stands_out_and_kept_in_order():
    document = "One two. Three four five six. Seven."
    starts = [0, 3, 7, 8, 14, 19, 24, 28, 29, 35, 36]
    tokens = [*pairwise(starts), (0, 0)]  # the last one is a special token
    a_rel = torch.tensor([0.05, 0.05, 0.05, 0.09, 0.09, 0.09, 0.09, 0.09, 0.3, 0.05, 0.05])
    texts = tuple(document[a:b] for a, b in tokens)
    result = RelevanceResult(a_rel, a_rel, texts, tuple(tokens), 5.0, ("x",), ())
    found = sentence_relevance(document, result)
    assert [round(s.mass, 6) for s in found] == [0.15, 0.45, 0.35]
    # the long sentence has the most mass, but only the last has a token above the uniform 1/11
    assert [round(s.excess, 4) for s in found] == [0.0, 0.0, round(0.3 - 1 / 11, 4)]
    assert extract(document, result, keep=1) == "Seven."
    assert extract(document, result, keep=2) == "One two. Seven."
    with pytest.raises(InputError, match="gives no offsets"):
        sentence_relevance(document, replace(result, offsets=None))
    with pytest.raises(InputError, match="keep: expected 1 sentence or more"):
        extract(document, result, keep=0)


def test_extract_summarizes_the_sentence_with_the_control_only(steerer):
    found = summarize(
        "extract", steerer, DOCUMENTS[:1], ["water"], MethodSettings(sentences=1, generate=GREEDY)
    )
    alone = summarize("plain", steerer, [CORPUS[2]], ["river"], MethodSettings(generate=GREEDY))
    assert found[0].text == alone[0].text


def test_a_bag_holds_the_tokens_of_the_control_inside_a_text():
    _, tokenizer = bart_with_tokenizer()
    inside = tokenizer("a music", add_special_tokens=False)["input_ids"]
    assert set(bag_of_words("music", tokenizer)) <= set(inside)


def test_wrong_methods_and_controls_are_refused(steerer):
    with pytest.raises(InputError, match="control 1 is empty"):
        summarize("prefix", steerer, DOCUMENTS[:2], ["music", "  "])
    with pytest.raises(InputError, match="expected 2, one a document, got 1"):
        summarize("plain", steerer, DOCUMENTS[:2], ["music"])
