from __future__ import annotations

import numpy as np
import pytest
import torch
from feature_worlds import DIM, architecture, bags, modules

from rlogist.batched import BatchedFeatureVecEnv, make_store, play
from rlogist.foreseeing import ForeseeRegions, foresight
from rlogist.full_observation import FullObservation, fit_scale, smooth_top1_svm
from rlogist.mixed_states import MixedStates
from rlogist.modules import Critic, Modules, Policy
from rlogist.ppo import PPO, PPOSettings, advantages
from rlogist.stage import run_stage
from rlogist.staged import StagedSettings
from shared_core import InputError

FAST = StagedSettings(
    epochs=25, lr=5e-3, batch=4, track_from=2, min_epochs=10, patience=5, global_epochs=8, mixed_epochs=5
)


@pytest.fixture(scope="module")
def trained() -> Modules:
    made = Modules(architecture(), torch.Generator().manual_seed(1))
    slides = bags(24, seed=1)
    fit_scale(made, slides)
    run_stage(FullObservation(made, slides, bags(8, seed=2), FAST, seed=0))
    store = make_store(slides, made)
    run_stage(ForeseeRegions(made, store, FAST, seed=0))
    run_stage(MixedStates(made, store, FAST, seed=0))
    return made


def ppo(own: Modules, steps: int = 320, seed: int = 0, **settings) -> PPO:
    torch.manual_seed(0)
    reward = settings.pop("reward", "delta_ce")
    env = BatchedFeatureVecEnv(make_store(bags(12, seed=1), own), own, 8, rho=0.25, reward=reward, seed=seed)
    s = PPOSettings(**({"steps": steps, "n_envs": 8, "n_steps": 10, "lr": 2e-3} | settings))
    return PPO(env, Policy(DIM, 16), Critic(DIM, 16), s, seed)


def test_full_observation_learns_to_tell_new_slides_apart(trained):
    store = make_store(bags(20, seed=3), trained)
    right = trained.classifier(store.seen, store.valid).argmax(-1) == store.label
    assert right.float().mean() >= 0.9


def test_f_global_comes_nearer_to_unseen_deep_features_on_new_slides(trained):
    with_update, without = foresight(make_store(bags(20, seed=4), trained), trained, 0.2, seed=0)
    assert with_update < 0.8 * without


def test_the_ratio_is_one_before_the_first_step_and_only_with_masks(trained):
    run = ppo(trained)
    rollout = run.collect(torch.Generator().manual_seed(0))
    flat, times = rollout.action.flatten(0, 1), torch.arange(80).split(8)
    logs = [run.log_probability(rollout.states.part(rows), flat[rows])[0] for rows in times]
    assert torch.equal(torch.cat(logs), rollout.log_probability.flatten())  # exactly 1
    scalars = run.learn(rollout, torch.Generator().manual_seed(0))
    assert scalars["first_ratio_error"] < 1e-5  # in minibatches, up to the order of float sums
    unmasked = run.policy(rollout.states.states, rollout.states.observed).log_softmax(-1)
    without = unmasked.gather(1, flat.unsqueeze(1)).squeeze(1)
    assert (without - rollout.log_probability.flatten()).abs().max() > 0.05


def test_advantages_are_the_sum_of_discounted_errors():
    g = torch.Generator().manual_seed(0)
    reward, value = torch.randn(6, 2, generator=g), torch.randn(6, 2, generator=g)
    done, last = torch.zeros(6, 2, dtype=torch.bool), torch.randn(2, generator=g)
    done[2, 0] = True
    found = advantages(reward, value, done, last, 0.9, 0.8)
    for env in range(2):
        for t in range(6):
            expected, weight = 0.0, 1.0
            for k in range(t, 6):
                following = 0.0 if done[k, env] else (value[k + 1, env] if k < 5 else last[env])
                expected += weight * (reward[k, env] + 0.9 * following - value[k, env])
                weight *= 0.9 * 0.8
                if done[k, env]:
                    break
            assert found[t, env].item() == pytest.approx(float(expected), abs=1e-5)


