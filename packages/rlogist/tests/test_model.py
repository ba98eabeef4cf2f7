from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_worlds import architecture, bags, resumable
from generated_slides import damage, tissue_slide

import rlogist
from rlogist.model import RLogist
from rlogist.ppo import PPOSettings
from rlogist.slides import Slide
from rlogist.sources import Bag, SlideSource
from rlogist.staged import StagedSettings
from shared_core import InputError

STAGED = StagedSettings(epochs=2, batch=4, global_epochs=1, mixed_epochs=1)
PPO = PPOSettings(steps=32, n_envs=4, n_steps=4)


class Counting:
    """The stain extractor, with the sum of all pixels it was given."""

    def __init__(self):
        self._own = rlogist.load_extractor("stain")
        self.name, self.dim, self.fingerprint = self._own.name, self._own.dim, self._own.fingerprint
        self.patches = 0

    def __call__(self, patches):
        self.patches += len(patches)
        return self._own(patches)


class Noisy(Slide):
    """A slide whose deep pixels outside some regions are replaced by noise."""

    kept: tuple[int, ...] = ()

    def read_region_block(self, region, purpose="deep"):
        block = super().read_region_block(region, purpose)
        return block if region in self.kept else 255 - block


@pytest.fixture(scope="module")
def model() -> RLogist:
    g = torch.Generator().manual_seed(0)
    made = [Bag(torch.randn(9, 36, generator=g), torch.randn(9, 4, 36, generator=g), i % 2) for i in range(6)]
    own = RLogist("stain", rho=0.2, architecture=architecture(dim=36))
    own.fit(made, staged=STAGED, ppo=PPO)
    torch.nn.init.normal_(own.modules.f_global.change.weight, std=0.1, generator=g)
    torch.nn.init.normal_(own.policy.layers[-1].weight, generator=g)
    return own


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tissue_slide(tmp_path / "a.tif")


