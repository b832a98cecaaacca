import re
import xml.etree.ElementTree as ElementTree

import pytest

from selfimprove_jax.report import plots


@pytest.fixture(
  params=["loss_curves", "arm_points", "flops_bars", "similarity_histogram", "differences"]
)
def drawn(request, sample_report):
  arms = sample_report["arms"]
  if request.param == "similarity_histogram":
    return plots.similarity_histogram(sample_report["pairs"]["similarities"])
  if request.param == "differences":
    differences = sample_report["comparison"]["differences"]
    return plots.differences([(name, name, d) for name, d in differences.items()], list(arms))
  return getattr(plots, request.param)(arms)


def test_a_figure_is_one_element_in_the_colours_of_the_page(drawn):
  assert drawn.startswith('<svg class="plot" viewBox="')
  ElementTree.fromstring(drawn)  # no namespaces are left, all tags are closed
  assert "#0a0b" not in drawn  # every placeholder was replaced
  assert "font-family" not in drawn
  assert "DejaVu" not in drawn
  assert "var(--ink)" in drawn or "var(--muted)" in drawn


def test_a_label_is_not_read_as_mathematics_or_markup(sample_report):
  sample_report["arms"]["sbp"]["label"] = "$a$ <b> &"
  svg = plots.arm_points(sample_report["arms"])
  assert "$a$ &lt;b&gt; &amp;" in svg


def test_a_curve_with_no_points_and_one_with_one_point_are_drawn(sample_report):
  arms = sample_report["arms"]
  arms["oracle"]["curve"] = []
  arms["sbp"]["curve"] = arms["sbp"]["curve"][:1]
  ElementTree.fromstring(plots.loss_curves(arms))


def test_arms_without_flops_are_drawn_empty(sample_report):
  arms = {"baseline": dict(sample_report["arms"]["baseline"], flops_parts={"arm": 0.0})}
  ElementTree.fromstring(plots.flops_bars(arms))


def test_a_better_arm_lies_further_left(sample_report):
  svg = plots.arm_points(sample_report["arms"])
  points = re.findall(
    r'<use href="#[^"]+" x="([\d.]+)" y="[\d.]+" style="fill: var\(--arm-(\w+)', svg
  )
  left = {role: float(x) for x, role in points}
  assert left["oracle"] < left["sbp"] < left["baseline"]
