"""Reports a comparison of test-time compute: accuracy against thinking tokens, by method."""

import collections
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import selfimprove_jax.pipelines.budget_forcing.metrics as metrics
import selfimprove_jax.pipelines.budget_forcing.pipeline as budget_forcing
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.pipelines.budget_forcing.config import Config
from selfimprove_jax.pipelines.common import report_parts
from selfimprove_jax.pipelines.common.report_parts import estimate
from selfimprove_jax.reasoning import length_controls
from selfimprove_jax.report import blocks
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Run

# Methods take these in the order of the report.
_STYLES = (
  blocks.Style("blue", "circle"),
  blocks.Style("orange", "square"),
  blocks.Style("green", "up"),
  blocks.Style("pink", "down"),
  blocks.Style("purple", "diamond"),
  blocks.Style("rust", "circle"),
  blocks.Style("teal", "square"),
  blocks.Style("gray", "up"),
)


def report(run: Run) -> blocks.Report:
  """Reports a finished run, or the complete artifacts of an unfinished one.

  `data` holds the keys of `report_parts.run_data` and, once the stages they need are complete:
    model, questions: the checkpoint; the number of questions
    methods: name -> is_control, num_runs, control, scaling, performance
    points: accuracy, thinking_tokens, ... for each arm and number of votes
  Standard errors are over groups of questions, of one seed.
  """
  stages = budget_forcing.stages(run.config)
  made = report_parts.complete_artifacts(run, stages)
  data = report_parts.run_data(run, stages, made) | _results(run.config, made)
  return blocks.Report(
    title=run.config.title,
    command=run.command,
    lead=report_parts.lead(_lead(data), stages, made),
    sections=(*result_sections(data), *report_parts.run_sections(run.command, data)),
    data=data,
  )


def result_sections(data: Mapping[str, Any]) -> tuple[blocks.Section, ...]:
  """Returns the sections with results; they have no blocks until an arm is graded."""
  styles = {m: _STYLES[i % len(_STYLES)] for i, m in enumerate(data["methods"])}
  return (
    blocks.Section("Accuracy against test-time compute", _curve_blocks(data, styles)),
    blocks.Section("Control, Scaling, Performance", _method_blocks(data, styles), in_summary=True),
    blocks.Section("The arms", _arm_blocks(data, styles)),
  )


# --- from artifacts to numbers


def _results(config: Config, made: Mapping[str, Artifact]) -> dict[str, Any]:
  settings: dict[str, list[metrics.Setting]] = collections.defaultdict(list)
  points = []
  for name, arm in config.arms.items():
    if f"grades/{name}" not in made:
      continue
    grades = list(made[f"grades/{name}"].records())
    for num_samples in arm.votes:
      setting = _setting(grades, num_samples, arm.demanded.min_tokens, arm.demanded.max_tokens)
      of_method = settings[arm.method]
      if any(map(_is_kept, grades)):  # otherwise no thinking was measured
        of_method.append(setting)
      points.append({"arm": name, **_point(setting, grades, num_samples, arm.method)})
  controls = {
    arm.method for arm in config.arms.values() if arm.condition.kind != "none" or arm.max_tries > 0
  }
  # Sequential and parallel scaling first, then the other ways to control length.
  methods = sorted(settings, key=lambda method: (method in controls, method))
  points.sort(key=lambda p: (methods.index(p["method"]), p["thinking_tokens"]["value"], p["arm"]))
  checker = "as numbers"
  if config.grading.checker != "numbers":
    checker = f"by math-verify {importlib.metadata.version('math-verify')}"
  data: dict[str, Any] = {
    "checker": checker,
    "methods": {m: {"is_control": m in controls, **_measures(settings[m])} for m in methods},
    "points": points,
  }
  if "checkpoint" in made:
    summary = made["checkpoint"].summary
    data["model"] = {key: summary[key] for key in ("path", "num_parameters", "digest")}
  if "questions" in made:
    data["questions"] = made["questions"].summary["questions"]
  return data


