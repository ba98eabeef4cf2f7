"""The proof's experiment: a small summarizer without control, steered to one of three passages.

The protocol, fixed before any test document was decoded:

1. Papers are split 70/10/20 by paper. Per seed a summarizer is trained on documents of the training papers.
2. Settings are chosen on documents of the validation papers, `choose`: among all settings whose ROUGE-1 is
   within two points of the best one's, that with the most success. Few-shot examples come from validation
   papers, too.
3. Each arm decodes the same test documents once. All arms are reported.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from relattn.experiment_plan import COARSE, CURVE_METRICS, Plan, SeedResult
from relattn.fewshot import FewShotSettings, fit
from relattn.fewshot_data import FewShotExample
from relattn.methods import MethodSettings, summarize
from relattn.papers import LEAD_WORDS, SEPARATOR, Papers, TopicDocument, load_papers, topic_documents
from relattn.pplm import PPLMCost
from relattn.relevance import EmbeddingRelevance, Relevance, SimilarityRelevance
from relattn.selection import coarse_to_fine, coverage_select, filled, online_select
from relattn.small_summarizer import new_summarizer, train_summarizer, word_tokenizer
from relattn.steerer import Steerer
from relattn.topic_scores import Score, choose, known_rouge1, mean, score
from relattn.weights import RelAttnModule

DECODING = {"num_beams": 4, "max_new_tokens": LEAD_WORDS + 2, "do_sample": False}

OnEvent = Callable[[int, str, float], None]
"""Called with a seed, what it is doing, and the share of the whole that is done, 0 to 1."""


@dataclass(frozen=True)
class Trained:
    """A trained summarizer as plain arrays, to hand from process to process.

    Attributes:
        seed: Its seed.
        loss: Mean training loss of the last 50 steps.
        state: Its parameters.
    """

    seed: int
    loss: float
    state: dict[str, np.ndarray]


def train_seed(seed: int, plan: Plan, on_event: OnEvent) -> Trained:
    """Train one seed's summarizer."""
    losses: list[float] = []

    def on_step(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 25 == 0:
            on_event(seed, "training", 0.5 * step / plan.training.steps)

    model, _ = train_summarizer(load_papers(), plan.training, seed, on_step)
    return Trained(seed, mean(losses[-50:]), {name: t.numpy() for name, t in model.state_dict().items()})


def measure_seed(trained: Trained, plan: Plan, on_event: OnEvent) -> SeedResult:
    """Choose settings, decode and score, with one seed's summarizer."""
    papers = load_papers()
    tokenizer = word_tokenizer(papers.vocabulary)
    model = new_summarizer(len(tokenizer), plan.training, trained.seed).eval()
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in trained.state.items()})
    result = SeedResult(trained.seed, trained.loss)
    with _without_warnings():
        Experiment(model, tokenizer, papers, plan, result, on_event).run()
    return result


