"""The command `relattn`: summarize, explain, evaluate and learn from a few examples, and prove the claim."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from relattn import cli_inputs
from relattn.cli_options import (
    METHOD_NAMES,
    Articles,
    BatchSize,
    Beams,
    Coarse,
    Control,
    Data,
    Document,
    Format,
    MaxSource,
    MaxTokens,
    MinTokens,
    Model,
    Module,
    NewtsControl,
    SkipBad,
    SourcePrefix,
    Split,
    Temperature,
    WeightOption,
    share,
)
from shared_core import InputError, command, files
from shared_core.command import (
    Device,
    ProofFolder,
    Quick,
    Seeds,
    above_zero,
    file_to_write,
    folder_to_write,
    one_of,
)

# Torch and all that needs it are imported inside the commands: help and wrong arguments answer at once.

app = typer.Typer(
    help="Steers any encoder-decoder summarizer to what the reader asked for, by relevance attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command, with the exit codes 0, 1 (the claim does not hold) and 2 (bad input)."""
    command.run(app)


@app.callback()
def _warnings_in_one_line() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    logger = logging.getLogger("relattn")
    logger.handlers = [handler]
    logger.propagate = False


@app.command()
def summarize(
    model: Model,
    control: Control,
    document: Document = None,
    weight: WeightOption = None,
    temperature: Temperature = "1",
    module: Module = None,
    beams: Beams = None,
    max_tokens: MaxTokens = None,
    min_tokens: MinTokens = None,
    max_source: MaxSource = None,
    source_prefix: SourcePrefix = "",
    coarse: Coarse = 1,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Write the summary and its reasons as JSON.", callback=file_to_write()),
    ] = None,
) -> None:
    """Summarize a text about what the reader asks for."""
    if coarse > 1 and weight != "online":
        raise InputError("is for --weight online alone", field="--coarse", value=coarse)
    text = cli_inputs.read_text(document)
    steerer = cli_inputs.load_steerer(model, temperature, module, max_source, device, source_prefix)
    settings = _generation(beams, max_tokens, min_tokens) | {"coarse": coarse}
    (summary,) = steerer.generate([text], [control], _number(weight), **settings)
    if out is not None:
        files.write_json(out, {
            "summary": summary.text,
            "control": control,
            "weight": summary.weight,
            "effective_support": summary.relevance.effective_support,
            "candidates": [{"weight": c.weight, "text": c.text, "kept": c.kept} for c in summary.candidates],
            "warnings": summary.warnings,
        })  # fmt: skip
    typer.echo(summary.text)


@app.command()
def explain(
    model: Model,
    control: Control,
    document: Document = None,
    temperature: Temperature = "1",
    module: Module = None,
    weight: WeightOption = None,
    max_source: MaxSource = None,
    source_prefix: SourcePrefix = "",
    device: Device = "auto",
    summary: Annotated[bool, typer.Option("--summary", help="Summarize, too.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write a page (.html) or numbers (.json), too.", callback=file_to_write(".html", ".json")
        ),
    ] = None,
) -> None:
    """Show which parts of a text are relevant to what the reader asks for."""
    if weight is not None and not summary:
        raise InputError("changes the summary alone: give --summary, too", field="--weight", value=weight)
    text = cli_inputs.read_text(document)
    steerer = cli_inputs.load_steerer(model, temperature, module, max_source, device, source_prefix)
    from relattn import explain as view

    if summary:
        (made,) = steerer.generate([text], [control], _number(weight))
        explanation = view.explain(text, made.relevance, made.text, ", ".join(control))
    else:
        (result,) = steerer.relevance([text], [control])
        explanation = view.explain(text, result, title=", ".join(control))
    Console().print(view.to_terminal(explanation))
    if out is not None:
        files.write_text(
            out, view.to_html(explanation) if out.suffix == ".html" else view.to_json(explanation)
        )
        print(f"written: {out}", file=sys.stderr)


