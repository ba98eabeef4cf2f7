"""Steerer: generate as users call it, on a tiny BART and a tiny T5 with real tokenizers."""

import logging
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from number_tokenizer import NumberTokenizer
from tiny_models import CORPUS, bart_with_tokenizer, family, t5_with_tokenizer, wordpiece_tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig, LogitsProcessorList

from relattn import EmbeddingRelevance, RelAttnModule, Steerer, online_select
from relattn.families import encoder_arguments
from relattn.generation import PAPER_SETTINGS, generation_settings
from relattn.logit_boost import KeywordBoost
from relattn.methods import MethodSettings, summarize
from shared_core import InputError

DOCUMENTS = [" ".join(CORPUS[:2]), CORPUS[3], " ".join(CORPUS[4:7])]
CONTROLS = ["music", ["climate policy", "trees"], "treaty"]
# Random models repeat themselves; without repetition their summaries differ and pass the filters.
SETTINGS = {"max_new_tokens": 10, "num_beams": 3, "no_repeat_ngram_size": 1}


@pytest.fixture(params=[bart_with_tokenizer, t5_with_tokenizer], ids=["bart", "t5"])
def steerer(request) -> Steerer:
    model, tokenizer = request.param()
    return Steerer(model, tokenizer, EmbeddingRelevance(temperature="auto"), 0.5)


def _plain(steerer: Steerer, documents: list[str], **settings) -> list[str]:
    """What a user gets from the model without this package."""
    batch = steerer.tokenizer(documents, return_tensors="pt", padding=True)
    settings = {"do_sample": False} | SETTINGS | settings
    ids = steerer.model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **settings)
    return [text.strip() for text in steerer.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _texts(summaries) -> list[str]:
    return [summary.text for summary in summaries]


def _hooks(model) -> int:
    # not forward hooks: transformers leaves its own there, to capture hidden states
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_weight_zero_is_plain_generation(steerer):
    assert _texts(steerer.generate(DOCUMENTS, CONTROLS, 0.0, **SETTINGS)) == _plain(steerer, DOCUMENTS)


def test_steering_changes_summaries_and_different_controls_change_them_differently(steerer):
    one = _texts(steerer.generate(DOCUMENTS[:1], ["music"], 0.9, **SETTINGS))
    other = _texts(steerer.generate(DOCUMENTS[:1], ["opera season"], 0.9, **SETTINGS))
    assert len({*one, *other, *_plain(steerer, DOCUMENTS[:1])}) == 3


def test_the_low_level_block_steers_the_users_own_generate(steerer):
    batch = steerer.tokenizer(DOCUMENTS, return_tensors="pt", padding=True)
    batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    settings = {"do_sample": False} | SETTINGS
    with steerer.steer(batch, CONTROLS) as inputs:
        once = steerer.model.generate(**inputs, **settings)
        twice = steerer.model.generate(**batch, **settings)
    assert torch.equal(once, twice)
    texts = [text.strip() for text in steerer.tokenizer.batch_decode(once, skip_special_tokens=True)]
    assert texts == _texts(steerer.generate(DOCUMENTS, CONTROLS, **SETTINGS))


def test_an_exception_inside_generate_leaves_nothing_behind(steerer):
    before = _plain(steerer, DOCUMENTS)
    calls = []

    def failing(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory, say")

    handle = steerer.model.lm_head.register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        steerer.generate(DOCUMENTS, CONTROLS, **SETTINGS)
    handle.remove()
    assert _hooks(steerer.model) == 0
    assert _plain(steerer, DOCUMENTS) == before
    steerer.generate(DOCUMENTS, CONTROLS, **SETTINGS)  # and the model is not held as "being steered"


def test_nested_steering_is_refused_and_the_outer_one_goes_on(steerer):
    batch = steerer.tokenizer(DOCUMENTS[:1], return_tensors="pt")
    with steerer.steer(batch, CONTROLS[:1]):
        with pytest.raises(InputError, match="model: is being steered already"):
            Steerer(steerer.model, steerer.tokenizer).generate(DOCUMENTS, CONTROLS)
        assert _hooks(steerer.model) == len(steerer.layers)
    assert _hooks(steerer.model) == 0


def test_plain_generation_in_another_thread_is_refused_rather_than_steered(steerer):
    batch = steerer.tokenizer(DOCUMENTS[:1], return_tensors="pt")
    errors = []

    def other():
        try:
            _plain(steerer, DOCUMENTS[:1])
        except RuntimeError as error:
            errors.append(str(error))

    with steerer.steer(batch, CONTROLS[:1]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert errors == ["this model is being steered in another thread: wait for it, or use a copy"]


def test_two_runs_give_the_same_text(steerer):
    first = steerer.generate(DOCUMENTS, CONTROLS, **SETTINGS)
    torch.manual_seed(99)
    assert _texts(first) == _texts(steerer.generate(DOCUMENTS, CONTROLS, **SETTINGS))
    assert generation_settings(steerer.model, {})["do_sample"] is False
    assert PAPER_SETTINGS["do_sample"] is False


def test_every_document_has_its_own_weight_and_order_is_kept(steerer):
    weights = [0.0, 0.4, 0.9]
    together = steerer.generate(DOCUMENTS, CONTROLS, weights, batch_size=2, **SETTINGS)
    assert [summary.weight for summary in together] == weights
    for n in range(3):
        [alone] = steerer.generate([DOCUMENTS[n]], [CONTROLS[n]], weights[n], **SETTINGS)
        assert together[n].text == alone.text


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 2), (3, 2), (1, 2, 4), (3, 2, 4), (3, 1, 4)])
def test_weights_per_document_layer_and_head(shape):
    model, tokenizer = bart_with_tokenizer()
    weight = torch.rand(shape)
    found = Steerer(model, tokenizer).generate(DOCUMENTS, CONTROLS, weight, **SETTINGS)
    full = weight.reshape(shape + (1,) * (3 - len(shape))).expand(3, 2, 4)
    assert [s.weight for s in found] == pytest.approx(full.double().mean((1, 2)).tolist())