def run_seed(seed: int, plan: Plan, on_event: OnEvent = lambda seed, stage, share: None) -> SeedResult:
    """Train, choose settings, decode and score, for one seed."""
    return measure_seed(train_seed(seed, plan, on_event), plan, on_event)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """The control of another document does not occur in the source: a warning for each would say so."""
    logger = logging.getLogger("relattn")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class Experiment:
    """One trained summarizer under all arms; fills in a `SeedResult`."""

    def __init__(
        self, model: Any, tokenizer: Any, papers: Papers, plan: Plan, result: SeedResult, on_event: OnEvent
    ) -> None:
        self.model, self.tokenizer, self.plan, self.result = model, tokenizer, plan, result
        self._on_event = on_event
        seed = result.seed
        self.validation = _documents(papers, "validation", plan.validation_documents, seed)
        self.test = _documents(papers, "test", plan.test_documents, seed)
        self.hard_validation = _documents(papers, "validation", plan.validation_documents, seed, hard=True)
        self.hard_test = _documents(papers, "test", plan.test_documents, seed, hard=True)
        self.shots = _documents(papers, "validation", 2 * plan.shots, seed, name="shots")

    def run(self) -> None:
        """Choose on validation documents, then decode the test documents."""
        self._say("choosing settings", 0.52)
        chosen = self.result.chosen = self._choose()
        self._say("few-shot learning", 0.66)
        module, score_gain = self._learn(chosen["relattn"][0])
        chosen["relattn-fewshot"] = score_gain
        self._say("decoding", 0.7)
        self._decode_test(module)
        self._decode_hard()
        self._say("done", 1.0)

    def _say(self, stage: str, share: float) -> None:
        self._on_event(self.result.seed, stage, share)

    def _choose(self) -> dict[str, Any]:
        """Settings of every arm that has some, on validation documents."""
        plan, documents = self.plan, self.validation
        plain = self._score(documents, self._method("plain", documents))
        curve = {(t, w): self._score(documents, self._steered(documents, w, _embedding(t)))
                 for t in plan.temperatures for w in plan.weights}  # fmt: skip
        self.result.curve = {key: tuple(mean(_value(s, metric) for s in found)
                                        - mean(_value(s, metric) for s in plain) for metric in CURVE_METRICS)
                             for key, found in curve.items()}  # fmt: skip
        oracle = {
            w: self._score(documents, self._steered(documents, w, _oracle(documents))) for w in plan.weights
        }
        few = documents[: plan.pplm_documents]
        pplm = {s: self._score(few, self._method("pplm", few, MethodSettings(pplm={"step_size": s})))
                for s in plan.pplm_steps}  # fmt: skip
        return {
            "relattn": choose(curve),
            "relattn-paper": choose({w: curve[1.0, w] for w in plan.weights}),
            "oracle": choose(oracle),
            "boost": self._chosen_boost(documents),
            "pplm": choose(pplm),
        }

    def _chosen_boost(self, documents: Sequence[TopicDocument]) -> float:
        return choose({b: self._score(documents, self._method("boost", documents, MethodSettings(boost=b)))
                       for b in self.plan.boosts})  # fmt: skip

    def _learn(self, temperature: float) -> tuple[RelAttnModule, dict[str, Any]]:
        """Few-shot: the weight of each layer alone is trained, on documents of validation papers."""
        examples = [FewShotExample(d.id, d.text, list(d.control), d.leads[d.target]) for d in self.shots]
        module = RelAttnModule.for_model(
            self.model, weight="per_layer", initial_weight=0.07, temperature=temperature
        )
        settings = FewShotSettings(
            trainable="new", steps=self.plan.shot_steps, warmup=4, learning_rate=0.1, micro_batch=10,
            seed=self.result.seed, generation=DECODING,
        )  # fmt: skip
        shots = self.plan.shots
        found = fit(self.model, self.tokenizer, examples[:shots], examples[shots:], module, settings)
        with torch.no_grad():
            assert module.logits is not None
            weights = module.logits.sigmoid().flatten().tolist()
        return module, {"best_step": found.best_step, "weights": weights}

    def _decode_test(self, module: RelAttnModule) -> None:
        documents, chosen = self.test, self.result.chosen
        temperature, weight = chosen["relattn"]
        relevance = _embedding(temperature)
        others = [*documents[1:], documents[0]]
        self._arm("plain", lambda: self._method("plain", documents))
        self.result.copying = mean(
            max(known_rouge1(text, lead) for lead in d.leads)
            for d, text in zip(documents, self._plain_texts, strict=True)
        )
        self._arm("prefix", lambda: self._method("prefix", documents))
        self._arm("boost", lambda: self._method("boost", documents, MethodSettings(boost=chosen["boost"])))
        pplm = MethodSettings(pplm={"step_size": chosen["pplm"]})
        self._arm("pplm", lambda: self._method("pplm", documents, pplm, self.result.pplm_cost))
        self._say("decoding", 0.76)
        self._arm("relattn", lambda: self._steered(documents, weight, relevance))
        self._arm("relattn-paper", lambda: self._steered(documents, chosen["relattn-paper"], _embedding(1.0)))
        self._arm("oracle", lambda: self._steered(documents, chosen["oracle"], _oracle(documents)))
        self._arm("other-control", lambda: self._steered(
            documents, weight, relevance, [d.control for d in others]))  # fmt: skip
        steerer = Steerer(self.model, self.tokenizer, module=module)
        self._arm("relattn-fewshot", lambda: self._texts(steerer, documents, None))
        self._say("online selection", 0.78)
        self._online(relevance)
        (result,) = Steerer(self.model, self.tokenizer, relevance).relevance(
            [documents[0].text], [documents[0].control]
        )
        self.result.relevance = (result.tokens, tuple(result.a_rel.tolist()))
        self.result.documents = documents[:8]

    def _online(self, relevance: Relevance) -> None:
        """Online selection, and the coverage selector on the same candidates."""
        documents = self.test
        begin = time.perf_counter()
        steerer = Steerer(self.model, self.tokenizer, relevance)
        found = steerer.generate(
            [d.text for d in documents], [d.control for d in documents], "online", batch_size=50,
            grid=self.plan.grid, **DECODING,
        )  # fmt: skip
        self.result.seconds["relattn-online"] = time.perf_counter() - begin
        self.result.online_weights = [summary.weight for summary in found]
        self._keep("relattn-online", [summary.text for summary in found])
        covering = []
        for document, summary in zip(documents, found, strict=True):
            texts = [candidate.text for candidate in summary.candidates]
            self._coarsely(texts, summary.text)
            ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            source = self.tokenizer(document.text)["input_ids"]
            covering.append(texts[coverage_select(texts, ids, source, summary.relevance.a_rel.tolist())])
        self._keep("relattn-coverage", covering)

    def _coarsely(self, texts: Sequence[str], chosen: str) -> None:
        """What a coarse grid would have chosen, and how much decoded: the same texts, but not all of them."""
        (decoded,) = coarse_to_fine([len(texts)], COARSE, lambda pairs: [texts[i] for _, i in pairs])
        candidates = filled(decoded, len(texts))
        self.result.coarse.append((candidates[online_select(candidates)] == chosen, len(decoded)))

    def _decode_hard(self) -> None:
        """Control words from outside the lead only; the weight is chosen anew for them."""
        documents = self.hard_validation
        chosen = self.result.chosen
        chosen["boost-hard"] = self._chosen_boost(documents)
        relevance = _embedding(chosen["relattn"][0])
        curve = {w: self._score(documents, self._steered(documents, w, relevance)) for w in self.plan.weights}
        weight = chosen["relattn-hard"] = choose(curve)
        test = self.hard_test
        for arm, texts in (
            ("plain", self._method("plain", test)),
            ("boost", self._method("boost", test, MethodSettings(boost=chosen["boost-hard"]))),
            ("relattn", self._steered(test, weight, relevance)),
            ("oracle", self._steered(test, chosen["oracle"], _oracle(test))),
        ):
            self.result.hard[arm] = self._score(test, texts)

    def _arm(self, name: str, decode: Callable[[], list[str]]) -> None:
        begin = time.perf_counter()
        texts = decode()
        self.result.seconds[name] = time.perf_counter() - begin
        if name == "plain":
            self._plain_texts = texts
        self._keep(name, texts)

    def _keep(self, name: str, texts: list[str]) -> None:
        self.result.scores[name] = self._score(self.test, texts)
        self.result.texts[name] = texts[:8]

    def _method(
        self,
        name: Any,
        documents: Sequence[TopicDocument],
        settings: MethodSettings | None = None,
        cost: PPLMCost | None = None,
    ) -> list[str]:
        given = settings or MethodSettings()
        settings = MethodSettings(boost=given.boost, pplm=given.pplm, batch_size=100, generate=dict(DECODING))
        steerer = Steerer(self.model, self.tokenizer)
        texts, controls = [d.text for d in documents], [d.control for d in documents]
        return [s.text for s in summarize(name, steerer, texts, controls, settings, cost)]

    def _steered(
        self,
        documents: Sequence[TopicDocument],
        weight: float,
        relevance: Relevance,
        controls: Sequence[tuple[str, ...]] | None = None,
    ) -> list[str]:
        return self._texts(Steerer(self.model, self.tokenizer, relevance), documents, weight, controls)

    def _texts(
        self,
        steerer: Steerer,
        documents: Sequence[TopicDocument],
        weight: float | None,
        controls: Sequence[tuple[str, ...]] | None = None,
    ) -> list[str]:
        asked = [d.control for d in documents] if controls is None else controls
        texts = [d.text for d in documents]
        return [s.text for s in steerer.generate(texts, asked, weight, batch_size=100, **DECODING)]

    @staticmethod
    def _score(documents: Sequence[TopicDocument], texts: Sequence[str]) -> list[Score]:
        return [score(document, text) for document, text in zip(documents, texts, strict=True)]


