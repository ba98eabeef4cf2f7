"""What the proof's experiment is about to do, and what it has found: arms, sizes, and one seed's result."""

from dataclasses import dataclass, field
from typing import Any

from relattn.papers import TopicDocument
from relattn.pplm import PPLMCost
from relattn.selection import GRID
from relattn.small_summarizer import TrainingPlan
from relattn.topic_scores import Score

ARMS = (
    "plain", "prefix", "pplm", "boost", "relattn", "relattn-paper", "relattn-online", "relattn-coverage",
    "relattn-fewshot", "oracle", "other-control",
)  # fmt: skip
"""plain: no control. relattn: weight and sharpness from validation. relattn-paper: the same with the
formula's sharpness. relattn-online: each document's weight by online selection. relattn-coverage: the same
candidates, chosen by covered relevance (not the paper's). oracle: relevance is uniform on the right passage.
other-control: relattn with the control of another document."""

CURVE_METRICS = ("rouge1", "success", "contrast")

COARSE = 5
"""The stride of the coarse grid, whose choices are compared with the whole grid's."""

HARD_ARMS = ("plain", "boost", "relattn", "oracle")


@dataclass(frozen=True)
class Plan:
    """How large the experiment is.

    Attributes:
        training: The summarizer's.
        validation_documents: On which settings are chosen.
        test_documents: On which arms are compared.
        pplm_documents: Validation documents for PPLM's settings, which are slow to try.
        weights: Steering weights to choose from.
        temperatures: Sharpness to choose from; 1 is the formula's.
        pplm_steps: PPLM's step sizes to choose from; the published 1e-5 is a large model's.
        boosts: Keyword bonuses to choose from.
        grid: Weights that online selection tries: the paper's.
        shots: Few-shot training documents, and as many to validate.
        shot_steps: Updates of few-shot training.
    """

    training: TrainingPlan = field(default_factory=TrainingPlan)
    validation_documents: int = 150
    test_documents: int = 200
    pplm_documents: int = 60
    weights: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    temperatures: tuple[float, ...] = (1.0, 0.3, 0.1)
    pplm_steps: tuple[float, ...] = (0.01, 0.1, 0.5)
    boosts: tuple[float, ...] = (2.0, 4.0, 8.0)
    grid: tuple[float, ...] = GRID
    shots: int = 10
    shot_steps: int = 40


QUICK = Plan(
    training=TrainingPlan(steps=30),
    validation_documents=12,
    test_documents=12,
    pplm_documents=4,
    weights=(0.2, 0.5),
    temperatures=(1.0, 0.3),
    pplm_steps=(0.01,),
    boosts=(2.0,),
    grid=(0.1, 0.3),
    shots=3,
    shot_steps=4,
)


@dataclass
class SeedResult:
    """What one seed gave.

    Attributes:
        seed: The seed.
        loss: Mean training loss of the last 50 steps.
        chosen: Settings by validation.
        scores: Arm to scores, one a test document.
        hard: The same with control words from outside the lead, on other documents.
        curve: (temperature, weight) to what steering gains over plain on validation documents, by
            CURVE_METRICS.
        texts: Arm to summaries of the first test documents.
        documents: These documents.
        relevance: Tokens and a_rel of the first test document, as relattn steered it.
        online_weights: Weights that online selection chose.
        coarse: For each test document whether online selection on a coarse grid chooses the same summary, and
            how many weights it decodes.
        seconds: Time to decode the test documents, by arm.
        pplm_cost: PPLM's passes on the test documents.
        copying: ROUGE-1 of plain summaries with the nearest lead: how well the summarizer writes.
    """

    seed: int
    loss: float = 0.0
    chosen: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, list[Score]] = field(default_factory=dict)
    hard: dict[str, list[Score]] = field(default_factory=dict)
    curve: dict[tuple[float, float], tuple[float, ...]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    documents: list[TopicDocument] = field(default_factory=list)
    relevance: tuple[tuple[str, ...], tuple[float, ...]] = ((), ())
    online_weights: list[float] = field(default_factory=list)
    coarse: list[tuple[bool, int]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    pplm_cost: PPLMCost = field(default_factory=PPLMCost)
    copying: float = 0.0