def test_a_head_of_weight_zero_is_left_alone():
    """w on one head of one layer moves the logits as w on that head in the reference does."""
    model, tokenizer = bart_with_tokenizer()
    steerer = Steerer(model, tokenizer)
    seen = []
    weight = torch.zeros(1, 2, 4)
    weight[0, 1, 2] = 1.0
    batch = tokenizer(DOCUMENTS[:1], return_tensors="pt")
    with torch.no_grad(), steerer.steer(batch, ["music"], weight) as inputs:
        layer = steerer.layers[1].output
        handle = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        model(**inputs, decoder_input_ids=torch.tensor([[2, 8, 9]]))
        handle.remove()
    heads = seen[0].unflatten(2, (4, 4))[0]
    assert torch.equal(heads[0, 2], heads[2, 2])  # the steered head does not look at the query
    assert not torch.equal(heads[0, 1], heads[2, 1])


def test_online_selection_is_the_selection_among_fixed_weight_summaries(steerer):
    grid = (0.01, 0.2, 0.5, 0.8)
    found = steerer.generate(DOCUMENTS, CONTROLS, "online", grid=grid, **SETTINGS)
    for n, summary in enumerate(found):
        expected = [steerer.generate([DOCUMENTS[n]], [CONTROLS[n]], w, **SETTINGS)[0].text for w in grid]
        assert [candidate.text for candidate in summary.candidates] == expected
        assert [candidate.weight for candidate in summary.candidates] == list(grid)
        chosen = online_select(expected)
        assert (summary.text, summary.weight) == (expected[chosen], grid[chosen])


def test_online_selection_encodes_each_document_once(steerer):
    calls = []
    handle = steerer.model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    steerer.generate(DOCUMENTS, CONTROLS, "online", **SETTINGS)
    handle.remove()
    assert len(calls) == 1


def test_a_coarse_grid_decodes_less_and_keeps_to_what_the_whole_grid_says(steerer, monkeypatch):
    grid = tuple(round(0.03 * n, 2) for n in range(1, 31))
    whole = steerer.generate(DOCUMENTS, CONTROLS, "online", grid=grid, **SETTINGS)
    found = steerer.generate(DOCUMENTS, CONTROLS, "online", grid=grid, coarse=5, **SETTINGS)
    for all_of_them, some in zip(whole, found, strict=True):
        assert [c.weight for c in some.candidates] == list(grid)
        assert all(c.decoded for c in all_of_them.candidates)
        assert all(c.decoded for c in some.candidates[::5])
        pairs = list(zip(some.candidates, all_of_them.candidates, strict=True))
        assert all(mine.text == theirs.text for mine, theirs in pairs if mine.decoded)
        assert online_select([c.text for c in some.candidates]) == grid.index(some.weight)
    assert 18 <= sum(c.decoded for s in found for c in s.candidates) < 90
    with pytest.raises(InputError, match="coarse: expected 1 or more"):
        steerer.generate(DOCUMENTS, CONTROLS, "online", coarse=0)


