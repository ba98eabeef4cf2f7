from __future__ import annotations

import numpy as np
import pytest
import torch
from feature_worlds import DIM, bags, modules
from test_environment import source

pytest.importorskip("sb3_contrib")
from sb3_contrib import MaskablePPO

from rlogist.environment import SlideEnv
from rlogist.sb3 import RegionPolicy, policy_of


def agent_and_env(count: int = 3) -> tuple[MaskablePPO, SlideEnv]:
    two = bags(count, sizes=(9, 14))
    env = SlideEnv([source(bag) for bag in two], modules(), [bag.label for bag in two], rho=0.3)
    agent = MaskablePPO(
        RegionPolicy, env, n_steps=16, batch_size=8, n_epochs=1, gamma=1.0, seed=0, device="cpu"
    )
    return agent, env


def test_maskable_ppo_trains_and_never_takes_a_masked_action():
    agent, env = agent_and_env()
    before = [p.clone() for p in agent.policy.mlp_extractor.parameters()]
    agent.learn(32)
    after = list(agent.policy.mlp_extractor.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.numel() > 1)
    state, _ = env.reset(seed=0)
    done = False
    while not done:
        masks = env.action_masks()
        action, _ = agent.predict(state, action_masks=masks, deterministic=True)
        assert masks[int(action)]
        state, _, done, _, _ = env.step(np.int64(action))


def test_action_logits_are_the_policys_scores():
    agent, env = agent_and_env()
    state, _ = env.reset(seed=0)
    observation = torch.from_numpy(state).unsqueeze(0)
    masks = env.action_masks()
    logits = agent.policy.get_distribution(observation, action_masks=masks).distribution.logits[0]
    scores = policy_of(agent)(observation[..., :DIM], observation[..., DIM] > 0.5)[0]
    expected = torch.log_softmax(scores[torch.from_numpy(masks)], 0)
    torch.testing.assert_close(logits[torch.from_numpy(masks)], expected)


def test_thousands_of_regions_do_not_trip_the_simplex_check():
    agent, _ = agent_and_env()
    dist = agent.policy.action_dist
    dist.action_dim = 5000
    found = dist.proba_distribution(torch.randn(64, 5000) * 8)
    found.apply_masking(np.ones((64, 5000), bool))
    assert found.get_actions().shape == (64,)
