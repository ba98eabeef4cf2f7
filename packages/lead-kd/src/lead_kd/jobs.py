"""What the command does with models and files: loading, training with a dev set, encoding, searching."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from lead_kd.cache import CachedTeacher, build_cache
from lead_kd.corpus import RetrievalData
from lead_kd.embeddings import encode_queries
from lead_kd.evaluation import measure
from lead_kd.minilm import MiniLM
from lead_kd.objectives import (
    Contrastive,
    Embedding,
    Lead,
    MarginMSE,
    Name,
    Objective,
    Regression,
    Response,
)
from lead_kd.pruning import encoder_of, prune_layers
from lead_kd.sampling import Sampler
from lead_kd.scorers import ColBERT, CrossEncoderScorer, DualEncoder, Scorer
from lead_kd.search import Run, search
from lead_kd.selection import LayerSchedule, Strategy
from lead_kd.training import Recipe, Trained, distill
from shared_core import InputError
from shared_core.files import write_json

if TYPE_CHECKING:
    from accelerate import Accelerator
    from sentence_transformers import SentenceTransformer

TeacherKind = Literal["auto", "dual", "colbert", "cross"]
TEACHER_KINDS: tuple[TeacherKind, ...] = get_args(TeacherKind)


@dataclass(frozen=True)
class LayerOptions:
    """How layers are paired and weighted.

    Args:
        pairs: K; None for 5, or as many as the smaller model has.
        strategy: How pairs are drawn.
        every: Steps between draws.
        layer_temperature: Of the layers' weights; None for 1 on scaled cosines and 10 on raw products.
        temperature: Of the distributions.
        reweight: Whether layers are weighted by how well they rank.
    """

    pairs: int | None = None
    strategy: Strategy = "random"
    every: int = 10
    layer_temperature: float | None = None
    temperature: float = 1.0
    reweight: bool = True


def load_student(name: str, device: str, keep: Sequence[int] | None = None) -> SentenceTransformer:
    """Load a student: a sentence-transformers folder, or a transformers encoder, which gets a [CLS] pooling.

    Args:
        name: Folder, or a name that the libraries know.
        device: Where it runs.
        keep: Layers that stay, from 0; all where None.

    Raises:
        InputError: It cannot be loaded.
    """
    model = load_dual_encoder(name, device)
    return model if keep is None else prune_layers(model, keep)


def load_dual_encoder(name: str, device: str) -> SentenceTransformer:
    """Load a sentence-transformers folder, or put a [CLS] pooling on a transformers encoder.

    A model that ranks by cosine and does not normalize gets a Normalize module, after which inner products
    are its cosines: what trains, searches and is saved ranks as the model did.

    Raises:
        InputError: It cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    folder = Path(name)
    try:
        if folder.is_dir() and not (folder / "modules.json").exists():
            transformer = Transformer(name)
            pooling = Pooling(transformer.get_embedding_dimension(), "cls")
            return SentenceTransformer(modules=[transformer, pooling], device=device)
        model = SentenceTransformer(name, device=device)
        if model._similarity_fn_name == "cosine" and not any(isinstance(part, Normalize) for part in model):
            model.append(Normalize())
        return model
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"cannot be loaded: {str(error).splitlines()[0]}", field="model", value=name
        ) from error


def load_teacher(
    name: str, device: str, kind: TeacherKind = "auto", query_length: int | None = None,
    passage_length: int | None = None,
) -> Scorer:  # fmt: skip
    """Load a teacher of any kind.

    Args:
        name: Folder, or a name that sentence-transformers knows.
        device: Where it runs.
        kind: "dual", "colbert" or "cross"; "auto" reads it from the folder.
        query_length: Longest query in tokens, for dual encoders.
        passage_length: Longest passage in tokens, for dual encoders.

    Raises:
        InputError: It cannot be loaded.
    """
    from sentence_transformers import CrossEncoder, MultiVectorEncoder

    chosen = _kind_of(Path(name)) if kind == "auto" else kind
    try:
        match chosen:
            case "dual":
                return DualEncoder(load_dual_encoder(name, device), None, query_length, passage_length)
            case "colbert":
                return ColBERT(MultiVectorEncoder(name, device=device))
            case "cross":
                return CrossEncoderScorer(CrossEncoder(name, device=device))
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"cannot be loaded: {str(error).splitlines()[0]}", field="teacher", value=name
        ) from error
    raise InputError(f"expected one of {', '.join(TEACHER_KINDS)}", field="teacher kind", value=kind)


