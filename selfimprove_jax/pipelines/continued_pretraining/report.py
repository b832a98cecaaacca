"""Reports continued pretraining: the loss on new text and on replay, before and after."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import selfimprove_jax.pipelines.continued_pretraining.pipeline as continued_pretraining
from selfimprove_jax.evaluation import statistics
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.pipelines.common import report_parts
from selfimprove_jax.pipelines.continued_pretraining.stages import CORPORA
from selfimprove_jax.report import formatting
from selfimprove_jax.report.report import (
  Axis,
  Block,
  Column,
  Facts,
  Figure,
  Grid,
  Interval,
  Label,
  Legend,
  Line,
  LinePlot,
  Number,
  Point,
  PointPlot,
  Report,
  Section,
  Stack,
  Style,
  Table,
  Text,
)
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Run

_BEFORE, _AFTER = Style("silver", "hollow"), Style("blue", "square")
_STYLES = {"before": _BEFORE, "after": _AFTER}


def report(run: Run) -> Report:
  """Reports a finished run, or the complete artifacts of an unfinished one.

  `data` holds the keys of `report_parts.run_data` and, where the stages they need are complete,
  `documents`, `rows` and `heldout` by corpus, `tuned` (parameters, steps, tokens, FLOPs, passes)
  and `curve`. Standard errors are over the held-out documents of one run; a document longer than a
  row counts once per piece. They do not cover the training seed, and they are too small if the
  documents of a group are alike.

  Raises:
    ValueError: a corpus has fewer than two held-out documents.
  """
  stages = continued_pretraining.stages(run.config)
  made = report_parts.complete_artifacts(run, stages)
  data = report_parts.run_data(run, stages, made) | _results(made)
  sentences = [_sentence(name, found) for name, found in data.get("heldout", {}).items()]
  return Report(
    title=run.config.title,
    command=run.command,
    lead=report_parts.lead(" ".join(sentences), stages, made),
    sections=(
      Section("Before and after", _heldout_blocks(data, made), in_summary=True),
      Section("Training", _training_blocks(data)),
      Section("Corpora", _corpora_blocks(data)),
      *report_parts.run_sections(run.command, data),
    ),
    data=data,
  )


def _results(made: Mapping[str, Artifact]) -> dict[str, Any]:
  def summaries(kind: str) -> dict[str, Any]:
    return {name: made[f"{name}/{kind}"].summary for name in CORPORA if f"{name}/{kind}" in made}

  data: dict[str, Any] = {"documents": summaries("documents"), "rows": summaries("rows")}
  if "tuned" in made:
    tuned = made["tuned"]
    keys = ("num_parameters", "steps_made", "tokens", "flops", "passes")
    data["tuned"] = {key: tuned.summary[key] for key in keys}
    data["heldout"] = {name: _losses(tuned, name) for name in CORPORA}
    data["curve"] = list(tuned.read_jsonl("curve.jsonl"))
  return data


def _losses(tuned: Artifact, name: str) -> dict[str, Any]:
  before, after = (
    {
      key: np.array([record[key] for record in tuned.read_jsonl(f"{when}-{name}.jsonl")])
      for key in ("nll", "tokens", "bytes")
    }
    for when in _STYLES
  )
  if len(before["nll"]) < 2:
    raise ValueError(
      f"{name} has {len(before['nll'])} held-out documents, but a standard error needs at least 2; "
      f"raise {name}.split.test_fraction in a new workdir"
    )
  counts, num_bytes = before["tokens"], before["bytes"]
  return {
    "documents": len(counts),
    "tokens": int(counts.sum()),
    "before": statistics.weighted_mean(before["nll"], counts).to_dict(),
    "after": statistics.weighted_mean(after["nll"], counts).to_dict(),
    "difference": statistics.paired_difference(after["nll"], before["nll"], counts).to_dict(),
    "bits_per_byte_before": statistics.bits_per_byte(before["nll"], num_bytes).to_dict(),
    "bits_per_byte_after": statistics.bits_per_byte(after["nll"], num_bytes).to_dict(),
  }


def _sentence(name: str, found: Mapping[str, Any]) -> str:
  """Says how the loss on a corpus changed, or that the change is within the noise."""
  difference = Estimate(**found["difference"])
  low, high = difference.interval95
  corpus = formatting.words(name)
  interval = f"95% interval {formatting.interval((low, high))} over documents"
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


def _heldout_blocks(data: Mapping[str, Any], made: Mapping[str, Artifact]) -> tuple[Block, ...]:
  if "heldout" not in data:
    return ()
  rows, points = [], []
  for name, found in data["heldout"].items():
    corpus, difference = formatting.words(name), Estimate(**found["difference"])
    rows.append(
      (
        corpus,
        Stack((_number(found["difference"], signed=True), Interval(*difference.interval95))),
        *(_number(found[when]) for when in _STYLES),
        *(_number(found[f"bits_per_byte_{when}"]) for when in _STYLES),
        found["documents"],
        Number(found["tokens"], form="short"),
      )
    )
    for when, style in _STYLES.items():
      estimate = Estimate(**found[when])
      points.append(Point(f"{corpus}, {when}", style, Number(estimate.value), estimate.interval95))
  columns = (
    Column("held out", is_text=True),
    Column("after \N{MINUS SIGN} before (95%)"),
    Column("nats/token before"),
    Column("after"),
    Column("bits/byte before", brief=False),
    Column("after", brief=False),
    Column("documents"),
    Column("tokens"),
  )
  tuned = data["tuned"]
  passes = ", ".join(
    f"{share:.2f} passes over {formatting.words(name)}" for name, share in tuned["passes"].items()
  )
  model = ()
  if "export" in made:
    model = (Facts({"exported model": str(made["export"].folder / "model")}),)
  return (
    Table(columns, tuple(rows)),
    Text(
      "Nats per token; negative differences are better. Standard errors are over held-out "
      "documents of one run and one seed."
    ),
    Text(f"{tuned['steps_made']:,} steps, {formatting.short(tuned['tokens'])} tokens: {passes}."),
    *model,
    Figure(
      "Held-out loss before and after",
      PointPlot(tuple(points), Axis("held-out nats per token (95% over documents)")),
      "Documents vary in difficulty, which widens these intervals; the differences in the table "
      "are paired by document.",
    ),
  )


def _number(found: Mapping[str, Any], *, signed: bool = False) -> Number:
  return Number(found["value"], found["stderr"], signed=signed)


def _training_blocks(data: Mapping[str, Any]) -> tuple[Block, ...]:
  if "tuned" not in data:
    return ()
  train, validation = report_parts.loss_curve(data["curve"])
  styles = {"training loss": Style("silver"), "validation loss": Style("blue", "square")}
  lines = tuple(
    Line(style, *zip(*points), dashed=dashed, markers="none" if dashed else "last")
    for style, points, dashed in zip(styles.values(), (train, validation), (True, False))
    if points
  )
  figure = Figure(
    "Loss of continued pretraining",
    LinePlot(lines, Axis("steps"), Axis("nats per token")),
    "Training loss on the mixture (dashed) and validation loss (solid).",
  )
  legend = Legend(tuple(Label(name, style) for name, style in styles.items()))
  tuned = data["tuned"]
  facts = {
    "parameters": tuned["num_parameters"],
    "optimizer steps": tuned["steps_made"],
    "tokens": tuned["tokens"],
    "FLOPs": Number(tuned["flops"], form="short"),
  }
  return (Grid((Section("", (legend, figure)), Facts(facts))),)


def _corpora_blocks(data: Mapping[str, Any]) -> tuple[Block, ...]:
  groups = []
  for name in CORPORA:
    facts = report_parts.corpus_facts(data["documents"].get(name, {}))
    for split, counts in data["rows"].get(name, {}).items():
      facts[f"tokens, {split}"] = counts["tokens"]
    if facts:
      groups.append(Section(formatting.words(name).capitalize(), (Facts(facts),)))
  return (Grid(tuple(groups)),) if groups else ()
