"""Many readings at once on cached features: tensors in, tensors out, any number of regions by padding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rlogist.modules import Modules, Update, masked
from rlogist.rewards import Reward, check_reward, reward_of
from rlogist.sources import Bag
from rlogist.transition import check_update, episode_length, look
from shared_core import InputError

Chooser = Callable[["State"], Float[Tensor, "batch regions"]]
"""Scores of regions, the highest allowed one is looked at next."""


@dataclass(frozen=True)
class FeatureStore:
    """Slides padded to the largest one's number of regions; padding has zeros, and `valid` false.

    Attributes:
        scan: Z, standardized.
        seen: V = f_local(U) of every region.
        valid: Which rows are regions.
        label: Class of each slide.
        sizes: N of each slide.
    """

    scan: Float[Tensor, "slides regions dim"]
    seen: Float[Tensor, "slides regions dim"]
    valid: Bool[Tensor, "slides regions"]
    label: Int64[Tensor, " slides"]
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.label)

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return self.scan.device

    def part(self, slides: Int64[Tensor, " batch"]) -> "FeatureStore":
        """Some of the slides, padded to the largest of them."""
        sizes = tuple(self.sizes[int(slide)] for slide in slides)
        width = max(sizes)
        return FeatureStore(
            self.scan[slides, :width],
            self.seen[slides, :width],
            self.valid[slides, :width],
            self.label[slides],
            sizes,
        )


def pad(rows: Sequence[Tensor]) -> Tensor:
    """Stack tensors (regions, ...) of different lengths to (slides, most regions, ...), zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def valid_rows(sizes: Sequence[int]) -> Bool[Tensor, "slides regions"]:
    """Which rows of padded slides are regions."""
    return torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(1)


@torch.no_grad()
def make_store(bags: Sequence[Bag], modules: Modules) -> FeatureStore:
    """Standardize Z and pool V of all slides, once; the result lies on the modules' device."""
    modules.eval()
    scan, seen = [], []
    for bag in (bag.to(modules.device) for bag in bags):
        centre = modules.centre(bag.scan)
        scan.append(modules.standardize(bag.scan, centre))
        seen.append(modules.f_local(modules.standardize(bag.deep, centre)))
    sizes = tuple(len(bag) for bag in bags)
    label = torch.tensor([bag.label for bag in bags])
    valid = valid_rows(sizes)
    return FeatureStore(pad(scan), pad(seen), valid.to(modules.device), label.to(modules.device), sizes)


@dataclass(frozen=True)
class State:
    """What an agent sees of a batch of readings.

    Attributes:
        states: S_t.
        observed: m_t.
        valid: Which rows are regions.
        allowed: Rows that may be looked at next.
        start: S_0; None in a rollout, whose states are learned from and not read on.
    """

    states: Float[Tensor, "batch regions dim"]
    observed: Bool[Tensor, "batch regions"]
    valid: Bool[Tensor, "batch regions"]
    allowed: Bool[Tensor, "batch regions"]
    start: Float[Tensor, "batch regions dim"] | None = None

    def part(self, rows: Int64[Tensor, " part"]) -> "State":
        """Some of the readings."""
        return State(self.states[rows], self.observed[rows], self.valid[rows], self.allowed[rows])