@app.command("eval")
def evaluate(
    model: Model,
    out: Annotated[
        Path, typer.Option(help="Folder for results.jsonl and metrics.json.", callback=folder_to_write)
    ],
    data: Data = None,
    format: Format = "jsonl",
    split: Split = "test",
    articles: Articles = None,
    newts_control: NewtsControl = "words",
    method: Annotated[
        str, typer.Option(help=", ".join(METHOD_NAMES), callback=one_of(*METHOD_NAMES))
    ] = "relattn",
    weight: WeightOption = None,
    temperature: Temperature = "1",
    module: Module = None,
    beams: Beams = None,
    max_tokens: MaxTokens = None,
    min_tokens: MinTokens = None,
    max_source: MaxSource = None,
    source_prefix: SourcePrefix = "",
    batch_size: BatchSize = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first examples.")] = None,
    bertscore: Annotated[
        str | None, typer.Option(help="Encoder, directory or name, to measure BERTScore with.")
    ] = None,
    bertscore_layer: Annotated[
        int, typer.Option(help="Its hidden state to compare; 17 is usual for roberta-large.")
    ] = 17,
    pplm_step: Annotated[
        float | None,
        typer.Option(
            help="Of the method pplm: size of a gradient step. The published 1e-5, if not given, is for large"
            " models and changes next to nothing on small ones: try 0.01 to 0.5 there.",
            callback=above_zero,
        ),
    ] = None,
    boost: Annotated[
        float | None, typer.Option(help="Of the method boost: bonus of a word, 2 nats if not given.")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Of the method bias: share of the odds that tokens outside keep; 0.01 if not given.",
            callback=share,
        ),
    ] = None,
    sentences: Annotated[
        int | None,
        typer.Option(min=1, help="Of bias and extract: how many sentences are relevant; 3 if not given."),
    ] = None,
    coarse: Coarse = 1,
    device: Device = "auto",
    skip_bad: SkipBad = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what OUT holds.")] = False,
) -> None:
    """Summarize and score a data set; finished examples are on disk at once."""
    if weight == "online" and method in ("relattn", "relattn-online"):
        method, weight = "relattn-online", None
    if weight == "online" and method == "relattn-prefix":
        raise InputError("expected a number for relattn-prefix", field="--weight", value=weight)
    own = {"pplm_step": pplm_step, "boost": boost, "alpha": alpha, "sentences": sentences,
           "coarse": coarse if coarse > 1 else None}  # fmt: skip
    own = {name: value for name, value in own.items() if value is not None}
    _refuse_unused(method, {"--weight": weight, "--temperature": None if temperature == "1" else temperature,
                            "--module": module} | {f"--{n.replace('_', '-')}": v for n, v in own.items()}
                   )  # fmt: skip
    examples = cli_inputs.read_examples(data, format, split, articles, skip_bad, newts_control)[:limit]
    steerer = cli_inputs.load_steerer(model, temperature, module, max_source, device, source_prefix)
    examples = cli_inputs.usable(examples, steerer, skip_bad)
    from relattn import evaluation, methods
    from relattn.pplm import PPLMCost

    options = _generation(beams, max_tokens, min_tokens)
    settings = methods.MethodSettings(
        weight=None if weight is None else float(weight),
        batch_size=batch_size,
        generate=options,
        pplm={} if pplm_step is None else {"step_size": pplm_step},
        online={"coarse": coarse},
        **{name: own[name] for name in ("boost", "alpha", "sentences") if name in own},
    )
    recorded = {
        "data": None if data is None else str(data), "format": format, "split": split,
        "articles": None if articles is None else str(articles),
        "model": model, "method": method, "weight": weight, "temperature": temperature,
        "module": None if module is None else str(module), "generate": options, "max_source": max_source,
    }  # fmt: skip
    if bertscore is not None:
        recorded["bertscore"] = [bertscore, bertscore_layer]
    if source_prefix:
        recorded["source_prefix"] = source_prefix
    if format == "newts":
        recorded["newts_control"] = newts_control
    recorded |= own
    score = cli_inputs.load_scores(bertscore, bertscore_layer, device)
    cost = PPLMCost()
    out.mkdir(parents=True, exist_ok=True)
    with Console(stderr=True).status("") as status:
        finished = evaluation.evaluate(
            examples,
            lambda texts, controls: methods.summarize(method, steerer, texts, controls, settings, cost),  # pyright: ignore[reportArgumentType]
            out / "results.jsonl",
            recorded,
            score=score,
            batch_size=batch_size,
            resume=resume,
            on_done=lambda done: status.update(f"{done} of {len(examples)} examples"),
        )
    metrics = evaluation.report(finished)
    files.write_json(out / "metrics.json", {
        "settings": recorded,
        "examples": len(finished),
        "seconds": sum(line.seconds for line in finished),
        "pplm_passes_of_this_run": vars(cost) if method == "pplm" else None,
        "warnings": sum(bool(line.warnings) for line in finished),
        "metrics": {name: vars(interval) for name, interval in metrics.items()},
    })  # fmt: skip
    table = Table(
        "metric", "mean", "95 % interval over documents", title=f"{method}, {len(finished)} examples"
    )
    for name, found in metrics.items():
        table.add_row(name, f"{found.mean:.4f}", f"{found.low:.4f} .. {found.high:.4f} ({found.documents})")
    Console().print(table)
    typer.echo(f"written: {out / 'results.jsonl'}, {out / 'metrics.json'}")


