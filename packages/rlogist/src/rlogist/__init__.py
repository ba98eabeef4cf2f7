"""RLogist: read a whole-slide image by looking at few of its regions in depth (AAAI 2023).

    slide = rlogist.Slide("x.svs", scan_mpp=2.0, deep_mpp=0.5, patch=256)
    model = rlogist.RLogist.from_pretrained("model")
    found = model.predict(slide)  # found.prob, found.path, found.reads, found.seconds, found.ledger

Zhao, Zhang, Ye, Cao, Han, Fu, Yang: "RLogist: Fast Observation Strategy on Whole-slide Images with Deep
Reinforcement Learning", AAAI 2023, arXiv 2212.01737.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import lazy_names

if TYPE_CHECKING:
    from rlogist.annotations import read_annotations
    from rlogist.batched import BatchedFeatureVecEnv, make_store
    from rlogist.demo_slides import make_demo_slides
    from rlogist.environment import SlideEnv
    from rlogist.extractors import load_extractor
    from rlogist.features import SlideFeatures, extract_features, read_features
    from rlogist.layouts import camelyon16, read_labels, split_patients, tcga
    from rlogist.ledger import ReadLedger
    from rlogist.model import RLogist
    from rlogist.modules import Architecture, Modules
    from rlogist.ppo import PPOSettings
    from rlogist.prediction import Prediction
    from rlogist.report import write_report
    from rlogist.slides import Slide
    from rlogist.sources import Bag, CachedSource, FeatureSource, SlideSource, bag_of
    from rlogist.staged import StagedSettings
    from rlogist.tissue import Segmentation

__all__ = [
    "Slide",
    "Segmentation",
    "ReadLedger",
    "load_extractor",
    "extract_features",
    "read_features",
    "SlideFeatures",
    "read_labels",
    "camelyon16",
    "tcga",
    "split_patients",
    "read_annotations",
    "make_demo_slides",
    "RLogist",
    "Prediction",
    "Architecture",
    "StagedSettings",
    "PPOSettings",
    "Bag",
    "bag_of",
    "FeatureSource",
    "SlideSource",
    "CachedSource",
    "Modules",
    "SlideEnv",
    "BatchedFeatureVecEnv",
    "make_store",
    "write_report",
]

# Each name is imported at first use, so that `rlogist --help` and its errors about options need no torch.
_HOME = {
    "Slide": "slides",
    "Segmentation": "tissue",
    "ReadLedger": "ledger",
    "load_extractor": "extractors",
    "extract_features": "features",
    "read_features": "features",
    "SlideFeatures": "features",
    "read_labels": "layouts",
    "camelyon16": "layouts",
    "tcga": "layouts",
    "split_patients": "layouts",
    "read_annotations": "annotations",
    "make_demo_slides": "demo_slides",
    "RLogist": "model",
    "Prediction": "prediction",
    "Architecture": "modules",
    "Modules": "modules",
    "StagedSettings": "staged",
    "PPOSettings": "ppo",
    "Bag": "sources",
    "bag_of": "sources",
    "FeatureSource": "sources",
    "SlideSource": "sources",
    "CachedSource": "sources",
    "SlideEnv": "environment",
    "BatchedFeatureVecEnv": "batched",
    "make_store": "batched",
    "write_report": "report",
}

__getattr__, __dir__ = lazy_names(__name__, _HOME)
