"""Stage C: proximal policy optimization of policy and critic on frozen modules, any number of regions.

Schulman et al. 2017, with the details of the released code's loop: rate falling linearly to 0, clipped
values, normalized advantages, gradients clipped to a norm. Masks that ruled actions out while acting rule
them out when probabilities are computed again.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rlogist.batched import BatchedFeatureVecEnv, State, play
from rlogist.mixed_states import classifier_step
from rlogist.modules import Critic, Policy, masked, seeded
from rlogist.rewards import default_discount
from rlogist.stage import Stage, derived_generator, flat_tensors, part_of
from shared_core import InputError

JOINT_BATCH = 8
"""Slides a step of the classifier between updates."""


@dataclass(frozen=True)
class PPOSettings:
    """Hyperparameters of stage C; the released code's.

    Args:
        steps: Looks in all, over all environments.
        n_envs: Readings side by side.
        n_steps: Looks of each between two updates.
        minibatches: Parts of a rollout.
        epochs: Passes over a rollout.
        lr: At the beginning.
        discount: gamma; where None the reward's own, 0.99 as in the released code and 1 for `delta_ce`.
        trace: lambda of generalized advantage estimation.
        clip: Of the probability ratio and of values.
        entropy: Weight of the entropy bonus.
        value: Weight of the value loss.
        max_norm: Of gradients.
        joint_every: After so many updates, one pass of the classifier over all slides, on the states where
            the policy's own readings end; 0 keeps it frozen.
    """

    steps: int = 500_000
    n_envs: int = 4
    n_steps: int = 128
    minibatches: int = 4
    epochs: int = 4
    lr: float = 2.5e-4
    discount: float | None = None
    trace: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01
    value: float = 0.5
    max_norm: float = 0.5
    joint_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "n_envs", "n_steps", "minibatches", "epochs"):
            if getattr(self, name) < 1:
                raise InputError("expected at least 1", field=name, value=getattr(self, name))
        if self.n_envs * self.n_steps < self.minibatches:
            raise InputError(
                f"expected at most {self.n_envs * self.n_steps}", field="minibatches", value=self.minibatches
            )
        if not 0 < (1.0 if self.discount is None else self.discount) <= 1 or not 0 <= self.trace <= 1:
            raise InputError("expected discount in (0, 1] and trace in [0, 1]")

    @property
    def updates(self) -> int:
        """How many rollouts; at least one."""
        return max(1, round(self.steps / (self.n_envs * self.n_steps)))


@dataclass(frozen=True)
class Rollout:
    """What happened between two updates, time first; states of all times lie one behind the other."""

    states: State
    action: Int64[Tensor, "time envs"]
    log_probability: Float[Tensor, "time envs"]
    value: Float[Tensor, "time envs"]
    reward: Float[Tensor, "time envs"]
    advantage: Float[Tensor, "time envs"]


class PPO(Stage):
    """Policy and critic in training; an epoch is an update.

    Args:
        env: Readings of training slides.
        policy: Trained in place.
        critic: Trained in place.
        settings: Hyperparameters.
        seed: Of actions and minibatches.
    """

    name = "C"

    def __init__(
        self,
        env: BatchedFeatureVecEnv,
        policy: Policy,
        critic: Critic,
        settings: PPOSettings,
        seed: int,
    ) -> None:
        if env.n_envs != settings.n_envs:
            raise InputError(f"expected {env.n_envs}, as env has", field="n_envs", value=settings.n_envs)
        self.env, self.policy, self.critic, self.settings, self.seed = env, policy, critic, settings, seed
        own = settings.discount
        self.discount = default_discount(env.reward_kind) if own is None else own
        self.parameters = [*policy.parameters(), *critic.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.lr, eps=1e-5)
        networks, optimizers = {"policy": policy, "critic": critic}, {"optimizer": self.optimizer}
        self.joint: torch.optim.Optimizer | None = None
        if settings.joint_every:
            classifier = env.modules.classifier
            self.joint = torch.optim.Adam(classifier.parameters(), lr=2e-4)
            networks, optimizers = networks | {"classifier": classifier}, optimizers | {"joint": self.joint}
        super().__init__(settings.updates, networks, optimizers)
        self.env.reset()

    def epoch(self) -> dict[str, float]:
        """One rollout and the passes over it."""
        generator = derived_generator(self.seed, 4, self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * (1 - self.done / self.total)
        rollout = self.collect(generator)
        scalars = self.learn(rollout, generator)
        self.done += 1
        if self.joint is not None and self.done % self.settings.joint_every == 0:
            scalars["joint_loss"] = self._joint_pass(self.joint, generator)
        return scalars

    @torch.no_grad()
    def collect(self, generator: torch.Generator) -> Rollout:
        """Act for `n_steps` looks."""
        times = self.settings.n_steps
        state = self.env.state()
        # Written in place: at thousands of regions, states are most of the memory of training.
        states = state.states.new_empty(times, *state.states.shape)
        flags = state.valid.new_empty(2, times, *state.valid.shape)
        actions, logs, values, rewards, dones = [], [], [], [], []
        for time in range(times):
            states[time], flags[0, time], flags[1, time] = state.states, state.observed, state.valid
            logits = torch.log_softmax(self.logits(state), dim=-1)
            # Drawn on the CPU, whose generator gives the same numbers everywhere.
            action = (
                torch.multinomial(logits.exp().cpu(), 1, generator=generator).squeeze(1).to(logits.device)
            )
            actions.append(action)
            logs.append(logits.gather(1, action.unsqueeze(1)).squeeze(1))
            values.append(self.critic(state.states, state.observed, state.valid))
            state, reward, done = self.env.step(action)
            rewards.append(reward)
            dones.append(done)
        last = self.critic(state.states, state.observed, state.valid)
        value, reward = torch.stack(values), torch.stack(rewards)
        advantage = advantages(reward, value, torch.stack(dones), last, self.discount, self.settings.trace)
        observed, valid = flags.flatten(1, 2)
        seen = State(states.flatten(0, 1), observed, valid, valid & ~observed)
        return Rollout(seen, torch.stack(actions), torch.stack(logs), value, reward, advantage)

    def logits(self, state: State) -> Float[Tensor, "batch regions"]:
        """Unnormalized log-probabilities of regions, those that may not be chosen ruled out."""
        return masked(self.policy(state.states, state.observed), state.allowed)

    def log_probability(
        self, state: State, action: Int64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Log pi(action | state) and the entropy of pi."""
        logs = torch.log_softmax(self.logits(state), dim=-1)
        entropy = -(logs.exp() * logs).sum(dim=-1)
        return logs.gather(1, action.unsqueeze(1)).squeeze(1), entropy

    def learn(self, rollout: Rollout, generator: torch.Generator) -> dict[str, float]:
        """Passes over a rollout in minibatches."""
        flat = {name: getattr(rollout, name).flatten() for name in _COLUMNS}
        count = len(flat["action"])
        seen: dict[str, list[float]] = {}
        for _ in range(self.settings.epochs):
            order = torch.randperm(count, generator=generator)
            for part in order.tensor_split(self.settings.minibatches):
                batch = {name: column[part] for name, column in flat.items()}
                loss, scalars = self._loss(rollout.states.part(part), batch)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_norm)
                self.optimizer.step()
                for name, value in scalars.items():
                    seen.setdefault(name, []).append(value)
        means = {name: float(np.mean(values)) for name, values in seen.items()}
        # Before the first step nothing has changed, so the ratio is 1 but for the order of float sums.
        means["first_ratio_error"] = seen["ratio_error"][0]
        means["reward"] = float(rollout.reward.mean())
        return means

    def _loss(self, state: State, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, float]]:
        s = self.settings
        log_probability, entropy = self.log_probability(state, batch["action"])
        change = log_probability - batch["log_probability"]
        ratio = change.exp()
        advantage = batch["advantage"]
        normal = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
        surrogate = torch.min(ratio * normal, ratio.clamp(1 - s.clip, 1 + s.clip) * normal).mean()
        value = self.critic(state.states, state.observed, state.valid)
        target, old = advantage + batch["value"], batch["value"]
        clipped = old + (value - old).clamp(-s.clip, s.clip)
        error = 0.5 * torch.max((value - target).square(), (clipped - target).square()).mean()
        loss = -surrogate - s.entropy * entropy.mean() + s.value * error
        scalars = {
            "policy_loss": -float(surrogate.detach()),
            "value_loss": float(error.detach()),
            "entropy": float(entropy.detach().mean()),
            "kl": float((ratio - 1 - change).detach().mean()),
            "ratio_error": float((ratio.detach() - 1).abs().max()),
        }
        return loss, scalars

    def _joint_pass(self, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> float:
        """The classifier learns from where the policy's readings of all slides end."""
        env, losses = self.env, []
        with seeded(generator):
            for slides in torch.randperm(len(env.store), generator=generator).split(JOINT_BATCH):
                batch = env.store.part(slides)
                ended = play(
                    batch, env.modules, lambda s: self.policy(s.states, s.observed), env.rho, env.update
                )
                env.modules.train()
                losses.append(classifier_step(env.modules, optimizer, ended.states, batch))
        env.modules.eval()
        env.refresh()
        return float(np.mean(losses))

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        return {**super().state_dict(), **flat_tensors({"env": self.env.state_dict()})}

    def load_state_dict(self, stored: dict[str, Tensor]) -> None:
        """Go on from there."""
        super().load_state_dict(stored)
        self.env.load_state_dict(part_of(stored, "env"))


def advantages(
    reward: Float[Tensor, "time envs"],
    value: Float[Tensor, "time envs"],
    done: Tensor,
    last: Float[Tensor, " envs"],
    discount: float,
    trace: float,
) -> Float[Tensor, "time envs"]:
    """Generalized advantage estimation (Schulman et al. 2016).

    Args:
        reward: r_t.
        value: V(s_t).
        done: Whether s_{t+1} begins another reading.
        last: V of the state behind the last step.
        discount: gamma.
        trace: lambda.
    """
    found, carried, following = torch.zeros_like(reward), torch.zeros_like(last), last
    for time in reversed(range(len(reward))):
        goes_on = (~done[time]).to(reward.dtype)
        error = reward[time] + discount * following * goes_on - value[time]
        carried = error + discount * trace * goes_on * carried
        found[time], following = carried, value[time]
    return found


_COLUMNS = ("action", "log_probability", "value", "advantage")
