"""From a finished comparison of test-time compute: curves, and Control, Scaling, Performance."""

import collections
import importlib.metadata
from typing import Any

import numpy as np

from selfimprove_jax import artifacts, storage
from selfimprove_jax.evaluation import thinking_metrics
from selfimprove_jax.pipelines import budget_forcing, provenance, stages
from selfimprove_jax.report import formatting, thinking_page
from selfimprove_jax.sampling import length_controls


def make_and_print(config: dict[str, Any], run_folder: storage.Path, *, command: str) -> None:
  """Writes `report/report.json` and `report/report.html`, and prints the table and its path.

  Raises:
    artifacts.ArtifactError: a stage is unfinished.
  """
  report = make_report(config, run_folder, command=command)
  folder = run_folder / "report"
  folder.mkdir(exist_ok=True)
  artifacts.write_json(folder / "report.json", report)
  storage.write_atomic(folder / "report.html", thinking_page.render(report).encode())
  print(describe(report))
  print(folder / "report.html")


def make_report(
  config: dict[str, Any], run_folder: storage.Path, *, command: str
) -> dict[str, Any]:
  """Every arm's accuracy and thinking tokens, and the measures of every method.

  Standard errors are over questions, of one seed.

  Raises:
    artifacts.ArtifactError: a stage is unfinished.
  """
  names = [stage.name for stage in budget_forcing.build(config)]
  made = {name: artifacts.open_artifact(run_folder / name) for name in names}
  seconds = stages.seconds_spent(run_folder)
  runs: dict[str, list[thinking_metrics.Run]] = collections.defaultdict(list)
  points = []
  for name, arm in config["arms"].items():
    grades = list(made[f"grades/{name}"].records())
    for num_samples in arm["votes"]:
      run = _run(grades, num_samples, arm["demanded"])
      of_method = runs[arm["method"]]
      if any(map(_is_kept, grades)):  # else there was no thinking to be measured
        of_method.append(run)
      points.append({"arm": name, **_point(run, grades, num_samples, arm["method"])})
  controls = {
    arm["method"] for arm in config["arms"].values() if arm["condition"] or arm["max_tries"]
  }
  methods = sorted(runs, key=lambda method: (method in controls, method))
  points.sort(key=lambda p: (methods.index(p["method"]), p["thinking_tokens"]["value"], p["arm"]))
  checkpoint = made["checkpoint"].summary
  return {
    "title": config["title"],
    "command": command,
    "config": config,
    **provenance.describe(),
    "model": {key: checkpoint[key] for key in ("path", "num_parameters", "files_digest")},
    "questions": made["questions"].summary["questions"],
    "checker": _checker(config["grading"]["checker"]),
    # Sequential and parallel first, then the controls.
    "methods": {
      method: {"is_control": method in controls, **_measures(runs[method])} for method in methods
    },
    "points": points,
    "stages": [
      {
        "name": name,
        "seconds": seconds.get(name),
        "tokens": made[name].summary.get("tokens"),
        "flops": None,
      }
      for name in names
    ],
  }


def _checker(name: str) -> str:
  if name == "numbers":
    return "as numbers"
  return f"by math-verify {importlib.metadata.version('math-verify')}"


def _run(
  grades: list[dict[str, Any]], num_samples: int, demanded: dict[str, Any]
) -> thinking_metrics.Run:
  """The first `num_samples` responses to each question, and a vote on their answers.

  A question without a thought that was kept counts as wrong, and its compute as the mean of the
  others', which so stays the mean over thoughts.
  """
  correct, tokens = [], []
  for samples in _by_question(grades, num_samples):
    vote = length_controls.majority_vote([sample["vote"] for sample in samples])
    correct.append(vote is not None and samples[vote.index]["correct"])
    kept = [sample for sample in samples if _is_kept(sample)]
    tokens.append(sum(s["num_thinking_tokens"] for s in kept) if kept else np.nan)
  tokens_Q = np.array(tokens, float)
  known = ~np.isnan(tokens_Q)
  tokens_Q[~known] = tokens_Q[known].mean() if known.any() else 0.0
  low, high = demanded["min_tokens"], demanded["max_tokens"]
  return thinking_metrics.Run(
    np.array(correct, bool),
    tokens_Q,
    min_tokens=num_samples * low,
    max_tokens=None if high is None else num_samples * high,
  )


def _is_kept(grade: dict[str, Any]) -> bool:
  return grade["forced"] != "rejected" and grade["error"] is None


def _by_question(grades, num_samples):
  by_id: dict[str, list[dict[str, Any]]] = {}
  for grade in grades:
    if grade["sample"] < num_samples:
      by_id.setdefault(grade["question_id"], []).append(grade)
  return by_id.values()


def _point(run, grades, num_samples, method):
  used = [grade for grade in grades if grade["sample"] < num_samples]
  num_questions = len(run.correct_Q)
  return {
    "method": method,
    "num_samples": num_samples,
    "accuracy": run.accuracy.to_dict(),
    "thinking_tokens": run.thinking_tokens.to_dict(),
    "sampled_tokens": sum(grade["sampled_tokens"] for grade in used) / num_questions,
    "demanded": [run.min_tokens, run.max_tokens],
    "within": run.is_within,
    "share_within": run.share_within,
    "forced": dict(sorted(collections.Counter(grade["forced"] for grade in used).items())),
    "statuses": dict(sorted(collections.Counter(grade["status"] for grade in used).items())),
    "failed": sum(grade["error"] is not None for grade in used),
  }


def _measures(runs: list[thinking_metrics.Run]) -> dict[str, Any]:
  if not runs:
    return {"num_runs": 0, "control": None, "scaling": None, "performance": None}
  scaling = thinking_metrics.scaling_points_per_1000_tokens(runs)
  demands = any(run.min_tokens or run.max_tokens is not None for run in runs)
  return {
    "num_runs": len(runs),
    "control": thinking_metrics.control(runs) if demands else None,
    "scaling": None if scaling is None else scaling.to_dict(),
    "performance": thinking_metrics.performance(runs).to_dict(),
  }


def describe(report: dict[str, Any]) -> str:
  """A table of the methods, as plain text."""
  rows = [["method", "runs", "control", "scaling", "performance"]]
  for method, found in report["methods"].items():
    rows.append(
      [
        method,
        str(found["num_runs"]),
        formatting.percent(found["control"]),
        formatting.with_error(found["scaling"], 2),
        formatting.with_error(found["performance"]),
      ]
    )
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = [
    "  ".join(
      cell.ljust(width) if column == 0 else cell.rjust(width)
      for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  ]
  return "\n".join(
    [
      lines[0],
      "-" * len(lines[0]),
      *lines[1:],
      "",
      "Scaling: accuracy points per 1,000 thinking tokens. Performance: share of the "
      f"{report['questions']} questions.",
      "Standard errors are over questions, of one seed.",
    ]
  )