def _setting(
  grades: Sequence[Mapping[str, Any]], num_samples: int, low: int, high: int | None
) -> metrics.Setting:
  """Takes the majority vote of the first `num_samples` responses to each question.

  A question without a kept thought counts as wrong. Its compute is set to the mean of the others',
  which leaves the mean over thoughts unchanged.
  """
  by_question = collections.defaultdict(list)
  for grade in grades:
    if grade["sample"] < num_samples:
      by_question[grade["question_id"]].append(grade)
  correct, tokens = [], []
  for samples in by_question.values():
    vote = length_controls.majority_vote([sample["vote"] for sample in samples])
    correct.append(vote is not None and samples[vote.index]["correct"])
    kept = [sample for sample in samples if _is_kept(sample)]
    tokens.append(sum(s["num_thinking_tokens"] for s in kept) if kept else np.nan)
  tokens_Q = np.array(tokens, float)
  known = ~np.isnan(tokens_Q)
  tokens_Q[~known] = tokens_Q[known].mean() if known.any() else 0.0
  return metrics.Setting(
    np.array(correct, bool),
    tokens_Q,
    np.array([samples[0]["group"] for samples in by_question.values()]),
    min_tokens=num_samples * low,
    max_tokens=None if high is None else num_samples * high,
  )


def _is_kept(grade: Mapping[str, Any]) -> bool:
  return grade["forced"] != "rejected" and grade["error"] is None


def _point(
  setting: metrics.Setting, grades: Sequence[Mapping[str, Any]], num_samples: int, method: str
) -> dict[str, Any]:
  used = [grade for grade in grades if grade["sample"] < num_samples]
  return {
    "method": method,
    "num_samples": num_samples,
    "accuracy": setting.accuracy.to_dict(),
    "thinking_tokens": setting.thinking_tokens.to_dict(),
    "sampled_tokens": sum(g["sampled_tokens"] for g in used) / len(setting.correct_Q),
    "demanded": [setting.min_tokens, setting.max_tokens],
    "within": setting.is_within,
    "share_within": setting.share_within,
    "forced": dict(sorted(collections.Counter(g["forced"] for g in used).items())),
    "statuses": dict(sorted(collections.Counter(g["status"] for g in used).items())),
    "failed": sum(g["error"] is not None for g in used),
  }


def _measures(settings: Sequence[metrics.Setting]) -> dict[str, Any]:
  if not settings:
    return {"num_runs": 0, "control": None, "scaling": None, "performance": None}
  scaling = metrics.scaling(settings)
  demands = any(s.min_tokens or s.max_tokens is not None for s in settings)
  return {
    "num_runs": len(settings),
    "control": metrics.control(settings) if demands else None,
    "scaling": None if scaling is None else scaling.to_dict(),
    "performance": metrics.performance(settings).to_dict(),
  }


# --- from numbers to blocks


def _lead(data: Mapping[str, Any]) -> str:
  """Writes how accuracy changes with thinking; a direction needs a 95% interval without zero."""
  if not data["methods"]:
    return ""
  sentences = [f"{_sample(data)}, one seed."]
  for method, found in data["methods"].items():
    if found["scaling"] is not None and not found["is_control"]:
      low, high = Estimate(**found["scaling"]).interval95
      changes = "rises" if low > 0 else "falls" if high < 0 else "does not change measurably"
      sentences.append(f"The accuracy of {method} {changes} with thinking tokens.")
  return " ".join(sentences)


def _sample(data: Mapping[str, Any]) -> str:
  """Writes what errors rest on: `200 questions in 12 groups`."""
  num_groups = data["points"][0]["accuracy"]["num_groups"]
  groups = "" if num_groups == data["questions"] else f" in {num_groups:,} groups"
  return f"{data['questions']:,} questions{groups}"


