"""A report as data, which the HTML page, the terminal and report.json show.

A pipeline builds a `Report` from frozen blocks. Cells hold numbers, which `formatting` writes. The
pipeline also gives colors and markers, so the renderers need not know its arms or methods.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Color = Literal[
  "gray", "blue", "orange", "pink", "green", "silver", "purple", "rust", "teal", "sky"
]
Marker = Literal["circle", "square", "up", "down", "diamond", "plus", "hollow", "swatch"]
Real = float | int
Form = Literal["fixed", "general", "percent", "short", "seconds"]


@dataclasses.dataclass(frozen=True)
class Style:
  """Gives a series its color and marker, the same in every table and figure of a report."""

  color: Color
  marker: Marker = "swatch"


@dataclasses.dataclass(frozen=True)
class Number:
  """Holds a number and how to write it.

  Attributes:
    value: None, NaN and infinities are shown as a dash.
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
  """A confidence interval, by default with signs: `-0.050 to +0.070`; `form` as in `Number`."""

  low: Real
  high: Real
  form: Form = "fixed"
  digits: int | None = None
  signed: bool = True


@dataclasses.dataclass(frozen=True)
class Label:
  """Shows the name of a series after its marker in its color."""

  text: str
  style: Style


@dataclasses.dataclass(frozen=True)
class Stack:
  """Stacks several lines in one cell; those below the first are smaller."""

  lines: "tuple[Cell, ...]"


@dataclasses.dataclass(frozen=True)
class Bar:
  """Shows a bar, scaled by the largest bar in its table."""

  value: Real


# Plain values are cells too: integers get separators, other numbers four digits.
Scalar = str | Real | bool | None
Cell = Scalar | Number | Interval | Label | Stack | Bar | list | tuple | Mapping


@dataclasses.dataclass(frozen=True)
class Column:
  """Describes a column of a table.

  Attributes:
    is_text: aligns the cells to the left; numbers are aligned to the right.
    brief: shown in the terminal too, which has less room than the page.
    code: sets the cells in a monospaced font.
  """

  header: str
  is_text: bool = False
  brief: bool = True
  code: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
  """Shows a table; `total` is a last row that is set apart.

  A table that is too wide for the screen scrolls sideways, except for its first column.
  """

  columns: tuple[Column, ...]
  rows: tuple[tuple[Cell, ...], ...]
  total: tuple[Cell, ...] = ()

  @property
  def largest_bar(self) -> Real:
    return max([cell.value for row in self.rows for cell in row if isinstance(cell, Bar)] or [0])


def table(
  rows: Sequence[Mapping[str, Cell]], *, text: Sequence[str], page_only: Sequence[str] = ()
) -> Table:
  """Makes a table from rows as header -> cell, at least one, all with the same headers.

  Args:
    text: headers of the columns with text, which are aligned to the left.
    page_only: headers of the columns that the terminal leaves out.
  """
  columns = tuple(
    Column(header, is_text=header in text, brief=header not in page_only) for header in rows[0]
  )
  return Table(columns, tuple(tuple(row.values()) for row in rows))


@dataclasses.dataclass(frozen=True)
class Text:
  """Shows a paragraph: a `warning` in a box, `code` without reflowing."""

  text: str
  kind: Literal["plain", "note", "warning", "code"] = "plain"


@dataclasses.dataclass(frozen=True)
class Facts:
  """Lists names and values; `verbatim` shows names as identifiers rather than words."""

  values: Mapping[str, Cell]
  verbatim: bool = False


@dataclasses.dataclass(frozen=True)
class Excerpt:
  """Holds a text with a heading and a few words about it; None is shown as a dash."""

  heading: str
  about: str
  text: str | None


@dataclasses.dataclass(frozen=True)
class TextPair:
  """Shows two texts side by side."""

  left: Excerpt
  right: Excerpt


@dataclasses.dataclass(frozen=True)
class Legend:
  """Names series with their markers, or with a swatch of their color."""

  labels: tuple[Label, ...]


@dataclasses.dataclass(frozen=True)
class Axis:
  """Describes an axis; `form` formats its ticks, `range` None fits the data."""

  label: str
  form: Form = "general"
  range: tuple[Real, Real] | None = None
  log2: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
  """Draws one line of a plot; `half_widths` are half the error bars of its points, if any."""

  style: Style
  x: tuple[Real, ...]
  y: tuple[Real, ...]
  half_widths: tuple[Real, ...] = ()
  dashed: bool = False
  markers: Literal["all", "last", "none"] = "last"


@dataclasses.dataclass(frozen=True)
class LinePlot:
  """Plots lines; `zero` draws one at 0, `skip_start` cuts off the steep start of loss curves."""

  lines: tuple[Line, ...]
  x: Axis
  y: Axis
  skip_start: bool = False
  zero: bool = False


@dataclasses.dataclass(frozen=True)
class Point:
  """Describes one row of a point plot: a value, its interval, and optionally a narrower one."""

  label: str
  style: Style
  value: Number
  interval: tuple[Real, Real]
  inner_interval: tuple[Real, Real] | None = None


@dataclasses.dataclass(frozen=True)
class PointPlot:
  """Plots points with intervals, a row each; `zero` draws a line at 0."""

  points: tuple[Point, ...]
  x: Axis
  zero: bool = False


@dataclasses.dataclass(frozen=True)
class BarPlot:
  """Plots stacked bars, a row each: (label, width of each part)."""

  bars: tuple[tuple[str, tuple[Real, ...]], ...]
  styles: tuple[Style, ...]  # of the parts
  x: Axis


@dataclasses.dataclass(frozen=True)
class Histogram:
  """Plots counts of values in bins of equal width."""

  values: tuple[Real, ...]
  x: Axis
  y: Axis
  style: Style = Style("blue")


@dataclasses.dataclass(frozen=True)
class Figure:
  """Shows a plot with a caption; screen readers read the title."""

  title: str
  plot: LinePlot | PointPlot | BarPlot | Histogram
  caption: str


@dataclasses.dataclass(frozen=True)
class Section:
  """Shows blocks under a heading, which may be empty; a section without blocks is not shown.

  The terminal prints sections `in_summary`; the others are on the page, and printed on request.
  """

  title: str
  blocks: "Blocks"
  in_summary: bool = False


@dataclasses.dataclass(frozen=True)
class Grid:
  """Shows blocks side by side, or below each other on a narrow screen."""

  blocks: "Blocks"


@dataclasses.dataclass(frozen=True)
class Details:
  """Hides blocks until the summary line is clicked; the terminal does not show them."""

  summary: str
  blocks: "Blocks"


Block = Table | Text | Facts | TextPair | Legend | Figure | Section | Grid | Details
Blocks = tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Claim:
  """States what the run supports (True), contradicts (False) or does not decide (None)."""

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
