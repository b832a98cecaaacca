"""Parts that the reports of several pipelines share: stages, provenance, corpora, loss curves."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.report import blocks, formatting
from selfimprove_jax.runs import artifacts, provenance
from selfimprove_jax.runs.stage import Run, Stage
from selfimprove_jax.runtime.config import to_json

_NUM_CURVE_POINTS = 60


def complete_artifacts(run: Run, stages: Sequence[Stage]) -> dict[str, artifacts.Artifact]:
  """Returns the artifacts of a run that are complete, by stage."""
  return {stage.name: run.artifact(stage.name) for stage in stages if run.has(stage.name)}


def lead(result: str, stages: Sequence[Stage], made: Mapping[str, artifacts.Artifact]) -> str:
  """Returns a run's result, preceded by the first missing stage if the run is unfinished."""
  missing = [stage.name for stage in stages if stage.name not in made]
  if not missing:
    return result
  unfinished = (
    f"This run is unfinished: {len(made)} of {len(stages)} stages are complete, "
    f"{missing[0]} is not."
  )
  return f"{unfinished} {result}".strip()


def run_data(
  run: Run, stages: Sequence[Stage], made: Mapping[str, artifacts.Artifact]
) -> dict[str, Any]:
  """Returns `config`, `commit`, `versions`, `hardware` and `stages` for report.json.

  A stage's seconds, tokens and FLOPs are None if they are unknown.
  """
  seconds = run.seconds()
  summaries = {name: artifact.summary for name, artifact in made.items()}
  return {
    "config": to_json(run.config),
    **provenance.describe(),
    "stages": [
      {
        "name": stage.name,
        "seconds": seconds.get(stage.name),
        "tokens": summaries.get(stage.name, {}).get("tokens"),
        "flops": summaries.get(stage.name, {}).get("flops"),
      }
      for stage in stages
    ],
  }


def run_sections(command: str, data: Mapping[str, Any]) -> tuple[blocks.Section, ...]:
  """Returns the sections that show the data of `run_data`."""
  return (
    blocks.Section("Stages", (_stages_table(data["stages"]),)),
    blocks.Section("How this was made", _provenance(command, data)),
  )


def _stages_table(stages: Sequence[Mapping[str, Any]]) -> blocks.Table:
  forms = {"seconds": "seconds", "tokens": "short", "flops": "short"}

  def costs(stage: Mapping[str, Any]) -> list[blocks.Number]:
    return [blocks.Number(stage[key], form=form) for key, form in forms.items()]

  rows = tuple(
    (formatting.words(stage["name"]), blocks.Bar(stage["seconds"] or 0), *costs(stage))
    for stage in stages
  )
  columns = [blocks.Column(header, is_text=True) for header in ("stage", "")]
  columns += [blocks.Column(header) for header in ("time", "tokens", "FLOPs")]
  total = {key: sum(stage[key] or 0 for stage in stages) for key in forms}
  return blocks.Table(tuple(columns), rows, total=("all", "", *costs(total)))


def _provenance(command: str, data: Mapping[str, Any]) -> tuple[Any, ...]:
  config = tuple(formatting.flatten(data["config"]))
  columns = tuple(blocks.Column(header, is_text=True, code=True) for header in ("field", "value"))
  machine = blocks.Facts({"commit": data["commit"], **data["hardware"]}, verbatim=True)
  return (
    *((blocks.Text(command, "code"),) if command else ()),
    blocks.Grid((machine, blocks.Facts(data["versions"], verbatim=True))),
    blocks.Details(f"Config ({len(config)} values)", (blocks.Table(columns, config),)),
  )


def estimate(found: Mapping[str, Any], **options: Any) -> blocks.Number:
  """Returns an estimate of report.json as a cell; `options` are further fields of `Number`."""
  return blocks.Number(found["value"], found["stderr"], **options)


