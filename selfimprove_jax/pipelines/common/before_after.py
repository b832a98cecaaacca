"""Parts of reports that compare held-out losses before and after a training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from selfimprove_jax.evaluation import statistics
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.pipelines.common import report_parts
from selfimprove_jax.pipelines.common.report_parts import estimate
from selfimprove_jax.report import blocks, formatting
from selfimprove_jax.runs.artifacts import Artifact

STYLES = {"before": blocks.Style("silver", "hollow"), "after": blocks.Style("blue", "square")}


@dataclasses.dataclass(frozen=True)
class Training:
  """The title and caption of the plot of training losses."""

  title: str
  caption: str


def losses(artifact: Artifact, before_shard: str, after_shard: str) -> dict[str, Any]:
  """Compares the losses of held-out documents before and after, paired by document.

  The shards are what `models.loss_records` yields. Standard errors are over groups of documents.
  """
  before, after = (report_parts.read_losses(artifact, s) for s in (before_shard, after_shard))
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


def sentence(name: str, found: Mapping[str, Any] | None) -> str:
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


def heldout_blocks(
  heldout: Mapping[str, Mapping[str, Any]], *, unit: str
) -> tuple[blocks.Blocks, blocks.Figure]:
  """Returns a table with a note, and a figure, of the results of `losses`.

  Args:
    heldout: corpus -> `losses`.
    unit: what the corpora consist of, such as documents.
  """
  rows, points = [], []
  for name, found in heldout.items():
    corpus = formatting.words(name)
    difference = estimate(found["difference"], signed=True)
    interval = blocks.Interval(*Estimate(**found["difference"]).interval95)
    points += [(f"{corpus}, {when}", style, found[when]) for when, style in STYLES.items()]
    rows.append(
      {
        "held out": corpus,
        "after \N{MINUS SIGN} before (95%)": blocks.Stack((difference, interval)),
        "nats/token before": estimate(found["before"]),
        "after": estimate(found["after"]),
        "bits/byte before": estimate(found["bits_per_byte_before"]),
        "bits/byte after": estimate(found["bits_per_byte_after"]),
        unit: found["documents"],
        "groups": found["groups"],
        "tokens": blocks.Number(found["tokens"], form="short"),
      }
    )
  note = (
    "Nats per token; negative differences are better. Standard errors are over the groups of "
    f"held-out {unit} of one run and one seed."
  )
  page_only = ("bits/byte before", "bits/byte after")
  table = blocks.table(rows, text=("held out",), page_only=page_only)
  figure = blocks.Figure(
    "Held-out loss before and after",
    report_parts.loss_plot(points),
    f"{unit.capitalize()} vary in difficulty, which widens these intervals; the differences in the "
    "table are paired.",
  )
  return (table, blocks.Text(note)), figure


def training_blocks(data: Mapping[str, Any], names: Training) -> blocks.Blocks:
  """Plots the training loss and lists what the training cost; nothing without `tuned` in `data`."""
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
    names.title,
    blocks.LinePlot(tuple(lines), blocks.Axis("steps"), blocks.Axis("nats per token")),
    names.caption,
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
