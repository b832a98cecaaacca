"""The report of budget forcing from small artifacts, and from a run of a tiny model."""

import json
import pathlib
from typing import Any

import pytest

from selfimprove_jax import report as reports
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.pipelines import budget_forcing
from selfimprove_jax.pipelines.budget_forcing.report import _setting
from selfimprove_jax.report import page
from selfimprove_jax.report.blocks import Figure, LinePlot, Report
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runs.stage import Run
from selfimprove_jax.runtime.config import parse

_QUESTIONS = ("a", "b", "c", "d")


def _grade(question, sample, vote, correct, tokens, forced="none"):
  return {
    "question_id": question,
    "group": f"group of {question}" if question in "ab" else "another",
    "sample": sample,
    "vote": vote,
    "correct": correct,
    "num_thinking_tokens": tokens,
    "sampled_tokens": tokens + 2,
    "forced": forced,
    "status": "equal" if correct else "different",
    "error": None,
  }


def _write(folder: pathlib.Path, summary: dict[str, Any], **files: list) -> None:
  writer = artifacts.Writer(folder, config={}, inputs={})
  for name, records in files.items():
    writer.write_jsonl(f"{name}.jsonl", records)
  writer.finish(summary)


@pytest.fixture(scope="module")
def smoke_config(smoke_page) -> budget_forcing.Config:
  return parse(budget_forcing.Config, smoke_page)


@pytest.fixture(scope="module")
def written(smoke_config, tmp_path_factory) -> Run:
  """A run in which more thinking is better, and rejection sampling kept no thought."""
  folder = tmp_path_factory.mktemp("run")
  _write(folder / "checkpoint", {"path": "/m", "num_parameters": 9, "digest": "f", "kind": "hf"})
  _write(folder / "questions", {"questions": 4})
  for name, arm in smoke_config.arms.items():
    grades = []
    for index, question in enumerate(_QUESTIONS):
      for sample in range(arm.num_samples):
        tokens = 0 if arm.max_tries else arm.demanded.max_tokens or 5
        correct = index < tokens / 3
        vote = None if arm.max_tries else str(correct)
        forced = "rejected" if arm.max_tries else "none"
        grades.append(_grade(question, sample, vote, correct, tokens, forced))
    _write(folder / "responses" / name, {"tokens": 7})
    _write(folder / "grades" / name, {"statuses": {}}, grades=grades)
  return Run(folder, smoke_config, "a command")


@pytest.fixture(scope="module")
def made(written) -> Report:
  return budget_forcing.report(written)


def test_there_is_a_point_for_each_vote_and_the_measures_of_each_method(made, smoke_config):
  data = made.data
  assert len(data["points"]) == sum(len(arm.votes) for arm in smoke_config.arms.values())
  assert data["questions"] == 4
  assert data["model"] == {"path": "/m", "num_parameters": 9, "digest": "f"}
  assert data["methods"].keys() == {arm.method for arm in smoke_config.arms.values()}
  forcing = data["methods"]["budget forcing"]
  assert forcing["num_runs"] == 3
  assert forcing["control"] == 1.0
  assert forcing["scaling"]["value"] > 0
  assert data["methods"]["majority vote"]["control"] is None  # no length is demanded of it
  one, two = (p for p in data["points"] if p["arm"] == "parallel")
  assert (one["num_samples"], two["num_samples"]) == (1, 2)
  assert two["thinking_tokens"]["value"] == 2 * one["thinking_tokens"]["value"] == 10
  assert two["accuracy"]["unit"] == "accuracy"
  assert one["sampled_tokens"] == 7


def test_methods_that_scale_come_before_the_other_length_controls(made):
  methods = made.data["methods"]
  assert list(methods)[:2] == ["budget forcing", "majority vote"]
  assert [found["is_control"] for found in methods.values()] == sorted(
    found["is_control"] for found in methods.values()
  )


def test_a_method_without_a_kept_thought_has_no_measures(made):
  assert made.data["methods"]["rejection sampling"] == {
    **{"is_control": True, "num_runs": 0},
    **dict.fromkeys(("control", "scaling", "performance")),
  }
  assert "rejection sampling" in reports.to_terminal(made)


