"""Draws a `Figure` as an SVG element that takes its colors and its font from the page.

Colors are drawn as placeholders and then replaced by CSS variables, so one SVG serves the light and
the dark page. The same figure gives the same bytes.
"""

import html
import io
import re
import textwrap
import typing
from typing import Any

import numpy as np

import selfimprove_jax.report.blocks as blocks
import selfimprove_jax.report.formatting as formatting

_ROLES = ("ink", "muted", "rule", "paper", *typing.get_args(blocks.Color))
# Near-blacks that matplotlib never draws by default.
_PLACEHOLDER = {role: f"#0a0b{16 + index:02x}" for index, role in enumerate(_ROLES)}
_MARKERS = {
  **{"circle": "o", "square": "s", "up": "^", "down": "v"},
  **{"diamond": "D", "plus": "P", "hollow": "o", "swatch": None},
}
_WIDTH, _ROW_HEIGHT = 4.8, 0.36  # inches; the page shows a figure about 350 to 480 pixels wide


def svg(figure: blocks.Figure, *, name: str) -> str:
  """Returns the figure as an `svg` element; `name` makes its ids unique in the page."""
  import matplotlib
  from matplotlib.backends.backend_svg import FigureCanvasSVG
  from matplotlib.figure import Figure

  draw, height = {
    blocks.LinePlot: (_draw_lines, lambda _: 3.4),
    blocks.PointPlot: (_draw_points, lambda plot: 0.75 + _ROW_HEIGHT * len(plot.points)),
    blocks.BarPlot: (_draw_bars, lambda plot: 0.75 + _ROW_HEIGHT * len(plot.bars)),
    blocks.Histogram: (_draw_histogram, lambda _: 2.5),
  }[type(figure.plot)]
  # rcParamsDefault: a matplotlibrc of the user must not change the bytes.
  with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_rc_params(name)}):
    canvas = Figure(figsize=(_WIDTH, height(figure.plot)), layout="constrained")
    FigureCanvasSVG(canvas)
    draw(canvas.subplots(), figure.plot)
    out = io.StringIO()
    canvas.savefig(out, format="svg", transparent=True)
  return _for_page(out.getvalue(), name=name, title=figure.title)


def _rc_params(name: str) -> dict[str, Any]:
  ink, muted, rule = (_PLACEHOLDER[role] for role in ("ink", "muted", "rule"))
  return {
    "svg.hashsalt": name,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": ink,
    "axes.labelcolor": muted,
    "axes.edgecolor": rule,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": rule,
    "grid.linewidth": 0.6,
    "xtick.color": rule,
    "ytick.color": rule,
    "xtick.labelcolor": muted,
    "ytick.labelcolor": muted,
    "ytick.major.size": 0,
  }


def _draw_lines(axes: Any, plot: blocks.LinePlot) -> None:
  lows, highs = [], []
  if plot.x.log2:
    axes.set_xscale("log", base=2)
  for line in plot.lines:
    if not line.x:
      continue
    y = np.array(line.y, dtype=float)
    axes.errorbar(
      line.x,
      y,
      yerr=line.half_widths or None,
      linestyle="--" if line.dashed else "-",
      linewidth=0.9 if line.dashed else 1.6,
      elinewidth=0.8,
      alpha=0.75 if line.dashed else 1,
      markersize=4.5,
      marker=None if line.markers == "none" else _MARKERS[line.style.marker],
      markevery=[len(y) - 1] if line.markers == "last" else None,
      **_colors(line.style),
    )
    lows.append(y.min())
    highs.append(np.quantile(y, 0.85) if len(y) > 4 else y.max())
  if plot.skip_start and lows:
    # A loss starts at log(vocabulary); on that scale the arms' final losses would coincide.
    low, high = min(lows), max(highs)
    axes.set_ylim(low - 0.06 * (high - low + 0.1), high + 0.12 * (high - low + 0.1))
  if plot.zero:
    axes.axhline(0, color=_PLACEHOLDER["muted"], linewidth=0.9)
  if not plot.x.log2:
    axes.set_xlim(left=0)
  _finish(axes, plot.x, plot.y)


def _draw_points(axes: Any, plot: blocks.PointPlot) -> None:
  if plot.zero:
    axes.axvline(0, color=_PLACEHOLDER["muted"], linewidth=0.9)
  for row, point in enumerate(plot.points):
    color = _PLACEHOLDER[point.style.color]
    if point.interval[0] < point.interval[1]:
      axes.plot(point.interval, [row, row], color=color, linewidth=1.3)
    if point.inner_interval:
      axes.plot(point.inner_interval, [row, row], color=color, linewidth=4.5, alpha=0.45)
    marker = {"marker": _MARKERS[point.style.marker], "markersize": 6, "markeredgewidth": 1.4}
    axes.plot([point.value.value], [row], **marker, **_colors(point.style))
    _label_row(axes, row, formatting.text(point.value))
  _name_rows(axes, [point.label for point in plot.points])
  axes.locator_params(axis="x", nbins=5)  # the names of the rows leave little width for numbers
  _finish(axes, plot.x, None)


