"""Pictures in one style, drawn without a display and without touching matplotlib's global state."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from shared_core.errors import InputError, needs_extra
from shared_core.files import atomic_path

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

# The palette of Okabe and Ito (2008), which people with any kind of colour vision can tell apart; yellow left
# out because it is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_DPI = 120  # 10 inches are 1200 pixels, and the default 10 point text is 17 pixels high


def figure(
    rows: int = 1, columns: int = 1, *, width: int = 1200, height: int | None = None, title: str = ""
) -> "tuple[matplotlib.figure.Figure, list[matplotlib.axes.Axes]]":
    """Make a figure with a grid of axes; no window, no pyplot, no global setting.

    Args:
        rows: Rows of axes.
        columns: Columns of axes.
        width: Width in pixels of the saved picture.
        height: Height in pixels; where None, axes are about as high as three quarters of their width.
        title: Title over all axes.

    Returns:
        The figure, and its axes row by row. Each has the colour-blind safe `COLOURS` as its cycle.

    Raises:
        InputError: matplotlib is not installed.
    """
    with needs_extra("plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    pixels = height or round(0.75 * width * rows / columns)
    made = Figure(figsize=(width / _DPI, pixels / _DPI), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    if title:
        made.suptitle(title, fontsize=13, fontweight="bold")
    axes = list(made.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_prop_cycle(color=COLOURS)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
    return made, axes


def save(figure: "matplotlib.figure.Figure", path: str | os.PathLike[str]) -> None:
    """Save a figure, atomically, in the format that the path's suffix names (``.png``, ``.svg``, ``.pdf``).

    Raises:
        InputError: The suffix names no picture format, or as for `atomic_path`.
    """
    suffix = Path(path).suffix.lstrip(".").lower()
    formats = sorted(figure.canvas.get_supported_filetypes())
    if suffix not in formats:
        raise InputError(f"the suffix must be one of {', '.join(formats)}", file=path, value=suffix)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=suffix, dpi=figure.dpi)
