"""From the artefacts of a finished run to its report: numbers, comparison, examples."""

from typing import Any

import numpy as np

from selfimprove_jax import artifacts, storage
from selfimprove_jax.evaluation import comparison
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.pipelines import provenance, sbp, stages
from selfimprove_jax.report.table import print_table
from selfimprove_jax.report.write import write_report

_NUM_EXAMPLES = 6
_NUM_CURVE_POINTS = 60
_MAX_SIMILARITIES = 20_000
# All-in costs by the kind of stage that they fall in.
_PARTS = {"seed": "seed", "embeddings": "embedding", "synthesizer": "tuning", "samples": "sampling"}


def make_and_print(config: dict[str, Any], run_folder: storage.Path, *, command: str) -> None:
  """Writes `report.json` and `report.html`, and prints the table and the page's path."""
  made = make_report(config, run_folder, command=command)
  page = write_report(made, run_folder / "report")
  print(print_table(made))
  print(page)


def make_report(
  config: dict[str, Any], run_folder: storage.Path, *, command: str
) -> dict[str, Any]:
  """The dict that `report.write.write_report` takes; the package `report` has the schema.

  Raises:
    artifacts.ArtifactError: a stage is unfinished.
  """
  names = [stage.name for stage in sbp.build(config)]
  made = {name: artifacts.open_artifact(run_folder / name) for name in names}
  seconds = stages.seconds_spent(run_folder)
  results = {name: _arm_result(name, config, made) for name in config["arms"]}
  tuned = made.get("synthesizer/nearest")
  conditioning = tuned.summary["conditioning"] if tuned else None
  compared = comparison.compare(
    list(results.values()),
    conditioning_gap=Estimate(**conditioning["gap"]) if conditioning else None,
    gate=config["synthesizer"]["gate"],
    **config["comparison"],
  )
  report: dict[str, Any] = {
    "title": config["title"],
    "command": command,
    "config": config,
    **provenance.describe(),
    "stages": [
      {
        "name": name,
        "seconds": seconds.get(name),
        "tokens": made[name].summary.get("tokens") if name != "tokens" else None,
        "flops": made[name].summary.get("flops"),
      }
      for name in names
    ],
    "corpus": _corpus(made),
    "tokenizer": made["tokenizer"].summary,
    "arms": {
      name: _arm(name, config, made, result, seconds.get(f"arms/{name}"))
      for name, result in results.items()
    },
    "comparison": compared,
    "synthesis": {
      source: _synthesis(made[f"samples/{source}"], made[f"synthetic/{source}"])
      for source in sbp.SYNTHETIC
      if f"synthetic/{source}" in made
    },
    "examples": _examples(made),
  }
  if conditioning:
    report["conditioning"] = conditioning
  if "relevance" in made:
    report["relevance"] = made["relevance"].summary
  if "pairs" in made:
    report["pairs"] = _pairs(made["pairs"])
    report["pair_examples"] = pair_examples(made["tokens"], made["pairs"], _NUM_EXAMPLES)
  return report


def _arm_result(name, config, made) -> comparison.ArmResult:
  artifact = made[f"arms/{name}"]
  summary = artifact.summary
  losses = list(artifact.read_jsonl("test.jsonl"))
  all_in = sum(made[stage].summary["flops"] for stage in sbp.all_in_stages(name, config))
  training, arm = config["training"], config["arms"][name]
  return comparison.ArmResult(
    name=name,
    label=arm["label"],
    nll_sums=np.array([record["nll"] for record in losses]),
    token_counts=np.array([record["tokens"] for record in losses]),
    byte_counts=np.array([record["bytes"] for record in losses]),
    train_tokens=summary["tokens"],
    steps=summary["steps_made"],
    schedule={**training, "seed": config["seed"], "num_parameters": summary["num_parameters"]},
    train_flops=summary["flops"],
    all_in_flops=all_in,
    weight_decay=arm["weight_decay"],
    dropout=arm["dropout_rate"],
    best_validation=summary["best_validation"],
    final_validation=summary["final_validation"],
  )


