"""`analyze` equals loops over the same hidden states, whatever the batches, padding and kind of model."""

import itertools

import numpy as np
import oracles
import pytest
import tiny_encoders
import torch
from tiny_encoders import SENTENCES

from isocse.analysis import analyze, analyze_states
from isocse.corpus import SentenceFile
from isocse.encoders import load_encoder, pool
from isocse.report import GeometryReport
from isocse.types import CLASSES
from shared_core import InputError


@pytest.fixture(scope="module")
def bert():
    return tiny_encoders.bert()


@pytest.fixture(scope="module")
def report(bert):
    return analyze(bert[0], SENTENCES, tokenizer=bert[1])


@pytest.fixture(scope="module")
def states(bert):
    """Hidden states by layer and sentence, computed one sentence at a time; and the token ids."""
    model, tokenizer = bert
    by_sentence, ids = [], []
    for sentence in SENTENCES:
        encoded = tokenizer(sentence, return_tensors="pt")
        with torch.no_grad():
            by_sentence.append(model(**encoded, output_hidden_states=True).hidden_states)
        ids.append(encoded["input_ids"][0].tolist())
    return [[layers[n][0] for layers in by_sentence] for n in range(3)], ids


def occurrences(states, ids, layer, *, first=False):
    found = {}
    for sentence, row in zip(states[layer], ids, strict=True):
        seen = set()
        for state, number in zip(sentence, row, strict=True):
            if first and number in seen:
                continue
            seen.add(number)
            found.setdefault(number, []).append(state)
    return found


def test_self_similarity_by_type_equals_a_loop_over_pairs_of_occurrences(bert, report, states):
    tokenizer = bert[1]
    for layer in range(3):
        found = occurrences(*states, layer)
        kept = {number: x for number, x in found.items() if len(x) >= 5}
        table = dict(zip(report.types.tokens, report.types.self_similarity[layer], strict=True))
        assert set(table) == set(tokenizer.convert_ids_to_tokens(list(kept)))
        for number, x in kept.items():
            token = tokenizer.convert_ids_to_tokens(number)
            assert table[token] == pytest.approx(oracles.mean_cosine(torch.stack(x)), abs=1e-6)
        plain = [table[t] for t in table if t not in ("[CLS]", "[SEP]")]
        assert report.measures["self_similarity"][layer] == pytest.approx(np.mean(plain), abs=1e-6)
        firsts = occurrences(*states, layer, first=True)
        values = [
            oracles.mean_cosine(torch.stack(firsts[number]))
            for number in kept
            if number not in tokenizer.all_special_ids and len(firsts[number]) > 1
        ]
        other = report.measures["self_similarity_other_count"][layer]
        assert other == pytest.approx(np.mean(values), abs=1e-6)


def test_intra_sentence_similarity_anisotropy_and_norms_equal_loops(report, states):
    for layer in range(3):
        sentences = states[0][layer]
        flat = torch.cat(sentences)
        m = {name: values[layer] for name, values in report.measures.items()}
        assert m["intra_sentence"] == pytest.approx(np.mean([oracles.intra(s) for s in sentences]), abs=1e-6)
        assert m["anisotropy"] == pytest.approx(oracles.expected_anisotropy(sentences[:]), abs=1e-6)
        units = flat.double() / flat.double().norm(dim=1, keepdim=True)
        pairs = (units @ units.T)[~torch.eye(len(flat), dtype=torch.bool)]
        assert m["anisotropy_tokens"] == pytest.approx(float(pairs.mean()), abs=1e-6)
        assert m["norm"] == pytest.approx(float(flat.norm(dim=1).mean()), abs=1e-5)
        mean = flat.double().mean(0)
        assert m["mean_distance"] == pytest.approx(float(mean.norm()), abs=1e-5)
        energy = float(flat.double().square().sum(1).mean())
        assert m["mean_share"] == pytest.approx(float(mean.square().sum()) / energy, abs=1e-6)
        assert m["cosine_to_mean"] == pytest.approx(float((units @ mean / mean.norm()).mean()), abs=1e-5)


