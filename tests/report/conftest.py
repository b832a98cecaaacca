"""A report with every kind of block; its numbers are invented."""

from collections.abc import Callable

import pytest

from selfimprove_jax.report import page
from selfimprove_jax.report.blocks import (
  Axis,
  Bar,
  BarPlot,
  Claim,
  Column,
  Details,
  Excerpt,
  Facts,
  Figure,
  Grid,
  Histogram,
  Interval,
  Label,
  Legend,
  Line,
  LinePlot,
  Number,
  Point,
  PointPlot,
  Report,
  Section,
  Stack,
  Style,
  Table,
  Text,
  TextPair,
)

_COLUMNS = (
  Column("arm", is_text=True),
  Column("difference (95%)"),
  Column("nats/token"),
  Column("bits/byte", brief=False),
  Column("training tokens"),
)


def _make_report(text: str = "plain text", *, sections: tuple[Section, ...] = ()) -> Report:
  """Returns a report with `text` at every place where a text can stand.

  Its second section has a block of every kind, or else `sections` come after the first.
  """
  blue, gray = Style("blue", "square"), Style("gray", "hollow")
  difference = Stack((Number(-0.0382, signed=True), Interval(-0.095, 0.0194)))
  lines = (
    Line(gray, (0, 100, 200), (7.0, 5.1, 4.2), dashed=True, markers="none"),
    Line(blue, (20, 100, 200), (7.0, 5.5, 4.9), half_widths=(0.1, 0.2, 0.1)),
    Line(blue, (50,), (5.0,), markers="all"),
    Line(gray, (), ()),
  )
  points = (
    Point(f"{text} a", blue, Number(3.9), (3.7, 4.1), (3.8, 4.0)),
    Point(f"{text} b", gray, Number(4.2), (4.2, 4.2)),
  )
  figures = {
    "lines": LinePlot(lines, Axis(text, "short"), Axis("nats"), skip_start=True),
    "curves": LinePlot(lines[1:3], Axis("tokens", "short", log2=True), Axis("", "percent", (0, 9))),
    "points": PointPlot(points, Axis(text), zero=True),
    "bars": BarPlot(((text, (1e9, 2e9)), ("none", (0, 0))), (blue, gray), Axis("FLOPs", "short")),
    "histogram": Histogram((0.1, 0.2, 0.2, 0.5), Axis(text), Axis("pairs")),
  }
  rows = (
    (Label(text, blue), difference, Number(3.957, 0.021), 1.5, Number(1_576_960, form="short")),
    (Label("baseline", gray), None, Number(3.995, 0.02), 1.6, Number(1_576_960, form="short")),
  )
  bars = ((text, Bar(2.0), Number(4.21, form="seconds")), ("b", Bar(1.0), 0.5))
  body = (
    Text(text, "note"),
    Text(text, "warning"),
    Text(text, "code"),
    Facts({text: text, "num_pairs": 4312, "share": 0.25, "is_done": True, "empty": None}),
    Facts({"x_y": {"num_a": 1, "b": 2.0}}, verbatim=True),
    Grid((Section("Group", (Text(text),)), Section("", (Text("no title"),)))),
    Table(
      (Column("", is_text=True), Column("", is_text=True), Column("time")), bars, ("all", "", 1)
    ),
    Legend((Label(text, blue), Label("part", Style("gray")))),
    *(Figure(f"{text} {name}", plot, text) for name, plot in figures.items()),
    TextPair(Excerpt("Seed", text, text), Excerpt("Synthesis", text, None)),
    Details(
      text, (Table((Column("field", True, code=True), Column("value", True)), (("a.b", text),)),)
    ),
  )
  return Report(
    title=f"{text}: title",
    command=text,
    lead=f"{text}: lead",
    claims=tuple(Claim("num_gain_x", holds, f"{text}: {holds}") for holds in (True, False, None)),
    caveats=(text,),
    sections=(
      Section("The arms", (Text(text), Table(_COLUMNS, rows)), in_summary=True),
      *(sections or (Section("Everything", body), Section("Nothing", ()))),
    ),
    data={"commit": None, "arms": {"sbp": {"train_tokens": 1_576_960}}},
  )


@pytest.fixture
def make_report() -> Callable[..., Report]:
  return _make_report


@pytest.fixture(scope="session")
def made() -> Report:
  return _make_report()


@pytest.fixture(scope="session")
def html(made) -> str:
  return page.render(made)
