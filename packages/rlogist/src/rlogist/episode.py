"""One reading of one slide, from the scan to the answer: the paper's Markov decision process."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlogist.batched import Chooser, State
from rlogist.modules import Modules, Update, masked
from rlogist.slides import UnreadableRegion
from rlogist.sources import FeatureSource
from rlogist.transition import check_update, look
from shared_core import InputError


@dataclass(frozen=True)
class Look:
    """One step of a path.

    Attributes:
        row: Row of the state.
        region: Index in the slide's grid.
        xy: Its top-left corner, level-0 pixels; None where the source does not know.
        probability: Of each class after the look.
        score: What made the agent look there; None where nothing was scored.
        damaged: What was wrong where the region's pixels could not be read; nothing changed then.
    """

    row: int
    region: int
    xy: tuple[int, int] | None
    probability: list[float]
    score: float | None = None
    damaged: str | None = None


class Episode:
    """One reading of one slide: starts at the scan, changes with every look.

    Deep features are asked for only where `look` is called, so what was not looked at cannot have an effect.

    Args:
        source: The slide's features. At least one row.
        modules: The networks, which are put into evaluation mode.
        looks: T.
        update: What a look does to other regions.
    """

    def __init__(
        self, source: FeatureSource, modules: Modules, looks: int, update: Update = "global"
    ) -> None:
        check_update(update)
        modules.eval()
        self.source, self.modules, self.looks = source, modules, looks
        self.update: Update = update
        scan = source.scan().to(modules.device)
        if scan.ndim != 2 or scan.shape[1] != modules.architecture.dim:
            raise InputError(
                f"{source.name} has {scan.shape[-1]}-d features, the model expects "
                f"{modules.architecture.dim}-d ones: use the extractor that it was trained with"
            )
        with torch.no_grad():
            # A new tensor for each episode: no reading may change where another one starts.
            self.centre = modules.centre(scan)
            self.states: Float[Tensor, "1 rows dim"] = modules.standardize(scan, self.centre).unsqueeze(0)
        self.start = self.states
        self.observed = torch.zeros(1, len(scan), dtype=torch.bool, device=modules.device)
        self.damaged = torch.zeros_like(self.observed)
        self.valid = torch.ones_like(self.observed)
        self.path: list[Look] = []
        self.logits = self._classify()
        self.start_probability = self.probability

    @property
    def allowed(self) -> Bool[Tensor, "1 rows"]:
        """Rows that may be looked at: neither looked at nor damaged."""
        return ~(self.observed | self.damaged)

    @property
    def probability(self) -> list[float]:
        """Of each class, now."""
        return torch.softmax(self.logits, dim=-1)[0].tolist()

    @property
    def done(self) -> bool:
        """T looks were made, or nothing is left to look at."""
        return int(self.observed.sum()) >= self.looks or not bool(self.allowed.any())

    @torch.no_grad()
    def look(self, row: int, score: float | None = None) -> Look:
        """Look at a row in depth, because of a score.

        A damaged region changes nothing but the path, and is not counted as a look.
        """
        try:
            seen = self._seen(row)
        except UnreadableRegion as error:
            self.damaged = self.damaged.clone()
            self.damaged[0, row] = True
            found = self._described(row, self.probability, score, str(error))
        else:
            self.states, self.observed = look(
                self.states,
                self.observed,
                torch.tensor([row], device=seen.device),
                seen,
                self.modules.f_global,
                self.update,
            )
            self.logits = self._classify()
            found = self._described(row, self.probability, score)
        self.path.append(found)
        return found

    @torch.no_grad()
    def read(self, chooser: Chooser, confidence: float | None = None) -> None:
        """Look where the score is highest until the reading is done.

        Args:
            chooser: Scores regions.
            confidence: Stop when the most likely class has this probability.
        """
        while not self.done:
            state = self.state()
            scores = masked(chooser(state), state.allowed)[0]
            row = int(scores.argmax())
            self.look(row, float(scores[row]))
            if confidence is not None and max(self.probability) >= confidence:
                return

    @torch.no_grad()
    def read_everywhere(self) -> None:
        """V of every region, in the order of the grid, and one answer at the end: what other methods do."""
        states, observed = self.states.clone(), self.observed.clone()
        for row in range(states.shape[1]):
            try:
                states[0, row] = self._seen(row)[0]
            except UnreadableRegion:
                continue
            observed[0, row] = True
        self.states, self.observed = states, observed
        self.logits = self._classify()
        end, rows = self.probability, torch.nonzero(observed[0]).flatten().tolist()
        self.path = [self._described(row, end) for row in rows]

    def state(self) -> State:
        """What a chooser sees."""
        return State(self.states, self.observed, self.valid, self.allowed, self.start)

    @torch.no_grad()
    def attention(self) -> Float[Tensor, "1 rows"]:
        """The classifier's attention on the state."""
        return self.modules.classifier.explain(self.states, self.valid)[1]

    @torch.no_grad()
    def _classify(self) -> Float[Tensor, "1 classes"]:
        return self.modules.classifier(self.states, self.valid)

    def _seen(self, row: int) -> Float[Tensor, "1 dim"]:
        """V of a row; reads it in depth."""
        deep = self.modules.standardize(self.source.deep(row).to(self.modules.device), self.centre)
        return self.modules.f_local(deep.unsqueeze(0))

    def _described(
        self, row: int, probability: list[float], score: float | None = None, damaged: str | None = None
    ) -> Look:
        region = int(self.source.region_index[row])
        return Look(row, region, self.source.corner(row), probability, score, damaged)