def test_sentence_measures_equal_their_definitions_on_all_sentences(report, states):
    for layer in range(3):
        pooled = torch.stack([s.mean(0) for s in states[0][layer]])
        m = {name: values[layer] for name, values in report.measures.items()}
        assert m["sentence_cosine"] == pytest.approx(oracles.mean_cosine(pooled), abs=1e-6)
        assert m["isoscore_sentences"] == pytest.approx(oracles.isoscore(pooled), abs=1e-5)
        assert m["uniformity"] == pytest.approx(oracles.uniformity(pooled), abs=1e-5)
        assert m["partition_sentences"] == pytest.approx(oracles.partition(pooled), rel=1e-4)


def test_adjusted_values_and_the_baseline_add_up_to_the_unadjusted_ones(bert, report):
    m = report.measures
    for name in ("intra_sentence", "self_similarity"):
        np.testing.assert_allclose(m[f"adjusted_{name}"] + m["anisotropy"], m[name])
    semantic = report.by_class["semantic"]
    np.testing.assert_allclose(1 - m["spurious_contextualization"], semantic["adjusted_self_similarity"])
    for baseline, base in (("sampled", "anisotropy_sampled"), ("tokens", "anisotropy_tokens")):
        other = analyze(bert[0], SENTENCES, tokenizer=bert[1], baseline=baseline, detail=False).measures
        np.testing.assert_allclose(other["adjusted_intra_sentence"] + other[base], other["intra_sentence"])


def same(a, b, **tolerance):
    assert a.layers == b.layers
    for name in set(a.measures) | set(b.measures):
        np.testing.assert_allclose(b.measures[name], a.measures[name], err_msg=name, **tolerance)


def test_padding_and_batches_change_no_number(bert, report):
    for size in (1, 90, 100_000):
        other = analyze(bert[0], SENTENCES, tokenizer=bert[1], batch_tokens=size)
        same(report, other, rtol=2e-4, atol=2e-6)


def test_the_order_of_sentences_changes_no_number_that_is_not_drawn(bert, report):
    other = analyze(bert[0], SENTENCES[::-1], tokenizer=bert[1])
    for name in ("anisotropy", "intra_sentence", "self_similarity", "isoscore_sentences", "mean_share"):
        np.testing.assert_allclose(other.measures[name], report.measures[name], rtol=1e-4)


