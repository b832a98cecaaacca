import dataclasses
import json
import math

import numpy as np

from selfimprove_jax import report


def test_the_json_holds_title_command_and_the_data_unrounded(made, tmp_path):
  made = dataclasses.replace(made, sections=(), data={"arms": {"sbp": {"evals": {"value": 1 / 3}}}})
  path = report.write(made, tmp_path / "new" / "folder")
  assert path.name == "report.html"
  read = json.loads((path.parent / "report.json").read_text())
  assert read == {
    "title": "plain text: title",
    "command": "plain text",
    "arms": {"sbp": {"evals": {"value": 1 / 3}}},
  }


def test_numpy_numbers_are_written_and_nan_and_infinity_are_null(made):
  data = {"a": np.float32(1.5), "b": math.nan, "c": np.array([0.5, math.inf]), "d": (1, 2), 3: None}
  text = report.to_json(dataclasses.replace(made, data=data))
  read = json.loads(text)
  assert read["a"] == 1.5
  assert read["b"] is None
  assert read["c"] == [0.5, None]
  assert read["d"] == [1, 2]
  assert read["3"] is None
  assert "NaN" not in text


def test_the_same_report_gives_the_same_bytes(make_report, made, html, tmp_path):
  again = make_report()
  path = report.write(again, tmp_path)
  assert path.read_text() == html
  assert (tmp_path / "report.json").read_text() == report.to_json(made)
