"""The console's view of a proof, readable at 100 columns."""

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared_core.proof.record import Metric, ProofRecord, Spread, spread


def show(record: ProofRecord, console: Console | None = None) -> None:
    """Print a record: the table of numbers, then each claim with its rule, verdict and reason."""
    if console is None:
        console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(_table(record))
    for claim in record.claims:
        verdict = Text("HOLDS", "bold green") if claim.holds else Text("DOES NOT HOLD", "bold red")
        console.print(Text.assemble(verdict, "  ", (claim.text, "bold")))
        console.print(Text(f"  rule: {claim.rule}\n  numbers: {claim.reason}"))
    for note in record.notes:
        console.print(Text(f"note: {note}"))
    console.print(
        Text(f"{record.wall_seconds:.1f} s, peak memory {record.peak_memory_bytes / 2**20:.0f} MiB")
    )


def _table(record: ProofRecord) -> Table:
    count = len(record.seeds)
    table = Table(title=Text(f"{record.package} {record.version}" + (" (quick)" if record.quick else "")))
    table.add_column("metric")
    table.add_column("method")
    # As Text, since rich would take the square brackets of a plain string for markup.
    table.add_column(Text(f"mean [min..max] of {count} seed{'s' if count > 1 else ''}"), justify="right")
    table.add_column(Text(f"{record.package} minus it, by seed"), justify="right")
    for metric in record.metrics:
        unit = f" ({metric.unit})" if metric.unit else ""
        label = f"{metric.label}{unit} {'↑' if metric.higher_is_better else '↓'}"
        names = [name for name, values in record.methods.items() if metric.name in values]
        for name in sorted(names, key=lambda name: name != record.package):
            own = name == record.package
            values = spread(record.methods[name][metric.name])
            paired = not own and record.package in names
            table.add_row(
                Text(label),
                Text(name, "bold" if own else ""),
                Text(_cell(metric, values), "bold" if own else ""),
                _difference(metric, record.difference(name, metric.name)) if paired else Text(""),
            )
            label = ""
        table.add_section()
    return table


def _difference(metric: Metric, difference: Spread) -> Text:
    low, high = (
        (difference.low, difference.high) if metric.higher_is_better else (-difference.high, -difference.low)
    )
    style = "green" if low > 0 else "red" if high < 0 else ""
    return Text(_cell(metric, difference, sign=True), style)


def _cell(metric: Metric, values: Spread, *, sign: bool = False) -> str:
    mean, low, high = (metric.show(value, sign=sign) for value in (values.mean, values.low, values.high))
    return mean if low == high else f"{mean} [{low}..{high}]"
