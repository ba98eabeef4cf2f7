"""A scheme to look at: bits of each layer as bars, in the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from csq.bitops import BitOperations
from csq.size_report import Report

_PAPER, _REST = "█", "░"
"""A paper bit, and a stored bit beyond those."""


def layer_table(report: Report, operations: BitOperations) -> Table:
    """One row a layer: its mask, its bits in both counts with a bar, and its share of the bit operations."""
    table = Table("layer", "weights", "mask", "paper", "stored", "", "BOPs")
    for name in ("weights", "paper", "stored", "BOPs"):
        table.columns[[str(c.header) for c in table.columns].index(name)].justify = "right"
    for layer in report.layers:
        macs, bits, act = operations.layers.get(layer.name, (0, 0, 0))
        more = max(0, layer.stored_bits - layer.bits)
        bar = f"[green]{_PAPER * layer.bits}[/green][dim]{_REST * more}[/dim]"
        table.add_row(
            layer.name,
            f"{layer.weights:,}",
            layer.mask_text,
            str(layer.bits),
            str(layer.stored_bits),
            bar,
            f"{macs * bits * act:,}" if macs else "",
        )
    return table


def totals_table(report: Report, operations: BitOperations, file_bytes: int) -> Table:
    """Paper bits, stored bits and bytes, always together, with what they compress to."""
    table = Table("of all weights", "bits a weight", "compression")
    table.add_row("paper bits", f"{report.average_bits:.3f}", f"{report.paper_compression:.2f}x")
    table.add_row("stored bits", f"{report.average_stored_bits:.3f}", f"{report.compression:.2f}x")
    whole = 4 * (report.weights + report.float_parameters)
    table.add_row("file", f"{file_bytes:,} bytes", f"{whole / file_bytes:.2f}x")
    table.add_row("bit operations an image", f"{operations.total:,}", f"{_saved(operations):.2f}x")
    return table


def sizes(report: Report, operations: BitOperations, file_bytes: int) -> str:
    """The three counts and the bit operations in two lines, for a picture."""
    return (
        f"{report.average_bits:.3f} paper bits, {report.average_stored_bits:.3f} stored bits a weight\n"
        f"{file_bytes:,} bytes; {operations.total:,} bit operations an image"
    )


def _saved(operations: BitOperations) -> float:
    return 1024 * operations.macs / max(1, operations.total)  # fp32 has 32 times 32


def draw(
    path: Path,
    report: Report,
    title: str,
    history: Sequence[dict[str, Any]] = (),
    target: float | None = None,
) -> None:
    """Save a picture: bits by layer, and where there is a history, precision and temperature over steps."""
    from shared_core import plot

    grown = [record for record in history if "precision" in record and "beta" in record]
    height = 160 + 34 * len(report.layers)
    figure, axes = plot.figure(1, 2 if grown else 1, height=max(420, height), title=title)
    places = range(len(report.layers))
    bars = axes[0]
    bars.barh(places, [layer.stored_bits for layer in report.layers], color="#BBBBBB", label="stored bits")
    bars.barh(
        places, [layer.bits for layer in report.layers], 0.45, color=plot.COLOURS[0], label="paper bits"
    )
    bars.set_yticks(list(places), [layer.name for layer in report.layers])
    bars.invert_yaxis()
    bars.set_xlabel("bits a weight")
    bars.set_xlim(0, max(9, *(layer.stored_bits for layer in report.layers)) + 0.3)
    bars.grid(False, axis="y")
    bars.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    if grown:
        steps = [record["step"] for record in grown]
        trace = axes[1]
        trace.plot(steps, [record["precision"] for record in grown], label="average precision, bits")
        if target is not None:
            trace.axhline(target, color=plot.COLOURS[6], linestyle=":", label="target")
        trace.set_xlabel("step")
        trace.set_ylim(0)
        right = trace.twinx()
        right.plot(steps, [record["beta"] for record in grown], color=plot.COLOURS[1], label="temperature β")
        right.set_yscale("log")
        right.grid(False)
        right.spines["top"].set_visible(False)
        lines = [*trace.get_lines(), *right.get_lines()]
        trace.legend(
            lines, [str(line.get_label()) for line in lines], loc="lower center", bbox_to_anchor=(0.5, 1.0),
            ncols=3, frameon=False,
        )  # fmt: skip
    plot.save(figure, path)
