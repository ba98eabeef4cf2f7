from __future__ import annotations

import warnings

import gymnasium.utils.env_checker
import numpy as np
import pytest
import torch
from feature_worlds import DIM, bags, modules

from rlogist.baselines import chooser_of
from rlogist.batched import BatchedFeatureVecEnv, make_store, play
from rlogist.environment import Episode, SlideEnv
from rlogist.features import SlideFeatures
from rlogist.modules import Policy
from rlogist.sources import CachedSource
from shared_core import InputError


def source(bag) -> CachedSource:
    count = len(bag)
    return CachedSource(
        SlideFeatures(
            np.zeros((count, 2), np.int64), bag.scan.numpy(), bag.deep.numpy(), np.arange(count), {}
        ),
        bag.name,
    )


@pytest.fixture
def env() -> SlideEnv:
    two = bags(2, sizes=(9, 14))
    return SlideEnv([source(bag) for bag in two], modules(), [bag.label for bag in two], rho=0.3)


def test_passes_gymnasiums_checker(env):
    with warnings.catch_warnings():
        # The checker advises against unbounded boxes; features have no bounds.
        warnings.filterwarnings("ignore", message=".*observation space (min|max)imum value is.*infinity")
        gymnasium.utils.env_checker.check_env(env, skip_render_check=True)


def test_passes_stable_baselines_checker(env):
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(env, warn=False)


def test_slides_of_different_size_share_one_environment_without_cropping(env):
    sizes = [len(slide.region_index) for slide in env.slides]
    assert sizes[0] != sizes[1]
    for index, size in enumerate(sizes):
        state, _ = env.reset(options={"slide": index})
        assert env.action_masks().sum() == size == state[:, -1].sum()
    with pytest.raises(InputError, match="never cropped"):
        SlideEnv(env.slides, modules(), max_regions=min(sizes))


def test_two_episodes_have_the_same_start_and_the_first_does_not_touch_features(env):
    before = env.slides[0].scan().clone()
    first, _ = env.reset(options={"slide": 0})
    for _ in range(2):
        env.step(np.int64(np.flatnonzero(env.action_masks())[0]))
    second, _ = env.reset(options={"slide": 0})
    assert np.array_equal(first, second)
    assert torch.equal(env.slides[0].scan(), before)


def test_the_label_is_in_the_reward_and_in_nothing_that_is_observed(env):
    other = SlideEnv(env.slides, env.modules, [1 - label for label in env.labels], rho=0.3)
    for own in (env, other):
        own.reset(options={"slide": 0})
    for row in range(3):
        (state, reward, *_), (same, opposite, *_) = env.step(np.int64(row)), other.step(np.int64(row))
        assert np.array_equal(state, same)
        assert reward != opposite


def test_improvements_of_cross_entropy_add_up_to_the_whole(env):
    env.reset(options={"slide": 1})
    start = torch.tensor(env.episode.probability)[env.labels[1]].log().item()
    total, done = 0.0, False
    while not done:
        _, reward, done, _, info = env.step(np.int64(np.flatnonzero(env.action_masks())[-1]))
        total += reward
    assert total == pytest.approx(float(np.log(info["probability"][env.labels[1]])) - start, abs=1e-5)


def test_a_masked_look_costs_a_step_and_changes_nothing(env):
    env.reset(options={"slide": 0})
    state, *_ = env.step(0)
    again, reward, *_ = env.step(0)
    assert np.array_equal(state, again)
    assert reward == 0


def test_features_of_another_dimension_are_told():
    with pytest.raises(InputError, match="expects 4-d ones"):
        Episode(source(bags(1)[0]), modules(dim=4), 2)


def test_the_batched_environment_does_the_same_as_the_plain_one():
    two, own = bags(2, sizes=(9, 14)), modules()
    store = make_store(two, own)
    batched = BatchedFeatureVecEnv(store, own, 2, rho=0.3, seed=3)
    batched.reset()
    plain = [SlideEnv(source(two[int(i)]), own, two[int(i)].label, rho=0.3) for i in batched.slide]
    for env in plain:
        env.reset()
    alive = [True, True]
    for _ in range(3):
        action = torch.tensor([int(row.nonzero()[-1]) for row in batched.allowed])
        _, reward, done = batched.step(action)
        for index, env in enumerate(plain):
            if alive[index]:
                state, own_reward, own_done, _, _ = env.step(int(action[index]))
                assert reward[index].item() == pytest.approx(own_reward, abs=1e-5)
                assert bool(done[index]) == own_done
                alive[index] = not own_done
                if not own_done:
                    count = len(env.slides[0].region_index)
                    expected = torch.from_numpy(state[:count, :DIM])
                    torch.testing.assert_close(batched.states[index, :count], expected)


def test_the_batched_environment_refuses_masked_actions():
    own = modules()
    env = BatchedFeatureVecEnv(make_store(bags(3), own), own, 2, rho=0.5)
    env.reset()
    env.step(torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="an action is masked"):
        env.step(torch.tensor([0, 1]))


def test_every_slide_is_read_before_any_is_read_twice():
    own = modules()
    env = BatchedFeatureVecEnv(make_store(bags(6), own), own, 6, rho=0.1)
    env.reset()
    assert sorted(env.slide.tolist()) == list(range(6))


@pytest.mark.parametrize("strategy", ["policy", "random", "greedy-static", "greedy-adaptive"])
def test_a_reading_looks_at_t_different_regions(strategy):
    own = modules()
    store = make_store(bags(4), own)
    played = play(store, own, chooser_of(strategy, own, Policy(DIM)), 0.2)
    for size, path, observed in zip(store.sizes, played.path, played.observed, strict=True):
        looks = path[path >= 0]
        assert len(set(looks.tolist())) == len(looks) == -(-size // 5) == int(observed.sum())
        assert (looks < size).all()


def test_greedy_static_takes_the_most_attention_of_the_scan():
    own = modules()
    store = make_store(bags(3), own)
    attention = own.classifier.explain(store.scan, store.valid)[1]
    played = play(store, own, chooser_of("greedy-static", own), 0.2)
    for row, path in zip(attention, played.path, strict=True):
        looks = path[path >= 0]
        assert looks.tolist() == row.topk(len(looks)).indices.tolist()


def test_the_batched_reading_is_the_single_one():
    two, own, policy = bags(3), modules(), Policy(DIM)
    torch.nn.init.normal_(policy.layers[-1].weight)
    store = make_store(two, own)
    played = play(store, own, chooser_of("policy", own, policy), 0.2)
    for index, bag in enumerate(two):
        episode = Episode(source(bag), own, int((played.path[index] >= 0).sum()))
        chooser = chooser_of("policy", own, policy)
        while not episode.done:
            state = episode.state()
            episode.look(int(chooser(state).masked_fill(~state.allowed, -1e9).argmax()))
        assert [look.row for look in episode.path] == played.path[index][played.path[index] >= 0].tolist()
        torch.testing.assert_close(episode.logits[0], played.logits[index])
