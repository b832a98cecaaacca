"""Reports a comparison of test-time compute: accuracy against thinking tokens, by method."""

import collections
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import selfimprove_jax.pipelines.budget_forcing.metrics as metrics
import selfimprove_jax.pipelines.budget_forcing.pipeline as budget_forcing
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.pipelines.budget_forcing.config import Config
from selfimprove_jax.pipelines.common import report_parts
from selfimprove_jax.reasoning import length_controls
from selfimprove_jax.report.report import (
  Axis,
  Block,
  Column,
  Figure,
  Grid,
  Label,
  Legend,
  Line,
  LinePlot,
  Number,
  Report,
  Section,
  Style,
  Table,
  Text,
)
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Run

# Methods take them in the order in which they are shown.
_STYLES = (
  Style("blue", "circle"),
  Style("orange", "square"),
  Style("green", "up"),
  Style("pink", "down"),
  Style("purple", "diamond"),
  Style("rust", "circle"),
  Style("teal", "square"),
  Style("gray", "up"),
)


def report(run: Run) -> Report:
  """Reports a finished run, or the complete artifacts of an unfinished one.

  `data` holds the keys of `report_parts.run_data` and, where the stages they need are complete:
    model, questions: the checkpoint; the number of questions
    methods: name -> is_control, num_runs, control, scaling, performance
    points: accuracy, thinking_tokens, ... for each arm and number of votes
  Standard errors are over questions, of one seed.
  """
  stages = budget_forcing.stages(run.config)
  made = report_parts.complete_artifacts(run, stages)
  data = report_parts.run_data(run, stages, made) | _results(run.config, made)
  return Report(
    title=run.config.title,
    command=run.command,
    lead=report_parts.lead(_lead(data), stages, made),
    sections=(*result_sections(data), *report_parts.run_sections(run.command, data)),
    data=data,
  )


