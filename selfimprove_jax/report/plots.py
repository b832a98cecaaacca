"""The report's figures: SVG strings that take their colours and font from the page.

Colours are roles (`arm-sbp`, `ink`, `rule`), drawn with placeholder colours that are then replaced
by CSS variables, so one SVG serves the light and the dark page. Same data, same bytes.
"""

import re
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np

from selfimprove_jax.report import formatting as fmt

FLOP_PARTS = ("seed", "embedding", "tuning", "sampling", "arm")

_ROLES = (
  "ink",
  "muted",
  "rule",
  "paper",
  "arm-baseline",
  "arm-sbp",
  "arm-unconditional",
  "arm-random-pairs",
  "arm-oracle",
  "arm-baseline-all-in",
  "arm-other0",
  "arm-other1",
  "arm-other2",
  *(f"part-{part}" for part in FLOP_PARTS),
)
# Nothing of matplotlib's own is drawn in these near-blacks.
PLACEHOLDER = {role: f"#0a0b{16 + index:02x}" for index, role in enumerate(_ROLES)}
_MARKERS = {
  "baseline": "o",
  "sbp": "s",
  "unconditional": "^",
  "random_pairs": "v",
  "oracle": "D",
  "baseline_all_in": "o",
}
_Z = 1.959964
_WIDTH = 4.8  # inches; the page shows a figure about 350 to 480 pixels wide


def loss_curves(arms: dict[str, Any]) -> str:
  """Validation (solid) and training loss (dashed) of every arm over its training tokens."""

  def draw(figure):
    axes = figure.subplots()
    names = fmt.arm_names(arms)
    lows, highs = [], []
    for name in names:
      curve = arms[name].get("curve") or []
      colour = PLACEHOLDER[fmt.arm_role(name, names)]
      for key, style in (("train_loss", "--"), ("validation_loss", "-")):
        points = [(p["tokens"], p[key]) for p in curve if p.get(key) is not None]
        if not points:
          continue
        x, y = np.array(points, dtype=float).T
        solid = style == "-"
        axes.plot(
          x,
          y,
          style,
          color=colour,
          linewidth=1.7 if solid else 0.9,
          alpha=1 if solid else 0.75,
          marker=_marker(name) if solid else None,
          markevery=[len(x) - 1],
          markersize=4.5,
          markerfacecolor=PLACEHOLDER["paper"] if name == "baseline_all_in" else colour,
        )
        lows.append(y.min())
        highs.append(np.quantile(y, 0.85) if len(y) > 4 else y.max())
    if lows:
      # the first steps, from log V down, would flatten all that is of interest
      low, high = min(lows), max(highs)
      axes.set_ylim(low - 0.06 * (high - low + 0.1), high + 0.12 * (high - low + 0.1))
    axes.set_xlim(left=0)
    labelled(axes, "training tokens", "nats per token")
    axes.xaxis.set_major_formatter(lambda number, _: fmt.short(number, pad=False))

  return svg("curves", 3.4, "Loss of every arm over its training", draw)


def arm_points(arms: dict[str, Any]) -> str:
  """Held-out nats per token of every arm with its 95% interval over documents."""
  names = fmt.arm_names(arms)

  def draw(figure):
    axes = figure.subplots()
    for row, name in enumerate(names):
      estimate = arms[name]["evals"]["heldout_nll"]
      _point(axes, row, name, names, estimate["value"], _Z * estimate["stderr"])
      _row_label(axes, row, f"{fmt.fixed(estimate['value'])}")
    _rows(axes, [arms[name]["label"] for name in names])
    labelled(axes, "held-out nats per token (95% over documents)", None)

  return svg("arms", _rows_height(len(names)), "Held-out loss of every arm", draw)


def differences(rows: list[tuple[str, str, dict[str, Any]]], arm_order: list[str]) -> str:
  """Paired differences with their 95% intervals: thick over documents, thin with seed noise.

  Args:
    rows: (arm whose colour is used, label, difference as `comparison.compare` gives it).
  """

  def draw(figure):
    axes = figure.subplots()
    axes.axvline(0, color=PLACEHOLDER["muted"], linewidth=0.9)
    for row, (name, _, difference) in enumerate(rows):
      colour = PLACEHOLDER[fmt.arm_role(name, arm_order)]
      axes.plot(difference["interval"], [row, row], color=colour, linewidth=1.2)
      axes.plot(
        difference["document_interval"], [row, row], color=colour, linewidth=4.5, alpha=0.45
      )
      _point(axes, row, name, arm_order, difference["value"], 0)
      _row_label(axes, row, fmt.signed(difference["value"]))
    _rows(axes, [label for _, label, _ in rows])
    gap = "\N{NO-BREAK SPACE}" * 4
    better, worse = "\N{LEFTWARDS ARROW} better", "worse \N{RIGHTWARDS ARROW}"
    labelled(axes, f"{better}{gap}nats per token{gap}{worse}", None)

  return svg("differences", _rows_height(len(rows)), "Paired differences between arms", draw)


