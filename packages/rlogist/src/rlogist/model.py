"""`RLogist`: everything together, from training features to reading a slide and saying what was read."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rlogist.baselines import STRATEGIES, chooser_of
from rlogist.batched import BatchedFeatureVecEnv, make_store
from rlogist.episode import Episode
from rlogist.extractors import Extractor, check_device, load_extractor
from rlogist.features import SlideFeatures
from rlogist.foreseeing import ForeseeRegions
from rlogist.full_observation import FullObservation, fit_scale
from rlogist.ledger import ReadLedger
from rlogist.mixed_states import MixedStates
from rlogist.modules import Architecture, Critic, Modules, Policy, Update, seeded
from rlogist.ppo import PPO, PPOSettings
from rlogist.prediction import Prediction
from rlogist.rewards import Reward, check_reward
from rlogist.slides import Slide
from rlogist.sources import Bag, CachedSource, FeatureSource, SlideSource, check_bags
from rlogist.stage import Stage, derived_generator
from rlogist.staged import StagedSettings
from rlogist.training_run import Epoch, run_stages
from rlogist.transition import check_rho, check_update, episode_length
from shared_core import InputError, files
from shared_core.files import make_folder

Reading = Literal["policy", "random", "greedy-static", "greedy-adaptive", "exhaustive"]


class RLogist:
    """A classifier of slides that looks at few of their regions in depth.

    ```python
    model = rlogist.RLogist(extractor="stain", update="global").fit(bags, validation)
    found = model.predict(slide)  # found.prob, found.path, found.reads, found.seconds, found.ledger
    ```

    Args:
        extractor: Name for `load_extractor`, or an extractor.
        update: What a look does to other regions; `targeted` is SASHA's and `none` the ablation.
        rho: Share of regions to look at.
        reward: Of reinforcement learning; `terminal` is the paper's.
        classes: Names of the classes, in the order of labels.
        architecture: Sizes of the networks; its `dim` and `classes` follow extractor and data.
        seed: Of all randomness in training.

    Raises:
        InputError: An argument is none of the possible ones.
    """

    def __init__(
        self,
        extractor: str | Extractor = "resnet50",
        *,
        update: Update = "global",
        rho: float = 0.1,
        reward: Reward = "delta_ce",
        classes: Sequence[str] | None = None,
        architecture: Architecture | None = None,
        seed: int = 0,
    ) -> None:
        check_update(update)
        check_rho(rho)
        check_reward(reward)
        self._extractor = extractor
        self.update: Update = update
        self.reward: Reward = reward
        self.rho, self.seed = rho, seed
        self.classes = list(classes) if classes is not None else []
        self.architecture = architecture
        self.fingerprint: str | None = None
        """The encoder's whose features this was trained on; None where it is not known."""
        self.opening: dict[str, float] = {}
        """`scan_mpp`, `deep_mpp` and `patch` of the training slides, as arguments of `Slide`."""
        self.networks: nn.ModuleDict | None = None

    @property
    def extractor_name(self) -> str:
        """The encoder's name, which needs no loading."""
        return self._extractor if isinstance(self._extractor, str) else self._extractor.name

    @property
    def extractor(self) -> Extractor:
        """The encoder, loaded at first use."""
        if isinstance(self._extractor, str):
            self._extractor = load_extractor(self._extractor)
        return self._extractor

    @property
    def modules(self) -> Modules:
        """f_local, f_global and classifier."""
        return self._trained("reading")

    @property
    def policy(self) -> Policy:
        """The scorer of regions."""
        return self._trained("policy")

    @property
    def critic(self) -> Critic:
        """The value of states, which only training needs."""
        return self._trained("critic")

    def begin(self, bags: Sequence[Bag]) -> None:
        """Make fresh networks for these training slides, whose features set the standardization."""
        dim, count = check_bags(bags)
        if self.classes and len(self.classes) != count:
            raise InputError(f"expected {count} names", field="classes", value=self.classes)
        self.classes = self.classes or [str(index) for index in range(count)]
        self.architecture = replace(self.architecture or Architecture(dim), dim=dim, classes=count)
        self.networks = _networks(self.architecture, self.seed)
        fit_scale(self.modules, bags)

    def fresh_policy(self) -> None:
        """Begin reinforcement anew: policy and critic as `begin` made them."""
        networks = self._trained_networks()
        made = _networks(self.modules.architecture, self.seed).to(self.modules.device)
        networks["policy"], networks["critic"] = made["policy"], made["critic"]

    def to(self, device: str | torch.device) -> "RLogist":
        """Move the networks; the encoder stays where it is."""
        self._trained_networks().to(device)
        return self

    def fit(
        self,
        bags: Sequence[Bag],
        validation: Sequence[Bag] = (),
        *,
        staged: StagedSettings | None = None,
        ppo: PPOSettings | None = None,
        folder: str | os.PathLike[str] | None = None,
        resume: bool = False,
        on_epoch: Epoch | None = None,
        device: str | torch.device = "cpu",
    ) -> "RLogist":
        """Train all stages on cached features.

        Args:
            bags: Training slides (`bag_of`).
            validation: Slides of other patients that choose stage A's epoch.
            staged: Hyperparameters of stages A, B, B2.
            ppo: Of stage C.
            folder: For checkpoints, made where it is not there; none where None.
            resume: Go on from the folder's checkpoint, to the same bits as without interruption.
            on_epoch: Called after each epoch with (stage, done, total, scalars).
            device: Where the networks learn and stay (`to` moves them). Bags may stay on the CPU; Z and V of
                all slides and a rollout's states have to fit there.

        Raises:
            InputError: No such device, bags do not fit together, patients on both sides, or a checkpoint of
                another run.
        """
        _check_patients(bags, validation)
        check_device(str(device))
        self.begin(bags)
        if validation:
            check_bags(validation, len(self.classes))
        staged = staged or StagedSettings()
        ppo = ppo or PPOSettings()
        self.to(device)
        run_stages(
            self._trained_networks(),
            self._stages(bags, validation, staged, ppo),
            settings={
                **self._config(),
                "staged": asdict(staged),
                "ppo": asdict(ppo),
                "bags": _digest([*bags, *validation]),
            },
            folder=None if folder is None else make_folder(folder),
            resume=resume,
            on_epoch=on_epoch,
        )
        self._trained_networks().eval()
        return self

    def predict(
        self,
        slide: Slide | SlideFeatures | FeatureSource,
        *,
        rho: float | None = None,
        strategy: Reading = "policy",
        confidence: float | None = None,
        seed: int = 0,
    ) -> Prediction:
        """Read a slide. The same slide gives the same bits each time.

        Args:
            slide: A slide file, which is read only where the agent looks; or cached features.
            rho: Share of regions to look at; the trained one where None.
            strategy: How regions are chosen; `exhaustive` looks at all of them, as other methods do.
            confidence: Stop when the most likely class has this probability; not in the paper.
            seed: Of the strategy `random`.

        Raises:
            InputError: Not trained, rho or confidence out of range, features of another extractor, a slide
                that was opened with another patch size or other magnifications than those of training, or one
                whose regions are all damaged.
        """
        started = perf_counter()
        rho = 1.0 if strategy == "exhaustive" else self.rho if rho is None else rho
        check_rho(rho)
        if confidence is not None and not 0 <= confidence <= 1:
            raise InputError("expected a probability", field="confidence", value=confidence)
        if strategy not in (*STRATEGIES, "exhaustive"):
            raise InputError("no such strategy", field="strategy", value=strategy)
        source = self._source(slide)
        before = source.ledger.copy()
        count = len(source.region_index)
        total = len(slide.regions) if isinstance(slide, Slide) else count
        if total and not count:
            raise InputError(f"{source.name} is damaged: none of its {total} regions can be read at the scan")
        if not count:
            return self._answer(source, None, total, rho, started, before)
        episode = Episode(source, self.modules, episode_length(count, rho), self.update)
        if strategy == "exhaustive":
            episode.read_everywhere()
        else:
            episode.read(chooser_of(strategy, self.modules, self.policy, seed), confidence)
        return self._answer(source, episode, total, rho, started, before)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` to a folder, which is made."""
        networks = self._trained_networks()
        target = make_folder(folder)
        with files.atomic_path(target / "model.safetensors") as temporary:
            save_file({key: value.contiguous() for key, value in networks.state_dict().items()}, temporary)
        files.write_json(target / "config.json", self._config())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], extractor: Extractor | None = None) -> "RLogist":
        """Load what `save_pretrained` wrote.

        Args:
            folder: The folder.
            extractor: The encoder, where it is not one that `load_extractor` can make from its name.

        Raises:
            InputError: A file is missing or damaged, or the extractor is another one.
        """
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            architecture = Architecture(**config["architecture"])
            own = {key: config[key] for key in ("update", "rho", "reward", "classes", "seed")}
            name, fingerprint = config["extractor"], config["fingerprint"]
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", file=path) from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a configuration of RLogist: {error}", file=path) from error
        model = cls(extractor or name, architecture=architecture, **own)
        if fingerprint is not None and (extractor is not None or name == "stain"):
            _check_fingerprint(model.extractor, name, fingerprint, path)
        model.fingerprint, model.opening = fingerprint, config.get("opening", {})
        model.networks = _networks(architecture, model.seed)
        weights = Path(folder) / "model.safetensors"
        try:
            model.networks.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(f"weights that do not fit or are damaged: {error}", file=weights) from error
        model.networks.eval()
        return model

    def _config(self) -> dict[str, Any]:
        known = self.fingerprint
        if known is None and not isinstance(self._extractor, str):
            known = self._extractor.fingerprint
        return {
            "extractor": self.extractor_name,
            "fingerprint": known,
            "opening": self.opening,
            "architecture": (self.architecture or Architecture(1)).to_dict(),
            "update": self.update,
            "rho": self.rho,
            "reward": self.reward,
            "classes": self.classes,
            "seed": self.seed,
        }

    def _stages(
        self, bags: Sequence[Bag], validation: Sequence[Bag], staged: StagedSettings, ppo: PPOSettings
    ) -> list[Callable[[], Stage]]:
        modules, seed = self.modules, self.seed

        def reinforcement() -> Stage:
            env = BatchedFeatureVecEnv(
                make_store(bags, modules),
                modules,
                ppo.n_envs,
                rho=self.rho,
                reward=self.reward,
                update=self.update,
                seed=seed,
            )
            return PPO(env, self.policy, self.critic, ppo, seed)

        return [
            lambda: FullObservation(modules, bags, validation, staged, seed),
            lambda: ForeseeRegions(modules, make_store(bags, modules), staged, seed, self.update),
            lambda: MixedStates(modules, make_store(bags, modules), staged, seed, self.update),
            reinforcement,
        ]

    def _source(self, slide: Slide | SlideFeatures | FeatureSource) -> FeatureSource:
        self._trained_networks()
        if isinstance(slide, SlideFeatures):
            return CachedSource(slide)
        if not isinstance(slide, Slide):
            return slide
        _check_opening(slide, self.opening)
        if self.fingerprint is not None:
            _check_fingerprint(self.extractor, self.extractor.name, self.fingerprint, None)
        return SlideSource(slide, self.extractor)

    def _answer(
        self,
        source: FeatureSource,
        episode: Episode | None,
        regions: int,
        rho: float,
        started: float,
        before: ReadLedger,
    ) -> Prediction:
        ledger = source.ledger.since(before)
        for text in source.ledger.notes:  # said at opening or in an earlier reading, and true for this one
            ledger.note(text)
        return Prediction(
            slide=source.name,
            status="no tissue" if episode is None else "read",
            classes=self.classes,
            probability=[] if episode is None else episode.probability,
            start=[] if episode is None else episode.start_probability,
            path=[] if episode is None else episode.path,
            regions=regions,
            region_index=source.region_index.tolist(),
            attention=[] if episode is None else episode.attention()[0].tolist(),
            seconds=perf_counter() - started,
            ledger=ledger,
            rho=rho,
            deep_pixel_ratio=source.slide.deep_share(ledger) if isinstance(source, SlideSource) else None,
        )

    def _trained_networks(self) -> nn.ModuleDict:
        if self.networks is None:
            raise InputError("the model is not trained: fit it, or load one with from_pretrained")
        return self.networks

    def _trained(self, name: str) -> Any:
        return self._trained_networks()[name]


def _networks(architecture: Architecture, seed: int) -> nn.ModuleDict:
    generator = derived_generator(seed, 0)
    a = architecture
    with seeded(generator):
        return nn.ModuleDict(
            {
                "reading": Modules(a),
                "policy": Policy(a.dim, a.policy_hidden),
                "critic": Critic(a.dim, a.policy_hidden),
            }
        )


def _check_fingerprint(extractor: Extractor, name: str, fingerprint: str, path: Path | None) -> None:
    if extractor.fingerprint != fingerprint:
        raise InputError(
            f"was trained on features of {name} ({fingerprint}), not of {extractor.name} with these weights",
            file=path,
            field="extractor",
            value=extractor.fingerprint,
        )


def _check_opening(slide: Slide, trained: dict[str, float]) -> None:
    own = {"patch": slide.geometry.patch, "scan_mpp": slide.scan_mpp, "deep_mpp": slide.deep_mpp}
    for name, value in trained.items():
        if abs(own[name] - value) > 0.01 * value:
            raise InputError(
                f"expected {value:g}, with which the model was trained", field=name, value=own[name]
            )


def _check_patients(bags: Sequence[Bag], validation: Sequence[Bag]) -> None:
    both = sorted({bag.patient for bag in bags if bag.patient} & {bag.patient for bag in validation})
    if both:
        raise InputError(f"patients in training and validation: {', '.join(both[:10])}", field="validation")


def _digest(bags: Sequence[Bag]) -> str:
    digest = hashlib.sha256()
    for bag in bags:
        digest.update(f"{bag.name}|{bag.label}|{bag.patient}|{tuple(bag.deep.shape)}".encode())
        digest.update(bag.scan.contiguous().numpy().tobytes())
    return digest.hexdigest()
