"""Parts that the reports of several pipelines share: stages, provenance, corpora, loss curves."""

from collections.abc import Mapping, Sequence
from typing import Any

from selfimprove_jax.report import formatting
from selfimprove_jax.report.report import (
  Bar,
  Column,
  Details,
  Facts,
  Grid,
  Number,
  Section,
  Table,
  Text,
)
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


def run_sections(command: str, data: Mapping[str, Any]) -> tuple[Section, ...]:
  """Returns the sections that show the data of `run_data`."""
  return (
    Section("Stages", (_stages_table(data["stages"]),)),
    Section("How this was made", _provenance(command, data)),
  )


def _stages_table(stages: Sequence[Mapping[str, Any]]) -> Table:
  total = {key: sum(stage[key] or 0 for stage in stages) for key in ("seconds", "tokens", "flops")}
  columns = (
    Column("stage", is_text=True),
    Column("", is_text=True),
    *(Column(header) for header in ("time", "tokens", "FLOPs")),
  )
  return Table(
    columns,
    tuple(
      (formatting.words(stage["name"]), Bar(stage["seconds"] or 0), *_costs(stage))
      for stage in stages
    ),
    total=("all", "", *_costs(total)),
  )


def _costs(stage: Mapping[str, Any]) -> tuple[Number, ...]:
  return (
    Number(stage["seconds"], form="seconds"),
    Number(stage["tokens"], form="short"),
    Number(stage["flops"], form="short"),
  )


def _provenance(command: str, data: Mapping[str, Any]) -> tuple[Any, ...]:
  config = tuple(formatting.flatten(data["config"]))
  columns = (Column("field", is_text=True, code=True), Column("value", is_text=True, code=True))
  machine = Facts({"commit": data["commit"], **data["hardware"]}, verbatim=True)
  return (
    *((Text(command, "code"),) if command else ()),
    Grid((machine, Facts(data["versions"], verbatim=True))),
    Details(f"Config ({len(config)} values)", (Table(columns, config),)),
  )


def corpus_facts(summary: Mapping[str, Any]) -> dict[str, Any]:
  """Flattens the summary of a corpus: single values first, then `measure, split` -> value."""
  facts = {key: value for key, value in summary.items() if not isinstance(value, Mapping)}
  for measure, by_split in summary.items():
    if isinstance(by_split, Mapping):
      facts |= {f"{measure}, {split}": value for split, value in by_split.items()}
  return facts


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
