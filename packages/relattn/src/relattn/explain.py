"""The source with its relevance as colour: in the terminal, and as one self-contained HTML page."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from relattn.extract import SentenceRelevance, sentence_relevance
from relattn.results import RelevanceResult


@dataclass(frozen=True)
class Explanation:
    """A document and how relevant its parts are.

    Attributes:
        document: The text.
        result: The relevance of its tokens.
        sentences: The relevance of its sentences.
        summary: The steered summary; None where none was made.
        title: A name for the page.
    """

    document: str
    result: RelevanceResult
    sentences: Sequence[SentenceRelevance]
    summary: str | None = None
    title: str = "Relevance"


def explain(
    document: str, result: RelevanceResult, summary: str | None = None, title: str = "Relevance"
) -> Explanation:
    """Put a document's relevance into sentences.

    Raises:
        InputError: The tokenizer gives no offsets (a slow one).
    """
    return Explanation(document, result, sentence_relevance(document, result), summary, title)


def shades(explanation: Explanation) -> list[tuple[int, int, float, float]]:
    """Pieces of the text that tokens stand for: begin, end, a_rel, and shade: a_rel over the largest, 0 to 1.

    Pieces do not overlap; bytes of one character that are several tokens share it, with the sum of their
    a_rel.
    """
    pieces: list[tuple[int, int, float]] = []
    for (begin, end), a in zip(
        explanation.result.offsets or (), explanation.result.a_rel.tolist(), strict=False
    ):
        piece = explanation.document[begin:end]
        begin += len(piece) - len(piece.lstrip())  # byte-level tokens hold the space before their word
        if end <= begin:
            continue
        if pieces and begin < pieces[-1][1]:
            start, stop, mass = pieces[-1]
            pieces[-1] = (start, max(stop, end), mass + a)
        else:
            pieces.append((begin, end, a))
    top = max((a for _, _, a in pieces), default=0.0) or 1.0
    return [(begin, end, a, a / top) for begin, end, a in pieces]


def to_terminal(explanation: Explanation, sentences: int = 5) -> RenderableType:
    """The coloured source, then the most relevant sentences; without colour their shares remain."""
    text = Text(_printable(explanation.document))
    for begin, end, _, shade in shades(explanation):
        if shade >= 0.05:  # paler than that cannot be told from the background
            text.stylize(_terminal_style(shade), begin, end)
    text.stylize("dim", _lost_from(explanation))
    ranked = sorted(explanation.sentences, key=lambda s: (-s.excess, s.begin))[:sentences]
    table = Table("share", "", "sentence", box=None, pad_edge=False)
    top = max((s.mass for s in ranked), default=0.0) or 1.0
    for sentence in ranked:
        bar = "█" * round(10 * sentence.mass / top)
        table.add_row(f"{sentence.mass:.1%}", Text(bar, "dark_orange"), Text(_cut(explanation, sentence)))
    parts: list[RenderableType] = [text, Text(), table, Text(_printable(_caption(explanation)), "dim")]
    parts += [Text(_printable(f"warning: {w}"), "yellow") for w in explanation.result.warnings]
    if explanation.summary is not None:
        parts += [Text(), Text.assemble(("summary: ", "bold"), _printable(explanation.summary))]
    return Group(*parts)


def to_html(explanation: Explanation) -> str:
    """One self-contained page: nothing from elsewhere, readable in dark mode and by screen readers."""
    rows = "\n".join(
        f'<tr><td class="share">{s.mass:.1%}</td>'
        f'<td><meter min="0" max="1" value="{s.mass:.4f}"></meter></td>'
        f"<td>{html.escape(explanation.document[s.begin : s.end])}</td></tr>"
        for s in sorted(explanation.sentences, key=lambda s: (-s.excess, s.begin))
    )
    warnings = "".join(f'<p class="warning">{html.escape(w)}</p>' for w in explanation.result.warnings)
    summary = ""
    if explanation.summary is not None:
        summary = f"<h2>Summary</h2><p>{html.escape(explanation.summary)}</p>"
    return _PAGE.format(
        title=html.escape(explanation.title),
        control=html.escape(", ".join(explanation.result.controls)),
        caption=html.escape(_caption(explanation)),
        warnings=warnings,
        summary=summary,
        source=_marked(explanation),
        rows=rows,
    )


def to_json(explanation: Explanation) -> str:
    """Tokens and sentences with their relevance as JSON."""
    d = explanation.document
    return json.dumps(
        {
            "control": explanation.result.controls,
            "effective_support": explanation.result.effective_support,
            "tokens": [
                {"text": d[b:e], "begin": b, "end": e, "a_rel": a} for b, e, a, _ in shades(explanation)
            ],
            "sentences": [
                {
                    "text": d[s.begin : s.end],
                    "begin": s.begin,
                    "end": s.end,
                    "mass": s.mass,
                    "excess": s.excess,
                }
                for s in explanation.sentences
            ],
            "summary": explanation.summary,
            "warnings": explanation.result.warnings,
        },
        ensure_ascii=False,
        indent=2,
    )


def _marked(explanation: Explanation) -> str:
    parts = []
    at = 0
    for begin, end, a, shade in shades(explanation):
        parts.append(html.escape(explanation.document[at:begin]))
        word = html.escape(explanation.document[begin:end])
        parts.append(
            f'<span style="--s:{shade:.3f}" title="{a:.2%}">{word}</span>' if shade >= 0.01 else word
        )
        at = end
    lost = max(at, _lost_from(explanation))
    parts.append(html.escape(explanation.document[at:lost]))
    if rest := explanation.document[lost:]:
        parts.append(f'<span class="lost" title="behind the length limit">{html.escape(rest)}</span>')
    return "".join(parts)


def _lost_from(explanation: Explanation) -> int:
    """Where the part begins that a length limit cut off; the text's end where none was."""
    end = max((stop for _, stop in explanation.result.offsets or ()), default=0)
    return end if explanation.document[end:].strip() else len(explanation.document)


