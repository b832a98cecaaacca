"""From a finished run of continued pretraining: what was learnt, and what was forgotten."""

from typing import Any

import numpy as np

from selfimprove_jax import artifacts, storage
from selfimprove_jax.evaluation import statistics
from selfimprove_jax.pipelines import continued_pretraining, provenance, stages
from selfimprove_jax.report import formatting

_WHEN = ("before", "after")


def make_and_print(config: dict[str, Any], run_folder: storage.Path, *, command: str) -> None:
  """Writes `report/report.json`, and prints its table and its path.

  Raises:
    artifacts.ArtifactError: a stage is unfinished.
  """
  report = make_report(config, run_folder, command=command)
  path = run_folder / "report" / "report.json"
  path.parent.mkdir(exist_ok=True)
  artifacts.write_json(path, report)
  print(describe(report))
  print(run_folder / "export" / "model")
  print(path)


def make_report(
  config: dict[str, Any], run_folder: storage.Path, *, command: str
) -> dict[str, Any]:
  """The held-out losses of both corpora before and after, and what the run was.

  Standard errors are over held-out documents (pieces, of those longer than a row) of this one run;
  they say nothing of another seed, and are too small where documents of one group are alike.

  Raises:
    artifacts.ArtifactError: a stage is unfinished.
    ValueError: a corpus has fewer than two held-out documents.
  """
  names = [stage.name for stage in continued_pretraining.build(config)]
  made = {name: artifacts.open_artifact(run_folder / name) for name in names}
  seconds = stages.seconds_spent(run_folder)
  tuned = made["tuned"]
  return {
    "title": config["title"],
    "command": command,
    "config": config,
    **provenance.describe(),
    "stages": [
      {
        "name": name,
        "seconds": seconds.get(name),
        "tokens": made[name].summary.get("tokens"),
        "flops": made[name].summary.get("flops"),
      }
      for name in names
    ],
    "documents": {
      name: made[f"{name}/documents"].summary for name in continued_pretraining.CORPORA
    },
    "rows": {name: made[f"{name}/rows"].summary for name in continued_pretraining.CORPORA},
    "tuned": {
      key: tuned.summary[key]
      for key in ("num_parameters", "steps_made", "tokens", "flops", "passes")
    },
    "heldout": {name: _losses(tuned, name) for name in continued_pretraining.CORPORA},
    "curve": list(tuned.read_jsonl("curve.jsonl")),
  }


def _losses(tuned, name):
  before, after = (
    {
      key: np.array([record[key] for record in tuned.read_jsonl(f"{when}-{name}.jsonl")])
      for key in ("nll", "tokens", "bytes")
    }
    for when in _WHEN
  )
  if len(before["nll"]) < 2:
    raise ValueError(
      f"{name} has {len(before['nll'])} held-out documents, a standard error needs at least 2: "
      f"raise {name}.split.test_fraction, in another workdir"
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


def describe(report: dict[str, Any]) -> str:
  """A table of the held-out losses, as plain text."""
  rows = [["held out", "documents", "tokens", *_WHEN, "after - before"]]
  for name, found in report["heldout"].items():
    difference = found["difference"]
    stderr = formatting.fixed(difference["stderr"])
    rows.append(
      [
        name.replace("_", " "),
        f"{found['documents']:,}",
        formatting.short(found["tokens"]),
        *(formatting.with_error(found[when]) for when in _WHEN),
        f"{formatting.signed(difference['value'])} \N{PLUS-MINUS SIGN} {stderr}",
      ]
    )
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = [
    "  ".join(
      cell.ljust(width) if column == 0 else cell.rjust(width)
      for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  ]
  tuned = report["tuned"]
  passes = ", ".join(
    f"{share:.2f} passes over {name.replace('_', ' ')}" for name, share in tuned["passes"].items()
  )
  return "\n".join(
    [
      lines[0],
      "-" * len(lines[0]),
      *lines[1:],
      "",
      "Nats per token; standard errors are over held-out documents, of one run and one seed.",
      f"{tuned['steps_made']:,} steps, {formatting.short(tuned['tokens'])} tokens: {passes}.",
    ]
  )