def result_sections(data: Mapping[str, Any]) -> tuple[Section, ...]:
  """Returns the sections about results, without blocks where no arm is graded yet."""
  styles = {m: _STYLES[i % len(_STYLES)] for i, m in enumerate(data["methods"])}
  return (
    Section("Accuracy against test-time compute", _curve_blocks(data, styles)),
    Section("Control, Scaling, Performance", _method_blocks(data, styles), in_summary=True),
    Section("The arms", _arm_blocks(data, styles)),
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
  data: dict[str, Any] = {
    "checker": _checker(config.grading.checker),
    "methods": {m: {"is_control": m in controls, **_measures(settings[m])} for m in methods},
    "points": points,
  }
  if "checkpoint" in made:
    summary = made["checkpoint"].summary
    data["model"] = {key: summary[key] for key in ("path", "num_parameters", "digest")}
  if "questions" in made:
    data["questions"] = made["questions"].summary["questions"]
  return data


def _checker(name: str) -> str:
  if name == "numbers":
    return "as numbers"
  return f"by math-verify {importlib.metadata.version('math-verify')}"


def _setting(
  grades: Sequence[Mapping[str, Any]], num_samples: int, low: int, high: int | None
) -> metrics.Setting:
  """Takes the majority vote of the first `num_samples` responses to each question.

  A question without a kept thought counts as wrong, and its compute as the mean of the others', so
  that the mean stays the mean over thoughts.
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
  return metrics.Setting(
    np.array(correct, bool),
    tokens_Q,
    min_tokens=num_samples * low,
    max_tokens=None if high is None else num_samples * high,
  )


def _is_kept(grade: Mapping[str, Any]) -> bool:
  return grade["forced"] != "rejected" and grade["error"] is None


def _by_question(
  grades: Sequence[Mapping[str, Any]], num_samples: int
) -> list[list[Mapping[str, Any]]]:
  by_id: dict[str, list[Mapping[str, Any]]] = {}
  for grade in grades:
    if grade["sample"] < num_samples:
      by_id.setdefault(grade["question_id"], []).append(grade)
  return list(by_id.values())


def _point(
  setting: metrics.Setting,
  grades: Sequence[Mapping[str, Any]],
  num_samples: int,
  method: str,
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
    "forced": dict(sorted(collections.Counter(grade["forced"] for grade in used).items())),
    "statuses": dict(sorted(collections.Counter(grade["status"] for grade in used).items())),
    "failed": sum(grade["error"] is not None for grade in used),
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
  """Says how accuracy changes with thinking: a direction only if the 95% interval excludes zero."""
  if not data["methods"]:
    return ""
  sentences = [f"{data['questions']:,} questions, one seed."]
  for method, found in data["methods"].items():
    if found["scaling"] is not None and not found["is_control"]:
      low, high = Estimate(**found["scaling"]).interval95
      changes = "rises" if low > 0 else "falls" if high < 0 else "does not change measurably"
      sentences.append(f"The accuracy of {method} {changes} with thinking tokens.")
  return " ".join(sentences)


def _curve_blocks(data: Mapping[str, Any], styles: Mapping[str, Style]) -> tuple[Block, ...]:
  methods = data["methods"]
  if not methods:
    return ()
  main = [method for method in methods if not methods[method]["is_control"]]
  controls = [method for method in methods if methods[method]["is_control"]]
  figures = []
  if main:
    figures.append(
      _curve_figure(
        data,
        {method: styles[method] for method in main},
        "Sequential and parallel scaling: accuracy against thinking tokens, summed over the "
        "samples of a question; bars are 95% over questions.",
      )
    )
  if controls:
    caption = "The other ways to control length."
    figures.append(_curve_figure(data, {method: styles[method] for method in controls}, caption))
  labels = tuple(Label(method, style) for method, style in styles.items())
  return (Legend(labels), Grid(tuple(figures)))


def _curve_figure(data: Mapping[str, Any], styles: Mapping[str, Style], caption: str) -> Figure:
  highs = [Estimate(**point["accuracy"]).interval95[1] for point in data["points"]]
  top = 1.05 * max(highs) or 1.0  # the same in every figure
  lines = []
  for method, style in styles.items():
    points = []
    for point in data["points"]:
      if point["method"] == method and point["thinking_tokens"]["value"] > 0:
        accuracy = Estimate(**point["accuracy"])
        half = accuracy.interval95[1] - accuracy.value
        points.append((point["thinking_tokens"]["value"], accuracy.value, half))
    if points:
      x, y, halves = zip(*sorted(points))
      lines.append(Line(style, x, y, halves, markers="all"))
  return Figure(
    "Accuracy against thinking tokens",
    LinePlot(
      tuple(lines),
      Axis("thinking tokens per question", "short", log2=True),
      Axis("accuracy", "percent", range=(0, top)),
    ),
    caption,
  )


def _method_blocks(data: Mapping[str, Any], styles: Mapping[str, Style]) -> tuple[Block, ...]:
  if not data["methods"]:
    return ()
  rows = tuple(
    (
      Label(method, styles[method]),
      _estimate(found["scaling"], digits=2),
      _estimate(found["performance"]),
      Number(found["control"], form="percent"),
      found["num_runs"],
    )
    for method, found in data["methods"].items()
  )
  columns = (
    Column("method", is_text=True),
    *(Column(header) for header in ("scaling", "performance", "control", "settings")),
  )
  return (
    Table(columns, rows),
    Text(
      "Scaling: mean slope over all pairs of settings, in accuracy points per 1,000 thinking "
      f"tokens. Performance: share of the {data['questions']:,} questions answered right in the "
      "best setting, which is biased upwards by that choice. Control: share of the settings whose "
      "mean of thinking tokens is in the demanded range. Standard errors are over questions, of "
      "one seed."
    ),
  )


def _estimate(found: Mapping[str, Any] | None, digits: int = 3) -> Number | None:
  return None if found is None else Number(found["value"], found["stderr"], digits=digits)


def _arm_blocks(data: Mapping[str, Any], styles: Mapping[str, Style]) -> tuple[Block, ...]:
  if not data["points"]:
    return ()
  rows = tuple(
    (
      point["arm"],
      _estimate(point["accuracy"]),
      Number(point["thinking_tokens"]["value"], digits=1),
      _demanded(*point["demanded"]),
      Number(point["share_within"], form="percent"),
      Label(point["method"], styles[point["method"]]),
      point["num_samples"],
      Number(point["sampled_tokens"], digits=1),
      point["forced"],
      point["statuses"],
    )
    for point in data["points"]
  )
  columns = (
    Column("arm", is_text=True),
    Column("accuracy"),
    Column("thinking tokens"),
    Column("demanded"),
    Column("questions within"),
    Column("method", is_text=True, brief=False),
    Column("samples"),
    Column("sampled tokens", brief=False),
    Column("ends of thoughts", brief=False),
    Column("answers", brief=False),
  )
  return (
    Text(
      "Tokens are per question. Sampled tokens include answers and rejected tries. Answers were "
      f"compared {data['checker']}."
    ),
    Table(columns, rows),
  )


def _demanded(low: int, high: int | None) -> str | None:
  if high is None:
    return f"\N{GREATER-THAN OR EQUAL TO} {low:,}" if low else None
  return f"{low:,} to {high:,}"