def _curve_blocks(data: Mapping[str, Any], styles: Mapping[str, blocks.Style]) -> blocks.Blocks:
  methods = data["methods"]
  if not methods:
    return ()
  captions = {
    False: "Sequential and parallel scaling: accuracy against thinking tokens, summed over the "
    "samples of a question; bars are 95% over groups of questions.",
    True: "The other ways to control length.",
  }
  figures = []
  for is_control, caption in captions.items():
    chosen = {m: styles[m] for m, found in methods.items() if found["is_control"] == is_control}
    if chosen:
      figures.append(_curve_figure(data, chosen, caption))
  labels = tuple(blocks.Label(method, style) for method, style in styles.items())
  return (blocks.Legend(labels), blocks.Grid(tuple(figures)))


def _curve_figure(
  data: Mapping[str, Any], styles: Mapping[str, blocks.Style], caption: str
) -> blocks.Figure:
  accuracies = [Estimate(**point["accuracy"]) for point in data["points"]]
  halves = [accuracy.interval95[1] - accuracy.value for accuracy in accuracies]
  halves = [half if math.isfinite(half) else 0.0 for half in halves]  # one group has no error
  # The same top in all figures.
  top = 1.05 * max(accuracy.value + half for accuracy, half in zip(accuracies, halves)) or 1.0
  lines = []
  for method, style in styles.items():
    points = sorted(
      (point["thinking_tokens"]["value"], accuracy.value, half)
      for point, accuracy, half in zip(data["points"], accuracies, halves)
      if point["method"] == method and point["thinking_tokens"]["value"] > 0
    )
    if points:
      lines.append(blocks.Line(style, *zip(*points), markers="all"))
  return blocks.Figure(
    "Accuracy against thinking tokens",
    blocks.LinePlot(
      tuple(lines),
      blocks.Axis("thinking tokens per question", "short", log2=True),
      blocks.Axis("accuracy", "percent", range=(0, top)),
    ),
    caption,
  )


def _method_blocks(data: Mapping[str, Any], styles: Mapping[str, blocks.Style]) -> blocks.Blocks:
  if not data["methods"]:
    return ()
  rows = [
    {
      "method": blocks.Label(method, styles[method]),
      "scaling": found["scaling"] and estimate(found["scaling"], digits=2),
      "performance": found["performance"] and estimate(found["performance"]),
      "control": blocks.Number(found["control"], form="percent"),
      "settings": found["num_runs"],
    }
    for method, found in data["methods"].items()
  ]
  return (
    blocks.table(rows, text=("method",)),
    blocks.Text(
      "Scaling: mean slope over all pairs of settings, in accuracy points per 1,000 thinking "
      f"tokens. Performance: share of the {data['questions']:,} questions answered right in the "
      "best setting, which is biased upwards by that choice. Control: share of the settings whose "
      "mean of thinking tokens is in the demanded range. Standard errors are over "
      f"{_sample(data)}, of one seed."
    ),
  )


def _arm_blocks(data: Mapping[str, Any], styles: Mapping[str, blocks.Style]) -> blocks.Blocks:
  if not data["points"]:
    return ()
  rows = [
    {
      "arm": point["arm"],
      "accuracy": estimate(point["accuracy"]),
      "thinking tokens": blocks.Number(point["thinking_tokens"]["value"], digits=1),
      "demanded": _demanded(*point["demanded"]),
      "questions within": blocks.Number(point["share_within"], form="percent"),
      "method": blocks.Label(point["method"], styles[point["method"]]),
      "samples": point["num_samples"],
      "sampled tokens": blocks.Number(point["sampled_tokens"], digits=1),
      "ends of thoughts": point["forced"],
      "answers": point["statuses"],
    }
    for point in data["points"]
  ]
  page_only = ("method", "sampled tokens", "ends of thoughts", "answers")
  return (
    blocks.Text(
      "Tokens are per question. Sampled tokens include answers and rejected tries. Answers were "
      f"compared {data['checker']}."
    ),
    blocks.table(rows, text=("arm", "method"), page_only=page_only),
  )


def _demanded(low: int, high: int | None) -> str | None:
  if high is None:
    return f"\N{GREATER-THAN OR EQUAL TO} {low:,}" if low else None
  return f"{low:,} to {high:,}"