def _value(score: Score, metric: str) -> float:
    return float(getattr(score, metric))


def _documents(
    papers: Papers, part: str, count: int, seed: int, hard: bool = False, name: str = "documents"
) -> list[TopicDocument]:
    """Documents of a part. Test documents are the same for all seeds."""
    streams = ("validation", "test", "documents", "shots")
    own = 0 if part == "test" else seed + 1
    generator = np.random.default_rng([own, streams.index(part), streams.index(name), int(hard)])
    where = "outside the lead" if hard else "anywhere"
    source = papers.test if part == "test" else papers.validation
    return list(islice(topic_documents(source, papers.vocabulary, generator, f"{part}-{name}", where), count))


def _embedding(temperature: float) -> EmbeddingRelevance:
    return EmbeddingRelevance(temperature=temperature)


def _oracle(documents: Sequence[TopicDocument]) -> SimilarityRelevance:
    """Relevance that knows the answer: uniform on the passage that the control is about."""
    targets = {(d.control, d.text): d.target for d in documents}

    def similarity(phrases: Sequence[str], tokens: Sequence[str]) -> list[float]:
        words = tokens[1:-1]  # without <s> and </s>
        target = targets[tuple(phrases), " ".join(words)]
        passage, scores = 0, [-1e4]
        for word in words:
            passage += word == SEPARATOR
            scores.append(0.0 if passage == target and word != SEPARATOR else -1e4)
        return [*scores, -1e4]

    return SimilarityRelevance(smooth_sigma=None, similarity=similarity)
