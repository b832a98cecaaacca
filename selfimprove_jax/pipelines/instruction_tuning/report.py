"""Reports instruction tuning: the loss on the assistant's tokens before and after."""

from collections.abc import Mapping
from typing import Any

import selfimprove_jax.pipelines.instruction_tuning.pipeline as instruction_tuning
from selfimprove_jax.pipelines.common import before_after, report_parts
from selfimprove_jax.report import blocks
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Run

_TRAINING = before_after.Training(
  "Loss of instruction tuning",
  "Loss on the assistant's tokens: training (dashed) and validation (solid).",
)
_NAME = "answers"


def report(run: Run) -> blocks.Report:
  """Reports a finished run, or the complete artifacts of an unfinished one.

  `data` holds the keys of `report_parts.run_data` and, once the stages they need are complete,
  `conversations`, `rows`, `tuned` (parameters, steps, tokens, targets, FLOPs, passes), `curve` and,
  if conversations were held out, `heldout` (`before_after.losses`). Standard errors are over
  held-out conversations of one run; those with one opening message are one group.
  """
  stages = instruction_tuning.stages(run.config)
  made = report_parts.complete_artifacts(run, stages)
  data = report_parts.run_data(run, stages, made) | _results(made)
  result = before_after.sentence(_NAME, data.get("heldout")) if "tuned" in data else ""
  return blocks.Report(
    title=run.config.title,
    command=run.command,
    lead=report_parts.lead(result, stages, made),
    sections=(
      blocks.Section("Before and after", _heldout_blocks(data, made), in_summary=True),
      blocks.Section("Training", before_after.training_blocks(data, _TRAINING)),
      blocks.Section("Conversations", _conversation_blocks(data)),
      *report_parts.run_sections(run.command, data),
    ),
    data=data,
  )


def _results(made: Mapping[str, Artifact]) -> dict[str, Any]:
  data: dict[str, Any] = {
    name: made[name].summary for name in ("conversations", "rows") if name in made
  }
  if "tuned" in made:
    tuned = made["tuned"]
    keys = ("num_parameters", "steps_made", "tokens", "targets", "flops", "passes")
    data["tuned"] = {key: tuned.summary[key] for key in keys}
    data["curve"] = list(tuned.read_jsonl("curve.jsonl"))
    if "before.jsonl" in tuned.shards:
      data["heldout"] = before_after.losses(tuned, "before.jsonl", "after.jsonl")
  return data


def _heldout_blocks(data: Mapping[str, Any], made: Mapping[str, Artifact]) -> blocks.Blocks:
  if "tuned" not in data:
    return ()
  tuned, rows = data["tuned"], data["rows"]
  notes = [
    f"{tuned['steps_made']:,} steps, {tuned['passes']['conversations']:.2f} passes, "
    f"{tuned['targets']:,} of the assistant's tokens."
  ]
  if rows["cut"] or rows["dropped"]:
    notes.append(
      f"{rows['cut']:,} conversations longer than a row were cut after an answer, and "
      f"{rows['dropped']:,} were dropped."
    )
  facts: tuple[blocks.Facts, ...] = ()
  if "export" in made:
    facts = (blocks.Facts({"exported model": str(made["export"].folder / "model")}),)
  if "heldout" not in data:
    return (*map(blocks.Text, notes), *facts)
  table, figure = before_after.heldout_blocks({_NAME: data["heldout"]}, unit="conversations")
  return (*table, *map(blocks.Text, notes), *facts, figure)


def _conversation_blocks(data: Mapping[str, Any]) -> blocks.Blocks:
  facts = report_parts.corpus_facts(data.get("conversations", {}))
  for name, found in data.get("rows", {}).items():
    if isinstance(found, Mapping):
      facts[f"tokens, {name}"] = found["tokens"]
      facts[f"the assistant's tokens, {name}"] = found["targets"]
    else:
      facts[f"{name} while rendering"] = found
  return (blocks.Facts(facts),) if facts else ()
