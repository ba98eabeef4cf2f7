"""Training and reading keep their tensors on one device, whichever it is (`elsewhere` stands for a GPU)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from elsewhere import elsewhere
from feature_worlds import architecture, bags
from test_environment import source

from rlogist.baselines import STRATEGIES
from rlogist.batched import make_store
from rlogist.environment import SlideEnv
from rlogist.mil_baselines import MIL_POOLINGS, fit_pooled
from rlogist.model import RLogist
from rlogist.ppo import PPOSettings
from rlogist.staged import StagedSettings
from shared_core import InputError

# The device behind `elsewhere` is PyTorch's meta, to which copies are not known to do anything.
pytestmark = pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter:UserWarning")


def fit(folder=None, on_epoch=None, device="cpu", joint_every=0, update="global", **staged) -> RLogist:
    """A very short training of all stages that goes on from the folder's checkpoint."""
    own = RLogist("stain", architecture=architecture(), update=update, seed=3)
    short = {"epochs": 2, "track_from": 0, "batch": 3, "global_epochs": 1, "mixed_epochs": 1}
    return own.fit(
        bags(6),
        bags(2, seed=1),
        folder=folder,
        resume=True,
        on_epoch=on_epoch,
        device=device,
        staged=StagedSettings(**short | staged),
        ppo=PPOSettings(steps=48, n_envs=4, n_steps=4, epochs=1, minibatches=2, joint_every=joint_every),
    )


def numbers(model: RLogist) -> dict[str, torch.Tensor]:
    return {key: value.cpu() for key, value in model.networks.state_dict().items()}


def copy_of(model: RLogist) -> RLogist:
    """The same networks once more, so that moving them does not move the fixture's."""
    own = RLogist("stain", architecture=model.architecture, rho=model.rho, seed=3)
    own.begin(bags(6))
    own.networks.load_state_dict(model.networks.state_dict())
    own.networks.eval()
    return own


@pytest.fixture(scope="module")
def trained() -> RLogist:
    return fit()


def test_the_other_device_refuses_what_a_gpu_refuses():
    with elsewhere() as device:
        there = torch.ones(3, 2).to(device)
        assert there.device.type == device
        assert (there + 1).sum().item() == 12
        assert there[torch.tensor([0, 2])].tolist() == [[1, 1], [1, 1]]
        for refused in (
            lambda: there + torch.ones(3, 2),
            lambda: torch.where(torch.ones(3, 2) > 0, there, there),
            lambda: torch.rand(3, device=device, generator=torch.Generator()),
            there.numpy,
        ):
            with pytest.raises(RuntimeError, match=r"two devices|generator|not supported"):
                refused()


def test_all_stages_learn_the_same_on_another_device(trained, tmp_path):
    with elsewhere() as device:
        there = fit(tmp_path, device=device)
        assert {value.device.type for value in there.networks.state_dict().values()} == {device}
        stored = numbers(there)
    for key, value in numbers(trained).items():
        torch.testing.assert_close(stored[key], value)


@pytest.mark.parametrize("moment", [("A", 1), ("C", 2)])
def test_a_run_goes_on_on_another_device(trained, tmp_path, moment):
    class Stop(Exception):
        pass

    def stop(stage, done, total, scalars):
        if (stage, done) == moment:
            raise Stop

    with pytest.raises(Stop):
        fit(tmp_path, stop)
    with elsewhere() as device:
        stored = numbers(fit(tmp_path, device=device))
    for key, value in numbers(trained).items():
        torch.testing.assert_close(stored[key], value)


def test_the_other_forms_of_training_stay_there_too():
    with elsewhere() as device:
        own = fit(
            device=device, joint_every=1, update="targeted", keep=0.5, instance_weight=0.0, global_ce=0.1
        )
        assert own.policy.layers[0].weight.device.type == device


@pytest.mark.parametrize("strategy", [*STRATEGIES, "exhaustive"])
def test_reading_answers_the_same_on_another_device(trained, strategy):
    slide = source(bags(1, seed=5)[0])
    expected = trained.predict(slide, strategy=strategy)
    with elsewhere() as device:
        there = copy_of(trained).to(device)
        found = there.predict(slide, strategy=strategy)
    assert [look.row for look in found.path] == [look.row for look in expected.path]
    np.testing.assert_allclose(found.probability, expected.probability, rtol=1e-5)


def test_an_environment_of_networks_on_another_device_gives_arrays(trained):
    slide = source(bags(1, seed=5)[0])
    with elsewhere() as device:
        env = SlideEnv(slide, copy_of(trained).to(device).modules, 1, rho=0.2)
        first, _ = env.reset(seed=0)
        second, reward, *_ = env.step(int(np.flatnonzero(env.action_masks())[0]))
    here = SlideEnv(slide, trained.modules, 1, rho=0.2)
    np.testing.assert_allclose(first, here.reset(seed=0)[0], rtol=1e-5)
    expected, own, *_ = here.step(int(np.flatnonzero(here.action_masks())[0]))
    np.testing.assert_allclose(second, expected, rtol=1e-4, atol=1e-6)
    assert reward == pytest.approx(own, abs=1e-6)


def test_rival_classifiers_learn_there_too(trained):
    with elsewhere() as device:
        store = make_store(bags(6), copy_of(trained).to(device).modules)
        for pooling in MIL_POOLINGS:
            model = fit_pooled(pooling, store, store, classes=2, seed=0, epochs=2)
            assert model(store.seen, store.valid).device.type == device


def test_a_device_that_is_not_there_is_told():
    with pytest.raises(InputError, match="device: cannot be used here"):
        RLogist("stain", architecture=architecture()).fit(bags(4), device="cuda:99")
