import re
import xml.etree.ElementTree as ElementTree

import pytest

from selfimprove_jax.report import figures
from selfimprove_jax.report.blocks import (
  Axis,
  Figure,
  Line,
  LinePlot,
  Number,
  Point,
  PointPlot,
  Style,
)


def _figures(report):
  return {b.title.split()[-1]: b for b in report.sections[1].blocks if isinstance(b, Figure)}


@pytest.mark.parametrize("name", ["lines", "curves", "points", "bars", "histogram"])
def test_a_figure_is_one_element_in_the_colors_of_the_page(name, made):
  drawn = figures.svg(_figures(made)[name], name=name)
  assert drawn.startswith('<svg class="plot" viewBox="')
  assert f'role="img" aria-label="plain text {name}"' in drawn
  ElementTree.fromstring(drawn)  # no namespaces are left, all tags are closed
  assert "#0a0b" not in drawn  # every placeholder was replaced
  assert "font-family" not in drawn
  assert "DejaVu" not in drawn
  assert "var(--ink)" in drawn or "var(--muted)" in drawn


def test_a_label_is_not_read_as_mathematics_or_markup(make_report):
  drawn = figures.svg(_figures(make_report("$a$ <b> &"))["points"], name="points")
  assert ">$a$ &lt;b&gt; &amp; a</text>" in drawn
  assert 'aria-label="$a$ &lt;b&gt; &amp; points"' in drawn


def test_a_smaller_value_is_drawn_further_left():
  points = tuple(
    Point(color, Style(color, "circle"), Number(value), (value, value))
    for color, value in (("blue", 4.0), ("green", 3.0), ("gray", 4.1))
  )
  drawn = figures.svg(Figure("", PointPlot(points, Axis("nats")), ""), name="points")
  marks = re.findall(r'<use href="#[^"]+" x="([\d.]+)" y="[\d.]+" style="fill: var\(--(\w+)', drawn)
  left = {color: float(x) for x, color in marks}
  assert left["green"] < left["blue"] < left["gray"]


def test_the_first_steps_of_loss_curves_are_cut_off():
  line = Line(Style("blue"), tuple(range(20)), (7.0, 6.0, *[3.0] * 18))

  def highest_tick(skip_start):
    plot = LinePlot((line,), Axis("steps", "percent"), Axis("nats"), skip_start=skip_start)
    drawn = figures.svg(Figure("", plot, ""), name="curve")
    return max(float(tick) for tick in re.findall(r">(\d\.\d+)</text>", drawn))

  assert highest_tick(False) > 6
  assert highest_tick(True) < 4


def test_ticks_are_written_in_the_form_of_their_axis(made):
  drawn = figures.svg(_figures(made)["curves"], name="curves")
  assert "200%" in drawn
  assert re.search(r">(64|128)</text>", drawn)
  assert "3G" in figures.svg(_figures(made)["bars"], name="bars")