def test_the_lead_gives_a_direction_only_if_the_interval_excludes_zero(made):
  assert made.lead.startswith("4 questions in 3 groups, one seed. The accuracy of budget forcing ")
  assert "rejection" not in made.lead
  slope = made.data["methods"]["budget forcing"]["scaling"]
  low, _ = Estimate(**slope).interval95
  says = "rises" if low > 0 else "does not change measurably"
  assert f"The accuracy of budget forcing {says} with thinking tokens." in made.lead


def test_the_table_of_methods_is_printed_with_its_notes(made):
  lines = reports.to_terminal(made).splitlines()
  assert lines[0].split() == ["method", "scaling", "performance", "control", "settings"]
  row = next(line for line in lines if line.startswith("budget forcing "))
  assert row.split()[-2:] == ["100%", "3"]
  text = " ".join(lines)
  for words in ("Scaling: mean slope", "Performance: share of the 4", "Control:", "of one seed"):
    assert words in text


def test_the_page_draws_both_curves_and_shows_every_arm(made, smoke_config):
  html = page.render(made)
  assert html.count('<svg class="plot"') == 2
  for text in ("budget forcing", "majority vote", "thinking tokens per question", "a command"):
    assert text in html
  for name in smoke_config.arms:
    assert f">{name}</td>" in html
  assert "compared as numbers" in html
  assert "0 to 8" in html


def test_the_figures_have_one_scale_and_every_point_its_interval(made):
  grid = made.sections[0].blocks[1]
  plots = [block.plot for block in grid.blocks if isinstance(block, Figure)]
  assert all(isinstance(plot, LinePlot) for plot in plots)
  ((low, high),) = {plot.y.range for plot in plots}
  assert low == 0
  assert high > max(max(line.y) for plot in plots for line in plot.lines)
  forcing = plots[0].lines[0]
  assert forcing.x == tuple(sorted(forcing.x))
  assert len(forcing.x) == len(forcing.half_widths) == 3


def test_an_unfinished_run_reports_the_arms_that_are_graded(written, smoke_config, tmp_path):
  assert "0 of " in budget_forcing.report(Run(tmp_path, smoke_config)).lead
  (tmp_path / "grades").mkdir()
  for name in ("checkpoint", "questions", "grades/forcing_4"):
    (tmp_path / name).symlink_to(written.folder / name)
  made = budget_forcing.report(Run(tmp_path, smoke_config))
  assert made.lead.startswith("This run is unfinished: 3 of ")
  assert [point["arm"] for point in made.data["points"]] == ["forcing_4"]
  assert "forcing_4" in reports.to_terminal(made, examples=True)


def test_a_vote_sums_the_tokens_of_its_samples_and_is_right_if_its_winner_is():
  grades = [
    *(_grade("a", 0, "3", False, 10), _grade("a", 1, "4", True, 20), _grade("a", 2, "4", True, 30)),
    *(_grade("b", 0, "5", True, 1), _grade("b", 1, None, False, 2), _grade("b", 2, "6", False, 3)),
  ]
  one, three = (_setting(grades, k, 5, 15) for k in (1, 3))
  assert one.correct_Q.tolist() == [False, True]
  assert one.tokens_Q.tolist() == [10, 1]
  assert three.correct_Q.tolist() == [True, True]
  assert three.tokens_Q.tolist() == [60, 6]
  assert (three.min_tokens, three.max_tokens) == (15, 45)


def test_a_question_without_a_kept_thought_is_wrong_and_leaves_the_mean_as_it_is():
  grades = [_grade("a", 0, "3", True, 10), _grade("b", 0, None, False, 0, forced="rejected")]
  setting = _setting(grades, 1, 0, 15)
  assert setting.correct_Q.tolist() == [True, False]
  assert setting.thinking_tokens.value == 10


@pytest.mark.slow
def test_a_finished_run_of_a_model_is_reported(config, finished, tmp_path):
  made = budget_forcing.report(Run(finished, config, "a command"))
  reports.write(made, tmp_path)
  kept = json.loads((tmp_path / "report.json").read_text())
  assert kept["questions"] == 3
  assert kept["methods"]["budget forcing"]["performance"]["stderr"] >= 0
  assert kept["methods"]["budget forcing"]["control"] == 1.0
  one, two = (p for p in kept["points"] if p["arm"] == "parallel")
  assert two["thinking_tokens"]["value"] > one["thinking_tokens"]["value"]
