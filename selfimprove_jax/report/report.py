"""A report as data, which the HTML page, the terminal and report.json show.

A pipeline builds a `Report` from frozen blocks. Cells hold numbers rather than formatted text;
`formatting` writes them. The pipeline also gives colors and markers, as `Style`, so the renderers
need no knowledge of arms or methods.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Color = Literal[
  "gray", "blue", "orange", "pink", "green", "silver", "purple", "rust", "teal", "sky"
]
Marker = Literal["circle", "square", "up", "down", "diamond", "plus", "hollow", "swatch"]
Real = float | int
Form = Literal["fixed", "general", "percent", "short", "seconds"]


@dataclasses.dataclass(frozen=True)
class Style:
  """The color and the marker of a series, the same in every table and figure of a report."""

  color: Color
  marker: Marker = "swatch"


@dataclasses.dataclass(frozen=True)
class Number:
  """A number and the way to write it.

  Attributes:
    value: None and values that are not finite are shown as a dash.
    stderr: standard error, shown after a plus-minus sign.
    form: `fixed` 3.957, `general` 3.957e+05, `percent` 40%, `short` 1.58M, `seconds` 2 min 05 s.
    digits: decimals of `fixed` (3) and `percent` (0), significant digits of `general` (4).
    signed: writes the plus sign.
  """

  value: Real | None
  stderr: Real | None = None
  form: Form = "fixed"
  digits: int | None = None
  signed: bool = False


@dataclasses.dataclass(frozen=True)
class Interval:
  """A confidence interval, written with signs: `-0.05 to +0.07`."""

  low: Real
  high: Real


@dataclasses.dataclass(frozen=True)
class Label:
  """The name of a series after its marker in its color."""

  text: str
  style: Style


@dataclasses.dataclass(frozen=True)
class Stack:
  """Several lines in one cell; those below the first are smaller."""

  lines: "tuple[Cell, ...]"


@dataclasses.dataclass(frozen=True)
class Bar:
  """A bar on the scale of the largest bar in its table."""

  value: Real


# Plain values are cells too: integers get separators, other numbers four digits.
Scalar = str | Real | bool | None
Cell = Scalar | Number | Interval | Label | Stack | Bar | list | tuple | Mapping


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of a table.

  Attributes:
    header: what the column holds.
    is_text: sets the cells to the left; numbers are set to the right.
    brief: shown in the terminal too, where there is less room.
    code: sets the cells in a monospaced font.
  """

  header: str
  is_text: bool = False
  brief: bool = True
  code: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
  """A table; one that is too wide for the screen scrolls, and its first column stays.

  Attributes:
    rows: a cell for each column.
    total: a last row that is set apart, or nothing.
  """

  columns: tuple[Column, ...]
  rows: tuple[tuple[Cell, ...], ...]
  total: tuple[Cell, ...] = ()

  @property
  def largest_bar(self) -> Real:
    return max([cell.value for row in self.rows for cell in row if isinstance(cell, Bar)] or [0])


@dataclasses.dataclass(frozen=True)
class Text:
  """A paragraph. A `warning` is set in a box, `code` is shown as it is typed."""

  text: str
  kind: Literal["plain", "note", "warning", "code"] = "plain"


@dataclasses.dataclass(frozen=True)
class Facts:
  """Names and values, one line each. Names that are `verbatim` are identifiers, not words."""

  values: Mapping[str, Cell]
  verbatim: bool = False


@dataclasses.dataclass(frozen=True)
class Excerpt:
  """A text with a heading and a few words about it; None is shown as a dash."""

  heading: str
  about: str
  text: str | None


@dataclasses.dataclass(frozen=True)
class TextPair:
  """Two texts side by side."""

  left: Excerpt
  right: Excerpt


@dataclasses.dataclass(frozen=True)
class Legend:
  """Names of series with their markers, or with a swatch of their color."""

  labels: tuple[Label, ...]


@dataclasses.dataclass(frozen=True)
class Axis:
  """An axis: its label, how its numbers are written, its range (None for that of the data)."""

  label: str
  form: Form = "general"
  range: tuple[Real, Real] | None = None
  log2: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of a plot through its points.

  Attributes:
    half_widths: half the error bar of each point, or nothing.
    markers: which points are marked.
  """

  style: Style
  x: tuple[Real, ...]
  y: tuple[Real, ...]
  half_widths: tuple[Real, ...] = ()
  dashed: bool = False
  markers: Literal["all", "last", "none"] = "last"


@dataclasses.dataclass(frozen=True)
class LinePlot:
  """Lines over a common x axis. `skip_start` cuts off the first steep part of loss curves."""

  lines: tuple[Line, ...]
  x: Axis
  y: Axis
  skip_start: bool = False


@dataclasses.dataclass(frozen=True)
class Point:
  """One row of a point plot: a value, its interval, and optionally a narrower one."""

  label: str
  style: Style
  value: Number
  interval: tuple[Real, Real]
  inner_interval: tuple[Real, Real] | None = None


@dataclasses.dataclass(frozen=True)
class PointPlot:
  """Points with intervals, a row each. `zero` draws the line of no difference."""

  points: tuple[Point, ...]
  x: Axis
  zero: bool = False


@dataclasses.dataclass(frozen=True)
class BarPlot:
  """Stacked bars, a row each: (label, width of each part)."""

  bars: tuple[tuple[str, tuple[Real, ...]], ...]
  styles: tuple[Style, ...]  # of the parts
  x: Axis


@dataclasses.dataclass(frozen=True)
class Histogram:
  """Counts of values in bins of equal width."""

  values: tuple[Real, ...]
  x: Axis
  y: Axis
  style: Style = Style("blue")


@dataclasses.dataclass(frozen=True)
class Figure:
  """A plot with the title that screen readers read and a caption."""

  title: str
  plot: LinePlot | PointPlot | BarPlot | Histogram
  caption: str


@dataclasses.dataclass(frozen=True)
class Section:
  """Blocks under a heading, which may be empty; a section without blocks is not shown.

  Attributes:
    in_summary: printed at the end of a run; the other sections are on the page, and in the
      terminal when examples are asked for.
  """

  title: str
  blocks: "tuple[Block, ...]"
  in_summary: bool = False


@dataclasses.dataclass(frozen=True)
class Grid:
  """Blocks side by side, below each other on a narrow screen."""

  blocks: "tuple[Block, ...]"


@dataclasses.dataclass(frozen=True)
class Details:
  """Blocks that are hidden until the summary line is clicked; not shown in the terminal."""

  summary: str
  blocks: "tuple[Block, ...]"


Block = Table | Text | Facts | TextPair | Legend | Figure | Section | Grid | Details


@dataclasses.dataclass(frozen=True)
class Claim:
  """A statement that the run supports (True), contradicts (False) or does not decide (None)."""

  name: str
  holds: bool | None
  sentence: str


@dataclasses.dataclass(frozen=True)
class Report:
  """The findings of a run.

  Attributes:
    command: the command that repeats the run.
    lead: the result in one paragraph.
    caveats: what a reader must know to judge the numbers.
    data: JSON-able; report.json holds it after `title` and `command`, with numbers unrounded.
  """

  title: str
  command: str
  lead: str
  sections: tuple[Section, ...]
  data: Mapping[str, Any]
  claims: tuple[Claim, ...] = ()
  caveats: tuple[str, ...] = ()
