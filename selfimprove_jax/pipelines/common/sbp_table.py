"""The benchmarks that SBP reports (arXiv 2509.15248), next to the paper's own numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.pipelines.common import benchmark_results
from selfimprove_jax.pipelines.common.benchmark_results import as_estimate
from selfimprove_jax.report import blocks, formatting

# Metric -> how the paper calls it with its shots, and its baseline, SBP's and the oracle's
# difference: the 3B model at 200B tokens, at 1T tokens, and the 6B model at 1T tokens.
_Column = tuple[float, float, float]
_ROWS: dict[str, tuple[str, tuple[_Column, _Column, _Column]]] = {
  "openwebtext/ppl_token": (
    "OpenWebText2 ppl",
    ((5.74, -0.53, -1.02), (4.51, -0.02, -0.12), (4.25, -0.06, -0.21)),
  ),
  "lambada/ppl_word": (
    "LAMBADA ppl",
    ((6.87, -0.85, -1.86), (4.33, -0.03, -0.22), (3.63, -0.06, -0.25)),
  ),
  "mmlu/ppl": (
    "MMLU ppl (5)",
    ((3.83, -0.36, -0.51), (3.17, -0.06, -0.05), (3.08, -0.08, -0.13)),
  ),
  "arc_challenge/acc": (
    "ARC-C (0)",
    ((35.32, 1.28, 2.82), (42.66, 1.62, 3.84), (47.44, 0.77, 0.17)),
  ),
  "arc_easy/acc": (
    "ARC-E (0)",
    ((68.94, 2.65, 4.29), (75.63, 0.42, 2.11), (78.70, 0.51, 0.85)),
  ),
  "sciq/acc": ("SciQ (0)", ((90.50, 1.00, 2.40), (93.20, 0.80, 0.50), (92.90, 1.90, 1.80))),
  "winogrande/acc": (
    "Winogrande (0)",
    ((60.14, 1.90, 5.53), (65.19, 1.42, 2.92), (70.17, 0.47, 2.36)),
  ),
  "triviaqa/exact_match": (
    "TriviaQA (1)",
    ((22.51, 3.36, 7.37), (36.07, 0.25, 0.59), (40.64, 0.49, 3.19)),
  ),
  "webqs/greedy_acc": (
    "WebQS (1)",
    ((8.56, 3.74, 10.83), (19.34, 0.54, 0.44), (19.88, 3.79, 5.22)),
  ),
}
_MEAN_NAME = "mean/acc"
_MEAN = ((47.66, 2.32, 5.54), (55.35, 0.84, 1.73), (58.29, 1.32, 2.26))
_ACCURACIES = tuple(name for name in _ROWS if "ppl" not in name)
_PAPERS = ("the paper's 3B, 200B tokens", "the paper's 3B, 1T tokens", "the paper's 6B, 1T tokens")
_NOTE = (
  "The last three columns are the paper's: its baseline, then the differences that SBP and the "
  "oracle make. They were measured on whole test sets by other models and tokenizers. The paper "
  "does not say whether its accuracies on ARC and SciQ are `acc` or `acc_norm`, nor over what "
  "MMLU's perplexity is taken; here it is that of the right letter over the whole vocabulary."
)


def mean_accuracy(evals: Mapping[str, Any]) -> Estimate | None:
  """Returns the mean of the six accuracies, each with equal weight; None if one is missing.

  The tasks' examples are independent of each other. `evals` may hold differences.
  """
  if not all(name in evals for name in _ACCURACIES):
    return None
  found = [as_estimate(evals[name]) for name in _ACCURACIES]
  value = float(np.mean([one.value for one in found]))
  stderr = float(np.sqrt(np.sum([one.stderr**2 for one in found]))) / len(found)
  groups = min(one.num_groups for one in found)
  return Estimate(value, stderr, "mean accuracy", groups)


def sentence(evals: Mapping[str, Any]) -> str:
  """States the mean of the six accuracies; empty if one is missing."""
  found = mean_accuracy(evals)
  if found is None:
    return ""
  written = formatting.text(blocks.Number(found.value, found.stderr, form="percent", digits=1))
  names = ", ".join(name.partition("/")[0] for name in _ACCURACIES)
  return f"The mean accuracy over {names} is {written} (standard error)."


def is_complete(evals: Mapping[str, Any]) -> bool:
  """Tells whether all nine benchmarks were measured."""
  return _ROWS.keys() <= evals.keys()


def table(
  evals: Mapping[str, Any],
  *,
  label: str = "this run",
  differences: Mapping[str, Mapping[str, Any]] | None = None,
) -> blocks.Blocks:
  """Returns the nine rows and the mean of the accuracies; empty if none was measured.

  Args:
    evals: TASK/METRIC -> estimate with `chance`, of the model that `label` names.
    differences: label of another model -> TASK/METRIC -> estimate of its difference to this one.
  """
  if not any(name in evals for name in _ROWS):
    return ()
  chances = [evals[name]["chance"] for name in _ACCURACIES if name in evals]
  chance = float(np.mean(chances)) if len(chances) == len(_ACCURACIES) else None
  rows = []
  for name, (told, papers) in (*_ROWS.items(), (_MEAN_NAME, ("mean of 6 accuracies", _MEAN))):
    columns = {}
    for other, found in (differences or {}).items():
      header = benchmark_results.difference_header(other, label)
      columns[header] = benchmark_results.difference_cell(_found(found, name), name)
    of_name = _found(evals, name)
    at_chance = chance if name == _MEAN_NAME else of_name and of_name["chance"]
    rows.append(
      {
        "benchmark (shots)": told if name == _MEAN_NAME else f"{told}: {name}",
        **_value_cells(of_name, name, label),
        "chance": blocks.Number(at_chance, form="percent", digits=1),
        **columns,
        **_paper_cells(papers),
      }
    )
  return blocks.table(rows, text=("benchmark (shots)", *_PAPERS)), blocks.Text(_NOTE)


def _found(evals: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
  """Returns the estimate of a row, which may be that of the mean accuracy."""
  if name != _MEAN_NAME:
    return evals.get(name)
  mean = mean_accuracy(evals)
  return mean and mean.to_dict()


def _value_cells(found: Mapping[str, Any] | None, name: str, label: str) -> dict[str, blocks.Cell]:
  if found is None:
    return {label: None, "95%": None}
  form = benchmark_results.form_of(name, found["value"])
  interval = blocks.Interval(*as_estimate(found).interval95, signed=False, **form)
  return {label: blocks.Number(found["value"], **form), "95%": interval}


def _paper_cells(papers: tuple[_Column, ...]) -> dict[str, str]:
  return {
    header: f"{baseline:.2f} (SBP {sbp:+.2f}, oracle {oracle:+.2f})"
    for header, (baseline, sbp, oracle) in zip(_PAPERS, papers, strict=True)
  }