def _kind_of(folder: Path) -> TeacherKind:
    """Read a folder's kind: its sentence-transformers type, or else its architecture."""
    described = folder / "config_sentence_transformers.json"
    if described.is_file():
        kind = json.loads(described.read_text()).get("model_type", "SentenceTransformer")
        return {"MultiVectorEncoder": "colbert", "CrossEncoder": "cross"}.get(kind, "dual")  # pyright: ignore
    if (folder / "config.json").is_file():
        architectures = json.loads((folder / "config.json").read_text()).get("architectures") or [""]
        return "cross" if "SequenceClassification" in architectures[0] else "dual"
    return "dual"


def make_objective(
    name: Name,
    student: DualEncoder,
    teacher: Scorer | None,
    options: LayerOptions,
    *,
    co_train: bool,
    seed: int,
) -> Objective:
    """Make the objective that a name stands for.

    Raises:
        InputError: The name is unknown, or the teacher does not fit it.
    """
    generator = torch.Generator().manual_seed(seed)
    match name:
        case "none":
            return Contrastive()
        case "response":
            return Response(temperature=options.temperature, co_train=co_train)
        case "listwise":
            return Response(temperature=options.temperature, own_only=True)
        case "margin-mse":
            return MarginMSE()
        case "lead":
            from lead_kd.sbert import default_layer_temperature

            assert teacher is not None
            temperature = options.layer_temperature or default_layer_temperature(teacher)
            return Lead(temperature, options.temperature, co_train, options.reweight)
        case "regression" | "embedding" | "minilm":
            return _feature_rival(name, student, teacher, generator)
    raise InputError("unknown objective", field="objective", value=name)


def _feature_rival(
    name: Name, student: DualEncoder, teacher: Scorer | None, generator: torch.Generator
) -> Objective:
    own = encoder_of(student.model)
    if name == "minilm":
        if not isinstance(teacher, DualEncoder):
            raise InputError("minilm needs a dual encoder that runs, not a cache", field="teacher")
        return MiniLM(own, encoder_of(teacher.model), own.config.num_attention_heads)
    if isinstance(teacher, DualEncoder):
        width = encoder_of(teacher.model).config.hidden_size
    elif isinstance(teacher, CachedTeacher):
        width = int(teacher.cache.layers.shape[2])
    else:
        raise InputError(f"{name} needs a dual encoder as teacher", field="teacher")
    if name == "embedding":
        return Embedding(own.config.hidden_size, width, generator)
    return Regression(own.config.hidden_size, width, student.n_layers, generator)