def _arm(name, config, made, result, seconds):
  parts = {"arm": result.train_flops}
  for stage in sbp.all_in_stages(name, config)[:-1]:
    part = _PARTS[stage.split("/")[0]]
    parts[part] = parts.get(part, 0) + made[stage].summary["flops"]
  return {
    "label": result.label,
    "train_tokens": result.train_tokens,
    "steps": result.steps,
    "train_flops": result.train_flops,
    "all_in_flops": result.all_in_flops,
    "flops_parts": parts,
    "seconds": seconds,
    "weight_decay": result.weight_decay,
    "dropout_rate": result.dropout,
    "passes": made[f"arms/{name}"].summary["passes"],
    "evals": comparison.evals(result),
    "best_validation": result.best_validation,
    "final_validation": result.final_validation,
    "curve": _curve(list(made[f"arms/{name}"].read_jsonl("curve.jsonl")), result),
  }


def _curve(records, result):
  """Every evaluation, and the training loss as the mean of its steps in each of some windows."""
  tokens_per_step = result.train_tokens // result.steps
  points = [
    {
      "step": record["step"],
      "tokens": record["step"] * tokens_per_step,
      "train_loss": None,
      "validation_loss": record["validation/loss"],
    }
    for record in records
    if "validation/loss" in record
  ]
  train = [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]
  window = max(1, len(train) // _NUM_CURVE_POINTS)
  for start in range(0, len(train) - window + 1, window):
    steps, values = zip(*train[start : start + window])
    points.append(
      {
        "step": steps[-1],
        "tokens": steps[-1] * tokens_per_step,
        "train_loss": sum(values) / len(values),
        "validation_loss": None,
      }
    )
  return sorted(points, key=lambda point: point["step"])


def _corpus(made):
  summary, tokens = made["documents"].summary, made["tokens"].summary
  facts = {k: v for k, v in summary.items() if not isinstance(v, dict)}
  for measure, by_role in summary.items():
    if isinstance(by_role, dict):
      facts |= {f"{measure}, {role}": value for role, value in by_role.items()}
  return facts | {f"tokens, {part}": counts["tokens"] for part, counts in tokens.items()}


def _pairs(artifact):
  similarities = [pair["similarity"] for pair in artifact.read_jsonl("unique.jsonl")]
  stride = -(-len(similarities) // _MAX_SIMILARITIES)
  return {
    "counts": artifact.summary["counts"]["unique"],
    "recall": artifact.summary["recall"]["unique"],
    "similarities": similarities[::stride],
  }


def _synthesis(samples, synthetic):
  return {
    "counts": synthetic.summary["counts"],
    "finish_reasons": samples.summary["finish_reasons"],
    "quality": synthetic.summary["quality"],
  }


def _examples(made):
  examples = []
  for source in sbp.SYNTHETIC:
    if f"synthetic/{source}" in made:
      records = synthetic_examples(made[f"synthetic/{source}"], _NUM_EXAMPLES)
      examples += [{"source": source, "similarity": None, **record} for record in records]
  return examples


def synthetic_examples(artifact: artifacts.Artifact, limit: int) -> list[dict[str, Any]]:
  """The first synthetic documents that were kept, each with its seed."""
  found = []
  for record in artifact.read_jsonl("documents.jsonl"):
    if len(found) == limit:
      break
    found.append({k: record[k] for k in ("seed_id", "seed_text", "text", "finish_reason")})
  return found


def pair_examples(
  tokens: artifacts.Artifact, pairs: artifacts.Artifact, limit: int
) -> list[dict[str, Any]]:
  """Pairs spread evenly over the list, each with its texts."""
  chosen = list(pairs.read_jsonl("unique.jsonl"))
  chosen = chosen[:: max(1, len(chosen) // limit)][:limit]
  wanted = {pair[d] for pair in chosen for d in ("d1", "d2")}
  texts = {r["id"]: r["text"] for r in tokens.read_jsonl("unique.jsonl") if r["id"] in wanted}
  return [
    {
      "d1": pair["d1"],
      "d2": pair["d2"],
      "d1_text": texts[pair["d1"]],
      "d2_text": texts[pair["d2"]],
      "similarity": pair["similarity"],
    }
    for pair in chosen
  ]