def _draw_bars(axes: Any, plot: blocks.BarPlot) -> None:
  totals = [sum(widths) for _, widths in plot.bars]
  for row, (_, widths) in enumerate(plot.bars):
    left = 0.0
    for style, width in zip(plot.styles, widths, strict=True):
      if width:
        color, paper = _PLACEHOLDER[style.color], _PLACEHOLDER["paper"]
        axes.barh(row, width, left=left, height=0.58, color=color, edgecolor=paper, linewidth=0.8)
      left += width
    _label_row(axes, row, _formatted(plot.x, totals[row]))
  axes.set_xlim(0, max(totals) * 1.02 or 1)
  _name_rows(axes, [label for label, _ in plot.bars])
  _finish(axes, plot.x, None)


def _draw_histogram(axes: Any, plot: blocks.Histogram) -> None:
  counts, edges = np.histogram(plot.values, bins=24)
  color, paper = _PLACEHOLDER[plot.style.color], _PLACEHOLDER["paper"]
  axes.bar(
    edges[:-1], counts, np.diff(edges), align="edge", color=color, edgecolor=paper, linewidth=0.8
  )
  _finish(axes, plot.x, plot.y)


def _colors(style: blocks.Style) -> dict[str, str]:
  color = _PLACEHOLDER[style.color]
  face = _PLACEHOLDER["paper"] if style.marker == "hollow" else color
  return {"color": color, "markerfacecolor": face}


def _name_rows(axes: Any, labels: list[str]) -> None:
  ellipsis = "\N{HORIZONTAL ELLIPSIS}"
  wrapped = [textwrap.wrap(label, 28, max_lines=2, placeholder=ellipsis) for label in labels]
  axes.set_yticks(range(len(labels)), ["\n".join(lines) for lines in wrapped])
  axes.set_ylim(len(labels) - 0.4, -0.6)  # the first row on top
  axes.tick_params(axis="y", length=0, labelcolor=_PLACEHOLDER["ink"])
  axes.spines["left"].set_visible(False)
  axes.grid(False, axis="y")
  axes.grid(True, axis="x")


def _label_row(axes: Any, row: int, label: str) -> None:
  place = axes.get_yaxis_transform()
  ink = _PLACEHOLDER["ink"]
  axes.text(1.02, row, label, transform=place, va="center", ha="left", color=ink)


def _finish(axes: Any, x: blocks.Axis, y: blocks.Axis | None) -> None:
  """Labels the axes and sets their ranges and number formats."""
  axes.set_xlabel(x.label)
  for axis, drawn, limit in ((x, axes.xaxis, axes.set_xlim), (y, axes.yaxis, axes.set_ylim)):
    if axis and axis.range:
      limit(*axis.range)
    if axis and axis.form != "general":
      drawn.set_major_formatter(lambda value, _, axis=axis: _formatted(axis, value, pad=False))
  if y:
    axes.set_title(y.label, loc="left", fontsize=9, color=_PLACEHOLDER["muted"])


def _formatted(axis: blocks.Axis, value: blocks.Real, *, pad: bool = True) -> str:
  if axis.form == "short":
    return formatting.short(value, pad=pad)
  return formatting.text(blocks.Number(value, form=axis.form, digits=0))


def _for_page(drawn: str, *, name: str, title: str) -> str:
  """Turns an SVG file into an element of the page, with unique ids and the page's colors."""
  # Removes the XML header, the metadata with its date, and the size in the opening tag.
  drawn = drawn[drawn.index("<svg") :]
  drawn = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", drawn, flags=re.DOTALL)
  opening, rest = drawn.split(">", 1)
  view_box = re.search(r'viewBox="[^"]*"', opening).group()
  rest = rest.replace("xlink:href=", "href=")
  # Figures share one document: ids with references get a prefix, the others are dropped.
  rest = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", rest)
  used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', rest))
  rest = re.sub(
    r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if f"{name}-{m[1]}" in used else "", rest
  )
  # Text keeps its size and inherits its family from the page.
  rest = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", rest)
  rest = re.sub(r"font-family: [^;\"]*;? ?", "", rest)
  for role, placeholder in _PLACEHOLDER.items():
    rest = rest.replace(placeholder, f"var(--{role})")
  rest = re.sub(r">\s+<", "><", rest)
  return f'<svg class="plot" {view_box} role="img" aria-label="{html.escape(title)}">{rest}'.strip()