def test_the_models_prefix_is_read_and_stands_for_no_text(steerer):
    """As T5's "summarize: ": generated as if the document began with it, shown as if it did not."""
    prefixed = [f"trade, {text}" for text in DOCUMENTS]
    own = Steerer(steerer.model, steerer.tokenizer, steerer.relevance_settings, 0.5, source_prefix="trade, ")
    found = own.generate(DOCUMENTS, CONTROLS, **SETTINGS)
    expected = steerer.generate(prefixed, CONTROLS, **SETTINGS)
    assert _texts(found) == _texts(expected)
    for text, mine, theirs in zip(DOCUMENTS, found, expected, strict=True):
        assert torch.equal(mine.relevance.a_rel, theirs.relevance.a_rel)
        pieces = [text[a:b] for a, b in mine.relevance.offsets]
        assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
        assert "trade" not in "".join(pieces) or "trade" in text
    [missing] = own.relevance([CORPUS[3]], ["trade"])  # the prefix is no place where a control stands
    assert missing.warnings[0].startswith("'trade' does not occur in the source; best match: '")
    assert missing.warnings[0].split("'")[3] in CORPUS[3]


def test_the_chunk_size_changes_nothing(steerer):
    whole = steerer.generate(DOCUMENTS, CONTROLS, "online", grid=(0.1, 0.5, 0.9), **SETTINGS)
    small = steerer.generate(DOCUMENTS, CONTROLS, "online", grid=(0.1, 0.5, 0.9), max_rows=2, **SETTINGS)
    assert [s.candidates for s in whole] == [s.candidates for s in small]


def test_coverage_selection_is_taken_only_by_its_name(steerer):
    grid = (0.01, 0.4, 0.9)
    found = steerer.generate(DOCUMENTS, CONTROLS, "online", grid=grid, select="coverage", **SETTINGS)
    for summary in found:
        assert summary.text in [candidate.text for candidate in summary.candidates]
    with pytest.raises(InputError, match='select: expected "consensus" or "coverage"'):
        steerer.generate(DOCUMENTS, CONTROLS, "online", select="mass", **SETTINGS)


def test_sampling_online_needs_a_seed_and_repeats_with_one(steerer):
    with pytest.raises(InputError, match="seed: online selection among sampled summaries needs a seed"):
        steerer.generate(DOCUMENTS, CONTROLS, "online", do_sample=True, **SETTINGS)
    options = {"grid": (0.1, 0.5), "do_sample": True, "temperature": 2.0} | SETTINGS
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = steerer.generate(DOCUMENTS, CONTROLS, "online", seed=1, **options)
    assert torch.equal(torch.get_rng_state(), before)
    again = steerer.generate(DOCUMENTS, CONTROLS, "online", seed=1, **options)
    other = steerer.generate(DOCUMENTS, CONTROLS, "online", seed=2, **options)
    assert [s.candidates for s in first] == [s.candidates for s in again]
    assert [s.candidates for s in first] != [s.candidates for s in other]


def test_finished_documents_come_before_later_ones_start(steerer):
    calls = []
    handle = steerer.model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    stream = steerer.iterate(DOCUMENTS, CONTROLS, batch_size=1, **SETTINGS)
    next(stream)
    handle.remove()
    assert len(calls) == 1


def test_gradients_are_on_in_the_callers_code_between_summaries(steerer):
    weight = torch.ones(1, requires_grad=True)
    for number, _ in steerer.iterate(DOCUMENTS, CONTROLS, batch_size=1, **SETTINGS):
        assert torch.is_grad_enabled(), number
        (2 * weight).sum().backward()
    assert weight.grad == 6
    assert torch.is_grad_enabled()