def test_the_seed_decides_what_is_drawn_and_nothing_else_does(bert, report):
    again, other = (analyze(bert[0], SENTENCES, tokenizer=bert[1], seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(again.measures["anisotropy_sampled"], report.measures["anisotropy_sampled"])
    assert (other.measures["anisotropy_sampled"] != report.measures["anisotropy_sampled"]).any()
    np.testing.assert_array_equal(other.measures["anisotropy"], report.measures["anisotropy"])


def scaled(states, ids, factor):
    for sentence, row in enumerate(ids):
        h = torch.stack([layer[sentence] for layer in states])[:, None] * factor
        yield h, torch.ones(1, len(row), dtype=torch.int64), torch.tensor([row])


def test_ten_times_longer_states_change_lengths_only(states):
    plain, longer = (analyze_states(scaled(*states, factor)) for factor in (1.0, 10.0))
    for name in ("norm", "norm_spread", "mean_distance"):
        expected = 10 * plain.measures[name]
        np.testing.assert_allclose(longer.measures[name], expected, rtol=1e-5, atol=1e-4)
    for name in ("anisotropy", "intra_sentence", "self_similarity", "isoscore_tokens", "uniformity",
                 "mean_share", "sentence_cosine", "top_dimension_share", "residual_anisotropy"):  # fmt: skip
        np.testing.assert_allclose(longer.measures[name], plain.measures[name], atol=2e-6)


def test_states_computed_elsewhere_give_the_same(bert, report, states):
    from isocse.types import kinds_of_tokenizer

    kinds = kinds_of_tokenizer(bert[1], range(len(bert[1])))
    found = analyze_states(scaled(*states, 1.0), kinds=kinds)
    same(report, found, rtol=2e-4, atol=2e-6)
    assert analyze_states(scaled(*states, 1.0), layers=[-1]).layers == [2]


def test_half_precision_is_close(states):
    exact, half = (
        analyze_states((h.to(kind), mask, ids) for h, mask, ids in scaled(*states, 1.0))
        for kind in (torch.float32, torch.bfloat16)
    )
    np.testing.assert_allclose(half.measures["anisotropy"], exact.measures["anisotropy"], atol=5e-3)


@pytest.mark.parametrize(("kind", "close"), [(torch.bfloat16, 3e-2), (torch.float16, 3e-3)])
def test_a_model_in_half_precision_is_measured(bert, report, kind, close):
    model, tokenizer = tiny_encoders.bert()
    found = analyze(model.to(kind), SENTENCES, tokenizer=tokenizer)
    for name in ("anisotropy", "intra_sentence", "self_similarity", "sentence_cosine", "isoscore_sentences"):
        np.testing.assert_allclose(found.measures[name], report.measures[name], atol=close, err_msg=name)
    np.testing.assert_allclose(found.measures["norm"], report.measures["norm"], rtol=1e-2)


def test_special_tokens_can_be_left_out_of_measures_and_are_reported_apart(bert, report, states):
    without = analyze(bert[0], SENTENCES, tokenizer=bert[1], include_special=False)
    inner = [oracles.intra(sentence[1:-1]) for sentence in states[0][2]]
    assert without.last("intra_sentence") == pytest.approx(np.mean(inner), abs=1e-6)
    np.testing.assert_allclose(without.measures["self_similarity"], report.measures["self_similarity"])
    special = [token for token, kind in zip(report.types.tokens, report.types.classes, strict=True)
               if kind == "special"]  # fmt: skip
    assert sorted(special) == ["[CLS]", "[SEP]"]
    assert not report.types.analysed[[report.types.tokens.index(t) for t in special]].any()


def test_official_mode_analyses_first_occurrences_pads_and_rounds(bert, states):
    model, tokenizer = bert
    found = analyze(model, SENTENCES, tokenizer=tokenizer, compat="official")
    encoded = tokenizer(SENTENCES, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = model(**encoded, output_hidden_states=True).hidden_states
    counts = np.bincount(encoded["input_ids"].flatten())
    kept = np.flatnonzero(counts >= 5)
    values = []
    for number in kept:
        x = []
        for row, ids in enumerate(encoded["input_ids"]):
            where = (ids == number).nonzero()
            if len(where):
                x.append(hidden[2][row, int(where[0])])
        values.append(round(oracles.mean_cosine(torch.stack(x)), 3))
    assert found.last("self_similarity") == pytest.approx(np.mean(values), abs=6e-4 / len(values) + 1e-6)
    assert "[PAD]" in found.types.tokens
    np.testing.assert_allclose(
        found.measures["adjusted_intra_sentence"] + found.measures["anisotropy_sampled"],
        found.measures["intra_sentence"],
    )


def test_dropout_is_off_while_measuring_and_the_mode_comes_back(bert, report):
    model, tokenizer = bert
    model.train()
    model.encoder.layer[0].eval()
    try:
        same(report, analyze(model, SENTENCES, tokenizer=tokenizer), rtol=1e-6)
        assert model.training
        assert model.pooler.training
        assert not model.encoder.layer[0].training
    finally:
        model.eval()


def test_a_normalize_module_has_no_part_in_token_states(tmp_path, report):
    folder = tiny_encoders.save_sentence_transformer(tmp_path)
    found = analyze(folder, SENTENCES)
    np.testing.assert_allclose(found.measures["norm"], report.measures["norm"], rtol=1e-4)
    assert found.settings["pooling"] == "mean"


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last"])
def test_pooling_equals_its_definition_on_either_side_of_padding(pooling):
    h = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = pool(h, mask, pooling)
    for row in range(3):
        x = h[row][mask[row].bool()]
        expected = {"cls": x[0], "mean": x.mean(0), "max": x.max(0).values, "last": x[-1]}[pooling]
        torch.testing.assert_close(found[row], expected)
    with pytest.raises(InputError, match="pooling: expected one of cls, mean, max, last"):
        pool(h, mask, "median")


def test_a_decoder_is_known_by_what_its_tokens_see(bert):
    model, tokenizer = tiny_encoders.gpt()
    encoder = load_encoder(model, tokenizer)
    assert (encoder.causal, encoder.pooling) == (True, "last")
    assert not load_encoder(*bert).causal
    report = analyze(model, SENTENCES, tokenizer=tokenizer)
    assert any("causal model" in note for note in report.notes)
    output = model(**tokenizer(SENTENCES[0], return_tensors="pt"), output_hidden_states=True)
    with encoder.measuring():
        ids = tokenizer(SENTENCES[0], return_tensors="pt")
        states = encoder.hidden_states(ids["input_ids"], ids["attention_mask"])
    torch.testing.assert_close(states[-1], output.last_hidden_state)  # after the last normalisation


def test_words_put_the_tokens_of_a_word_together(bert, states):
    model, tokenizer = bert
    report = analyze(model, SENTENCES, tokenizer=tokenizer, unit="word")
    assert "river" in report.types.tokens
    assert "old" in report.types.tokens
    encoded = [tokenizer(sentence, return_offsets_mapping=True) for sentence in SENTENCES]
    contexts = []
    for sentence, encoding, hidden in zip(SENTENCES, encoded, states[0][2], strict=True):
        for start in [n for n in range(len(sentence)) if sentence.startswith("language", n)]:
            end = start + len("language")
            if sentence[end : end + 1].isalpha():
                continue
            inside = [n for n, (a, b) in enumerate(encoding["offset_mapping"]) if start <= a < b <= end]
            contexts.append(hidden[inside].mean(0))
    row = report.types.tokens.index("language")
    assert report.types.counts[row] == len(contexts)
    expected = oracles.mean_cosine(torch.stack(contexts))
    assert report.types.self_similarity[2, row] == pytest.approx(expected, abs=1e-6)


def test_treatments_remeasure_everything_on_treated_states(bert, states):
    found = analyze(bert[0], SENTENCES, tokenizer=bert[1], treatments=["remove-2", "standardize", "center"])
    sample = analyze(bert[0], SENTENCES, tokenizer=bert[1])
    top = [k for k, _, _ in sample.top_dimensions[2]][:2]
    kept = [k for k in range(16) if k not in top]
    reduced = [sentence[:, kept] for sentence in states[0][2]]
    row = {name: values[2] for name, values in found.treated["remove-2"].items()}
    assert row["anisotropy"] == pytest.approx(oracles.expected_anisotropy(reduced), abs=1e-6)
    assert row["intra_sentence"] == pytest.approx(np.mean([oracles.intra(s) for s in reduced]), abs=1e-6)
    assert abs(found.treated["center"]["anisotropy"][2]) < 0.1 < found.measures["anisotropy"][2]
    assert abs(found.treated["standardize"]["anisotropy"][2]) < 0.1


def test_alignment_by_layer(bert, states):
    pairs = list(itertools.pairwise(SENTENCES[:6]))
    found = analyze(bert[0], SENTENCES, tokenizer=bert[1], pairs=pairs, detail=False)
    pooled = [torch.nn.functional.normalize(s.mean(0), dim=0) for s in states[0][2][:6]]
    expected = np.mean([float((a - b).square().sum()) for a, b in itertools.pairwise(pooled)])
    assert found.last("alignment") == pytest.approx(expected, abs=1e-6)


def test_layers_can_be_chosen(bert, report):
    found = analyze(bert[0], SENTENCES, tokenizer=bert[1], layers=[0, -1], detail=False)
    assert found.layers == [0, 2]
    np.testing.assert_allclose(found.measures["norm"], report.measures["norm"][[0, 2]])
    with pytest.raises(InputError, match=r"layers: expected numbers from 0 \(embeddings\) to 2"):
        analyze(bert[0], SENTENCES, tokenizer=bert[1], layers=[7])


def test_a_report_survives_its_file(report, tmp_path):
    report.to_json(tmp_path / "geometry.json")
    again = GeometryReport.from_json(tmp_path / "geometry.json")
    same(report, again, atol=1e-8)
    assert again.types.tokens == report.types.tokens
    assert again.settings == report.settings
    assert again.top_dimensions[0][0][0] == report.top_dimensions[0][0][0]
    np.testing.assert_allclose(again.map.points, report.map.points, atol=1e-7)
    frame = report.to_pandas()
    assert list(frame.index) == [0, 1, 2]
    assert {"anisotropy", "anisotropy_error"} <= set(frame.columns)
    assert list(report.types_to_pandas().columns)[-1] == "layer_2"
    report.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "is not a geometry.json"),
     ('{"format": "isocse geometry 1"}', "is damaged")],
)  # fmt: skip
def test_a_file_that_is_no_report_is_named(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=f"x.json: {message}"):
        GeometryReport.from_json(tmp_path / "x.json")
    with pytest.raises(InputError, match=r"no\.json: cannot be read"):
        GeometryReport.from_json(tmp_path / "no.json")


