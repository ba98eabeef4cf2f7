"""Scores of layers against plain loops over the models' own hidden states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import (
    PASSAGES,
    QUERIES,
    colbert,
    cross_encoder,
    dual_encoder,
    save_bert,
    save_distilbert,
)
from transformers import AutoConfig, AutoModelForSequenceClassification

from lead_kd.candidates import candidate_mask, own_block
from lead_kd.losses import lead_loss
from lead_kd.objectives import Candidates, check_candidates
from lead_kd.pruning import prune_layers
from lead_kd.scorers import ColBERT, CrossEncoderScorer, DualEncoder, _head, count_cut
from lead_kd.scores import layer_distributions, layer_scores, maxsim
from shared_core import InputError


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"), layers=3)


def states(model, text):
    """All hidden states of one text, straight from transformers."""
    tokens = model.tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        return model[0].model(**tokens, output_hidden_states=True).hidden_states


def test_a_cls_encoders_layers_are_dot_products_of_raw_cls_states(bert):
    model = dual_encoder(bert).eval()
    scorer = DualEncoder(model)
    with torch.no_grad():
        scores = scorer(scorer.collate(QUERIES, PASSAGES))
    assert scores.layers.shape == (3, 4, 8)
    for q, query in enumerate(QUERIES):
        for p, passage in enumerate(PASSAGES):
            a, b = states(model, query), states(model, passage)
            for layer in range(3):  # index 0 is the first layer, not the embeddings
                expected = float(a[layer + 1][0, 0] @ b[layer + 1][0, 0])
                assert scores.layers[layer, q, p].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(scores.layers[-1], scores.final)
    ranked = model.encode(QUERIES) @ model.encode(PASSAGES).T
    np.testing.assert_allclose(scores.final.numpy(), ranked, rtol=1e-4, atol=1e-4)


def test_a_mean_pooled_normalized_encoder_gives_cosines_times_twenty(bert):
    model = dual_encoder(bert, "mean", normalize=True).eval()
    scorer = DualEncoder(model)
    with torch.no_grad():
        scores = scorer(scorer.collate(QUERIES, PASSAGES))
    a = [state[0].mean(0) for state in states(model, QUERIES[0])[1:]]
    b = [state[0].mean(0) for state in states(model, PASSAGES[4])[1:]]
    for layer in range(3):
        expected = 20 * torch.cosine_similarity(a[layer], b[layer], dim=0)
        assert scores.layers[layer, 0, 4].item() == pytest.approx(expected.item(), rel=1e-4)


def test_scores_are_float32_under_autocast(bert):
    scorer = DualEncoder(dual_encoder(bert).eval())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scorer(scorer.collate(QUERIES, PASSAGES))
        q, p = torch.full((1, 1, 4), 16.0), torch.tensor([[[16.0] * 4, [16.0, 16.0, 16.0, 16.0625]]])
        near = layer_scores(q, p)  # 1024 and 1025: one number in bfloat16
    assert scores.layers.dtype == scores.final.dtype == torch.float32
    assert near.flatten().tolist() == [1024, 1025]


def test_only_the_layers_that_are_asked_for_are_given_in_that_order(bert):
    scorer = DualEncoder(dual_encoder(bert).eval())
    batch = scorer.collate(QUERIES, PASSAGES)
    with torch.no_grad():
        torch.testing.assert_close(scorer(batch, [2, 0]).layers, scorer(batch).layers[[2, 0]])


def test_lengths_cut_queries_and_passages_apart(bert):
    scorer = DualEncoder(dual_encoder(bert), query_length=4, passage_length=6)
    batch = scorer.collate(QUERIES, PASSAGES)
    assert batch["queries"]["input_ids"].shape[1] == 4
    assert batch["passages"]["input_ids"].shape[1] == 6


def test_prompts_are_put_before_texts(bert):
    model = dual_encoder(bert)
    model.prompts = {"query": "what ", "document": "the "}
    batch = DualEncoder(model).collate(["cat"], ["cat"])
    words = model.tokenizer.batch_decode
    assert words(batch["queries"]["input_ids"]) == ["[CLS] what cat [SEP]"]
    assert words(batch["passages"]["input_ids"]) == ["[CLS] the cat [SEP]"]


def test_the_models_configuration_is_left_as_it_was(bert):
    model = dual_encoder(bert)
    scorer = DualEncoder(model)
    scorer(scorer.collate(QUERIES, PASSAGES))
    assert model[0].model.config.output_hidden_states is False


def test_a_model_that_does_not_normalize_is_told_that_it_ranks_by_dot_products(bert):
    model = dual_encoder(bert)
    DualEncoder(model)
    assert model.similarity_fn_name == "dot"
    normalized = dual_encoder(bert, normalize=True)
    DualEncoder(normalized)
    assert normalized.similarity_fn_name == "cosine"  # the same order
    cosine = dual_encoder(bert)
    cosine.similarity_fn_name = "cosine"
    with pytest.raises(InputError, match=r"similarity_fn_name: ranks by this.*append a Normalize module"):
        DualEncoder(cosine)


def test_an_encoder_that_shows_no_hidden_states_is_refused(bert, monkeypatch):
    scorer = DualEncoder(dual_encoder(bert))
    forward = type(scorer.model[0]).forward

    def hiding(self, features, **more):
        out = forward(self, features, **more)
        del out["all_layer_embeddings"]
        return out

    monkeypatch.setattr(type(scorer.model[0]), "forward", hiding)
    with pytest.raises(InputError, match="model: shows no hidden states of its layers"):
        scorer(scorer.collate(QUERIES, PASSAGES))


def test_an_empty_text_has_a_vector_too(bert):
    scorer = DualEncoder(dual_encoder(bert, "mean", normalize=True).eval())
    with torch.no_grad():
        scores = scorer(scorer.collate(QUERIES, ["", *PASSAGES[1:]]))
    assert torch.isfinite(scores.layers).all()


def test_texts_that_are_cut_are_counted_with_prompt_and_special_tokens(bert):
    model = dual_encoder(bert)
    texts = ["the", "the moon", "the moon shines"]
    assert [count_cut(model, texts, "document", length) for length in (5, 4, 3, 2)] == [0, 1, 2, 3]
    model.prompts = {"document": "a "}
    assert count_cut(model, texts, "document", 5) == 1
    assert count_cut(model, texts, "query", 5) == 0


@pytest.mark.parametrize("expansion", [None, 9])
def test_colbert_is_the_sum_of_best_matches_and_its_final_score_the_models_own(bert, expansion):
    model = colbert(bert, expansion=expansion).eval()
    scorer = ColBERT(model)
    with torch.no_grad():
        scores = scorer(scorer.collate(QUERIES, PASSAGES))
    own = model.similarity(model.encode_query(QUERIES), model.encode_document(PASSAGES))
    torch.testing.assert_close(scores.final, own, rtol=1e-4, atol=1e-4)
    if expansion is None:
        for layer in range(3):
            q, p = states(model, QUERIES[1])[layer + 1][0], states(model, PASSAGES[2])[layer + 1][0]
            expected = (q @ p.T).amax(1).sum()  # raw, neither projected nor normalized
            assert scores.layers[layer, 1, 2].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_maxsim_in_blocks_is_a_loop_over_tokens(dtype):
    generator = torch.Generator().manual_seed(0)
    q, p = torch.randn(3, 4, 5, generator=generator), torch.randn(7, 6, 5, generator=generator)
    q_mask, p_mask = torch.rand(3, 4, generator=generator) < 0.7, torch.rand(7, 6, generator=generator) < 0.6
    p_mask[:, 0] = True
    expected = torch.zeros(3, 7)
    for i in range(3):
        for j in range(7):
            for token in range(4):
                if q_mask[i, token]:
                    expected[i, j] += max(
                        float(q[i, token] @ p[j, other]) for other in range(6) if p_mask[j, other]
                    )
    for budget in (1, 2000, 10**9):
        found = maxsim(q.to(dtype), p.to(dtype), q_mask, p_mask, budget)
        torch.testing.assert_close(
            found.float(), expected, rtol=1e-2 if dtype == torch.float16 else 1e-5, atol=2e-2
        )
    p_mask[2] = False
    with pytest.raises(InputError, match="at least one token in every passage"):
        maxsim(q, p, q_mask, p_mask)


def test_a_cross_encoders_head_reads_every_layer_and_only_own_passages(tmp_path):
    folder = save_bert(tmp_path, layers=3, classifier=True)
    model = cross_encoder(folder)
    model.eval()
    scorer = CrossEncoderScorer(model)
    with torch.no_grad():
        scores = scorer(scorer.collate(QUERIES, PASSAGES))
    assert scores.layers.shape == (3, 4, 2)
    pairs = [(QUERIES[row // 2], text) for row, text in enumerate(PASSAGES)]
    own = model.predict(pairs, activation_fn=torch.nn.Identity()).reshape(4, 2)
    np.testing.assert_allclose(scores.final.numpy(), own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.layers[-1], scores.final)
    assert not torch.allclose(scores.layers[0], scores.layers[1])
    assert not scorer.in_batch


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("albert", {"embedding_size": 16}),
        ("bert", {}),
        ("deberta-v2", {"pooler_hidden_size": 16}),
        ("distilbert", {"dim": 16, "hidden_dim": 16, "n_layers": 2, "n_heads": 2}),
        ("electra", {"embedding_size": 16}),
        ("modernbert", {"classifier_pooling": "cls", "pad_token_id": 0}),
        ("modernbert", {"classifier_pooling": "mean", "pad_token_id": 0}),
        ("mpnet", {}),
        ("roberta", {}),
    ],
)
def test_heads_of_all_architectures_give_the_models_own_logits(kind, more):
    common = {"vocab_size": 30, "num_labels": 1, "hidden_size": 16, "intermediate_size": 16}
    config = AutoConfig.for_model(
        kind, **{**common, "num_hidden_layers": 2, "num_attention_heads": 2, **more}
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    tokens = torch.randint(3, 30, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits
        backbone = getattr(model, model.base_model_prefix)
        hidden = backbone(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        assert len(hidden) == 3
        torch.testing.assert_close(_head(model)(hidden[-1], mask), logits)


def test_a_head_that_is_not_known_is_refused():
    model = torch.nn.Module()
    model.base_model_prefix, model.x = "x", torch.nn.Module()
    with pytest.raises(InputError, match="expected a cross-encoder of the kind of BERT"):
        _head(model)


def test_the_student_is_cut_to_the_cross_encoders_candidates(tmp_path, bert):
    teacher = CrossEncoderScorer(cross_encoder(save_bert(tmp_path, layers=4, classifier=True)))
    student = DualEncoder(dual_encoder(bert))
    told = teacher(teacher.collate(QUERIES, PASSAGES))
    scores = student(student.collate(QUERIES, PASSAGES))
    own = own_block(4, 2)
    mask = candidate_mask(torch.arange(8), own[:, :1], own[:, 0])
    cut, on = check_candidates(scores, told, Candidates(own[:, 0], mask, own))
    for query in range(4):
        torch.testing.assert_close(cut.layers[:, query], scores.layers[:, query, 2 * query : 2 * query + 2])
    assert on.target.tolist() == [0, 0, 0, 0]
    lead_loss(cut.layers, told.layers, on.target, [(1, 0), (3, 2)], mask=on.mask).total.backward()
    with pytest.raises(InputError, match=r"expected scores of shape \(4, 8\), or a cross-encoder's \(4, 2\)"):
        check_candidates(scores, student(student.collate(QUERIES[:2], PASSAGES[:4])), on)


def test_a_wider_deeper_teacher_with_other_tokens_teaches(tmp_path, bert):
    """Nothing compares vectors of the two models: widths 24 and 16, depths 3 and 3, other vocabularies."""
    teacher_model = dual_encoder(save_distilbert(tmp_path, width=24, offset=7), "mean")
    teacher, student = DualEncoder(teacher_model.eval()), DualEncoder(dual_encoder(bert))
    assert len(teacher_model.tokenizer) != len(student.model.tokenizer)
    batches = [scorer.collate(QUERIES, PASSAGES) for scorer in (teacher, student)]
    assert not torch.equal(batches[0]["queries"]["input_ids"], batches[1]["queries"]["input_ids"])
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    losses = []
    with torch.no_grad():
        told = teacher(batches[0])
    student.eval()  # no dropout: the loss can only fall by learning
    for _ in range(30):
        terms = lead_loss(student(batches[1]).layers, told.layers, torch.arange(0, 8, 2), [(0, 0), (2, 1)])
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((terms.total.item(), terms.lyr.item()))
    assert losses[-1][0] < losses[0][0]
    assert losses[-1][1] < losses[0][1]


def test_distributions_sum_to_one_over_candidates():
    q, p = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    found = layer_distributions(q, p)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(
        found.log() - found.log()[..., :1], layer_scores(q, p) - layer_scores(q, p)[..., :1]
    )


def test_a_pruned_models_layers_are_those_that_were_kept(bert):
    model = dual_encoder(bert).eval()
    small = prune_layers(model, [0, 1])
    assert len(small[0].model.encoder.layer) == 2
    with torch.no_grad():
        whole, cut = (DualEncoder(one)(DualEncoder(one).collate(QUERIES, PASSAGES)) for one in (model, small))
    torch.testing.assert_close(cut.layers, whole.layers[:2])
    assert len(model[0].model.encoder.layer) == 3  # the model itself is left as it was
    with pytest.raises(InputError, match=r"keep: expected rising layers from 0 to 2 \(got \[2, 1\]\)"):
        prune_layers(model, [2, 1])


def test_a_pruned_model_is_saved_and_loaded(tmp_path, bert):
    from sentence_transformers import SentenceTransformer

    small = prune_layers(dual_encoder(bert).eval(), [0, 2])
    small.save(str(tmp_path / "small"))
    loaded = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    np.testing.assert_allclose(loaded.encode(QUERIES), small.encode(QUERIES), rtol=1e-5, atol=1e-6)


def test_masks_drop_copies_and_other_positives():
    ids = torch.tensor([7, 3, 9, 3, 8, 7])
    mask = candidate_mask(ids, torch.tensor([[7, 8], [9, -1]]), torch.tensor([0, 2]))
    assert mask.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 1, 0]]
    # the positive stands in the second column of its copies: it is kept, the first is dropped
    late = candidate_mask(torch.tensor([5, 5]), torch.tensor([[5]]), torch.tensor([1]))
    assert late.tolist() == [[False, True]]