def test_a_model_in_training_mode_generates_without_dropout_and_stays_in_training_mode(steerer):
    expected = _texts(steerer.generate(DOCUMENTS, CONTROLS, **SETTINGS))
    steerer.model.train()
    steerer.layers[0].attention.eval()  # a user's frozen part
    for module in steerer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert _texts(steerer.generate(DOCUMENTS, CONTROLS, **SETTINGS)) == expected
    assert steerer.model.training
    assert not steerer.layers[0].attention.training


def test_a_left_padded_batch_has_the_relevance_of_the_right_padded_one():
    model, tokenizer = (
        t5_with_tokenizer()
    )  # relative positions: its encoder does not care where a text stands
    steerer = Steerer(model, tokenizer, weight=0.8)
    outputs = []
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = tokenizer(DOCUMENTS, return_tensors="pt", padding=True)
        with torch.no_grad(), steerer.steer(batch, CONTROLS) as inputs:
            outputs.append(model(**inputs, decoder_input_ids=torch.tensor([[0, 8, 9]] * 3)).logits)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


def test_a_batch_without_mask_has_the_mask_that_generate_infers(steerer):
    batch = steerer.tokenizer(DOCUMENTS, return_tensors="pt", padding=True)
    outputs = []
    for asked in ({"input_ids": batch.input_ids}, batch):
        with steerer.steer(asked, CONTROLS) as inputs:
            assert torch.equal(inputs["attention_mask"], batch.attention_mask)
            outputs.append(steerer.model.generate(**inputs, do_sample=False, **SETTINGS))
    assert torch.equal(*outputs)
    steerer.model.config.pad_token_id = steerer.model.generation_config.eos_token_id  # texts end with it
    with steerer.steer({"input_ids": batch.input_ids}, CONTROLS) as inputs:
        assert inputs["attention_mask"].all()


def test_leds_global_attention_is_on_the_first_real_token_or_where_the_user_says():
    model = family("led")
    padded = encoder_arguments(model, torch.tensor([[1, 1, 1], [0, 0, 1]]))
    assert padded["global_attention_mask"].tolist() == [[1, 0, 0], [0, 0, 1]]
    steerer = Steerer(model, NumberTokenizer())
    ids = torch.randint(5, 99, (1, 12))
    target = torch.tensor([[2, 7]])
    wide = torch.zeros_like(ids)
    wide[0, [0, 5]] = 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = {}
    for name, asked in (("first", batch), ("own", {**batch, "global_attention_mask": wide})):
        with torch.no_grad(), steerer.steer(asked, ["12"], 0.3) as inputs:
            found[name] = model(**inputs, decoder_input_ids=target).logits
            if name == "own":  # the model's own encoder pass is the same one
                assert torch.allclose(model(**asked, decoder_input_ids=target).logits, found[name], atol=1e-6)
    assert (found["own"] - found["first"]).abs().max() > 1e-3


def test_a_short_batch_leaves_bigbirds_block_sparse_attention_on_and_its_modes_as_they_were():
    model = family("bigbird_pegasus_sparse")
    steerer = Steerer(model, NumberTokenizer())
    long = " ".join(map(str, range(10, 60)))
    before = steerer.relevance([long], ["12"])[0].a_rel
    model.train()
    steerer.generate(["12 14"], ["12"], max_new_tokens=2)
    assert model.get_encoder().attention_type == "block_sparse"
    assert all(layer.self_attn.attention_type == "block_sparse" for layer in model.get_encoder().layers)
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.equal(steerer.relevance([long], ["12"])[0].a_rel, before)


def test_half_precision_models_are_steered():
    model, tokenizer = bart_with_tokenizer()
    exact = Steerer(model, tokenizer).relevance(DOCUMENTS, CONTROLS)
    steerer = Steerer(model.to(torch.bfloat16), tokenizer)
    rough = steerer.relevance(DOCUMENTS, CONTROLS)
    for a, b in zip(exact, rough, strict=True):
        assert b.a_rel.dtype == torch.float32
        torch.testing.assert_close(a.a_rel, b.a_rel, atol=2e-3, rtol=0.05)
    assert all(s.text for s in steerer.generate(DOCUMENTS, CONTROLS, "online", grid=(0.1, 0.4), **SETTINGS))


