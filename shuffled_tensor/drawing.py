# SPDX-License-Identifier: MIT
"""What all pictures share: colours, distances, texts, ribbons, a page, and its PNG."""

from __future__ import annotations

from colorsys import hls_to_rgb

__all__ = [
    "AXIS",
    "BETWEEN",
    "CELL_HEIGHT",
    "GREY",
    "INK",
    "LABELS",
    "MARGIN",
    "MAX_CELLS",
    "colour",
    "page",
    "png",
    "text",
]

MAX_CELLS = 2048
"""The cells that a picture shows at most."""

INK, GREY, _PAPER = "#1f2328", "#59636e", "#ffffff"
MARGIN, AXIS, BETWEEN, CELL_HEIGHT = 28, 38, 128, 14  # pixels

LABELS = 'font-family="ui-monospace, monospace, sans-serif" font-size="10" text-anchor="middle"'
"""Of the texts in cells; the last family is there for machines that have no monospaced one."""


def page(title: str, width: int, height: int, lines: list[str], definitions: str = "") -> str:
    """An SVG of a white page of so many pixels, with elements and what they refer to."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif">',
            f"<title>{title}</title>",
            *([definitions] if definitions else []),
            f'<rect width="100%" height="100%" rx="8" fill="{_PAPER}"/>',
            *lines,
            "</svg>\n",
        ]
    )


def text(
    x: float, y: float, text: str, *, size: int = 12, fill: str = INK, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>{text}</text>'


def colour(hue: float, lightness: float, saturation: float = 0.88) -> str:
    """A hue in degrees, and the rest from 0 to 1."""
    rgb = hls_to_rgb(hue % 360 / 360, lightness, saturation)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def png(svg: str) -> bytes:
    """A page as a PNG of as many pixels.

    Raises:
        ModuleNotFoundError: vl-convert-python, which brings its own fonts, is not installed.
    """
    import vl_convert  # the extra `png`

    return bytes(vl_convert.svg_to_png(svg))
