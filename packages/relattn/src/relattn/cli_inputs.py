"""What the arguments of a command name: a text, a model directory, a data set, a scorer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared_core import InputError, command

if TYPE_CHECKING:
    from relattn.examples import Example
    from relattn.steerer import Steerer

logger = logging.getLogger("relattn")

# As in cli.py, torch and all that needs it are imported inside the functions.


def read_text(document: Path | None) -> str:
    """The text of a file, or of standard input.

    Raises:
        InputError: It is empty or not UTF-8, or there is neither.
    """
    place = "standard input" if document is None else document
    if document is None:
        if sys.stdin.isatty():
            raise InputError("expected a text file, or text on standard input", field="DOCUMENT")
        content = sys.stdin.buffer.read()
    else:
        content = document.read_bytes()
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text: {error.reason} at byte {error.start}"
        raise InputError(message, file=place) from error
    if not text.strip():
        raise InputError("is empty: expected a text", file=place)
    return text


def read_examples(
    data: Path | None, form: str, split: str, articles: Path | None, skip_bad: bool, newts_control: str
) -> list[Example]:
    """The examples of a data set in one of the formats.

    Raises:
        InputError: A place that the format needs is missing, or what its reader says.
    """
    from relattn import readers
    from relattn.entsum import load_entsum

    if newts_control != "words" and form != "newts":
        raise InputError("is for --format newts alone", field="--newts-control", value=newts_control)
    if form == "aclsum":
        return readers.load_aclsum(split)
    if data is None:
        raise InputError(f"is missing: expected the data's place for the format {form}", field="--data")
    if form == "entsum":
        if articles is None:
            raise InputError("is missing: entsum's annotations need the articles' folder", field="--articles")
        return load_entsum(data, articles, skip_bad=skip_bad)
    if form == "ctrlsum":
        return readers.load_ctrlsum(data, split)
    if form == "newts":
        return readers.load_newts(data, newts_control, skip_bad)
    load = {"jsonl": readers.load_jsonl, "csv": readers.load_csv}[form]
    return load(data, skip_bad=skip_bad)


def usable(examples: Sequence[Example], steerer: Steerer, skip_bad: bool) -> list[Example]:
    """The examples of which the tokenizer knows text and control: all are looked at before the long work.

    Raises:
        InputError: It knows none of an example's tokens (with `skip_bad` a warning), or of no example's.
    """
    from relattn.controls import encode_control

    found, bad = [], []
    for example in examples:
        try:
            steerer.read([example.document])
            encode_control(example.control, steerer.tokenizer)
        except InputError as error:
            field = "document" if error.field == "documents" else "control"
            bad.append(
                InputError(
                    f"the tokenizer knows no token of the {field} of example {example.id!r}", field=field
                )
            )
        else:
            found.append(example)
    for error in bad if skip_bad else ():
        logger.warning("skipped: %s", error)
    if bad and not (skip_bad and found):
        more = f", and so of {len(bad) - 1} more" if len(bad) > 1 else ""
        raise InputError(f"{bad[0].message}{more}: leave such examples out with --skip-bad") from bad[0]
    return found


def load_scores(encoder: str | None, layer: int, device: str) -> Any:
    """What `eval` measures: all of `relattn.metrics`, and BERTScore where an encoder is given.

    Raises:
        InputError: The encoder cannot be loaded.
    """
    from relattn.metrics import bertscore_f1, score_summary

    if encoder is None:
        return score_summary
    from relattn.bertscore import BertScore

    try:
        scorer = BertScore.from_pretrained(encoder, layer, command.usable_device(device))
    except (OSError, KeyError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot be loaded: {first}", field="--bertscore", value=encoder) from error

    def score(example: Example, summary: str) -> dict[str, float]:
        found = score_summary(example, summary)
        if example.summary is not None:
            found["bertscore"] = bertscore_f1(summary, example.summary, scorer)
        return found

    return score


def load_steerer(
    model: str, temperature: str, module: Path | None, max_source: int | None, device: str, prefix: str = ""
) -> Steerer:
    """A steerer of a model directory, with a relevance of that sharpness or a trained module.

    Raises:
        InputError: The model, the module or the device cannot be used.
    """
    from relattn.relevance import EmbeddingRelevance
    from relattn.steerer import Steerer
    from relattn.weights import RelAttnModule

    if module is not None and temperature != "1":
        raise InputError("is the module's own: give one of the two", field="--temperature", value=temperature)
    loaded, tokenizer = load_model(model, device)
    if module is not None:
        trained = RelAttnModule.from_pretrained(module).to(loaded.device)
        return Steerer(loaded, tokenizer, module=trained, max_source_tokens=max_source, source_prefix=prefix)
    sharpness = "auto" if temperature == "auto" else float(temperature)
    relevance = EmbeddingRelevance(temperature=sharpness)
    return Steerer(loaded, tokenizer, relevance, max_source_tokens=max_source, source_prefix=prefix)


def load_model(name: str, device: str) -> tuple[Any, Any]:
    """An encoder-decoder model in eval mode on a device, and its tokenizer.

    Raises:
        InputError: It cannot be loaded, is another kind of model, or there is no such device.
    """
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    where = command.usable_device(device)
    try:
        config = AutoConfig.from_pretrained(name)
        if not config.is_encoder_decoder:
            from relattn.families import SUPPORTED

            raise InputError(
                f"{config.model_type} is no encoder-decoder model: expected one of {', '.join(SUPPORTED)}",
                field="--model",
                value=name,
            )
        model = AutoModelForSeq2SeqLM.from_pretrained(name, config=config)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except InputError:
        raise
    except (OSError, KeyError, ValueError) as error:  # transformers has all three for what it cannot read
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot be loaded: {first}", field="--model", value=name) from error
    return model.eval().to(where), tokenizer