def test_encoder_decoder_models_take_two_tokenizers():
    from tiny_models import byte_level_tokenizer

    source, target = wordpiece_tokenizer(), byte_level_tokenizer()
    model = family("bert2bert")
    model.encoder.resize_token_embeddings(len(source))
    model.decoder.resize_token_embeddings(len(target))
    model.config.encoder.vocab_size, model.config.decoder.vocab_size = len(source), len(target)
    steerer = Steerer(model, source, weight=0.6, target_tokenizer=target)
    [found] = steerer.generate(DOCUMENTS[:1], ["music"], **SETTINGS)
    batch = source(DOCUMENTS[:1], return_tensors="pt")
    with steerer.steer({"input_ids": batch.input_ids}, ["music"]) as inputs:
        ids = model.generate(**inputs, do_sample=False, **SETTINGS)
    assert found.text == target.decode(ids[0], skip_special_tokens=True).strip()
    assert "music" in found.relevance.tokens


def test_saved_models_steer_after_loading(bart_folder, t5_folder):
    for folder in (bart_folder, t5_folder):
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        steerer = Steerer(model, AutoTokenizer.from_pretrained(folder), weight=0.6)
        assert len(steerer.generate(DOCUMENTS, CONTROLS)) == 3


def test_the_models_own_generation_settings_come_before_ours():
    model, _ = bart_with_tokenizer()
    assert generation_settings(model, {}) == {"do_sample": False, "num_beams": 4, "max_new_tokens": 142}
    model.generation_config.update(num_beams=2, max_length=50)
    assert generation_settings(model, {}) == {"do_sample": False}
    assert generation_settings(model, {"num_beams": 7}) == {"do_sample": False, "num_beams": 7}


def test_a_generation_config_of_the_callers_keeps_the_models_own_settings_where_it_says_nothing():
    model, _ = bart_with_tokenizer()
    model.generation_config.update(max_length=50)
    config = GenerationConfig(num_beams=2)
    assert generation_settings(model, {"generation_config": config}) == {"generation_config": config}


@pytest.mark.parametrize("place", ["model", "caller"])
def test_settings_that_ask_for_an_object_still_give_text(place):
    model, tokenizer = bart_with_tokenizer()
    steerer = Steerer(model, tokenizer)
    expected = _texts(steerer.generate(DOCUMENTS, CONTROLS, **SETTINGS))
    config = model.generation_config if place == "model" else GenerationConfig(**SETTINGS, do_sample=False)
    config.return_dict_in_generate = True
    given = SETTINGS if place == "model" else {"generation_config": config}
    assert _texts(steerer.generate(DOCUMENTS, CONTROLS, **given)) == expected
    assert config.return_dict_in_generate  # the user's object is as it was
    boosted = summarize("boost", steerer, DOCUMENTS, CONTROLS, MethodSettings(boost=0.0, generate=given))
    assert [s.text for s in boosted] == _plain(steerer, DOCUMENTS, return_dict_in_generate=False)


@pytest.mark.parametrize("place", ["model", "caller"])
def test_settings_that_ask_for_several_summaries_are_refused(place):
    model, tokenizer = bart_with_tokenizer()
    config = model.generation_config if place == "model" else GenerationConfig(num_beams=2)
    config.num_return_sequences = 2
    given = {} if place == "model" else {"generation_config": config}
    with pytest.raises(InputError, match=r"num_return_sequences: expected 1, .* \(got 2\)"):
        Steerer(model, tokenizer).generate(DOCUMENTS, CONTROLS, **given)