def flops_bars(arms: dict[str, Any]) -> str:
  """Where every arm's all-in FLOPs went, stacked."""
  names = [name for name in fmt.arm_names(arms) if arms[name].get("flops_parts")]

  def draw(figure):
    axes = figure.subplots()
    totals = [sum(arms[name]["flops_parts"].values()) for name in names]
    for row, name in enumerate(names):
      left = 0.0
      for part in FLOP_PARTS:
        width = arms[name]["flops_parts"].get(part, 0)
        if width:
          axes.barh(
            row,
            width,
            left=left,
            height=0.58,
            color=PLACEHOLDER[f"part-{part}"],
            edgecolor=PLACEHOLDER["paper"],
            linewidth=0.8,
          )
        left += width
      _row_label(axes, row, fmt.short(totals[row]))
    axes.set_xlim(0, max(totals) * 1.02 or 1)
    _rows(axes, [arms[name]["label"] for name in names])
    axes.xaxis.set_major_formatter(lambda number, _: fmt.short(number, pad=False))
    labelled(axes, "FLOPs, all-in", None)

  return svg("flops", _rows_height(len(names)), "Where the FLOPs went", draw)


def similarity_histogram(similarities: list[float], *, role: str = "arm-sbp") -> str:
  """How similar the documents of the pairs are."""

  def draw(figure):
    axes = figure.subplots()
    counts, edges = np.histogram(similarities, bins=24)
    axes.bar(
      edges[:-1],
      counts,
      width=np.diff(edges),
      align="edge",
      color=PLACEHOLDER[role],
      edgecolor=PLACEHOLDER["paper"],
      linewidth=0.8,
    )
    labelled(axes, "similarity of d1 and d2 (cosine)", "pairs")

  return svg("similarities", 2.5, "Histogram of the similarity of pairs", draw)


def _marker(name: str) -> str:
  return _MARKERS.get(name, "P")


def _point(axes, row: int, name: str, names: list[str], centre: float, half: float | int) -> None:
  colour = PLACEHOLDER[fmt.arm_role(name, names)]
  if half:
    axes.plot([centre - half, centre + half], [row, row], color=colour, linewidth=1.4)
  hollow = name == "baseline_all_in"
  axes.plot(
    [centre],
    [row],
    marker=_marker(name),
    markersize=6,
    color=colour,
    markerfacecolor=PLACEHOLDER["paper"] if hollow else colour,
    markeredgewidth=1.4,
  )


def _rows_height(num_rows: int) -> float:
  return 0.75 + 0.36 * num_rows


def _rows(axes, labels: list[str]) -> None:
  axes.set_yticks(range(len(labels)), ["\n".join(_two_lines(label)) for label in labels])
  axes.set_ylim(len(labels) - 0.4, -0.6)
  axes.tick_params(axis="y", length=0, labelcolor=PLACEHOLDER["ink"])
  axes.spines["left"].set_visible(False)
  axes.grid(False, axis="y")
  axes.grid(True, axis="x")


def _two_lines(label: str) -> list[str]:
  return textwrap.wrap(label, 28, max_lines=2, placeholder="\N{HORIZONTAL ELLIPSIS}")


def _row_label(axes, row: int, text: str) -> None:
  axes.text(
    1.02,
    row,
    text,
    transform=axes.get_yaxis_transform(),
    va="center",
    ha="left",
    color=PLACEHOLDER["ink"],
  )


def labelled(axes, x: str, y: str | None) -> None:
  axes.set_xlabel(x)
  if y:
    axes.set_title(y, loc="left", fontsize=9, color=PLACEHOLDER["muted"])


def svg(name: str, height: float, title: str, draw: Callable[[Any], None]) -> str:
  import io

  import matplotlib
  from matplotlib.backends.backend_svg import FigureCanvasSVG
  from matplotlib.figure import Figure

  ink, muted, rule = (PLACEHOLDER[role] for role in ("ink", "muted", "rule"))
  style = {
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
  with matplotlib.rc_context({**matplotlib.rcParamsDefault, **style}):
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    draw(figure)
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True)
  return _for_page(out.getvalue(), name=name, title=title)


def _for_page(svg: str, *, name: str, title: str) -> str:
  """An SVG file as an element of the page: its ids its own, its colours and font the page's."""
  svg = svg[svg.index("<svg") :]
  svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
  opening, rest = svg.split(">", 1)
  view_box = re.search(r'viewBox="[^"]*"', opening).group()
  rest = rest.replace("xlink:href=", "href=")
  rest = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", rest)
  used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', rest))
  rest = re.sub(
    r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if f"{name}-{m[1]}" in used else "", rest
  )
  rest = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", rest)
  rest = re.sub(r"font-family: [^;\"]*;? ?", "", rest)
  for role, colour in PLACEHOLDER.items():
    rest = rest.replace(colour, f"var(--{role})")
  rest = re.sub(r">\s+<", "><", rest)
  label = fmt.escape(title)
  return f'<svg class="plot" {view_box} role="img" aria-label="{label}">{rest}'.strip()
