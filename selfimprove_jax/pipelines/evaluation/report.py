"""Reports an evaluation: a table of metrics with standard errors, and the examples behind it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import selfimprove_jax.pipelines.common.sbp_table as sbp_table
import selfimprove_jax.pipelines.evaluation.pipeline as evaluation
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.evaluation.tasks import metrics
from selfimprove_jax.pipelines.common import report_parts
from selfimprove_jax.report import blocks
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Run

_NUM_EXAMPLES = 3
_NUM_GENERATIONS = 5
_SHOWN_CHARS = 1500  # of a prompt, from its end


def report(run: Run) -> blocks.Report:
  """Reports a finished run, or the complete artifacts of an unfinished one.

  `data` holds the keys of `report_parts.run_data`, and `evals.TASK/METRIC` with value, standard
  error, unit, groups, and chance level (None where it is no accuracy).
  """
  stages = evaluation.stages(run.config)
  made = report_parts.complete_artifacts(run, stages)
  names = [name for name in run.config.named_tasks if f"metrics/{name}" in made]
  data = report_parts.run_data(run, stages, made) | {"evals": _evals(names, made)}
  return blocks.Report(
    title=f"{run.config.title}: {run.config.checkpoint}",
    command=run.command,
    lead=report_parts.lead(sbp_table.sentence(data["evals"]), stages, made),
    sections=(
      blocks.Section("Results", _results(names, data, made), in_summary=True),
      blocks.Section("SBP's benchmarks", sbp_table.table(data["evals"])),
      *(blocks.Section(f"Examples of {name}", _examples(name, made)) for name in names),
      *report_parts.run_sections(run.command, data),
    ),
    data=data,
  )


def _evals(names: Sequence[str], made: Mapping[str, Artifact]) -> dict[str, Any]:
  return {
    f"{name}/{metric}": {**found, "chance": made[f"metrics/{name}"].summary["chance"][metric]}
    for name in names
    for metric, found in made[f"metrics/{name}"].summary["metrics"].items()
  }


def _results(
  names: Sequence[str], data: Mapping[str, Any], made: Mapping[str, Artifact]
) -> blocks.Blocks:
  rows = []
  for name in names:
    summary, scores = made[f"metrics/{name}"].summary, made[f"scores/{name}"].summary
    for metric, found in summary["metrics"].items():
      estimate = Estimate(**found)
      form = {"form": "percent", "digits": 1} if metrics.is_accuracy(metric) else {}
      rows.append(
        {
          "task/metric": f"{name}/{metric}",
          "value": blocks.Number(estimate.value, estimate.stderr, **form),
          "chance": blocks.Number(summary["chance"][metric], form="percent", digits=1),
          "unit": found["unit"],
          "examples": scores["examples"],
          "groups": found["num_groups"],
          "cut": scores["truncated"],
          "with equal choices": summary["equal_choices"],
        }
      )
  if not rows:
    return ()
  note = (
    "± is the standard error over groups. `cut` counts requests whose context lost its beginning, "
    "because it is longer than the model's window. `acc_norm` divides log-likelihoods by "
    "characters, `acc_bytes` by UTF-8 bytes. Perplexities per token can only be compared between "
    "models with one tokenizer."
  )
  page_only = ("unit", "groups", "cut", "with equal choices")
  table = blocks.table(rows, text=("task/metric", "unit"), page_only=page_only)
  return table, blocks.Text(note)


def _examples(name: str, made: Mapping[str, Artifact]) -> blocks.Blocks:
  records = list(made[f"scores/{name}"].records())
  worst, best = metrics.worst_and_best(records, _NUM_EXAMPLES)
  pairs = tuple(
    blocks.TextPair(_excerpt("worst", left), _excerpt("best", right))
    for left, right in zip(worst, best)
  )
  generations = [
    {
      "example": record["id"],
      "raw generation": repr(record["generation"]),
      "read as": record["prediction"],
      "accepted": ", ".join(record["answers"][:3]),
      "correct": record["correct"],
    }
    for record in records[:_NUM_GENERATIONS]
    if "generation" in record
  ]
  if not generations:
    return pairs
  return (blocks.table(generations, text=tuple(generations[0])), *pairs)


def _excerpt(heading: str, record: Mapping[str, Any]) -> blocks.Excerpt:
  prompt = record["prompts"][0]
  if "generation" in record:
    about = f"generated {record['generation']!r}; accepted: {', '.join(record['answers'][:5])}"
  elif "choices" in record:
    scored = [
      f"{'* ' if index in record['gold'] else ''}{text!r} {logprob:.2f}"
      for index, (text, logprob) in enumerate(zip(record["choices"], record["logprobs"]))
    ]
    about = f"log-likelihoods in nats, * is right: {'; '.join(scored)}"
    if len(record["prompts"]) > 1:
      prompt = "\n".join(record["prompts"])
  else:
    nats = -float(np.sum(record["logprobs"])) / record["num_tokens"][0]
    about = f"{nats:.3f} nats per token"
  return blocks.Excerpt(f"{heading}: {record['id']}", about, prompt[-_SHOWN_CHARS:])