@pytest.mark.parametrize(
    ("documents", "controls", "weight", "message"),
    [
        (["", "b"], ["a", "b"], 0.1, "documents: document 0 is empty"),
        (["a text", " \n"], ["a", "b"], 0.1, "documents: document 1 is empty"),
        ("a text", ["a"], 0.1, "documents: expected a list of documents, got one string"),
        (["a text"], "a", 0.1, "controls: expected a list with one control a document, got one string"),
        (["a text"], ["a", "b"], 0.1, "controls: expected 1, one a document, got 2"),
        (["a text", "a text"], ["a"], 0.1, "controls: expected 2, one a document, got 1"),
        (["a text"], [" "], 0.1, "controls: control 0 is empty"),
        (["a text"], [None], 0.1, "controls: control 0 is empty"),
        (["a text"], ["a"], 1.2, r"weight: expected numbers from 0 to 1 \(got 1.2"),
        (["a text"], ["a"], -0.1, "weight: expected numbers from 0 to 1"),
        (["a text"], ["a"], float("nan"), r"weight: expected numbers from 0 to 1 \(got nan\)"),
        (
            ["a text"],
            ["a"],
            [0.1, 0.2],
            r"weight: expected a number, or shape \(1,\), \(1, 2\) or \(1, 2, 4\)",
        ),
        (["a text"], ["a"], torch.zeros(1, 3), r"got shape \(1, 3\)"),
        (["a text"], ["a"], torch.zeros(1, 1, 1, 1), r"got shape \(1, 1, 1, 1\)"),
        (["a text"], ["a"], "on-line", 'weight: expected a number from 0 to 1, or "online"'),
    ],
)
def test_bad_documents_controls_and_weights_are_named(documents, controls, weight, message):
    steerer = Steerer(*bart_with_tokenizer())
    with pytest.raises(InputError, match=message):
        steerer.generate(documents, controls, weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected 1 or more"),
        ({"on_empty": "skip"}, 'on_empty: expected "error" or "plain"'),
        ({"weight": "online", "grid": (0.3, 0.1)}, "grid: expected weights from 0 to 1, ascending"),
        ({"weight": "online", "grid": ()}, "grid: expected weights from 0 to 1, ascending"),
        ({"weight": "online", "grid": (0.5, 1.5)}, "grid: expected weights from 0 to 1, ascending"),
        ({"attention_mask": torch.ones(1, 2)}, "attention_mask: is filled in here"),
        ({"num_return_sequences": 2}, "num_return_sequences: expected 1"),
    ],
)
def test_bad_options_are_named(options, message):
    steerer = Steerer(*bart_with_tokenizer())
    with pytest.raises(InputError, match=message):
        steerer.generate(["a text"], ["a"], **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder_input_ids", torch.tensor([[2, 100], [2, 200]])),
        ("decoder_attention_mask", torch.ones(2, 3)),
        ("global_attention_mask", torch.ones(2, 3)),
        ("a_new_name", torch.ones(2, 3)),
        ("prefix_allowed_tokens_fn", lambda row, written: [5]),
    ],
)
def test_arguments_with_a_row_a_document_are_refused_because_batches_go_by_length(name, value):
    steerer = Steerer(*bart_with_tokenizer())
    with pytest.raises(InputError, match=f"{name}: has a row a document, but .* use Steerer.steer"):
        steerer.generate(DOCUMENTS[:2], CONTROLS[:2], **{name: value})


@pytest.mark.parametrize("weight", [0.5, "online"])
def test_a_logits_processor_for_each_document_meets_its_own_document(steerer, weight):
    """The first document is the longest, so that batches by length turn their order around."""
    documents = [" ".join(CORPUS[:3]), CORPUS[3], CORPUS[4]]
    words = [steerer.tokenizer(f" {w}", add_special_tokens=False)["input_ids"][-1:]
             for w in ("music", "river", "treaty")]  # fmt: skip
    settings = {"max_new_tokens": 3, "num_beams": 2, "weight": weight, "grid": [0.1, 0.2], "max_rows": 4}
    boosted = steerer.generate(
        documents, CONTROLS, **settings, logits_processor=LogitsProcessorList([KeywordBoost(words, 50.0)])
    )
    for summary, (word,) in zip(boosted, words, strict=True):
        assert steerer.tokenizer.decode([word]).strip() in summary.text
    with pytest.raises(InputError, match="bags: expected a bag for each document, got 1"):
        steerer.generate(documents, CONTROLS, **settings, logits_processor=[KeywordBoost(words[:1])])


def test_misspelt_options_reach_generate_and_are_refused_there():
    steerer = Steerer(*bart_with_tokenizer())
    with pytest.raises(ValueError, match="num_beam"):
        steerer.generate(["a text"], ["a"], num_beam=2)


def test_a_control_of_unknown_tokens_only_is_an_error():
    steerer = Steerer(*_wordpiece_bert())
    with pytest.raises(InputError, match=r"control 0: the tokenizer's vocabulary knows no token of it"):
        steerer.generate(["The opera house."], ["Ж"])


def test_a_blank_control_can_mean_a_plain_summary(steerer):
    found = steerer.generate(DOCUMENTS, ["music", "", None], on_empty="plain", **SETTINGS)
    assert _texts(found)[1:] == _plain(steerer, DOCUMENTS)[1:]
    assert [s.weight for s in found] == [0.5, 0.0, 0.0]
    online = steerer.generate(
        DOCUMENTS, ["music", " ", []], "online", grid=(0.1, 0.9), on_empty="plain", **SETTINGS
    )
    assert _texts(online)[1:] == _plain(steerer, DOCUMENTS)[1:]
    assert [len(s.candidates) for s in online] == [2, 0, 0]


