"""Compares two evaluations of the same examples, metric by metric.

  python tools/compare_evaluations.py runs/eval_baseline runs/eval_sbp
  python tools/compare_evaluations.py --tasks arc_easy,sciq runs/eval_baseline runs/eval_sbp

Prints the value of each run, their difference (second minus first, paired by example) with its 95%
interval, and on how many examples the second run is better (won), worse (lost) and equal (tied).
Errors are clustered by group, with Student's t. Perplexities are compared by their mean nats and by
their ratio. Exits with 1 if a task has another version, other rows or other prompts in one run, and
says which.
"""

import argparse
import dataclasses
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from selfimprove_jax.evaluation.tasks import metrics
from selfimprove_jax.evaluation.tasks.items import Record
from selfimprove_jax.report import blocks, formatting
from selfimprove_jax.runs import artifacts

_PROMPTS = ("contexts", "prompt")  # fields of an item that are its prompt
_HINTS = ("preamble",)  # tells what prompts share, and changes no result
_SHOWN_CHARS = 60


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """A task as one run has scored it; `examples` are what was asked, in the records' order."""

  version: tuple[Any, ...]
  examples: list[dict[str, Any]]
  records: list[Record]
  metrics: dict[str, dict[str, Any]]


def read(run: pathlib.Path, task: str) -> Evaluation:
  """Reads a task of a run.

  Raises:
    artifacts.ArtifactError: the task is unfinished there, or damaged.
  """
  examples, scores, measured = (
    artifacts.open_artifact(run / kind / task) for kind in ("examples", "scores", "metrics")
  )
  config = artifacts.read_json(run / "examples" / task / "config.json")["config"]
  return Evaluation(
    version=tuple(config[key] for key in ("version", "definition")),
    examples=list(examples.records()),
    records=list(scores.records()),
    metrics=measured.summary["metrics"],
  )


def fault(first: Evaluation, second: Evaluation) -> str | None:
  """Returns why the two cannot be compared, or None if they can."""
  for name, *values in zip(("version", "definition"), first.version, second.version):
    if values[0] != values[1]:
      return f"the task has {name} {values[0]!r} in the first run and {values[1]!r} in the second"
  ids = [[example["id"] for example in run.examples] for run in (first, second)]
  if ids[0] != ids[1]:
    for order, here, there in (("first", *ids), ("second", *reversed(ids))):
      if missing := [id_ for id_ in here if id_ not in set(there)]:
        return (
          f"the rows differ: {len(ids[0])} in the first run and {len(ids[1])} in the second; only "
          f"the {order} has {missing[0]}"
        )
    return "the rows are the same, in another order"
  for one, other in zip(first.examples, second.examples):
    fields = (one["item"].keys() | other["item"].keys()) - {*_PROMPTS, *_HINTS}
    for field in (*_PROMPTS, "group", *sorted(fields)):
      values = [e["group"] if field == "group" else e["item"].get(field) for e in (one, other)]
      if values[0] != values[1]:
        what = "prompts" if field in _PROMPTS else f"rows ({field})"
        return f"the {what} of {one['id']} differ: {_differing(*map(str, values))}"
  return None


def _differing(one: str, other: str) -> str:
  """Shows two texts from a little before the place where they begin to differ."""
  pairs = enumerate(zip(one, other))
  place = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
  begin = max(place - _SHOWN_CHARS // 2, 0)
  return " and ".join(repr(text[begin : begin + _SHOWN_CHARS]) for text in (one, other))


def row(name: str, first: Evaluation, second: Evaluation) -> dict[str, str]:
  """Returns the cells of a metric; raises ValueError like `metrics.compare`."""
  found = metrics.compare(name, [first.records], [second.records])
  is_accuracy, is_perplexity = metrics.is_accuracy(name), metrics.METRICS[name][2]
  form: dict[str, Any] = {"form": "percent", "digits": 1} if is_accuracy else {}
  values = [
    formatting.text(blocks.Number(e.metrics[name]["value"], **form)) for e in (first, second)
  ]
  low, high = found.difference.interval95
  ends = [formatting.text(blocks.Number(x, signed=True, **form)) for x in (low, high)]
  difference = blocks.Number(found.difference.value, signed=True, **form)
  ratio = math.exp(found.difference.value) if is_perplexity else None
  return {
    "first": values[0],
    "second": values[1],
    "difference": formatting.text(difference) + (" nats" if is_perplexity else ""),
    "95% interval": " to ".join(ends),
    "ratio": formatting.text(blocks.Number(ratio)),
    "won": str(found.won),
    "lost": str(found.lost),
    "tied": str(found.tied),
    "groups": str(found.difference.num_groups),
  }


def print_table(rows: Sequence[dict[str, str]]) -> None:
  lines = [list(rows[0]), *(list(r.values()) for r in rows)]
  widths = [max(map(len, column)) for column in zip(*lines)]
  for first, *others in lines:
    cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
    print("  ".join([first.ljust(widths[0]), *cells]))


def tasks_of(run: pathlib.Path) -> list[str]:
  """Returns the tasks that a run has begun to score."""
  found = (run / "scores").rglob("config.json")
  return sorted(path.parent.relative_to(run / "scores").as_posix() for path in found)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("first", type=pathlib.Path, help="workdir of an evaluation: the baseline")
  parser.add_argument("second", type=pathlib.Path, help="workdir of another one")
  parser.add_argument("--tasks", default="", help="some of the tasks, separated by commas")
  arguments = parser.parse_args()
  runs = (arguments.first, arguments.second)
  begun = [tasks_of(run) for run in runs]
  for run, tasks in zip(runs, begun):
    if not tasks:
      parser.error(f"{run} holds no evaluation: it has no folder scores/TASK")
  wanted = [name for name in arguments.tasks.split(",") if name]
  for name in wanted:
    for run, tasks in zip(runs, begun):
      if name not in tasks:
        parser.error(f"{run} has no task {name!r}; it has {', '.join(tasks)}")
  shared = [name for name in begun[0] if name in begun[1] and (not wanted or name in wanted)]
  if not shared:
    parser.error(f"no task is in both runs: {', '.join(begun[0])}; {', '.join(begun[1])}")
  rows, notes, faults = [], [], []
  for task in shared:
    try:
      both = [read(run, task) for run in runs]
    except artifacts.ArtifactError as error:
      faults.append(f"{task}: {error}")
      continue
    if reason := fault(*both):
      faults.append(f"{task}: {reason}")
      continue
    for name in metrics.METRICS:
      if all(name in evaluation.metrics for evaluation in both):
        try:
          rows.append({"task/metric": f"{task}/{name}", **row(name, *both)})
        except ValueError as error:
          notes.append(f"{task}/{name} is left out: {error}")
  if faults:
    print("the runs cannot be compared:", *faults, sep="\n  ", file=sys.stderr)
    return 1
  if not wanted:
    for run, tasks in zip(runs, begun):
      if alone := sorted(set(tasks) - set(shared)):
        notes.append(f"only in {run}: {', '.join(alone)}")
  if rows:
    print_table(rows)
  for note in notes:
    print(note)
  return 0


if __name__ == "__main__":
  sys.exit(main())