@app.command()
def fewshot(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the module (and model).", callback=folder_to_write)],
    data: Data = None,
    format: Format = "jsonl",
    split: Split = "train",
    articles: Articles = None,
    train: Annotated[int, typer.Option(min=1, help="Documents to train on.")] = 10,
    validation: Annotated[int, typer.Option(min=1, help="Other documents, to choose the best step.")] = 10,
    trainable: Annotated[
        str,
        typer.Option(help="all, cross_attention or new", callback=one_of("all", "cross_attention", "new")),
    ] = "all",
    weight_variant: Annotated[
        str,
        typer.Option(
            help="per_layer, per_head or linear", callback=one_of("per_layer", "per_head", "linear")
        ),
    ] = "linear",
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 100,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.", callback=above_zero)] = 3e-5,
    temperature: Temperature = "1",
    max_tokens: MaxTokens = None,
    beams: Beams = None,
    newts_control: NewtsControl = "words",
    source_prefix: SourcePrefix = "",
    seed: Annotated[int, typer.Option(min=0, help="Which documents, their order, and dropout.")] = 0,
    device: Device = "auto",
    skip_bad: SkipBad = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in OUT, where there is one.")
    ] = False,
) -> None:
    """Learn from a few examples how strongly, and by what relevance, to steer."""
    checkpoint = out / "checkpoint.safetensors"
    files.check_no_run(checkpoint, resume)
    examples = cli_inputs.read_examples(data, format, split, articles, skip_bad, newts_control)
    loaded, tokenizer = cli_inputs.load_model(model, device)
    from relattn import fewshot as learning
    from relattn.fewshot_data import split_by_document
    from relattn.steerer import Steerer
    from relattn.weights import RelAttnModule

    few = [
        learning.FewShotExample(e.document_id, e.document, e.control, e.summary)
        for e in cli_inputs.usable(examples, Steerer(loaded, tokenizer), skip_bad)
        if e.summary
    ]
    chosen, held_out = split_by_document(few, train, validation, seed)
    sharpness = "auto" if temperature == "auto" else float(temperature)
    module = RelAttnModule.for_model(
        loaded, relevance="trained", weight=weight_variant, initial_weight=0.07, temperature=sharpness,
        smooth_sigma=None,
    )  # fmt: skip
    settings = learning.FewShotSettings(
        trainable=trainable, steps=steps, warmup=min(10, steps), learning_rate=lr, seed=seed,
        generation=_generation(beams, max_tokens, None),
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with Console(stderr=True).status("training") as status:
        result = learning.fit(
            loaded, tokenizer, chosen, held_out, module, settings,
            checkpoint=checkpoint, resume=resume,
            on_step=lambda step, loss: status.update(f"step {step} of {steps}, loss {loss:.3f}"),
            source_prefix=source_prefix,
        )  # fmt: skip
    result.module.save_pretrained(out)
    if trainable != "new":
        loaded.save_pretrained(out)
        tokenizer.save_pretrained(out)
    files.write_json(out / "fewshot.json", {
        "train": sorted({e.document_id for e in chosen}),
        "validation": sorted({e.document_id for e in held_out}),
        "best_step": result.best_step,
        "scores": {str(step): score for step, score in result.scores.items()},
    })  # fmt: skip
    typer.echo(
        f"best step {result.best_step}: mean ROUGE {result.scores[result.best_step]:.4f} on validation"
        f" documents, {result.scores[0]:.4f} before"
    )
    typer.echo(f"written: {out}")


@app.command()
def prove(
    out: ProofFolder = Path("runs/relattn"),
    seeds: Seeds = 3,
    quick: Quick = False,
) -> None:
    """Show on embedded data whether the paper's claim holds; exit code 0 where it does, 1 where not."""
    from relattn.proof import prove as run_proof

    raise typer.Exit(run_proof(out, seeds, quick))


# Which methods of `eval` read an option. A comparison must not be labelled with what had no effect.
_READERS = {
    "--weight": ("relattn", "relattn-prefix"),
    "--temperature": ("bias", "extract", "relattn", "relattn-online", "relattn-prefix"),
    "--module": ("bias", "extract", "relattn", "relattn-online", "relattn-prefix"),
    "--pplm-step": ("pplm",),
    "--boost": ("boost",),
    "--alpha": ("bias",),
    "--sentences": ("bias", "extract"),
    "--coarse": ("relattn-online",),
}


def _refuse_unused(method: str, given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value is not None and method not in _READERS[option]:
            raise InputError(
                f"is not used by the method {method}: expected one of {', '.join(_READERS[option])}",
                field=option,
                value=str(value),
            )


def _number(weight: str | None) -> Any:
    return weight if weight in (None, "online") else float(weight)


def _generation(beams: int | None, max_tokens: int | None, min_tokens: int | None) -> dict[str, Any]:
    given = {"num_beams": beams, "max_new_tokens": max_tokens, "min_new_tokens": min_tokens}
    return {name: value for name, value in given.items() if value is not None}