def many_states(count, first):
    """Sentences of 8 tokens, of which the first one's state is given; the others are random."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count // 20):
        h = torch.randn(1, 20, 8, 6, generator=generator)
        h[:, :, 0] = first
        yield h, torch.ones(20, 8, dtype=torch.bool), torch.arange(8).repeat(20, 1)


def test_tokens_drawn_from_a_corpus_larger_than_the_sample_stand_anywhere_in_their_sentence():
    found = analyze_states(many_states(2000, torch.ones(6)), sample=100)
    difference = found.last("anisotropy_sampled") - found.last("anisotropy")
    error = float(found.errors["anisotropy_sampled"][-1])
    assert 0 < error < 0.02
    assert abs(difference) < 4 * error  # all first tokens would have 1


def test_states_that_are_all_alike_have_anisotropy_1_and_no_residual():
    one = (torch.ones(2, 20, 8, 6), torch.ones(20, 8, dtype=torch.bool), torch.arange(8).repeat(20, 1))
    found = analyze_states([one])
    for name in ("anisotropy", "anisotropy_sampled", "intra_sentence", "self_similarity"):
        np.testing.assert_allclose(found.measures[name], 1, atol=1e-6)
    assert np.isnan(found.measures["residual_anisotropy"]).all()


# Bad input.


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        ([], "sentences: expected at least one sentence, the corpus is empty"),
        (["", " "], r"sentences: expected at least 2 sentences that are not empty \(got 0\)"),
        ("one text", "sentences: expected a list of sentences, not one text"),
        ([1, 2], r"sentences: expected texts \(got 'int'\)"),
        (["river city", "music water"], "min_count: no type of token occurs 5 times, the most frequent"),
    ],
)
def test_a_corpus_that_cannot_be_measured(bert, sentences, message):
    with pytest.raises(InputError, match=message):
        analyze(bert[0], sentences, tokenizer=bert[1])


def test_empty_sentences_are_left_out_and_counted(bert, report):
    found = analyze(bert[0], [*SENTENCES, "", "   "], tokenizer=bert[1])
    same(report, found, rtol=1e-5, atol=1e-7)
    assert found.corpus["empty"] == 2
    assert "2 empty sentences were left out" in found.notes
    assert any("samples have all 43 sentences" in note for note in found.notes)


def test_long_sentences_are_cut_and_counted(bert):
    found = analyze(bert[0], [*SENTENCES, " ".join(SENTENCES[:10])], tokenizer=bert[1])
    assert found.corpus["cut"] == 1
    assert "1 sentences were cut at 64 tokens" in found.notes


def test_states_that_are_no_numbers_are_named_with_layer_and_sentence(states):
    broken = [[s.clone() for s in layer] for layer in states[0]]
    broken[1][7][3, 2] = float("nan")
    with pytest.raises(InputError, match="hidden states: NaN or infinity at layer 1, sentence 7"):
        analyze_states(scaled(broken, states[1], 1.0))


def test_states_of_zeros_are_counted_and_make_no_nan(states):
    broken = [[s.clone() for s in layer] for layer in states[0]]
    broken[1][7][3] = 0
    broken[1][8][:] = 0
    found = analyze_states(scaled(broken, states[1], 1.0))
    assert found.corpus["zero_vectors"] == 1 + len(states[1][8])
    assert np.isfinite(found.measures["anisotropy"]).all()
    assert np.isfinite(found.measures["intra_sentence"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "letter"}, r"unit: expected one of token, word \(got 'letter'\)"),
        ({"baseline": "none"}, "baseline: expected one of expected, sampled, tokens"),
        ({"compat": "v2"}, "compat: expected one of official"),
        ({"min_count": 1}, r"min_count: expected 2 or more \(got 1\)"),
        ({"treatments": ["bleach"]}, "treatments: expected remove-K, center or standardize"),
        ({"classes": "nouns"}, "classes: expected stopwords or frequency"),
        ({"max_length": 1000}, "max_length: expected 3 to 64 tokens"),
        ({"pooling": "median"}, "pooling: expected one of cls, mean, max, last"),
        ({"pairs": []}, "pairs: expected at least one positive pair"),
    ],
)
def test_options_that_are_wrong(bert, options, message):
    with pytest.raises(InputError, match=message):
        analyze(bert[0], SENTENCES, tokenizer=bert[1], **options)


def test_a_misspelt_option_is_told_with_those_there_are(bert):
    with pytest.raises(TypeError, match=r"unexpected argument min_cuont; options: layers, pooling"):
        analyze(bert[0], SENTENCES, tokenizer=bert[1], min_cuont=3)


def test_models_that_are_none(tmp_path, bert):
    with pytest.raises(InputError, match="tokenizer: is missing: a transformers model needs its tokenizer"):
        analyze(bert[0], SENTENCES)
    with pytest.raises(InputError, match="model: expected a SentenceTransformer, a transformers model"):
        analyze(torch.nn.Linear(2, 2), SENTENCES)
    with pytest.raises(InputError, match="model: cannot be loaded"):
        analyze(tmp_path, SENTENCES)
    with pytest.raises(InputError, match="model: expected a model's folder"):
        analyze(str(tmp_path / "nowhere"), SENTENCES)


def test_a_text_file_is_read_anew_each_time(tmp_path, bert, report):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(SENTENCES) + "\n", encoding="utf-8")
    same(report, analyze(bert[0], SentenceFile(path), tokenizer=bert[1]), rtol=1e-6)
    path.write_bytes(b"good\n\xff\xfe\n")
    with pytest.raises(InputError, match=r"corpus\.txt: is not UTF-8 text"):
        list(SentenceFile(path))
    with pytest.raises(InputError, match="expected a text file with one sentence a line"):
        SentenceFile(tmp_path)


def test_classes_of_a_wordpiece_vocabulary(report):
    classes = dict(zip(report.types.texts, report.types.classes, strict=True))
    assert (classes["the"], classes["."], classes["river"], classes["[cls]"]) == (
        "functional", "functional", "semantic", "special",
    )  # fmt: skip
    assert set(report.types.classes) <= set(CLASSES)
    assert {"semantic", "functional"} <= set(next(reversed(report.by_frequency.values())))
