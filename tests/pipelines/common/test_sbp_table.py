"""The table of SBP's benchmarks, of one model and of arms."""

import re

import pytest

from selfimprove_jax.pipelines.common import sbp_table
from selfimprove_jax.report import formatting

_ACCURACIES = (
  *("arc_challenge/acc", "arc_easy/acc", "sciq/acc", "winogrande/acc"),
  *("triviaqa/exact_match", "webqs/greedy_acc"),
)
_PERPLEXITIES = ("openwebtext/ppl_token", "lambada/ppl_word", "mmlu/ppl")


def _estimate(value, stderr, unit="accuracy", **others):
  return {"value": value, "stderr": stderr, "unit": unit, "num_groups": 1000, **others}


@pytest.fixture
def evals():
  found = {n: _estimate(i / 10, 0.06, chance=0.25) for i, n in enumerate(_ACCURACIES)}
  return found | {n: _estimate(30.0, 1.0, "perplexity", chance=None) for n in _PERPLEXITIES}


def test_the_mean_of_the_six_accuracies_is_given_only_if_all_were_measured(evals):
  found = sbp_table.mean_accuracy(evals)
  assert found.value == pytest.approx(0.25)
  assert found.stderr == pytest.approx(0.06 / 6**0.5)
  assert sbp_table.is_complete(evals)
  del evals["sciq/acc"]
  assert sbp_table.mean_accuracy(evals) is None
  assert sbp_table.sentence(evals) == ""
  assert not sbp_table.is_complete(evals)


def test_arms_are_differences_to_the_baseline_next_to_the_papers_columns(evals):
  differences = {n: _estimate(0.03, 0.01, interval=[0.0, 0.1]) for n in _ACCURACIES}
  differences |= {n: _estimate(-2.5, 0.5, "perplexity") for n in _PERPLEXITIES}
  table, _ = sbp_table.table(evals, label="repeated", differences={"SBP": differences})
  headers = [column.header for column in table.columns]
  assert headers[:5] == [
    "benchmark (shots)",
    *("repeated", "95%", "chance", "SBP \N{MINUS SIGN} repeated (95%)"),
  ]
  rows = {row[0]: [*map(formatting.text, row)] for row in table.rows}
  assert len(rows) == 10
  arc = rows["ARC-E (0): arc_easy/acc"]
  assert arc[1] == "10.0%" and arc[3] == "25.0%"
  assert arc[4] == "+3.0%, +1.0% to +5.0%"
  assert arc[5] == "68.94 (SBP +2.65, oracle +4.29)"
  ppl = rows["LAMBADA ppl: lambada/ppl_word"]
  assert ppl[1:5] == [
    "30.00",
    "28.04 to 31.96",
    formatting.MISSING,
    "\N{MINUS SIGN}2.50, \N{MINUS SIGN}3.48 to \N{MINUS SIGN}1.52",
  ]
  mean = rows["mean of 6 accuracies"]
  assert mean[1] == "25.0%"
  assert re.match(r"\+3.0%, \+2.2% to \+3.8%", mean[4])  # a third of the widths: six tasks


def test_a_single_model_has_no_columns_of_differences(evals):
  table, _ = sbp_table.table(evals)
  headers = [column.header for column in table.columns]
  assert headers[:4] == ["benchmark (shots)", "this run", "95%", "chance"] and len(headers) == 7
  assert sbp_table.table({"quality/acc": evals["arc_easy/acc"]}) == ()
