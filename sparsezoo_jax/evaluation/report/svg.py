"""Plots as inline SVG: lines and grouped bars, with axes, ticks, tooltips and an HTML legend.

Colours are CSS variables (`--c0` ...), so that a page's style decides on light and dark.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape as html_escape

from sparsezoo_jax.untrusted import printable

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44
COLOURS = 8
"""Distinguishable colours; more series share a ramp instead."""
TOOLTIPS = 40
"""Most points of a series that carry a tooltip."""


def escape(text: str) -> str:
    """`text` for HTML, in elements and in quoted attributes; what would hide or turn its characters is escaped, too."""
    return html_escape(printable(text))


@dataclasses.dataclass(frozen=True)
class Series:
    """One line: points with a value that is None (or not above 0 on a logarithmic axis) are gaps."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    dashed: bool = False
    place: int | None = None
    """Number of its colour; None: its place among the lines of the plot."""
    in_legend: bool = True


def line_plot(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    log_y: bool = False,
    reference: Sequence[Series] = (),
    y_from_zero: bool = False,
    percent: bool = False,
    places: int = 0,
) -> str:
    """A `<figure>` with one line a series; `reference` lines are grey and dashed. Empty series give a note.

    Colours are those of `places` series, or of as many as there are here.
    """
    drawn = [*series, *reference]
    points = [
        (x, y)
        for line in drawn
        for x, y in zip(line.x, line.y, strict=True)
        if _drawable(x, log=False) and _drawable(y, log=log_y)
    ]
    if not points:
        return _figure(title, '<p class="note">no data</p>', "")
    xs, ys = [x for x, _ in points], [float(y) for _, y in points if y is not None]
    x_axis = _Axis.linear(min(xs), max(xs), LEFT, WIDTH - RIGHT, tight=True)
    if log_y:
        y_axis = _Axis.logarithmic(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    else:
        y_axis = _Axis.linear(min(0.0, *ys) if y_from_zero else min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    parts = [_axes(x_axis, y_axis, x_label, y_label, percent=percent)]
    for line in reference:
        parts.append(f'<path class="reference" d="{_path(line, x_axis, y_axis, log_y)}"/>')
    count = max(len(series) if places == 0 else places, 1)
    shades = [colour(index if line.place is None else line.place, count) for index, line in enumerate(series)]
    for line, shade in zip(series, shades, strict=True):
        style = f"stroke:{shade}" + (";stroke-dasharray:5 3" if line.dashed else "")
        parts.append(f'<path class="line" style="{style}" d="{_path(line, x_axis, y_axis, log_y)}"/>')
        parts.append(_tooltips(line, x_axis, y_axis, log_y, percent, y_label))
    names = [(line.name, shade) for line, shade in zip(series, shades, strict=True) if line.in_legend]
    names += [(line.name, "var(--grey)") for line in reference]
    return _figure(title, _svg(title, parts), _legend(names, alone=places > 0))


def bar_plot(
    title: str,
    y_label: str,
    groups: Sequence[str],
    series: Sequence[tuple[str, Sequence[float | None]]],
    *,
    percent: bool = False,
) -> str:
    """A `<figure>` with groups of bars, one bar a series in each group; None leaves a gap."""
    values = [value for _, bars in series for value in bars if _drawable(value, log=False)]
    if not values:
        return _figure(title, '<p class="note">no data</p>', "")
    y_axis = _Axis.linear(0.0, max(float(v) for v in values if v is not None), HEIGHT - BOTTOM, TOP)
    span = (WIDTH - RIGHT - LEFT) / len(groups)
    bar = 0.8 * span / len(series)
    parts = [_axes(None, y_axis, "", y_label, percent=percent)]
    every = max(1, math.ceil(len(groups) / 14))
    for group, label in enumerate(groups):
        left = LEFT + (group + 0.1) * span
        if group % every == 0:
            parts.append(_text("tick", left + 0.4 * span, HEIGHT - BOTTOM + 16, label))
        for index, (name, bars) in enumerate(series):
            value = bars[group]
            if value is None or not _drawable(value, log=False):
                continue
            top = y_axis.at(value)
            parts.append(
                f'<rect style="fill:{colour(index, len(series))}" x="{left + index * bar:.1f}" y="{top:.1f}" '
                f'width="{max(bar - 1, 0.5):.1f}" height="{max(HEIGHT - BOTTOM - top, 0):.1f}">'
                f"<title>{escape(name)}, {escape(label)}: {number(value, percent)}</title></rect>"
            )
    return _figure(
        title, _svg(title, parts), _legend([(name, colour(i, len(series))) for i, (name, _) in enumerate(series)])
    )


def colour(index: int, count: int) -> str:
    """CSS colour of a series: one of the palette, or a place on a ramp from blue to yellow for many series."""
    if count <= COLOURS:
        return f"var(--c{index})"
    share = index / (count - 1)
    return f"hsl({250 - 200 * share:.0f} 65% var(--ramp))"


def number(value: float, percent: bool = False) -> str:
    """A number as short as it can be read: 12.5 %, 3.4 k, 0.012."""
    if percent:
        return f"{100 * value:.3g} %"
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == ' k' else size):.4g}{suffix}"
    return f"{value:.4g}"


