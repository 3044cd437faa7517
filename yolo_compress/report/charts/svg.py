"""Inline SVG from matplotlib. Text stays text, and colours are CSS variables of the page. Equal input gives equal bytes."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Placeholders for matplotlib. In the SVG each becomes a CSS variable that the page sets for the light and dark theme.
COLOURS = {
    "ink": "#0a0b0c",
    "muted": "#1a1b1c",
    "line": "#2a2b2c",
    "paper": "#3a3b3c",
    "before": "#4a4b4c",
    "after": "#5a5b5c",
    "bad": "#6a6b6c",
}
WIDE_PX, NARROW_PX = 1000, 360


@contextmanager
def style(salt: str) -> Iterator[None]:
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": ["DejaVu Sans"],
        "font.size": 12,
        "text.parse_math": False,
        "text.color": COLOURS["ink"],
        "axes.edgecolor": COLOURS["line"],
        "axes.labelcolor": COLOURS["muted"],
        "xtick.color": COLOURS["line"],
        "ytick.color": COLOURS["line"],
        "xtick.labelcolor": COLOURS["muted"],
        "ytick.labelcolor": COLOURS["muted"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": COLOURS["line"],
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "hatch.linewidth": 0.6,
    }
    with matplotlib.rc_context(settings):
        yield


def blank(width_px: int, height_px: int) -> Figure:
    figure = Figure(figsize=(width_px / 72, height_px / 72), dpi=72, layout="constrained")
    figure.patch.set_alpha(0)
    return figure


def to_svg(figure: Figure, description: str) -> str:
    """Return the <svg> element without prolog, metadata, date and size. The page sets its size."""
    buffer = io.StringIO()
    with warnings.catch_warnings():  # the browser draws the text in its own fonts, so a glyph missing here does no harm
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    return f'<svg {box[0]} role="img" aria-label="{description}">{body.strip()}'