def test_the_ledger_has_t_times_k_times_patch_squared_deep_pixels(model, path):
    slide = Slide(path, patch=32)
    found = model.predict(slide)
    looks = -(-len(slide.regions) // 5)
    assert len(found.path) == looks == found.looks
    assert found.ledger.total("deep", "prefetch").pixels == looks * 16 * 32**2
    assert found.ledger.total("deep").reads == looks
    assert found.ledger.total("scan").reads == found.regions
    assert found.deep_pixel_ratio == looks / found.regions


def test_the_network_sees_only_the_scan_and_what_was_looked_at(model, path):
    counting = Counting()
    source = SlideSource(Slide(path, patch=32), counting)
    found = model.predict(source)
    assert counting.patches == found.regions + 16 * found.looks


def test_pixels_that_were_not_looked_at_have_no_effect(model, path):
    found = model.predict(Slide(path, patch=32))
    changed = Noisy(path, patch=32)
    changed.kept = tuple(look.region for look in found.path)
    again = model.predict(changed)
    assert again.path == found.path
    assert again.probability == found.probability
    changed = Noisy(path, patch=32)  # and pixels that are looked at have one
    assert model.predict(changed).probability != found.probability


def test_two_readings_agree_bit_for_bit_and_from_the_cache_too(model, path, tmp_path):
    first, second = (model.predict(Slide(path, patch=32)) for _ in range(2))
    assert (first.path, first.probability, first.attention) == (
        second.path,
        second.probability,
        second.attention,
    )
    features = rlogist.extract_features(
        Slide(path, patch=32), rlogist.load_extractor("stain"), tmp_path / "a.h5", deep=True
    )
    cached = model.predict(features)
    assert [look.region for look in cached.path] == [look.region for look in first.path]
    np.testing.assert_allclose(cached.probability, first.probability, atol=1e-6)


def test_every_strategy_reads_and_exhaustive_reads_all(model, path):
    for strategy in ("random", "greedy-static", "greedy-adaptive"):
        found = model.predict(Slide(path, patch=32), strategy=strategy)
        assert found.observation_ratio == pytest.approx(0.2, abs=1 / found.regions)
    whole = model.predict(Slide(path, patch=32), strategy="exhaustive")
    assert whole.looks == whole.regions
    for one in (found, whole):  # both times include finding tissue and the scan
        assert [one.ledger.total(kind).reads for kind in ("segment", "scan")] == [1, one.regions]
        assert one.seconds > one.ledger.total().seconds
    assert sum(whole.probability) == pytest.approx(1)


def test_a_slide_of_one_region_is_looked_at_once(model):
    g = np.random.default_rng(0)
    scan, deep = g.normal(size=(1, 36)), g.normal(size=(1, 16, 36))
    one = rlogist.SlideFeatures(
        np.zeros((1, 2), np.int64), scan.astype(np.float32), deep.astype(np.float32), np.arange(1)
    )
    found = model.predict(one, rho=0.01)
    assert (found.looks, found.observation_ratio) == (1, 1.0)
    assert sum(found.probability) == pytest.approx(1)


def test_a_confident_reading_may_stop_early(model, path):
    assert model.predict(Slide(path, patch=32), confidence=0.0).looks == 1
    with pytest.raises(InputError, match="confidence: expected a probability"):
        model.predict(Slide(path, patch=32), confidence=90.0)


def test_the_path_says_where_on_the_slide_each_look_was(model, path, tmp_path):
    slide = Slide(path, patch=32)
    found = model.predict(slide)
    assert [look.xy for look in found.path] == [tuple(slide.regions.xy[look.region]) for look in found.path]
    features = rlogist.extract_features(slide, rlogist.load_extractor("stain"), tmp_path / "a.h5", deep=True)
    assert [look.xy for look in model.predict(features).path] == [look.xy for look in found.path]


def test_a_damaged_region_is_noted_on_the_path_and_the_reading_goes_on(model, path):
    with Slide(path, patch=32) as slide:
        whole = model.predict(slide)
        x, y = (int(value) // 256 for value in slide.regions.xy[whole.path[0].region])
    damage(path, page=0, tile=y * 4 + x)
    found = model.predict(Slide(path, patch=32))
    assert found.path[0].region == whole.path[0].region
    assert "is damaged" in found.path[0].damaged
    assert found.looks == whole.looks
    assert any("is damaged" in note for note in found.ledger.notes)


def test_a_slide_whose_scan_is_damaged_everywhere_is_no_glass(model, path):
    damage(path, page=1, tile=0)  # the scan's level has this tile only
    with pytest.raises(InputError, match=r"a is damaged: none of its \d+ regions can be read"):
        model.predict(Slide(path, patch=32))


def test_glass_is_no_tissue_and_no_class(model, tmp_path):
    path = tissue_slide(tmp_path / "glass.tif", height=512, width=512, margin=255)
    found = model.predict(Slide(path, patch=32))
    assert (found.status, found.label, found.path, found.probability) == ("no tissue", None, [], [])
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_saved_model_answers_the_same(model, path, tmp_path):
    model.save_pretrained(tmp_path / "m")
    again = RLogist.from_pretrained(tmp_path / "m")
    one, two = (own.predict(Slide(path, patch=32)) for own in (model, again))
    assert (one.path, one.probability) == (two.path, two.probability)
    other = Counting()
    other.fingerprint = "another"
    with pytest.raises(InputError, match="was trained on features of stain"):
        RLogist.from_pretrained(tmp_path / "m", extractor=other)
    (tmp_path / "m" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="weights that do not fit or are damaged"):
        RLogist.from_pretrained(tmp_path / "m")


def test_what_cannot_be_is_told(model, path):
    with pytest.raises(InputError, match="the model is not trained"):
        RLogist("stain").predict(Slide(path, patch=32))
    with pytest.raises(InputError, match="rho: expected a share"):
        model.predict(Slide(path, patch=32), rho=0.0)
    one_class = [replace(bag, label=0) for bag in bags(4)]
    with pytest.raises(InputError, match="at least two classes"):
        RLogist("stain").fit(one_class)
    with pytest.raises(InputError, match="patients in training and validation: p0-0"):
        RLogist("stain").fit(bags(4), bags(2))
    wrong = Bag(torch.randn(3, 5), torch.randn(3, 4, 5), 0)
    with pytest.raises(InputError, match="features of one dimension"):
        RLogist("stain").fit([*bags(4), wrong])
    holed = bags(4)
    holed[2].deep[0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="s0-2: the extractor at depth gives NaN or infinite features"):
        RLogist("stain").fit(holed)
    rows = np.zeros((2, 36), np.float32)
    rows[1, 3] = np.inf
    features = rlogist.SlideFeatures(np.zeros((2, 2), np.int64), rows, rows[:, None], np.arange(2))
    with pytest.raises(InputError, match="gives NaN or infinite features"):
        model.predict(features)


RUN = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[2])
torch.set_num_threads(1)
from feature_worlds import resumable
def die(stage, done, total, scalars):
    if [stage, str(done)] == sys.argv[3:]:
        os.kill(os.getpid(), signal.SIGKILL)
resumable(sys.argv[1], die)
"""


@pytest.mark.parametrize("moment", ["A 3", "C 2"])
def test_a_killed_training_ends_with_the_same_bits(moment, tmp_path):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", RUN, str(tmp_path), here, *moment.split()]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    seen = []
    killed = resumable(tmp_path, lambda stage, done, *_: seen.append(f"{stage} {done}"))
    assert seen[0] == moment  # what had a checkpoint is not done again
    whole = resumable(None).networks.state_dict()
    for key, value in killed.networks.state_dict().items():
        assert torch.equal(value, whole[key]), key


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    def fit(seed: int) -> None:
        own = RLogist("stain", architecture=architecture(), seed=seed)
        own.fit(bags(4), staged=STAGED, ppo=PPO, folder=tmp_path, resume=True)

    fit(0)
    with pytest.raises(InputError, match="of a run with other settings"):
        fit(1)
