"""Pictures of the proof: gain against steering weight, the arms, and one document's relevance."""

from collections.abc import Sequence

import numpy as np

from relattn.experiment_plan import ARMS, CURVE_METRICS, SeedResult
from relattn.metrics import Interval
from relattn.papers import SEPARATOR
from shared_core import plot, proof

_LABELS = {"rouge1": "ROUGE-1", "success": "success", "contrast": "control contrast"}


def draw(run: proof.ProofRun, results: Sequence[SeedResult], levels: dict[str, dict[str, Interval]]) -> None:
    """Draw and record all pictures.

    Args:
        run: The proof.
        results: Of its seeds.
        levels: Each arm's metrics, mean with interval over test documents.
    """
    _gain(run, results)
    _arms(run, levels)
    _strip(run, results[0])


def _gain(run: proof.ProofRun, results: Sequence[SeedResult]) -> None:
    figure, axes = plot.figure(
        1, 3, height=460, title="Gain over plain against steering weight, validation documents"
    )
    temperatures = sorted({temperature for temperature, _ in results[0].curve}, reverse=True)
    for part, (axis, metric) in enumerate(zip(axes, CURVE_METRICS, strict=True)):
        for colour, temperature in zip(plot.COLOURS, temperatures, strict=False):
            weights = sorted(w for t, w in results[0].curve if t == temperature)
            lines = np.array([[100 * r.curve[temperature, w][part] for w in weights] for r in results])
            name = f"temperature {temperature:g}" + (" (the formula)" if temperature == 1 else "")
            axis.plot(weights, lines.mean(0), color=colour, marker="o", label=name)
            axis.plot(weights, lines.T, color=colour, linewidth=0.7, alpha=0.4)
        axis.axhline(0, color="0.4", linestyle="--", linewidth=1)
        axis.set_xlabel("steering weight w")
        axis.set_ylabel(f"{_LABELS[metric]}, points over plain")
    axes[0].legend(fontsize=8, title="mean of the seeds (thin: each)", title_fontsize=8)
    plot.save(figure, run.picture("gain-against-weight"))


def _arms(run: proof.ProofRun, levels: dict[str, dict[str, Interval]]) -> None:
    figure, axes = plot.figure(
        1, 3, height=520, title="Test documents (bars: means with 95 % intervals over documents; dots: seeds)"
    )
    for axis, metric in zip(axes, CURVE_METRICS, strict=True):
        for row, arm in enumerate(ARMS):
            values = 100 * np.array(run.methods[arm][metric])
            colour = plot.COLOURS[1] if arm == "relattn" else plot.COLOURS[0]
            found = levels[arm][metric]
            reach = [[100 * (found.mean - found.low)], [100 * (found.high - found.mean)]]
            axis.barh(row, 100 * found.mean, xerr=reach, color=colour, alpha=0.35, ecolor=colour, capsize=3)
            axis.plot(values, [row] * len(values), "o", color=colour, markersize=3)
        axis.set_yticks(range(len(ARMS)), ARMS if axis is axes[0] else [""] * len(ARMS))
        axis.invert_yaxis()
        chance = " (dashed: chance)" if metric == "success" else ""
        axis.set_xlabel(f"{_LABELS[metric]}, %{chance}")
    axes[1].axvline(100 / 3, color="0.4", linestyle="--", linewidth=1)
    plot.save(figure, run.picture("arms"))


def _strip(run: proof.ProofRun, result: SeedResult) -> None:
    """The relevance of one document, a row a passage: each word on its colour."""
    document = result.documents[0]
    figure, (axis,) = plot.figure(
        1, 1, height=400, title=f"Relevance of one test document to: {', '.join(document.control)}"
    )
    words, relevance = result.relevance[0][1:-1], np.array(result.relevance[1][1:-1])  # without <s>, </s>
    ends = [n for n, word in enumerate(words) if word == SEPARATOR] + [len(words)]
    begins = [0, *(end + 1 for end in ends[:-1])]
    passages = [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]
    grid = np.full((len(passages), max(end - begin for begin, end in zip(begins, ends, strict=True))), np.nan)
    for row, passage in enumerate(passages):
        shades = 100 * relevance[passage]
        grid[row, : len(shades)] = shades
        for column, word in enumerate(words[passage]):
            bold = "bold" if word in document.control else "normal"
            axis.text(column, row, word, ha="center", va="center", fontsize=8, fontweight=bold)
    # Pale at its darkest, so that black letters stay readable.
    shown = axis.imshow(grid, cmap="Oranges", vmin=0, vmax=1.6 * np.nanmax(grid), aspect="auto")
    labels = ["passage asked for" if n == document.target else "other passage" for n in range(len(passages))]
    axis.set_yticks(range(len(passages)), labels)
    axis.set_xticks([])
    axis.grid(visible=False)
    axis.set_xlabel(
        f"plain: {result.texts['plain'][0]}\nrelattn: {result.texts['relattn'][0]}\n"
        f"asked for: {document.leads[document.target]}",
        fontsize=9,
        loc="left",
    )
    bar = figure.colorbar(shown, ax=axis, boundaries=np.linspace(0, np.nanmax(grid), 64), pad=0.01)
    bar.set_label("a_rel, %")
    plot.save(figure, run.picture("relevance-strip"))
