"""One HTML file about one reading, without remote assets: where the agent looked, what changed its mind."""

import base64
import html
import io
import os
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from rlogist.geojson import region_features, tissue_features, write_geojson
from rlogist.overlay import draw_heat, draw_outlines
from rlogist.prediction import Prediction
from rlogist.slides import Slide, UnreadableRegion
from shared_core import files

Picture = UInt8[np.ndarray, "_ _ 3"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px;
  margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
img { max-width: 100% } figure { margin: 0 } figcaption { color: #555; font-size: .9em }
table { border-collapse: collapse } td, th { padding: .2em .9em .2em 0; text-align: right }
th { border-bottom: 1px solid #999 } td:first-child, th:first-child { text-align: left }
.row { display: flex; flex-wrap: wrap; gap: 1em } .row figure { flex: 1 1 300px }
.top figure { flex: 0 1 200px }
"""


def write_report(
    out: str | os.PathLike[str],
    slide: Slide,
    found: Prediction,
    whole: Prediction | None = None,
    top: int = 8,
) -> None:
    """Write the page, and beside it a GeoJSON of tissue and looks for QuPath (suffix .geojson).

    Args:
        out: The .html file.
        slide: The slide that was read; its thumbnail and the top regions are read for the page, which its
            ledger calls `picture` and `deep` after the reading.
        found: The reading.
        whole: An exhaustive reading of the same slide, whose attention is shown beside.
        top: How many regions are shown at depth, those that changed the probabilities the most.
    """
    picture = slide.thumbnail()
    scale = slide.size[0] / picture.shape[1]
    outlined = draw_outlines(picture, slide.tissue.contours, scale)
    parts = [_summary(found)]
    if found.path:
        maps = [_attention(picture, slide, found, scale, "Attention at the end of the reading")]
        if whole is not None and whole.attention:
            maps.append(_attention(picture, slide, whole, scale, "Attention, all regions at depth"))
        parts += [
            "<h2>The path</h2>",
            _figure(draw_path(outlined, slide, found, scale), "Looks in order, from dark to bright"),
            "<h2>Probability after each look</h2>",
            probability_curve(found),
            "<h2>Where the classifier's attention lies</h2>",
            f"<div class=row>{''.join(maps)}</div>",
            "<h2>Looks that changed the answer the most</h2>",
            f"<div class='row top'>{_top_regions(slide, found, top)}</div>",
        ]
    else:
        parts.append(_figure(outlined, "No tissue was found"))
    parts += ["<h2>What was read</h2>", _ledger(found)]
    title = html.escape(f"{found.slide}: reading")
    files.write_text(
        out,
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1>{''.join(parts)}</html>\n",
    )
    write_geojson(Path(out).with_suffix(".geojson"), path_features(slide, found))


def path_features(slide: Slide, found: Prediction) -> list[dict]:
    """Tissue, and one object a look with its number, score and probability, as GeoJSON features."""
    looks = [look for look in found.path if look.damaged is None]
    numbers = {
        "Look": [float(order) for order, _ in enumerate(looks, start=1)],
        "Score": [look.score if look.score is not None else 0.0 for look in looks],
        f"Probability of {found.classes[-1]}": [look.probability[-1] for look in looks],
    }
    chosen = [look.region for look in looks]
    return tissue_features(slide.tissue.contours) + region_features(
        slide.regions, chosen, numbers, name="Look", kind="annotation"
    )


def draw_path(picture: Picture, slide: Slide, found: Prediction, scale: float) -> Picture:
    """A copy of a reduced picture with looks as numbered squares joined by arrows, coloured by time."""
    drawn = picture.copy()
    boxes = slide.regions.boxes() / scale
    colours = _by_time(len(found.path))
    centres = [
        np.round((boxes[look.region, :2] + boxes[look.region, 2:]) / 2).astype(int) for look in found.path
    ]
    for start, end, colour in zip(centres, centres[1:], colours[1:], strict=False):
        cv2.arrowedLine(drawn, tuple(map(int, start)), tuple(map(int, end)), colour, 2, cv2.LINE_AA, 0, 0.04)
    image = Image.fromarray(drawn)
    pen = ImageDraw.Draw(image)
    for order, (look, centre, colour) in enumerate(zip(found.path, centres, colours, strict=True), start=1):
        left, top, right, bottom = (int(value) for value in np.round(boxes[look.region]))
        pen.rectangle((left, top, right, bottom), outline=colour, width=3)
        x, y = int(centre[0]), int(centre[1])
        pen.text(
            (x, y), str(order), fill="white", anchor="mm", font_size=15, stroke_width=3, stroke_fill="black"
        )
    return np.asarray(image)


def probability_curve(found: Prediction) -> str:
    """Probability of the last class from the scan and after each look, as an SVG."""
    width, height, left = 1040, 220, 40
    values = [found.start[-1], *(look.probability[-1] for look in found.path)]
    step = (width - left - 10) / (len(values) - 1)
    points = [(left + i * step, 10 + (height - 40) * (1 - value)) for i, value in enumerate(values)]
    grid = "".join(
        f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" font-size="12">{label}</text>'
        for label, y in ((f"{v:g}", 10 + (height - 40) * (1 - v)) for v in (0, 0.5, 1))
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#D55E00"><title>look {i}: {v:.3f}</title></circle>'
        for i, ((x, y), v) in list(enumerate(zip(points, values, strict=True)))[1:]
    )
    label = html.escape(
        f"probability of {found.classes[-1]} from the scan and after looks 1 to {len(found.path)}"
    )
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="100%" role="img" aria-label="{label}">{grid}'
        f'<polyline points="{line}" fill="none" stroke="#D55E00" stroke-width="2"/>{dots}</svg>'
        f"<figcaption>{label}</figcaption></figure>"
    )


def _summary(found: Prediction) -> str:
    if not found.probability:
        return "<p><b>No tissue</b>: there is no answer for this slide.</p>"
    shares = ", ".join(
        f"{html.escape(name)} {p:.3f}" for name, p in zip(found.classes, found.probability, strict=True)
    )
    deep = found.ledger.total("deep", "prefetch").pixels
    share = 100 * found.observation_ratio
    return (
        f"<p><b>{html.escape(str(found.label))}</b> ({shares}), after {found.looks} looks at "
        f"{found.regions} regions ({share:.1f} %), {deep:,} pixels read in depth, {found.seconds:.2f} s.</p>"
    )


def _attention(picture: Picture, slide: Slide, found: Prediction, scale: float, caption: str) -> str:
    """The heat map, from the least to the most attention; the caption tells how far these are apart."""
    values = np.full(len(slide.regions), np.nan)
    own = np.asarray(found.attention)
    low, high = float(own.min()), float(own.max())
    values[found.region_index] = (own - low) / max(high - low, 1e-12)
    heat = draw_heat(picture, slide.regions, values, scale)
    return _figure(
        heat, f"{caption}: {low:.2%} (dark) to {high:.2%} (bright) a region, {1 / len(own):.2%} were it even"
    )


def _top_regions(slide: Slide, found: Prediction, top: int) -> str:
    looks = [(i, look) for i, look in enumerate(found.path) if look.damaged is None]
    before = {i: (found.path[i - 1].probability if i else found.start)[-1] for i, _ in looks}
    ranked = sorted(looks, key=lambda entry: -abs(entry[1].probability[-1] - before[entry[0]]))[:top]
    shown = []
    for order, look in ranked:
        try:
            block = slide.read_region_block(look.region)
        except UnreadableRegion:
            continue
        side, patch = slide.geometry.side, slide.geometry.patch
        whole = block.reshape(side, side, patch, patch, 3).transpose(0, 2, 1, 3, 4)
        picture = np.ascontiguousarray(whole.reshape(side * patch, side * patch, 3))
        change = look.probability[-1] - before[order]
        x, y = slide.regions.xy[look.region]
        shown.append(_figure(picture, f"look {order + 1} at ({x}, {y}): {change:+.3f}"))
    return "".join(shown)


def _ledger(found: Prediction) -> str:
    rows = "".join(
        f"<tr><td>{purpose}</td><td>{level}</td><td>{tally.reads}</td><td>{tally.pixels:,}</td>"
        f"<td>{tally.seconds:.3f}</td></tr>"
        for (purpose, level), tally in sorted(found.ledger.entries().items())
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in found.ledger.notes)
    head = "<tr><th>purpose</th><th>level</th><th>reads</th><th>pixels</th><th>seconds</th></tr>"
    return f"<table>{head}{rows}</table>" + (f"<ul>{notes}</ul>" if notes else "")


def _figure(picture: Picture, caption: str) -> str:
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="{_data(picture)}"><figcaption>{text}</figcaption></figure>'


def _data(picture: Picture) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _by_time(count: int) -> list[tuple[int, int, int]]:
    steps = np.linspace(40, 230, max(count, 1)).astype(np.uint8)
    colours = cv2.applyColorMap(steps[:, None], cv2.COLORMAP_PLASMA).reshape(-1, 3)[:, ::-1]
    return [(int(r), int(g), int(b)) for r, g, b in colours]