def cached(
    teacher: Scorer,
    folder: Path,
    data: RetrievalData,
    negatives: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CachedTeacher:
    """Read a frozen dual encoder from its cache, which is built first where it is not there.

    Args:
        teacher: The teacher.
        folder: Of the cache.
        data: What is trained on; the cache holds its queries and all passages that can be drawn for them.
        negatives: Hard negatives a query; where some query has fewer, any passage can be drawn.
        progress: Called with the number of texts that are done, and of all.

    Raises:
        InputError: The teacher is no dual encoder, or the cache is of another.
    """
    if not isinstance(teacher, DualEncoder):
        raise InputError("only a dual encoder can be cached", field="teacher", value=type(teacher).__name__)
    judged = list(data.judged())
    passages: Sequence[str] = data.corpus
    if all(len(data.negatives.get(query, ())) >= negatives for query in judged):
        names = {
            name for query in judged for name in (*data.positives(query), *data.negatives.get(query, ()))
        }
        rows = sorted(row for name in names if (row := data.corpus.row(name)) is not None)
        passages = [data.corpus[row] for row in rows]
    cache = build_cache(
        teacher, folder, [data.queries[query] for query in judged], passages, progress=progress
    )
    return CachedTeacher(cache, teacher)


@dataclass(frozen=True)
class DevSet:
    """Queries that settings are chosen on, and the passages that are searched for them."""

    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    ids: list[str]
    texts: list[str]


def dev_set(data: RetrievalData, passages: int, seed: int = 0) -> DevSet:
    """Take the judged passages of all queries, and others drawn at random up to a number.

    Args:
        data: The dev split.
        passages: Passages in all; the judged ones are always in.
        seed: Of the draw.
    """
    queries = {query: data.queries[query] for query in data.judged()}
    if not queries:
        raise InputError("no query of the dev split has a positive", file=data.corpus.source)
    judged = {
        row for query in queries for name in data.qrels[query] if (row := data.corpus.row(name)) is not None
    }
    order = np.random.default_rng(seed).permutation(len(data.corpus))
    others = [int(row) for row in order if row not in judged][: max(passages - len(judged), 0)]
    rows = sorted(judged) + others
    return DevSet(
        queries,
        {query: data.qrels[query] for query in queries},
        [data.corpus.ids[row] for row in rows],
        [data.corpus[row] for row in rows],
    )


def dev_run(
    model: SentenceTransformer,
    dev: DevSet,
    query_length: int | None,
    passage_length: int | None,
    k: int = 100,
) -> Run:
    """Search the dev set with a model."""
    before = model.max_seq_length
    was_training = model.training
    try:
        queries = encode_queries(model, list(dev.queries.values()), max_length=query_length)
        if passage_length is not None:
            model.max_seq_length = passage_length
        passages = np.asarray(model.encode_document(dev.texts, show_progress_bar=False), np.float32)
    finally:
        model.max_seq_length = before
        model.train(was_training)
    found = search(queries, passages, k)
    return found.as_run(list(dev.queries), dev.ids)


def train(
    student: DualEncoder,
    teacher: Scorer | None,
    data: RetrievalData,
    out: Path,
    *,
    objective: Name,
    options: LayerOptions,
    recipe: Recipe,
    batch_size: int,
    negatives: int,
    co_train: bool,
    resume: bool,
    dev: DevSet | None,
    accelerator: Accelerator,
    about: dict[str, Any],
    on_step: Callable[[int, Any], None],
) -> Trained:
    """Train, keep the student of the best evaluation in `best` and the last one in `student`."""
    sampler = Sampler(data, batch_size, negatives, recipe.seed, processes=accelerator.num_processes)
    if accelerator.is_main_process:
        for number, words in (
            (sampler.without_positive, "queries have no positive in this split and are left out"),
            (sampler.filled, "queries have fewer hard negatives than asked for; passages at random stand in"),
        ):
            if number:
                warnings.warn(f"{number} {words}", stacklevel=2)
    schedule = None
    if objective in ("lead", "regression"):
        assert teacher is not None
        depth = min(5, teacher.n_layers, student.n_layers)
        schedule = LayerSchedule(
            teacher.n_layers, student.n_layers, options.pairs or depth, options.strategy, options.every,
            recipe.seed,
        )  # fmt: skip
    loss = make_objective(objective, student, teacher, options, co_train=co_train, seed=recipe.seed)
    scores_file = out / "dev.json"
    scores: dict[str, dict[str, float]] = (
        json.loads(scores_file.read_text()) if resume and scores_file.exists() else {}
    )
    step = [0]

    def evaluate() -> dict[str, float]:
        assert dev is not None
        run = dev_run(student.model, dev, student.query_length, student.passage_length)
        found = measure(dev.qrels, run, ("nDCG@10", "RR@10")).mean
        earlier = [value["nDCG@10"] for value in scores.values()]
        if not earlier or found["nDCG@10"] > max(earlier):
            _save(student.model, out / "best")
        scores[str(step[0])] = found
        write_json(scores_file, scores)
        return found

    def count(done: int, found: Any) -> None:
        step[0] = done
        on_step(done, found)

    trained = distill(
        student, teacher, loss, sampler, recipe, schedule, co_train=co_train, out=out, resume=resume,
        about={**about, "layer options": asdict(options)}, evaluate=evaluate if dev else None, on_step=count,
        accelerator=accelerator,
    )  # fmt: skip
    if accelerator.is_main_process:
        _save(student.model, out / "student")
        if co_train and isinstance(teacher, DualEncoder | ColBERT | CrossEncoderScorer):
            _save(teacher.model, out / "teacher")
    return trained


def _save(model: Any, folder: Path) -> None:
    """Write a model's folder whole: who looks, or kills this, finds the earlier one or the new one."""
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    model.save(str(fresh), create_model_card=False)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def teacher_layers_table(
    teacher: DualEncoder, dev: DevSet, measures: Sequence[str] = ("nDCG@10", "RR@10"), batch_size: int = 64
) -> list[tuple[int, dict[str, float]]]:
    """Measure what each of a teacher's layers would reach alone: what LEAD lives on."""
    from lead_kd.scorers import to_device, tokens_of

    device = next(teacher.parameters()).device
    was_training = teacher.training
    teacher.eval()

    def of(texts: Sequence[str], task: str, length: int | None) -> torch.Tensor:
        parts = []
        for start in range(0, len(texts), batch_size):
            tokens = tokens_of(teacher.model, texts[start : start + batch_size], task, length)
            with torch.no_grad():
                parts.append(teacher.vectors(to_device(tokens, device))[0].float().cpu())
        return torch.cat(parts)

    queries = of(list(dev.queries.values()), "query", teacher.query_length)
    passages = of(dev.texts, "document", teacher.passage_length)
    teacher.train(was_training)
    table = []
    for layer in range(teacher.n_layers):
        found = search(queries[:, layer].numpy(), passages[:, layer].numpy(), 100)
        run = found.as_run(list(dev.queries), dev.ids)
        table.append((layer + 1, measure(dev.qrels, run, measures).mean))
    return table