class BatchedFeatureVecEnv:
    """`n_envs` readings side by side on cached features; a reading that ends is followed by another slide's.

    Modules stay as they are while the environment is used. All state is in `state_dict`.

    Args:
        store: The slides.
        modules: f_global and classifier.
        n_envs: Readings at once.
        rho: Share of regions that is looked at.
        reward: As in `rewards.reward_of`.
        update: What a look does to other regions.
        seed: Of the order of slides: every slide is read once before any is read twice.
    """

    def __init__(
        self,
        store: FeatureStore,
        modules: Modules,
        n_envs: int = 32,
        *,
        rho: float = 0.1,
        reward: Reward = "delta_ce",
        update: Update = "global",
        seed: int = 0,
    ) -> None:
        check_reward(reward)
        check_update(update)
        if n_envs < 1:
            raise InputError("expected at least 1", field="n_envs", value=n_envs)
        self.store, self.modules, self.n_envs, self.rho = store, modules.eval(), n_envs, rho
        self.reward_kind: Reward = reward
        self.update: Update = update
        self.looks = torch.tensor([episode_length(size, rho) for size in store.sizes], device=store.device)
        self._generator = torch.Generator().manual_seed(seed)
        self._queue = torch.empty(0, dtype=torch.int64)
        self._start_logits = self._classify_starts()
        self.slide = torch.zeros(n_envs, dtype=torch.int64, device=store.device)
        self.time = torch.zeros(n_envs, dtype=torch.int64, device=store.device)
        self._take_up_slides()
        self.states = self._start
        self.observed = torch.zeros_like(self.valid)
        self.logits = self._start_logits[self.slide]

    def reset(self) -> State:
        """Start a reading in every environment."""
        self._begin(torch.ones_like(self.slide, dtype=torch.bool))
        return self.state()

    @torch.no_grad()
    def step(
        self, action: Int64[Tensor, " envs"]
    ) -> tuple[State, Float[Tensor, " envs"], Bool[Tensor, " envs"]]:
        """Look at a region in every environment: the next state (of a new slide where done), reward, done.

        Raises:
            ValueError: An action is not allowed.
        """
        envs = torch.arange(self.n_envs, device=action.device)
        if not bool(self.allowed[envs, action].all()):
            raise ValueError("an action is masked: a region that was looked at, or padding")
        seen = self.store.seen[self.slide, action]
        self.states, self.observed = look(
            self.states, self.observed, action, seen, self.modules.f_global, self.update
        )
        before, self.logits = self.logits, self.modules.classifier(self.states, self.valid)
        self.time = self.time + 1
        done = self.time >= self.looks[self.slide]
        reward = reward_of(self.reward_kind, before, self.logits, self.store.label[self.slide], done)
        self._begin(done)
        return self.state(), reward, done

    @property
    def allowed(self) -> Bool[Tensor, "envs regions"]:
        """Rows that may be looked at."""
        return self.valid & ~self.observed

    def state(self) -> State:
        """What the agent sees."""
        return State(self.states, self.observed, self.valid, self.allowed, self._start)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs to go on with the same bits."""
        return {
            "slide": self.slide,
            "time": self.time,
            "states": self.states,
            "observed": self.observed,
            "logits": self.logits,
            "queue": self._queue,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, stored: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        stored = {
            key: value if key in _ON_CPU else value.to(self.store.device) for key, value in stored.items()
        }
        self.slide, self.time, self.states = stored["slide"], stored["time"], stored["states"]
        self.observed, self.logits, self._queue = stored["observed"], stored["logits"], stored["queue"]
        self._generator.set_state(stored["generator"])
        self._take_up_slides()
        self._start_logits = self._classify_starts()

    def refresh(self) -> None:
        """Take up a classifier that has changed."""
        self._start_logits = self._classify_starts()
        with torch.no_grad():
            self.logits = self.modules.classifier(self.states, self.valid)

    @torch.no_grad()
    def _classify_starts(self) -> Float[Tensor, "slides classes"]:
        return self.modules.classifier(self.store.scan, self.store.valid)

    def _take_up_slides(self) -> None:
        """S_0 and the rows that are regions, of the slides that are being read."""
        self._start, self.valid = self.store.scan[self.slide], self.store.valid[self.slide]

    def _begin(self, which: Bool[Tensor, " envs"]) -> None:
        count = int(which.sum())
        if not count:
            return
        while len(self._queue) < count:
            more = torch.randperm(len(self.store), generator=self._generator)
            self._queue = torch.cat([self._queue, more])
        # New tensors: what a caller kept of earlier steps must not change.
        self.slide = self.slide.masked_scatter(which, self._queue[:count].to(self.slide.device))
        self._queue = self._queue[count:]
        self._take_up_slides()
        flags = which.unsqueeze(-1)
        self.time = self.time.masked_fill(which, 0)
        self.states = torch.where(flags.unsqueeze(-1), self._start, self.states)
        self.observed = self.observed & ~flags
        self.logits = torch.where(flags, self._start_logits[self.slide], self.logits)


_ON_CPU = ("queue", "generator")


@dataclass(frozen=True)
class Played:
    """What came of one reading of each slide.

    Attributes:
        logits: Of each slide at the end.
        states: S_T.
        observed: Which rows were looked at.
        path: Rows in order; -1 behind the end of shorter readings.
    """

    logits: Float[Tensor, "slides classes"]
    states: Float[Tensor, "slides regions dim"]
    observed: Bool[Tensor, "slides regions"]
    path: Int64[Tensor, "slides looks"]


@torch.no_grad()
def play(
    store: FeatureStore, modules: Modules, chooser: Chooser, rho: float, update: Update = "global"
) -> Played:
    """Read every slide once, always looking where the chooser's score is highest."""
    modules.eval()
    check_update(update)
    looks = torch.tensor([episode_length(size, rho) for size in store.sizes], device=store.device)
    states, observed = store.scan, torch.zeros_like(store.valid)
    path = torch.full((len(store), int(looks.max())), -1, device=store.device)
    slides = torch.arange(len(store), device=store.device)
    for time in range(path.shape[1]):
        allowed = store.valid & ~observed
        scores = chooser(State(states, observed, store.valid, allowed, store.scan))
        action = masked(scores, allowed).argmax(dim=-1)
        after, marked = look(states, observed, action, store.seen[slides, action], modules.f_global, update)
        going = time < looks
        states = torch.where(going.view(-1, 1, 1), after, states)
        observed = torch.where(going.unsqueeze(-1), marked, observed)
        path[:, time] = torch.where(going, action, path[:, time])
    return Played(modules.classifier(states, store.valid), states, observed, path)