@dataclasses.dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    @staticmethod
    def linear(low: float, high: float, start: float, end: float, *, tight: bool = False) -> _Axis:
        if high - low < 1e-9 * max(abs(high), abs(low), 1e-3):
            low, high = min(0.0, 2 * low), max(0.0, high) or 1.0  # one value: its bar from zero
        step = 10.0 ** math.floor(math.log10((high - low) / 5))
        step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
        if not tight:
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        first = math.ceil(low / step - 1e-9)
        ticks = tuple((first + i) * step for i in range(int((high - first * step) / step + 1e-9) + 1))
        return _Axis(low, high, start, end, ticks)

    @staticmethod
    def logarithmic(low: float, high: float, start: float, end: float) -> _Axis:
        first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
        last = max(last, first + 1)
        every = max(1, math.ceil((last - first) / 6))
        return _Axis(10.0**first, 10.0**last, start, end, tuple(10.0**p for p in range(first, last + 1, every)), True)

    def at(self, value: float) -> float:
        """Place of a value in the picture."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _drawable(value: float | None, *, log: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _path(line: Series, x_axis: _Axis, y_axis: _Axis, log: bool) -> str:
    commands, pen_down = [], False
    for x, y in zip(line.x, line.y, strict=True):
        if y is None or not _drawable(y, log=log):
            pen_down = False
            continue
        commands.append(f"{'L' if pen_down else 'M'}{x_axis.at(x):.1f} {y_axis.at(y):.1f}")
        pen_down = True
    return "".join(commands)


def _tooltips(line: Series, x_axis: _Axis, y_axis: _Axis, log: bool, percent: bool, y_label: str) -> str:
    places = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None and _drawable(y, log=log)]
    every = max(1, math.ceil(len(places) / TOOLTIPS))
    return "".join(
        f'<circle class="hover" cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="5">'
        f"<title>{escape(line.name)} at {number(x)}: {number(y, percent)}</title></circle>"
        for x, y in places[::every]
    )


def _axes(x_axis: _Axis | None, y_axis: _Axis, x_label: str, y_label: str, *, percent: bool) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(_text("tick", LEFT - 6, y + 4, number(tick, percent), "end"))
    if x_axis is not None:
        for tick in x_axis.ticks:
            x = x_axis.at(tick)
            parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
            parts.append(_text("tick", x, bottom + 16, number(tick)))
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    parts.append(_text("label", (LEFT + right) / 2, HEIGHT - 8, x_label))
    parts.append(_text("label", 12, (TOP + bottom) / 2, y_label, turned=True))
    return "".join(parts)


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x} {y})"' if turned else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def _svg(title: str, parts: Sequence[str]) -> str:
    label = escape(title)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _legend(names: Sequence[tuple[str, str]], *, alone: bool = False) -> str:
    """Names with their colours; of a single one only if it is told to stand `alone`."""
    if len(names) < 2 and not alone:
        return ""
    return (
        '<ul class="legend">'
        + "".join(f'<li><span style="background:{shade}"></span>{escape(name)}</li>' for name, shade in names)
        + "</ul>"
    )


def _figure(title: str, body: str, legend: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{body}{legend}</figure>"