def test_reinforcement_finds_the_regions_that_tell(trained):
    run = ppo(trained, steps=3200, lr=1e-2)
    before = run.collect(torch.Generator().manual_seed(1)).reward.mean()
    run_stage(run)
    after = run.collect(torch.Generator().manual_seed(1)).reward.mean()
    assert after > before + 0.02
    env = run.env
    env.reset()
    with torch.no_grad():
        action = run.logits(env.state()).argmax(-1)
    suspicious = env.states[torch.arange(8), action]
    typical = env.states.mean(dim=1)
    assert (suspicious[:, 0] > typical[:, 0] + 1).float().mean() > 0.8


@pytest.mark.parametrize(("reward", "discount"), [("terminal", 0.99), ("neg_ce", 0.99), ("delta_ce", 1.0)])
def test_advantages_are_discounted_as_the_reward_asks(trained, reward, discount):
    run = ppo(trained, reward=reward)
    found = run.collect(torch.Generator().manual_seed(0))
    ends = torch.zeros_like(found.action, dtype=torch.bool)
    for env in range(8):  # the flags of looks fall back to one where a reading begins
        seen = found.states.observed.view(10, 8, -1)[:, env].sum(-1)
        ends[:-1, env] = seen[1:] == 0
        ends[-1, env] = run.env.time[env] == 0
    state = run.env.state()
    with torch.no_grad():
        last = run.critic(state.states, state.observed, state.valid)
    expected = advantages(found.reward, found.value, ends, last, discount, 0.95)
    torch.testing.assert_close(found.advantage, expected)


@pytest.mark.parametrize("joint", [0, 2])
def test_reinforcement_goes_on_to_the_same_bits(joint):
    def fresh() -> PPO:
        return ppo(modules(3), joint_every=joint)

    whole = fresh()
    run_stage(whole)
    first = fresh()
    for _ in range(2):
        first.epoch()
    stored = {key: value.clone() for key, value in first.state_dict().items()}
    second = fresh()
    second.load_state_dict(stored)
    run_stage(second)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_joint_training_shows_the_classifier_the_ends_of_all_readings(monkeypatch):
    shown = []

    def record(own, optimizer, states, batch):
        shown.append((states, batch))
        return 0.0

    monkeypatch.setattr("rlogist.ppo.classifier_step", record)
    run = ppo(modules(3), joint_every=1)
    run.epoch()
    store, own = run.env.store, run.env.modules
    ended = play(store, own, lambda s: run.policy(s.states, s.observed), 0.25)
    assert sum(len(batch) for _, batch in shown) == len(store) == 12
    for states, batch in shown:
        for row in range(len(batch)):
            size = batch.sizes[row]
            alike = [i for i in range(12) if torch.equal(store.scan[i, :size], batch.scan[row, :size])]
            torch.testing.assert_close(states[row, :size], ended.states[alike[0], :size])


def test_stage_a_goes_on_to_the_same_bits():
    def fresh() -> FullObservation:
        return FullObservation(modules(2), bags(8), bags(4, seed=9), FAST, seed=5)

    whole, first, second = fresh(), fresh(), fresh()
    for _ in range(6):
        whole.epoch()
    for _ in range(3):
        first.epoch()
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    for _ in range(3):
        second.epoch()
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_stage_a_warms_up_and_falls_along_half_a_cosine():
    settings = StagedSettings(epochs=10, lr=1.0, warmup=2, final_lr=0.1)
    rates = [settings.rate(epoch) for epoch in range(11)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[6] == pytest.approx((1 + 0.1) / 2)
    assert rates[10] == pytest.approx(0.1)
    assert StagedSettings(lr=2e-4).rate(0) == StagedSettings(lr=2e-4).rate(199) == 2e-4  # the released code's
    stage = FullObservation(modules(2), bags(8), [], settings, seed=5)
    for _ in range(2):
        stage.epoch()
    assert [group["lr"] for group in stage.optimizer.param_groups] == pytest.approx([2 / 3])
    with pytest.raises(InputError, match="warmup below epochs"):
        StagedSettings(epochs=3, warmup=3)


def test_smooth_svm_by_hand():
    # log(e^(0+1) + e^2) - 2 for the first, log(e^1 + e^(3+1)) - 1 for the second
    loss = smooth_top1_svm(torch.tensor([[0.0, 2.0], [1.0, 3.0]]), torch.tensor([1, 0]))
    expected = (np.log(np.e + np.e**2) - 2 + np.log(np.e + np.e**4) - 1) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)
