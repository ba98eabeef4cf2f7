"""Reading slides as a gymnasium environment."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float32

from rlogist.episode import Episode
from rlogist.modules import Modules, Update
from rlogist.rewards import Reward, check_reward, reward_of
from rlogist.sources import FeatureSource
from rlogist.transition import check_rho, check_update, episode_length
from shared_core import InputError


class SlideEnv(gymnasium.Env[Float32[np.ndarray, "rows columns"], np.int64]):
    """Reading slides as a gymnasium environment with `action_masks()`, as sb3-contrib's MaskablePPO wants it.

    An observation has a row a region: its d standardized features, whether it was looked at (0 or 1), whether
    the row is a region at all (0 in padding). The action is the row to look at next. A look at a row that the
    mask rules out costs a step and changes nothing.

    Args:
        slides: One source or several; `reset` draws one of them (or takes `options={"slide": i}`).
        modules: The networks, not changed.
        labels: The class of each slide; None gives rewards of 0.
        rho: Share of regions that is looked at.
        reward: As in `rewards.reward_of`.
        update: What a look does to other regions.
        max_regions: Rows of an observation; the largest slide's where None. Slides are padded, never cropped.

    Raises:
        InputError: rho, reward or update is none of the possible ones; a slide has no region or more than
            `max_regions`.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012, gymnasium's own form

    def __init__(
        self,
        slides: FeatureSource | Sequence[FeatureSource],
        modules: Modules,
        labels: int | Sequence[int] | None = None,
        *,
        rho: float = 0.1,
        reward: Reward = "delta_ce",
        update: Update = "global",
        max_regions: int | None = None,
    ) -> None:
        check_rho(rho)
        check_reward(reward)
        check_update(update)
        self.slides: list[FeatureSource] = list(slides) if isinstance(slides, Sequence) else [slides]
        self.labels = [labels] if isinstance(labels, int) else None if labels is None else list(labels)
        if self.labels is not None and len(self.labels) != len(self.slides):
            raise InputError(f"expected {len(self.slides)} labels", field="labels", value=len(self.labels))
        self.modules, self.rho = modules, rho
        self.reward_kind: Reward = reward
        self.update: Update = update
        sizes = [len(source.region_index) for source in self.slides]
        for source, size in zip(self.slides, sizes, strict=True):
            if not size:
                raise InputError(f"{source.name} has no region: no tissue was found")
            if max_regions is not None and size > max_regions:
                raise InputError(
                    f"{source.name} has {size} regions, expected at most max_regions={max_regions}; "
                    "slides are never cropped",
                    field="max_regions",
                )
        self.rows = max_regions or max(sizes)
        dim = modules.architecture.dim
        self.observation_space = spaces.Box(-np.inf, np.inf, (self.rows, dim + 2), np.float32)
        self.action_space = spaces.Discrete(self.rows)
        self.episode: Episode | None = None
        self._label: int | None = None
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32[np.ndarray, "rows columns"], dict[str, Any]]:
        """Start a reading of a slide drawn at random, or of `options["slide"]`."""
        super().reset(seed=seed)
        index = int((options or {}).get("slide", self.np_random.integers(len(self.slides))))
        source = self.slides[index]
        looks = episode_length(len(source.region_index), self.rho)
        self.episode = Episode(source, self.modules, looks, self.update)
        self._label = None if self.labels is None else self.labels[index]
        self._steps = 0
        return self._observation(), {"slide": source.name, "looks": looks}

    def step(
        self, action: np.int64 | int
    ) -> tuple[Float32[np.ndarray, "rows columns"], float, bool, bool, dict[str, Any]]:
        """Look at a row."""
        episode = self._running()
        before, row = episode.logits, int(action)
        self._steps += 1
        if row < len(episode.source.region_index) and bool(episode.allowed[0, row]):
            damaged = episode.look(row).damaged
            self._steps -= damaged is not None  # a damaged region is not a look
        else:
            damaged = None
        done = self._steps >= episode.looks or episode.done
        reward = 0.0
        if self._label is not None:
            label = torch.tensor([self._label], device=before.device)
            last = torch.tensor([done], device=before.device)
            reward = float(reward_of(self.reward_kind, before, episode.logits, label, last)[0])
        info = {"probability": episode.probability, "damaged": damaged}
        return self._observation(), reward, done, False, info

    def action_masks(self) -> Bool[np.ndarray, " rows"]:
        """True where an action may be taken: regions not looked at yet."""
        allowed = self._running().allowed[0].cpu().numpy()
        return np.pad(allowed, (0, self.rows - len(allowed)))

    def _running(self) -> Episode:
        if self.episode is None:
            raise ValueError("call reset() first")
        return self.episode

    def _observation(self) -> Float32[np.ndarray, "rows columns"]:
        episode = self._running()
        found = np.zeros(self.observation_space.shape or (), np.float32)
        count = episode.states.shape[1]
        found[:count, :-2] = episode.states[0].cpu().numpy()
        found[:count, -2] = episode.observed[0].cpu().numpy()
        found[:count, -1] = 1
        return found