def loss_plot(
  losses: Iterable[tuple[str, blocks.Style, Mapping[str, Any]]],
) -> blocks.PointPlot:
  """Plots held-out losses with their 95% intervals: (label, style, estimate in nats per token)."""
  points = []
  for label, style, found in losses:
    loss = Estimate(**found)
    points.append(blocks.Point(label, style, blocks.Number(loss.value), loss.interval95))
  axis = blocks.Axis("held-out nats per token (95% over groups of documents)")
  return blocks.PointPlot(tuple(points), axis)


def read_losses(artifact: artifacts.Artifact, name: str) -> dict[str, np.ndarray]:
  """Reads the loss of each document, as `models.loss_records` writes it, one array per field."""
  records = list(artifact.read_jsonl(name))
  fields = ("id", "group", "nll", "tokens", "bytes")
  return {key: np.array([r[key] for r in records]) for key in fields}


def corpus_facts(summary: Mapping[str, Any]) -> dict[str, Any]:
  """Flattens the summary of a corpus: single values first, then `measure, split` -> value."""
  summary = {key: value for key, value in summary.items() if key != "decontamination"}
  facts = {key: value for key, value in summary.items() if not isinstance(value, Mapping)}
  for measure, by_split in summary.items():
    if isinstance(by_split, Mapping):
      facts |= {f"{measure}, {split}": value for split, value in by_split.items()}
  return facts


def decontamination_section(found: Mapping[str, Mapping[str, Any] | None]) -> blocks.Section:
  """Shows the items of benchmarks that texts contain.

  Args:
    found: name of the texts -> `Findings.summary`, or None where they were not checked.
  """
  title = "Benchmarks in the training text"
  parts: list[blocks.Block] = []
  rows: list[dict[str, Any]] = []
  worst: list[dict[str, Any]] = []
  unchecked = [formatting.words(name) for name, result in found.items() if result is None]
  if unchecked:
    text = (
      f"Nothing was checked against benchmarks ({', '.join(unchecked)}): neither "
      "decontamination.data_dir nor benchmarks.data_dir names a folder of them, or "
      "decontamination.action is off."
    )
    parts.append(blocks.Text(text, "note"))
  for name, result in found.items():
    if result is None:
      continue
    done = "dropped" if result["dropped"] else "kept, but listed"
    sentence = (
      f"{formatting.words(name).capitalize()}: {result['contaminated']:,} of "
      f"{result['documents']:,} documents contain an item of a benchmark and were {done}."
    )
    parts.append(blocks.Text(sentence))
    for task, counts in result["tasks"].items():
      rows.append(
        {
          "task": task,
          "text": formatting.words(name),
          "documents with items": counts["documents_hit"],
          "items in them": counts["items_hit"],
          "items": counts["items"],
          "too short to check": counts["unchecked"],
        }
      )
    for record in result["worst"]:
      first = record["examples"][0]
      worst.append(
        {
          "document": record["id"],
          "text": formatting.words(name),
          "items": record["items"],
          "of tasks": ", ".join(f"{task} {n}" for task, n in record["tasks"].items()),
          "the first": f"{first['task']}, {first['item']}",
          "its words": first["words"],
        }
      )
  if rows:
    parts.append(blocks.table(rows, text=("task", "text")))
  if worst:
    parts.append(blocks.Text("The documents with the most items:"))
    text_columns = ("document", "text", "of tasks", "the first", "its words")
    parts.append(blocks.table(worst, text=text_columns, page_only=("its words",)))
  return blocks.Section(title, tuple(parts))


def loss_curve(
  records: Sequence[Mapping[str, Any]],
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
  """Returns (step, training loss), averaged over windows of steps, and (step, validation loss)."""
  train = [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]
  validation = [(r["step"], r["validation/loss"]) for r in records if "validation/loss" in r]
  window = max(1, len(train) // _NUM_CURVE_POINTS)
  averaged = []
  for start in range(0, len(train) - window + 1, window):
    steps, losses = zip(*train[start : start + window])
    averaged.append((steps[-1], sum(losses) / len(losses)))
  return averaged, validation
