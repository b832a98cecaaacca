"""Reads the benchmark scores of a run's models, and shows them: a table, and curves over steps.

One model is the reference. The others are shown by their paired differences to it, whose intervals
are over the groups of examples; the noise of training seeds is not in them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.evaluation.tasks import metrics
from selfimprove_jax.evaluation.tasks.task import Task
from selfimprove_jax.report import blocks
from selfimprove_jax.runs.artifacts import Artifact

_NOTE = (
  "± is the standard error over groups of examples; the other columns are differences, paired by "
  "example, with their 95% interval over groups. With several trainings each example counts with "
  "its mean over them; the noise of the seeds is not in the interval. `cut` counts requests whose "
  "context lost its beginning, because it is longer than the model's window."
)
_NUM_PRINTED = 2
_LARGE = 1e4  # perplexities of weak models
_Tasks = Iterable[Task]


def compare_models(
  tasks: _Tasks, made: Mapping[str, Artifact], trainings: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
  """Compares models on every task whose metrics are complete.

  Args:
    made: the complete artifacts of a run, by stage.
    trainings: model -> the stages that trained it; the first model is the reference.

  Returns:
    {"reference": its name, "evals": model -> TASK/METRIC -> estimate with `chance`, `examples` and
    `truncated` (requests), "differences": other model -> TASK/METRIC -> estimate with `interval`}.
  """
  found = Comparison(tuple(trainings))
  for task in tasks:
    records, sizes = {}, {}
    for model, stages in trainings.items():
      scored = [made[f"scores/{s}/{task.name}"] for s in stages if _is_measured(made, s, task)]
      if scored:
        records[model] = [list(artifact.records()) for artifact in scored]
        sizes[model] = {name: scored[0].summary[name] for name in ("examples", "truncated")}
    found.add(task.name, task.metrics, records, sizes)
  return found.to_dict()


class Comparison:
  """Collects the metrics of several models, and their differences to the first one."""

  def __init__(self, models: Sequence[str]):
    self._reference, *self._others = models
    self._evals: dict[str, dict[str, Any]] = {model: {} for model in models}
    self._differences: dict[str, dict[str, Any]] = {model: {} for model in self._others}

  def add(
    self,
    name: str,
    metric_names: Iterable[str],
    records: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    sizes: Mapping[str, Mapping[str, int]],
  ) -> None:
    """Adds a task.

    Args:
      records: model -> the records of each of its trainings; models may be missing.
      sizes: model -> `examples` and `truncated`.
    """
    for metric in metric_names:
      key = f"{name}/{metric}"
      for model, found in records.items():
        chance = metrics.chance(metric, found[0])
        estimate = metrics.estimate(metric, *found).to_dict()
        self._evals[model][key] = {**estimate, "chance": chance, **sizes[model]}
      for model in self._others:
        if self._reference in records and model in records:
          change = metrics.compare(metric, records[self._reference], records[model]).change
          interval = list(change.interval95)
          self._differences[model][key] = {**change.to_dict(), "interval": interval}

  def to_dict(self) -> dict[str, Any]:
    """Returns what `compare_models` returns."""
    return {
      "reference": self._reference,
      "evals": self._evals,
      "differences": self._differences,
    }


def _is_measured(made: Mapping[str, Artifact], stage: str, task: Task) -> bool:
  return made.keys() >= {f"scores/{stage}/{task.name}", f"metrics/{stage}/{task.name}"}


def table(compared: Mapping[str, Any], labels: Mapping[str, str]) -> blocks.Blocks:
  """Shows the result of `compare_models`, a row for each metric; nothing without a reference.

  Args:
    labels: model -> its name in the report, in the order of the columns. The terminal has room for
      the first differences.
  """
  reference = compared["reference"]
  headers = {
    model: difference_header(label, labels[reference])
    for model, label in labels.items()
    if model != reference
  }
  rows = []
  for name, found in compared["evals"][reference].items():
    form = form_of(name, found["value"])
    row: dict[str, Any] = {
      "task/metric": name,
      "chance": blocks.Number(found["chance"], form="percent", digits=1),
      labels[reference]: blocks.Number(found["value"], found["stderr"], **form),
    }
    for model, header in headers.items():
      row[header] = difference_cell(compared["differences"][model].get(name), name)
    keys = {"unit": "unit", "examples": "examples", "num_groups": "groups", "truncated": "cut"}
    rows.append(row | {header: found[key] for key, header in keys.items()})
  if not rows:
    return ()
  page_only = (*list(headers.values())[_NUM_PRINTED:], "unit", "examples", "groups", "cut")
  shown = blocks.table(rows, text=("task/metric", "unit"), page_only=page_only)
  return shown, blocks.Text(_NOTE)


def form_of(name: str, value: float) -> dict[str, Any]:
  """Returns how a value of a TASK/METRIC is written, as fields of `blocks.Number`."""
  metric = name.rpartition("/")[2]
  if metrics.is_accuracy(metric):
    return {"form": "percent", "digits": 1}
  if abs(value) >= _LARGE:
    return {"form": "general", "digits": 3}
  return {"digits": 2 if metrics.METRICS[metric][2] else 3}


def difference_header(label: str, reference: str) -> str:
  return f"{label} \N{MINUS SIGN} {reference} (95%)"


def difference_cell(found: Mapping[str, Any] | None, name: str) -> blocks.Cell:
  """Returns a difference above its 95% interval; None if it is not known.

  Args:
    found: an estimate, with other keys.
    name: TASK/METRIC, which decides the form.
  """
  if found is None:
    return None
  form = form_of(name, found["value"])
  interval = blocks.Interval(*as_estimate(found).interval95, **form)
  return blocks.Stack((blocks.Number(found["value"], signed=True, **form), interval))


def as_estimate(found: Mapping[str, Any]) -> Estimate:
  """Returns the estimate that a mapping holds, among other keys."""
  return Estimate(**{key: found[key] for key in ("value", "stderr", "unit", "num_groups")})


def dynamics(
  tasks: _Tasks, made: Mapping[str, Artifact], stages: Iterable[str], *, start: str | None = None
) -> dict[str, Any]:
  """Returns TASK/METRIC -> stage -> points of its checkpoints, in order, and of its result.

  A point is {"step", "value", "stderr"}. Stages without `dynamics` are left out.

  Args:
    start: the stage of the model that they all start from, which is at step 0.
  """
  found: dict[str, dict[str, Any]] = {}
  for stage in stages:
    if f"dynamics/{stage}" not in made:
      continue
    measured = [(r["task"], r["step"], r["metrics"]) for r in made[f"dynamics/{stage}"].records()]
    ends = {stage: made[stage].summary["step"], **({start: 0} if start else {})}
    for task in tasks:
      for model, step in ends.items():
        if _is_measured(made, model, task):
          summary = made[f"metrics/{model}/{task.name}"].summary
          measured.append((task.name, step, summary["metrics"]))
    for task, step, values in sorted(measured, key=lambda one: one[1]):
      for metric, value in values.items():
        point = {"step": step, "value": value["value"], "stderr": value["stderr"]}
        found.setdefault(f"{task}/{metric}", {}).setdefault(stage, []).append(point)
  return found


def curves(
  tasks: _Tasks, found: Mapping[str, Any], labels: Mapping[str, blocks.Label]
) -> blocks.Blocks:
  """Plots the first metric of each task over the steps of training.

  Args:
    found: the result of `dynamics`.
    labels: stage -> label and style of its line; stages without one are not drawn.
  """
  figures, drawn = [], set()
  for task in tasks:
    name = f"{task.name}/{task.metrics[0]}"
    lines = []
    for stage, label in labels.items():
      if points := found.get(name, {}).get(stage):
        drawn.add(stage)
        x, y = (tuple(point[key] for point in points) for key in ("step", "value"))
        bars = tuple(point["stderr"] or 0.0 for point in points)
        lines.append(blocks.Line(label.style, x, y, half_widths=bars, markers="all"))
    if lines:
      unit = metrics.METRICS[task.metrics[0]][1]
      plot = blocks.LinePlot(tuple(lines), blocks.Axis("steps"), blocks.Axis(unit))
      caption = (
        f"{name} of the checkpoints on disk and of the result; bars are one standard error over "
        "groups of examples."
      )
      figures.append(blocks.Figure(f"{name} during training", plot, caption))
  if not figures:
    return ()
  legend = blocks.Legend(tuple(labels[stage] for stage in labels if stage in drawn))
  return legend, blocks.Grid(tuple(figures))
