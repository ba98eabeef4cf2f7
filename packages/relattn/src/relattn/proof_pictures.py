"""Pictures of the proof: gain against steering weight, the arms, and one document's relevance."""

from collections.abc import Sequence

import numpy as np

from relattn.experiment_plan import ARMS, SeedResult
from shared_core import plot, proof


def draw(run: proof.ProofRun, results: Sequence[SeedResult]) -> None:
    """Draw and record all pictures."""
    _gain(run, results)
    _arms(run)
    _relevance(run, results[0])


def _gain(run: proof.ProofRun, results: Sequence[SeedResult]) -> None:
    figure, axes = plot.figure(
        1, 2, height=520, title="Gain over plain against steering weight, on validation documents"
    )
    temperatures = sorted({temperature for temperature, _ in results[0].curve}, reverse=True)
    for axis, part, label in zip(axes, (0, 1), ("ROUGE-1, points", "success, %"), strict=True):
        for colour, temperature in zip(plot.COLOURS, temperatures, strict=False):
            weights = sorted(w for t, w in results[0].curve if t == temperature)
            lines = np.array(
                [
                    [100 * (r.curve[temperature, w][part] - (r.curve[temperature, w][2] if part == 0 else 0))
                     for w in weights]
                    for r in results
                ]
            )  # fmt: skip
            name = f"temperature {temperature:g}" + (" (the formula)" if temperature == 1 else "")
            axis.plot(weights, lines.mean(0), color=colour, marker="o", label=name)
            axis.plot(weights, lines.T, color=colour, linewidth=0.7, alpha=0.4)
        axis.axhline(0 if part == 0 else 100 / 3, color="0.4", linestyle="--", linewidth=1)
        axis.set_xlabel("steering weight w")
        axis.set_ylabel(label + (" over plain" if part == 0 else " (dashed: chance)"))
    axes[0].legend(fontsize=8)
    plot.save(figure, run.picture("gain-against-weight"))


def _arms(run: proof.ProofRun) -> None:
    figure, axes = plot.figure(1, 2, height=560, title="Test documents (bars: means; dots: seeds)")
    for axis, metric, label in zip(
        axes, ("rouge1", "success"), ("ROUGE-1, %", "success, % (dashed: chance)"), strict=True
    ):
        for row, arm in enumerate(ARMS):
            values = 100 * np.array(run.methods[arm][metric])
            colour = plot.COLOURS[1] if arm == "relattn" else plot.COLOURS[0]
            axis.barh(row, values.mean(), color=colour, alpha=0.35)
            axis.plot(values, [row] * len(values), "o", color=colour, markersize=4)
        axis.set_yticks(range(len(ARMS)), ARMS)
        axis.invert_yaxis()
        axis.set_xlabel(label)
    axes[1].axvline(100 / 3, color="0.4", linestyle="--", linewidth=1)
    plot.save(figure, run.picture("arms"))


def _relevance(run: proof.ProofRun, result: SeedResult) -> None:
    tokens, relevance = result.relevance
    document = result.documents[0]
    figure, (axis,) = plot.figure(
        1, 1, height=420, title=f"Relevance of one document's tokens to: {', '.join(document.control)}"
    )
    axis.bar(range(len(tokens)), relevance, color=plot.COLOURS[1])
    axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
    axis.set_ylabel("a_rel")
    axis.set_xlabel(
        f"plain: {result.texts['plain'][0]}\nrelattn: {result.texts['relattn'][0]}\n"
        f"asked for: {document.leads[document.target]}",
        fontsize=9,
        loc="left",
    )
    plot.save(figure, run.picture("relevance-strip"))
