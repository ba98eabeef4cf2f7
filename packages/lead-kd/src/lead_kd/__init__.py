"""LEAD: a small retriever that learned how a large one reads, layer by layer.

    loss = lead_kd.LeadLoss(student, lead_kd.DualEncoder(teacher))

Sun, Liu, Gong, Dong, Lu, Zhang, Yang, Majumder, Duan: "LEAD: Liberal Feature-based Distillation for Dense
Retrieval", WSDM 2024, arXiv 2212.05225.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import lazy_names

if TYPE_CHECKING:
    from lead_kd.cache import CachedTeacher, TeacherCache, build_cache
    from lead_kd.evaluation import compare, measure
    from lead_kd.losses import LeadTerms, TermWeights, lead_loss
    from lead_kd.pruning import prune_layers
    from lead_kd.readers import load_data, load_pairs
    from lead_kd.sampling import Sampler
    from lead_kd.sbert import LeadDataCollator, LeadLoss, follow_steps
    from lead_kd.scorers import ColBERT, CrossEncoderScorer, DualEncoder
    from lead_kd.scores import layer_distributions
    from lead_kd.selection import LayerSchedule, select_layers
    from lead_kd.training import Recipe, distill

__all__ = [
    "lead_loss",
    "LeadTerms",
    "TermWeights",
    "layer_distributions",
    "select_layers",
    "LayerSchedule",
    "DualEncoder",
    "ColBERT",
    "CrossEncoderScorer",
    "CachedTeacher",
    "TeacherCache",
    "build_cache",
    "LeadLoss",
    "LeadDataCollator",
    "follow_steps",
    "distill",
    "Recipe",
    "Sampler",
    "prune_layers",
    "load_data",
    "load_pairs",
    "measure",
    "compare",
]

# Each name is imported at first use, so that `lead-kd --help` and its errors about options need no torch.
_HOME = {
    "lead_loss": "losses",
    "LeadTerms": "losses",
    "TermWeights": "losses",
    "layer_distributions": "scores",
    "select_layers": "selection",
    "LayerSchedule": "selection",
    "DualEncoder": "scorers",
    "ColBERT": "scorers",
    "CrossEncoderScorer": "scorers",
    "CachedTeacher": "cache",
    "TeacherCache": "cache",
    "build_cache": "cache",
    "LeadLoss": "sbert",
    "LeadDataCollator": "sbert",
    "follow_steps": "sbert",
    "distill": "training",
    "Recipe": "training",
    "Sampler": "sampling",
    "prune_layers": "pruning",
    "load_data": "readers",
    "load_pairs": "readers",
    "measure": "evaluation",
    "compare": "evaluation",
}

# Modules that are reached as attributes: lead_kd.objectives.Response.
_MODULES = (
    "embeddings",
    "evaluation",
    "jobs",
    "losses",
    "mining",
    "objectives",
    "readers",
    "scorers",
    "scores",
    "search",
    "training",
)

__getattr__, __dir__ = lazy_names(__name__, _HOME, _MODULES)
