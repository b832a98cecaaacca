import math

import pytest

from selfimprove_jax.report import formatting
from selfimprove_jax.report.blocks import Interval, Label, Number, Stack, Style


@pytest.mark.parametrize(
  ("number", "text"),
  [
    (0, "0"),
    (512, "512"),
    (999.7, "1.00k"),
    (1_576_960, "1.58M"),
    (4.9e12, "4.90T"),
    (2e21, "2.00Z"),
    (-1500, "\N{MINUS SIGN}1.50k"),
    (None, "\N{EN DASH}"),
  ],
)
def test_large_numbers_are_shortened(number, text):
  assert formatting.short(number) == text


def test_ticks_are_not_padded_with_zeros():
  assert formatting.short(4.9e12, pad=False) == "4.9T"


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(4.21, "4.2 s"), (59.97, "1 min 00 s"), (125, "2 min 05 s"), (3599.7, "1 h 00 min")],
)
def test_times_carry_over(seconds, text):
  assert formatting.duration(seconds) == text


@pytest.mark.parametrize(
  ("cell", "text"),
  [
    (None, "\N{EN DASH}"),
    (Number(None, form="percent"), "\N{EN DASH}"),
    (Number(math.nan), "\N{EN DASH}"),
    (Number(-0.0571), "\N{MINUS SIGN}0.057"),
    (Number(0.0571, signed=True), "+0.057"),
    (Number(3.957, 0.021), "3.957 ± 0.021"),
    (Number(-0.5, 0.1, signed=True, digits=1), "\N{MINUS SIGN}0.5 ± 0.1"),
    (Number(0.4, 0.25, form="percent"), "40% ± 25%"),
    (Number(1e9, form="short"), "1.00G"),
    (Number(61, form="seconds"), "1 min 01 s"),
    (Number(0.123456, form="general"), "0.1235"),
    (Interval(-0.05, 0.07), "\N{MINUS SIGN}0.050 to +0.070"),
    (Interval(-0.05, 0.07, form="percent", digits=1), "\N{MINUS SIGN}5.0% to +7.0%"),
    (Interval(0.05, math.inf, signed=False), "unknown"),
    (Label("SBP", Style("blue")), "SBP"),
    (Stack((Number(1.5), "x")), "1.500, x"),
    (True, "yes"),
    (-1234, "\N{MINUS SIGN}1,234"),
    (0.25, "0.25"),
    ([1, None, "a"], "1, \N{EN DASH}, a"),
    ({"num_a": 1, "b_c": 0.5}, "a 1, b c 0.5"),
    ("text", "text"),
  ],
)
def test_a_cell_is_written_on_one_line(cell, text):
  assert formatting.text(cell) == text


def test_a_standard_error_gives_the_number_of_decimals():
  assert [formatting.decimals(stderr) for stderr in (0.00062, 0.31, 12, 0, math.inf)] == [
    5,
    2,
    0,
    3,
    3,
  ]


def test_leaves_are_listed_with_their_paths():
  tree = {"a": {"b": 1, "c": {}}, "d": [2]}
  assert formatting.flatten(tree) == [("a.b", 1), ("a.c", {}), ("d", [2])]
