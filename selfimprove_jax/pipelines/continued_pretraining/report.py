"""Reports continued pretraining: the loss on new text and on replay, before and after."""

from collections.abc import Mapping, Sequence
from typing import Any

import selfimprove_jax.pipelines.continued_pretraining.pipeline as continued_pretraining
from selfimprove_jax.evaluation.tasks.task import Task
from selfimprove_jax.pipelines.common import before_after, benchmark_results, report_parts
from selfimprove_jax.pipelines.continued_pretraining.stages import CORPORA
from selfimprove_jax.report import blocks, formatting
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Run

_MODELS = {"initial": "before", "tuned": "after"}
_TRAINING = before_after.Training(
  "Loss of continued pretraining",
  "Training loss on the mixture (dashed) and validation loss (solid).",
)


def report(run: Run) -> blocks.Report:
  """Reports a finished run, or the complete artifacts of an unfinished one.

  `data` holds the keys of `report_parts.run_data` and, once the stages they need are complete,
  `documents`, `decontamination`, `rows` and `heldout` by corpus, `tuned` (parameters, steps,
  tokens, FLOPs, passes) and `curve`. `benchmarks` and `dynamics`, if tasks are named, are the
  results of `benchmark_results.compare_models` and `dynamics`. Standard errors are over the groups
  of held-out documents of one run. They do not cover the training seed, and one group alone has
  none.
  """
  stages = continued_pretraining.stages(run.config)
  made = report_parts.complete_artifacts(run, stages)
  tasks = [task for _, task in run.config.benchmarks.named_tasks.values()]
  data = report_parts.run_data(run, stages, made) | _results(made) | _benchmarks(tasks, made)
  sentences = []
  if "heldout" in data:
    sentences = [before_after.sentence(name, data["heldout"].get(name)) for name in CORPORA]
  return blocks.Report(
    title=run.config.title,
    command=run.command,
    lead=report_parts.lead(" ".join(sentences), stages, made),
    sections=(
      blocks.Section("Before and after", _heldout_blocks(data, made), in_summary=True),
      *_benchmark_sections(tasks, data),
      blocks.Section("Training", before_after.training_blocks(data, _TRAINING)),
      blocks.Section("Corpora", _corpora_blocks(data)),
      report_parts.decontamination_section(data["decontamination"]),
      *report_parts.run_sections(run.command, data),
    ),
    data=data,
  )


def _results(made: Mapping[str, Artifact]) -> dict[str, Any]:
  def summaries(kind: str) -> dict[str, Any]:
    return {name: made[f"{name}/{kind}"].summary for name in CORPORA if f"{name}/{kind}" in made}

  data: dict[str, Any] = {"documents": summaries("documents"), "rows": summaries("rows")}
  data["decontamination"] = {
    name: summary.get("decontamination") for name, summary in data["documents"].items()
  }
  if "tuned" in made:
    tuned = made["tuned"]
    keys = ("num_parameters", "steps_made", "tokens", "flops", "passes")
    data["tuned"] = {key: tuned.summary[key] for key in keys}
    scored = [name for name in CORPORA if f"before-{name}.jsonl" in tuned.shards]
    data["heldout"] = {
      name: before_after.losses(tuned, f"before-{name}.jsonl", f"after-{name}.jsonl")
      for name in scored
    }
    data["curve"] = list(tuned.read_jsonl("curve.jsonl"))
  return data


def _benchmarks(tasks: Sequence[Task], made: Mapping[str, Artifact]) -> dict[str, Any]:
  if not tasks:
    return {}
  trainings = {model: [model] for model in _MODELS}
  return {
    "benchmarks": benchmark_results.compare_models(tasks, made, trainings),
    "dynamics": benchmark_results.dynamics(tasks, made, ["tuned"], start="initial"),
  }


def _benchmark_sections(
  tasks: Sequence[Task], data: Mapping[str, Any]
) -> tuple[blocks.Section, ...]:
  if "benchmarks" not in data:
    return ()
  label = blocks.Label("continued pretraining", before_after.STYLES["after"])
  table = benchmark_results.table(data["benchmarks"], _MODELS)
  curves = benchmark_results.curves(tasks, data["dynamics"], {"tuned": label})
  return (
    blocks.Section("Benchmarks", table, in_summary=True),
    blocks.Section("Benchmarks during continued pretraining", curves),
  )


def _heldout_blocks(data: Mapping[str, Any], made: Mapping[str, Artifact]) -> blocks.Blocks:
  if "tuned" not in data:
    return ()
  tuned = data["tuned"]
  passes = ", ".join(
    f"{share:.2f} passes over {formatting.words(name)}" for name, share in tuned["passes"].items()
  )
  exported = made["export"].folder / "model" if "export" in made else None
  notes = [f"{tuned['steps_made']:,} steps, {formatting.short(tuned['tokens'])} tokens: {passes}."]
  notes += [
    f"{counts['repeated']:,} of {counts['documents']:,} documents of {formatting.words(name)} were "
    "dropped, since others have the same text."
    for name, counts in data["documents"].items()
    if counts.get("repeated")
  ]
  facts = (blocks.Facts({"exported model": str(exported)}),) if exported else ()
  if not data["heldout"]:
    return (*map(blocks.Text, notes), *facts)
  table, figure = before_after.heldout_blocks(data["heldout"], unit="documents")
  return (*table, *map(blocks.Text, notes), *facts, figure)


def _corpora_blocks(data: Mapping[str, Any]) -> blocks.Blocks:
  groups = []
  for name in CORPORA:
    facts = report_parts.corpus_facts(data["documents"].get(name, {}))
    for split, counts in data["rows"].get(name, {}).items():
      facts[f"tokens, {split}"] = counts["tokens"]
    if facts:
      groups.append(blocks.Section(formatting.words(name).capitalize(), (blocks.Facts(facts),)))
  return (blocks.Grid(tuple(groups)),) if groups else ()
