"""Relevance attention: an encoder-decoder summarizer, steered to what the reader asked for, without training.

    steerer = relattn.Steerer(model, tokenizer)
    steerer.generate(documents, controls, weight="online")

Xiao, Miculicich, Liu, He, Carenini: "Attend to the Right Context: A Plug-and-Play Module for
Content-Controllable Summarization", arXiv 2212.10819.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import lazy_names

if TYPE_CHECKING:
    from relattn.entsum import load_entsum
    from relattn.examples import Example
    from relattn.methods import summarize
    from relattn.readers import load_aclsum, load_csv, load_ctrlsum, load_dataset, load_jsonl, load_newts
    from relattn.relevance import EmbeddingRelevance, SimilarityRelevance
    from relattn.selection import coverage_select, online_select
    from relattn.steerer import Candidate, ControlledSummary, RelevanceResult, Steerer
    from relattn.weights import RelAttnConfig, RelAttnModule

__all__ = [
    "Steerer",
    "ControlledSummary",
    "Candidate",
    "RelevanceResult",
    "EmbeddingRelevance",
    "SimilarityRelevance",
    "online_select",
    "coverage_select",
    "RelAttnModule",
    "RelAttnConfig",
    "Example",
    "load_jsonl",
    "load_csv",
    "load_dataset",
    "load_newts",
    "load_entsum",
    "load_aclsum",
    "load_ctrlsum",
    "summarize",
]

# Each name is imported at first use, so that `relattn --help` and its errors about options need no torch.
_HOME = {
    "Steerer": "steerer",
    "ControlledSummary": "steerer",
    "Candidate": "steerer",
    "RelevanceResult": "steerer",
    "EmbeddingRelevance": "relevance",
    "SimilarityRelevance": "relevance",
    "online_select": "selection",
    "coverage_select": "selection",
    "RelAttnModule": "weights",
    "RelAttnConfig": "weights",
    "Example": "examples",
    "load_jsonl": "readers",
    "load_csv": "readers",
    "load_dataset": "readers",
    "load_newts": "readers",
    "load_entsum": "entsum",
    "load_aclsum": "readers",
    "load_ctrlsum": "readers",
    "summarize": "methods",
}

# Modules that are reached as attributes: relattn.selection.GRID.
_MODULES = (
    "bertscore",
    "families",
    "fewshot",
    "fewshot_data",
    "generation",
    "reference",
    "relevance",
    "rouge",
    "selection",
    "steering",
)

__getattr__, __dir__ = lazy_names(__name__, _HOME, _MODULES)