def _caption(explanation: Explanation) -> str:
    support = explanation.result.effective_support
    total = len(explanation.result.tokens)
    control = ", ".join(explanation.result.controls)
    return f"relevance to {control}: spread over about {support:.0f} of {total} tokens"


# All controls but tab and newline: a terminal obeys them, and rich drops some, which would shift the colours.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], " ")


def _printable(text: str) -> str:
    return text.translate(_CONTROLS)


def _terminal_style(shade: float) -> str:
    # Mixed with white, and black letters on it: readable whatever the terminal's own colours are.
    red, green, blue = (round(255 + shade * (full - 255)) for full in (249, 115, 22))
    return f"black on rgb({red},{green},{blue})"


def _cut(explanation: Explanation, sentence: SentenceRelevance, width: int = 200) -> str:
    text = " ".join(_printable(explanation.document[sentence.begin : sentence.end]).split())
    return text if len(text) <= width else text[: width - 1] + "…"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 17px/1.65 system-ui, sans-serif; max-width: 46rem; margin: 2.5rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; margin-bottom: .2rem; }}
h2 {{ font-size: 1.05rem; margin-top: 2rem; }}
.caption, .share {{ opacity: .7; }}
.warning {{ color: #b45309; }}
.source {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.source span[style] {{ background: rgb(249 115 22 / calc(var(--s) * .75)); border-radius: .2em; }}
.lost {{ opacity: .45; }}
table {{ border-collapse: collapse; font-size: .92rem; }}
td {{ padding: .25rem .5rem; vertical-align: top; }}
.share {{ text-align: right; font-variant-numeric: tabular-nums; }}
meter {{ width: 6rem; }}
meter::-webkit-meter-optimum-value {{ background: #f97316; }}
meter::-moz-meter-bar {{ background: #f97316; }}
</style>
</head>
<body>
<h1>{control}</h1>
<p class="caption">{caption}</p>
{warnings}{summary}
<h2>Source</h2>
<p class="source">{source}</p>
<h2>Sentences, most relevant first</h2>
<table>
{rows}
</table>
</body>
</html>
"""
