"""Reports continued pretraining: the loss on new text and on replay, before and after."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import selfimprove_jax.pipelines.continued_pretraining.pipeline as continued_pretraining
from selfimprove_jax.evaluation import statistics
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.evaluation.tasks.task import Task
from selfimprove_jax.pipelines.common import benchmark_results, report_parts
from selfimprove_jax.pipelines.common.report_parts import estimate
from selfimprove_jax.pipelines.continued_pretraining.stages import CORPORA
from selfimprove_jax.report import blocks, formatting
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Run

_MODELS = {"initial": "before", "tuned": "after"}
_STYLES = {"before": blocks.Style("silver", "hollow"), "after": blocks.Style("blue", "square")}


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
    sentences = [_sentence(name, data["heldout"].get(name)) for name in CORPORA]
  return blocks.Report(
    title=run.config.title,
    command=run.command,
    lead=report_parts.lead(" ".join(sentences), stages, made),
    sections=(
      blocks.Section("Before and after", _heldout_blocks(data, made), in_summary=True),
      *_benchmark_sections(tasks, data),
      blocks.Section("Training", _training_blocks(data)),
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
    data["heldout"] = {name: _losses(tuned, name) for name in scored}
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
  label = blocks.Label("continued pretraining", _STYLES["after"])
  table = benchmark_results.table(data["benchmarks"], _MODELS)
  curves = benchmark_results.curves(tasks, data["dynamics"], {"tuned": label})
  return (
    blocks.Section("Benchmarks", table, in_summary=True),
    blocks.Section("Benchmarks during continued pretraining", curves),
  )


def _losses(tuned: Artifact, name: str) -> dict[str, Any]:
  before, after = (report_parts.read_losses(tuned, f"{when}-{name}.jsonl") for when in _STYLES)
  counts, num_bytes, of = before["tokens"], before["bytes"], {"groups": before["group"]}
  return {
    "documents": len(counts),
    "groups": len(np.unique(before["group"])),
    "tokens": int(counts.sum()),
    "before": statistics.weighted_mean(before["nll"], counts, **of).to_dict(),
    "after": statistics.weighted_mean(after["nll"], counts, **of).to_dict(),
    "difference": statistics.paired_difference(after["nll"], before["nll"], counts, **of).to_dict(),
    "bits_per_byte_before": statistics.bits_per_byte(before["nll"], num_bytes, **of).to_dict(),
    "bits_per_byte_after": statistics.bits_per_byte(after["nll"], num_bytes, **of).to_dict(),
  }


def _sentence(name: str, found: Mapping[str, Any] | None) -> str:
  """Writes how the loss on a corpus changed, or why that is not known."""
  corpus = formatting.words(name)
  if found is None:
    return f"Nothing of {corpus} was held out, so its loss was not measured."
  difference = Estimate(**found["difference"])
  low, high = difference.interval95
  interval = f"95% interval {formatting.interval((low, high))} over "
  interval += "1 group" if found["groups"] == 1 else f"{found['groups']:,} groups"
  if low <= 0 <= high:
    return (
      f"The held-out loss on {corpus} did not change measurably: "
      f"{formatting.signed(difference.value)} nats per token, {interval}."
    )
  verb = "fell" if high < 0 else "rose"
  return (
    f"The held-out loss on {corpus} {verb} from {formatting.fixed(found['before']['value'])} to "
    f"{formatting.fixed(found['after']['value'])} nats per token "
    f"({formatting.signed(difference.value)}, {interval})."
  )


def _heldout_blocks(data: Mapping[str, Any], made: Mapping[str, Artifact]) -> blocks.Blocks:
  if "tuned" not in data:
    return ()
  rows, points = [], []
  for name, found in data["heldout"].items():
    corpus = formatting.words(name)
    difference = estimate(found["difference"], signed=True)
    interval = blocks.Interval(*Estimate(**found["difference"]).interval95)
    points += [(f"{corpus}, {when}", style, found[when]) for when, style in _STYLES.items()]
    rows.append(
      {
        "held out": corpus,
        "after \N{MINUS SIGN} before (95%)": blocks.Stack((difference, interval)),
        "nats/token before": estimate(found["before"]),
        "after": estimate(found["after"]),
        "bits/byte before": estimate(found["bits_per_byte_before"]),
        "bits/byte after": estimate(found["bits_per_byte_after"]),
        "documents": found["documents"],
        "groups": found["groups"],
        "tokens": blocks.Number(found["tokens"], form="short"),
      }
    )
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
  if not rows:
    return (*map(blocks.Text, notes), *facts)
  return (
    blocks.table(rows, text=("held out",), page_only=("bits/byte before", "bits/byte after")),
    blocks.Text(
      "Nats per token; negative differences are better. Standard errors are over the groups of "
      "held-out documents of one run and one seed."
    ),
    *map(blocks.Text, notes),
    *facts,
    blocks.Figure(
      "Held-out loss before and after",
      report_parts.loss_plot(points),
      "Documents vary in difficulty, which widens these intervals; the differences in the table "
      "are paired by document.",
    ),
  )


def _training_blocks(data: Mapping[str, Any]) -> blocks.Blocks:
  if "tuned" not in data:
    return ()
  train, validation = report_parts.loss_curve(data["curve"])
  styles = {
    "training loss": blocks.Style("silver"),
    "validation loss": blocks.Style("blue", "square"),
  }
  silver, blue = styles.values()
  lines = []
  if train:
    lines.append(blocks.Line(silver, *zip(*train), dashed=True, markers="none"))
  if validation:
    lines.append(blocks.Line(blue, *zip(*validation)))
  figure = blocks.Figure(
    "Loss of continued pretraining",
    blocks.LinePlot(tuple(lines), blocks.Axis("steps"), blocks.Axis("nats per token")),
    "Training loss on the mixture (dashed) and validation loss (solid).",
  )
  shown = dict(zip(styles, (train, validation)))
  legend = blocks.Legend(tuple(blocks.Label(n, style) for n, style in styles.items() if shown[n]))
  tuned = data["tuned"]
  facts = {
    "parameters": tuned["num_parameters"],
    "optimizer steps": tuned["steps_made"],
    "tokens": tuned["tokens"],
    "FLOPs": blocks.Number(tuned["flops"], form="short"),
  }
  return (blocks.Grid((blocks.Section("", (legend, figure)), blocks.Facts(facts))),)


def _corpora_blocks(data: Mapping[str, Any]) -> blocks.Blocks:
  groups = []
  for name in CORPORA:
    facts = report_parts.corpus_facts(data["documents"].get(name, {}))
    for split, counts in data["rows"].get(name, {}).items():
      facts[f"tokens, {split}"] = counts["tokens"]
    if facts:
      groups.append(blocks.Section(formatting.words(name).capitalize(), (blocks.Facts(facts),)))
  return (blocks.Grid(tuple(groups)),) if groups else ()
