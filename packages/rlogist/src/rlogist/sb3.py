"""The agent in sb3-contrib's `MaskablePPO`: a policy class whose action logits are the scores of regions.

```python
from sb3_contrib import MaskablePPO

agent = MaskablePPO(RegionPolicy, SlideEnv(sources, modules, labels, rho=0.1), gamma=1.0)
```

Importing this module needs `pip install 'rlogist[sb3]'`.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from sb3_contrib.common.maskable.distributions import MaskableCategorical, MaskableCategoricalDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from rlogist.modules import Critic, Policy, seeded


class RegionPolicy(MaskableActorCriticPolicy):
    """`Policy` and `Critic` on observations of `SlideEnv`; any number of regions, padded rows never count.

    Args:
        observation_space: `SlideEnv`'s.
        action_space: `SlideEnv`'s.
        lr_schedule: Learning rate by the rest of training.
        hidden: Width of both networks.
        kwargs: As for `MaskableActorCriticPolicy`.
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        lr_schedule: Callable[[float], float],
        hidden: int = 64,
        **kwargs: Any,
    ) -> None:
        self._hidden = hidden
        rows, columns = observation_space.shape
        self._rows, self._dim = rows, columns - 2
        options = {"features_extractor_class": _Rows, "ortho_init": False, **kwargs}
        super().__init__(observation_space, action_space, lr_schedule, **options)

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor: Any = _Networks(self._dim, self._rows, self._hidden).to(self.device)

    def _build(self, lr_schedule: Any) -> None:
        self.action_dist = _RegionDistribution(self._rows)
        super()._build(lr_schedule)
        self.value_net: Any = nn.Identity()
        rate: Any = {"lr": lr_schedule(1)}  # every torch optimizer has it, their base class has not
        self.optimizer = self.optimizer_class(self.parameters(), **rate, **self.optimizer_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "hidden": self._hidden}


class _RegionDistribution(MaskableCategoricalDistribution):
    """A categorical over regions whose logits are what the network gives.

    Arguments are not validated: at thousands of regions, float32 probabilities do not add up to 1 within the
    validator's tolerance (sb3-contrib issue 247).
    """

    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        return nn.Identity()

    def proba_distribution(self, action_logits: Tensor) -> "_RegionDistribution":
        logits = action_logits.view(-1, self.action_dim)
        self.distribution = MaskableCategorical(logits=logits, validate_args=False)
        return self


class _Rows(BaseFeaturesExtractor):
    """Observations as they are."""

    def __init__(self, observation_space: Any) -> None:
        rows, columns = observation_space.shape
        super().__init__(observation_space, features_dim=rows * columns)

    def forward(self, observations: Tensor) -> Tensor:
        return observations


class _Networks(nn.Module):
    """Policy and critic where stable-baselines expects its multi-layer perceptrons."""

    def __init__(self, dim: int, rows: int, hidden: int) -> None:
        super().__init__()
        self.latent_dim_pi, self.latent_dim_vf = rows, 1
        self.policy, self.critic = Policy(dim, hidden), Critic(dim, hidden)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(observations), self.forward_critic(observations)

    def forward_actor(
        self, observations: Float[Tensor, "batch regions columns"]
    ) -> Float[Tensor, "batch regions"]:
        return self.policy(observations[..., :-2], observations[..., -2] > 0.5)

    def forward_critic(
        self, observations: Float[Tensor, "batch regions columns"]
    ) -> Float[Tensor, "batch 1"]:
        flags = observations[..., -2:] > 0.5
        return self.critic(observations[..., :-2], flags[..., 0], flags[..., 1]).unsqueeze(-1)


def policy_of(agent: Any) -> Policy:
    """The trained scorer of an agent with `RegionPolicy`, a copy for `RLogist` and `chooser_of`."""
    trained = agent.policy.mlp_extractor.policy
    with seeded(torch.Generator().manual_seed(0)):
        copy = Policy(trained.layers[0].in_features - 1, trained.layers[0].out_features)
    copy.load_state_dict({key: value.cpu() for key, value in trained.state_dict().items()})
    return copy.eval()
