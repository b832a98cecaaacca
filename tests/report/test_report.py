import json
import math

import numpy as np
import pytest

from selfimprove_jax.report import formatting as fmt
from selfimprove_jax.report import table, write


def test_the_json_holds_every_number_unrounded(sample_report, tmp_path):
  path = write.write_report(sample_report, tmp_path / "new" / "folder")
  assert path.name == "report.html"
  assert json.loads((path.parent / "report.json").read_text()) == sample_report


def test_numpy_numbers_are_written_and_what_is_not_finite_is_null(sample_report, tmp_path):
  sample_report["arms"]["sbp"]["best_validation"] = np.float32(1.5)
  sample_report["arms"]["sbp"]["final_validation"] = math.nan
  sample_report["pairs"]["similarities"] = np.array([0.5, 0.75])
  write.write_report(sample_report, tmp_path)
  read = json.loads((tmp_path / "report.json").read_text())
  assert read["arms"]["sbp"]["best_validation"] == 1.5
  assert read["arms"]["sbp"]["final_validation"] is None
  assert read["pairs"]["similarities"] == [0.5, 0.75]
  assert "NaN" not in (tmp_path / "report.json").read_text()


def test_the_printed_table_has_every_arm_and_claim_in_a_hundred_columns(sample_report):
  sample_report["arms"]["sbp"]["label"] = "A label that is much too long for the table"
  printed = table.print_table(sample_report)
  assert max(len(line) for line in printed.splitlines()) <= 100
  for name, arm in sample_report["arms"].items():
    assert name == "sbp" or arm["label"] in printed
    assert fmt.fixed(arm["evals"]["heldout_nll"]["value"]) in printed
  flat = " ".join(printed.split())
  for claim in sample_report["comparison"]["claims"]:
    assert claim["sentence"] in flat
  assert sample_report["comparison"]["verdict"] in flat


@pytest.mark.parametrize(
  ("number", "text"),
  [
    (0, "0"),
    (512, "512"),
    (999.7, "1.00k"),
    (1_576_960, "1.58M"),
    (4.9e12, "4.90T"),
    (2e21, "2.00Z"),
  ],
)
def test_large_numbers_are_shortened(number, text):
  assert fmt.short(number) == text


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(4.21, "4.2 s"), (59.97, "1 min 00 s"), (125, "2 min 05 s"), (3599.7, "1 h 00 min")],
)
def test_times_carry_over(seconds, text):
  assert fmt.duration(seconds) == text


def test_a_standard_error_is_shown_with_two_digits():
  assert (
    fmt.value({"value": 0.009, "stderr": 0.00062, "unit": "share"}) == "0.00900 ± 0.00062 share"
  )
