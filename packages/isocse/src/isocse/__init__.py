"""The geometry of sentence encoders: isotropy, contextualization and learning dynamics.

    report = isocse.analyze("my-encoder", sentences)
    shift = isocse.compare("before", "after", sentences)

Xiao, Long, Al Moubayed: "On Isotropy, Contextualization and Learning Dynamics of Contrastive-based Sentence
Representation Learning", Findings of ACL 2023, arXiv 2212.09170.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import lazy_names

if TYPE_CHECKING:
    from isocse.analysis import analyze, analyze_states
    from isocse.corpus import SentenceFile
    from isocse.cosines import (
        expected_anisotropy,
        intra_sentence_similarity,
        mean_cosine,
        self_similarity,
    )
    from isocse.dimensions import dimension_contributions, remove_dimensions
    from isocse.dynamics import GeometryCallback, GeometryEvaluator
    from isocse.isotropy import alignment, isoscore, partition_isotropy, uniformity
    from isocse.report import GeometryReport
    from isocse.shift import ShiftReport, compare
    from isocse.training import Recipe, train

__all__ = [
    "analyze",
    "analyze_states",
    "compare",
    "GeometryReport",
    "ShiftReport",
    "SentenceFile",
    "GeometryCallback",
    "GeometryEvaluator",
    "Recipe",
    "train",
    "self_similarity",
    "intra_sentence_similarity",
    "mean_cosine",
    "expected_anisotropy",
    "dimension_contributions",
    "remove_dimensions",
    "isoscore",
    "partition_isotropy",
    "alignment",
    "uniformity",
]

# Each name is imported at first use, so that `isocse --help` and its errors about options need no torch.
_HOME = {
    "analyze": "analysis",
    "analyze_states": "analysis",
    "compare": "shift",
    "GeometryReport": "report",
    "ShiftReport": "shift",
    "SentenceFile": "corpus",
    "GeometryCallback": "dynamics",
    "GeometryEvaluator": "dynamics",
    "Recipe": "training",
    "train": "training",
    "self_similarity": "cosines",
    "intra_sentence_similarity": "cosines",
    "mean_cosine": "cosines",
    "expected_anisotropy": "cosines",
    "dimension_contributions": "dimensions",
    "remove_dimensions": "dimensions",
    "isoscore": "isotropy",
    "partition_isotropy": "isotropy",
    "alignment": "isotropy",
    "uniformity": "isotropy",
}

_MODULES = ("cosines", "dimensions", "isotropy", "postprocess", "streams", "types")

__getattr__, __dir__ = lazy_names(__name__, _HOME, _MODULES)