def test_a_control_that_is_not_in_the_source_is_a_warning_with_the_best_match(steerer, caplog):
    with caplog.at_level(logging.WARNING, "relattn"):
        found = steerer.generate([CORPUS[2]], ["opera"], **SETTINGS)[0]
    [warning] = found.warnings
    assert warning.startswith("'opera' does not occur in the source; best match: '")
    assert warning.split("'")[3] in CORPUS[2]
    assert warning in caplog.text
    assert steerer.generate([CORPUS[2]], ["River"], **SETTINGS)[0].warnings == ()


def test_truncation_is_a_warning_with_the_number_of_lost_tokens_and_phrases():
    model, tokenizer = bart_with_tokenizer()
    text = f"{CORPUS[0]} {CORPUS[1]}"
    whole = len(tokenizer(text).input_ids)
    steerer = Steerer(model, tokenizer, max_source_tokens=20)
    [found] = steerer.relevance([text], [["music", "dance"]])
    assert len(found.tokens) == 20
    assert found.warnings == (
        f"document truncated: {whole - 20} tokens were lost; 'dance' stands only in the lost part",
    )
    [found] = steerer.relevance([text], ["music"])
    assert found.warnings == (f"document truncated: {whole - 20} tokens were lost",)


def test_documents_are_cut_at_the_models_positions_even_if_more_is_asked_for():
    model, tokenizer = bart_with_tokenizer()
    tokenizer.model_max_length = 10_000
    assert Steerer(model, tokenizer, max_source_tokens=5_000).max_source_tokens == 160
    model, tokenizer = t5_with_tokenizer()
    tokenizer.model_max_length = int(1e30)
    assert Steerer(model, tokenizer).max_source_tokens is None
    with pytest.raises(InputError, match="max_source_tokens: expected 1 or more"):
        Steerer(model, tokenizer, max_source_tokens=0)


def test_decoder_only_models_are_refused():
    import transformers as hf

    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(
        InputError, match=r"GPT2LMHeadModel is not an encoder-decoder model.*expected one of BART, PEGASUS"
    ):
        Steerer(model, None)


def test_a_module_of_another_shape_is_refused():
    model, tokenizer = bart_with_tokenizer()
    module = RelAttnModule(RelAttnModule.for_model(model).config.__class__(16, 3, 4))
    with pytest.raises(
        InputError, match="module: expected 2 layers and 4 heads as the model has, got 3 and 4"
    ):
        Steerer(model, tokenizer, module=module)
    with pytest.raises(InputError, match="relevance: expected a module or a relevance, got both"):
        Steerer(model, tokenizer, EmbeddingRelevance(), module=RelAttnModule.for_model(model))


def test_no_documents_give_no_summaries(steerer):
    assert steerer.generate([], []) == []
    assert steerer.relevance([], []) == []


@given(order=st.permutations(range(3)), batch_size=st.integers(1, 4))
def test_order_and_batching_of_documents_do_not_matter(order, batch_size):
    steerer = Steerer(*bart_with_tokenizer(), weight=0.6)
    expected = steerer.relevance(DOCUMENTS, CONTROLS)
    found = steerer.relevance(
        [DOCUMENTS[n] for n in order], [CONTROLS[n] for n in order], batch_size=batch_size
    )
    for place, n in enumerate(order):
        assert (found[place].a_rel - expected[n].a_rel).abs().max() < 1e-6
        assert found[place].tokens == expected[n].tokens


def test_tokens_are_the_documents_text_where_offsets_say(steerer):
    [found] = steerer.relevance(DOCUMENTS[:1], CONTROLS[:1])
    for token, (start, end) in zip(found.tokens, found.offsets, strict=True):
        assert end == start or token == DOCUMENTS[0][start:end]
    assert found.a_rel.sum().item() == pytest.approx(1, abs=1e-6)
    assert found.effective_support == pytest.approx(8, abs=1e-2)


def _wordpiece_bert():
    source = wordpiece_tokenizer()
    model = family("bert2bert")
    model.encoder.resize_token_embeddings(len(source))
    return model, source
