"""A bar figure as a plain SVG file: two bars a group, and a mark for a limit."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 120, 320, 64, 40, 56
"""Of a group; of the figure and its margins."""
COLOURS = ("#9aa5b1", "#2563a8")


class Group(NamedTuple):
    """What one group of bars shows, in milliseconds."""

    label: str
    dense: float
    sparse: float
    limit: float
    """What `sparse` would be if bytes alone counted."""


def bar_figure(title: str, sparse: str, groups: Sequence[Group]) -> str:
    """An SVG document of ms a token, dense beside `sparse`, with the limit by bytes as a line across the sparse bar."""
    width = LEFT + WIDTH * max(2, len(groups)) + 24
    largest, base = max(max(group[1:]) for group in groups), HEIGHT - BOTTOM
    step = next(s * 10**p for p in range(-3, 9) for s in (1, 2, 5) if largest / (s * 10**p) <= 6)

    def y(value: float) -> float:
        return base - value / largest * (base - TOP)

    parts = [_text(LEFT, 20, title, "start", 14)]
    for tick in range(int(largest / step) + 1):
        at = y(tick * step)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{width - 12}" stroke="#d8dde3"/>')
        parts.append(_text(LEFT - 6, at + 4, f"{tick * step:g}", "end"))
    for place, group in enumerate(groups):
        left = LEFT + WIDTH * place + 0.15 * WIDTH
        for i, (name, value) in enumerate((("dense", group.dense), (sparse, group.sparse))):
            x, top, bar = left + 0.35 * WIDTH * i, y(value), 0.33 * WIDTH
            shape = f'x="{x:.1f}" y="{top:.1f}" width="{bar:.1f}" height="{base - top:.1f}"'
            note = f"{name}, {group.label}: {value:.1f} ms"
            parts.append(f'<rect {shape} fill="{COLOURS[i]}"><title>{escape(note)}</title></rect>')
            parts.append(_text(x + bar / 2, top - 4, f"{value:.1f}"))
        at, x = y(group.limit), left + 0.35 * WIDTH
        note = f"limit by bytes: {group.limit:.1f} ms"
        mark = f'<path d="M{x - 4:.1f} {at:.1f}h{0.33 * WIDTH + 8:.1f}" stroke="#111" stroke-width="2">'
        parts.append(f"{mark}<title>{escape(note)}</title></path>")
        parts.append(_text(left + 0.35 * WIDTH, base + 18, group.label))
    parts.append(_text(16, (TOP + base) / 2, "ms a token", turned=True))
    for i, name in enumerate(("dense", sparse)):
        x = LEFT + 90 * i
        parts.append(f'<rect x="{x}" y="{HEIGHT - 22}" width="12" height="12" fill="{COLOURS[i]}"/>')
        parts.append(_text(x + 18, HEIGHT - 12, name, "start"))
    parts.append(f'<path d="M{LEFT + 180} {HEIGHT - 16}h12" stroke="#111" stroke-width="2"/>')
    parts.append(_text(LEFT + 198, HEIGHT - 12, "limit by bytes", "start"))
    size = f'width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}"'
    body = "\n".join(['<rect width="100%" height="100%" fill="white"/>', *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">\n{body}\n</svg>\n'


def _text(x: float, y: float, text: str, anchor: str = "middle", size: int = 11, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'
