import pathlib

import pytest

from selfimprove_jax import report as reports
from selfimprove_jax.data.decontamination import (
  Benchmarks,
  DecontaminationConfig,
  Findings,
  ItemText,
)
from selfimprove_jax.pipelines.common import report_parts
from selfimprove_jax.report import blocks
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Stage

_MADE = Artifact(pathlib.Path("made"), {})


def _stages(*names):
  return [Stage(name, lambda context, config: {}, None) for name in names]


def test_the_lead_of_a_finished_run_is_its_result():
  assert report_parts.lead("A gain.", _stages("a", "b"), {"a": _MADE, "b": _MADE}) == "A gain."


def test_the_lead_of_an_unfinished_run_names_the_first_stage_that_is_missing():
  lead = report_parts.lead("A gain.", _stages("a", "b", "c"), {"a": _MADE})
  assert lead == "This run is unfinished: 1 of 3 stages are complete, b is not. A gain."


def test_facts_of_a_corpus_list_single_values_before_those_of_splits():
  summary = {"groups": {"test": 8, "train": 45}, "documents": 233}
  facts = report_parts.corpus_facts(summary)
  assert list(facts.items()) == [("documents", 233), ("groups, test", 8), ("groups, train", 45)]


@pytest.mark.parametrize("num_steps", [1, 59, 60, 500])
def test_the_training_loss_is_averaged_over_windows_of_steps(num_steps):
  records = [{"step": step, "train/loss": float(step)} for step in range(1, num_steps + 1)]
  train, validation = report_parts.loss_curve([*records, {"step": 7, "validation/loss": 2.0}])
  assert validation == [(7, 2.0)]
  assert len(train) <= 120
  window = max(1, num_steps // 60)
  for index, (step, loss) in enumerate(train):
    assert step == (index + 1) * window
    assert loss == pytest.approx(step - (window - 1) / 2)


def test_stages_are_summed_and_the_config_is_listed_by_path():
  data = {
    "stages": [
      {"name": "arms/sbp", "seconds": 60.0, "tokens": 1000, "flops": 2e9},
      {"name": "documents", "seconds": None, "tokens": None, "flops": None},
    ],
    "config": {"model": {"dim": 96}, "seed": 0},
    "commit": "abc",
    "versions": {"jax": "1"},
    "hardware": {"devices": "1 x cpu"},
  }
  stages, made = report_parts.run_sections("a command", data)
  (table,) = stages.blocks
  assert [row[0] for row in table.rows] == ["arms/sbp", "documents"]
  assert [cell.value for cell in table.total[2:]] == [60.0, 1000, 2e9]
  command, grid, details = made.blocks
  assert command.text == "a command"
  assert grid.blocks[0].values == {"commit": "abc", "devices": "1 x cpu"}
  assert details.summary == "Config (2 values)"
  assert details.blocks[0].rows == (("model.dim", 96), ("seed", 0))
  assert len(report_parts.run_sections("", data)[1].blocks) == 2  # no command is shown


def _printed(found) -> str:
  section = report_parts.decontamination_section(found)
  made = blocks.Report(title="t", command="", lead="", sections=(section,), data={})
  return " ".join(reports.to_terminal(made, examples=True).split())


def test_text_that_was_not_checked_against_benchmarks_is_said_so():
  printed = _printed({"new_text": None, "replay": None})
  assert "Nothing was checked against benchmarks (new text, replay)" in printed
  assert report_parts.decontamination_section({}).blocks == ()


def test_the_items_in_the_text_are_counted_by_task_and_the_worst_documents_shown():
  texts = [ItemText(task, f"line {i}", f"{task} {i} " + "so " * 20) for task in "ab" for i in "123"]
  findings = Findings(Benchmarks(texts), DecontaminationConfig())
  findings.check("book.txt", " ".join(item.text for item in texts[:4]))
  findings.check("other.txt", "Nothing of this kind.")
  printed = _printed({"replay": findings.summary()})
  assert "Replay: 1 of 2 documents contain an item of a benchmark and were dropped." in printed
  assert "a replay 1 3 3 0" in printed
  assert "b replay 1 3 3 0" in printed
  assert "book.txt replay 6 a 3, b 3 a, line 1" in printed
