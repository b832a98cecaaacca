"""Reports an SBP run: the arms, the controls, the synthetic documents, and their cost."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

import selfimprove_jax.pipelines.sbp.comparison as comparison
import selfimprove_jax.pipelines.sbp.pipeline as sbp
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.pipelines.common import report_parts
from selfimprove_jax.pipelines.sbp.config import SYNTHETIC, Config
from selfimprove_jax.report import formatting
from selfimprove_jax.report.formatting import PLUS_MINUS, plus_minus
from selfimprove_jax.report.report import (
  Axis,
  Bar,
  BarPlot,
  Block,
  Cell,
  Claim,
  Column,
  Excerpt,
  Facts,
  Figure,
  Grid,
  Histogram,
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
  TextPair,
)
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Run
from selfimprove_jax.runtime.config import to_json

_NUM_EXAMPLES = 6
_MAX_SIMILARITIES = 20_000
# Arms in the order in which they are shown; others follow by name, with the further styles.
_STYLES = {
  "baseline": Style("gray", "circle"),
  "sbp": Style("blue", "square"),
  "unconditional": Style("orange", "up"),
  "random_pairs": Style("pink", "down"),
  "oracle": Style("green", "diamond"),
  "baseline_all_in": Style("silver", "hollow"),
}
_FURTHER_STYLES = tuple(Style(color, "plus") for color in ("purple", "rust", "teal"))
# The parts of an arm's all-in cost, by the first part of the names of the stages that they sum.
_PARTS = {"seed": "seed", "embeddings": "embedding", "synthesizer": "tuning", "samples": "sampling"}
_PART_STYLES = {
  "seed": Style("silver"),
  "embedding": Style("pink"),
  "tuning": Style("blue"),
  "sampling": Style("sky"),
  "arm": Style("gray"),
}
_NATS = Axis("nats per token")


def report(run: Run) -> Report:
  """Reports a finished run, or the complete artifacts of an unfinished one.

  `data` holds the keys of `report_parts.run_data` and, where the stages they need are complete:
    corpus, tokenizer: name -> count or fact
    arms: name -> label, train_tokens, steps, train_flops, all_in_flops, flops_parts, seconds,
      weight_decay, dropout_rate, passes (source -> number of epochs), best_validation,
      final_validation, evals ("heldout_nll" and "bits_per_byte"), curve
    comparison: the result of `comparison.compare`
    conditioning: the result of `comparison.conditioning_gap`
    relevance, pairs, synthesis, examples, pair_examples
  Estimates are {"value", "stderr", "unit"}.
  """
  stages = sbp.stages(run.config)
  made = report_parts.complete_artifacts(run, stages)
  data = report_parts.run_data(run, stages, made) | _results(run.config, made, run.seconds())
  compared = data.get("comparison", {"verdict": "", "claims": [], "caveats": []})
  claims = [Claim(c["claim"], c["holds"], c["sentence"]) for c in compared["claims"]]
  return Report(
    title=run.config.title,
    command=run.command,
    lead=report_parts.lead(compared["verdict"], stages, made),
    claims=tuple(claims),
    caveats=tuple(compared["caveats"]),
    sections=(*result_sections(data), *report_parts.run_sections(run.command, data)),
    data=data,
  )


def result_sections(data: Mapping[str, Any]) -> tuple[Section, ...]:
  """Returns the sections about results; those whose stages have not run have no blocks."""
  labels = _labels(data.get("arms", {}))
  return (
    Section("The arms", _arms_blocks(data, labels), in_summary=True),
    Section("Controls: what else could explain a gain", _control_blocks(data, labels)),
    Section("At equal all-in FLOPs", _all_in_blocks(data, labels)),
    Section("Corpus", _corpus_blocks(data)),
    Section("Pairs", _pair_blocks(data)),
    Section("Synthetic documents", _synthesis_blocks(data, labels)),
  )


# --- from artifacts to numbers


def _results(
  config: Config, made: Mapping[str, Artifact], seconds: Mapping[str, float]
) -> dict[str, Any]:
  data: dict[str, Any] = {}
  if "documents" in made:
    data["corpus"] = _corpus(made)
  if "tokenizer" in made:
    data["tokenizer"] = made["tokenizer"].summary
  results = {
    name: _arm_result(name, config, made)
    for name in config.arms
    if made.keys() >= set(sbp.all_in_stages(name, config))
  }
  conditioning = None
  if "synthesizer/nearest" in made:
    conditioning = data["conditioning"] = made["synthesizer/nearest"].summary["conditioning"]
  if "baseline" in results:
    data["arms"] = {
      name: _arm(name, config, made, result, seconds.get(f"arms/{name}"))
      for name, result in results.items()
    }
    data["comparison"] = comparison.compare(
      list(results.values()),
      seed_noise=config.comparison.seed_noise,
      conditioning_gap=Estimate(**conditioning["gap"]) if conditioning else None,
      gate=config.synthesizer.gate,
    )
  sources = [s for s in SYNTHETIC if made.keys() >= {f"samples/{s}", f"synthetic/{s}"}]
  data["synthesis"] = {
    source: {
      "counts": made[f"synthetic/{source}"].summary["counts"],
      "finish_reasons": made[f"samples/{source}"].summary["finish_reasons"],
      "quality": made[f"synthetic/{source}"].summary["quality"],
    }
    for source in sources
  }
  data["examples"] = [
    {"source": source, **example}
    for source in sources
    for example in _synthetic_examples(made[f"synthetic/{source}"])
  ]
  if "relevance" in made:
    data["relevance"] = made["relevance"].summary
  if made.keys() >= {"tokens", "pairs"}:
    data["pairs"] = _pairs(made["pairs"])
    data["pair_examples"] = _pair_examples(made["tokens"], made["pairs"])
  return data


def _arm_result(name: str, config: Config, made: Mapping[str, Artifact]) -> comparison.ArmResult:
  artifact, arm = made[f"arms/{name}"], config.arms[name]
  summary, losses = artifact.summary, list(artifact.read_jsonl("test.jsonl"))
  shared = {"seed": config.seed, "num_parameters": summary["num_parameters"]}
  return comparison.ArmResult(
    name=name,
    label=arm.label,
    nll_sums=np.array([record["nll"] for record in losses]),
    token_counts=np.array([record["tokens"] for record in losses]),
    byte_counts=np.array([record["bytes"] for record in losses]),
    train_tokens=summary["tokens"],
    steps=summary["steps_made"],
    schedule={**to_json(config.training), **shared},
    train_flops=summary["flops"],
    all_in_flops=sum(made[s].summary["flops"] for s in sbp.all_in_stages(name, config)),
    weight_decay=arm.weight_decay,
    dropout=arm.dropout_rate,
    best_validation=summary["best_validation"],
    final_validation=summary["final_validation"],
  )


def _arm(
  name: str,
  config: Config,
  made: Mapping[str, Artifact],
  result: comparison.ArmResult,
  seconds: float | None,
) -> dict[str, Any]:
  parts = {"arm": result.train_flops}
  for stage in sbp.all_in_stages(name, config)[:-1]:
    part = _PARTS[stage.split("/")[0]]
    parts[part] = parts.get(part, 0) + made[stage].summary["flops"]
  artifact = made[f"arms/{name}"]
  kept = ("label", "train_tokens", "steps", "train_flops", "all_in_flops", "weight_decay")
  return {
    **{field: getattr(result, field) for field in (*kept, "best_validation", "final_validation")},
    "dropout_rate": result.dropout,
    "flops_parts": parts,
    "seconds": seconds,
    "passes": artifact.summary["passes"],
    "evals": comparison.evals(result),
    "curve": _curve(list(artifact.read_jsonl("curve.jsonl")), result),
  }


def _curve(
  records: list[dict[str, Any]], result: comparison.ArmResult
) -> list[dict[str, float | int | None]]:
  train, validation = report_parts.loss_curve(records)
  tokens_per_step = result.train_tokens // result.steps
  points = [(step, None, loss) for step, loss in validation]
  points += [(step, loss, None) for step, loss in train]
  return [
    {
      "step": step,
      "tokens": step * tokens_per_step,
      "train_loss": train_loss,
      "validation_loss": validation_loss,
    }
    for step, train_loss, validation_loss in sorted(points, key=lambda point: point[0])
  ]


def _corpus(made: Mapping[str, Artifact]) -> dict[str, Any]:
  facts = report_parts.corpus_facts(made["documents"].summary)
  if "tokens" in made:
    counts = made["tokens"].summary
    facts |= {f"tokens, {part}": found["tokens"] for part, found in counts.items()}
  return facts


def _pairs(artifact: Artifact) -> dict[str, Any]:
  similarities = [pair["similarity"] for pair in artifact.read_jsonl("unique.jsonl")]
  stride = max(1, -(-len(similarities) // _MAX_SIMILARITIES))
  return {
    "counts": artifact.summary["counts"]["unique"],
    "recall": artifact.summary["recall"]["unique"],
    "similarities": similarities[::stride],
  }


def _synthetic_examples(artifact: Artifact) -> list[dict[str, Any]]:
  """Returns the first synthetic documents that passed the filters, with their seeds."""
  found = []
  for record in artifact.read_jsonl("documents.jsonl"):
    if len(found) == _NUM_EXAMPLES:
      break
    found.append({key: record[key] for key in ("seed_id", "seed_text", "text", "finish_reason")})
  return found


def _pair_examples(tokens: Artifact, pairs: Artifact) -> list[dict[str, Any]]:
  """Returns pairs from evenly spaced places of the list, with their texts."""
  chosen = list(pairs.read_jsonl("unique.jsonl"))
  chosen = chosen[:: max(1, len(chosen) // _NUM_EXAMPLES)][:_NUM_EXAMPLES]
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


# --- from numbers to blocks


def _labels(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Label]:
  """Returns the label and style of every arm, in the order in which arms are shown."""
  further = sorted(name for name in arms if name not in _STYLES)
  styles = _STYLES | dict(zip(further, itertools.cycle(_FURTHER_STYLES)))
  return {name: Label(arms[name]["label"], styles[name]) for name in styles if name in arms}


def _arms_blocks(data: Mapping[str, Any], labels: Mapping[str, Label]) -> tuple[Block, ...]:
  if not labels:
    return ()
  compared = data["comparison"]
  columns = (
    Column("arm", is_text=True),
    Column("difference to the baseline (95%)"),
    Column("held-out nats/token"),
    Column("bits/byte"),
    Column("oracle's gain recovered", brief=False),
    Column("validation, best / final", brief=False),
    Column("passes over its data", brief=False),
    Column("training tokens"),
    Column("FLOPs, own / all-in"),
    Column("weight decay / dropout"),
  )
  differences, recovered = compared["differences"], compared["recovered"]
  rows = tuple(
    _arm_row(label, data["arms"][name], differences.get(name), recovered.get(name))
    for name, label in labels.items()
  )
  return (
    Text(
      f"Loss on {compared['num_documents']:,} held-out documents ({compared['num_tokens']:,} "
      f"tokens) at the end of training, {PLUS_MINUS} standard error over documents. "
      "Differences are paired by document; negative is better."
    ),
    Table(columns, rows),
    Legend(tuple(labels.values())),
    Grid((_curves_figure(data, labels), _points_figure(data, labels))),
  )


def _arm_row(
  label: Label,
  arm: Mapping[str, Any],
  difference: Mapping[str, Any] | None,
  share: Mapping[str, Any] | None,
) -> tuple[Cell, ...]:
  return (
    label,
    Stack((_signed(difference), Interval(*difference["interval"]))) if difference else None,
    _estimate(arm["evals"]["heldout_nll"]),
    _estimate(arm["evals"]["bits_per_byte"]),
    Stack((Number(share["value"], form="percent"), plus_minus(share["stderr"], form="percent")))
    if share
    else None,
    Stack((Number(arm["best_validation"]), Number(arm["final_validation"]))),
    Stack(tuple(f"{formatting.words(s)} {passes:.3g}" for s, passes in arm["passes"].items())),
    Number(arm["train_tokens"], form="short"),
    Stack((Number(arm["train_flops"], form="short"), Number(arm["all_in_flops"], form="short"))),
    Stack((arm["weight_decay"], arm["dropout_rate"])),
  )


def _estimate(found: Mapping[str, Any]) -> Stack:
  return Stack((Number(found["value"]), plus_minus(found["stderr"])))


def _signed(difference: Mapping[str, Any]) -> Number:
  return Number(difference["value"], signed=True)


def _curves_figure(data: Mapping[str, Any], labels: Mapping[str, Label]) -> Figure:
  lines = []
  for name, label in labels.items():
    for key, dashed in (("train_loss", True), ("validation_loss", False)):
      curve = data["arms"][name]["curve"]
      points = [(point["tokens"], point[key]) for point in curve if point[key] is not None]
      if points:
        markers = "none" if dashed else "last"
        lines.append(Line(label.style, *zip(*points), dashed=dashed, markers=markers))
  return Figure(
    "Loss of every arm during its training",
    LinePlot(tuple(lines), Axis("training tokens", "short"), _NATS, skip_start=True),
    "Validation loss (solid) and training loss (dashed) over the training tokens of each arm. The "
    "first steps are cut off.",
  )


def _points_figure(data: Mapping[str, Any], labels: Mapping[str, Label]) -> Figure:
  points = []
  for name, label in labels.items():
    found = Estimate(**data["arms"][name]["evals"]["heldout_nll"])
    points.append(Point(label.text, label.style, Number(found.value), found.interval95))
  return Figure(
    "Held-out loss of every arm",
    PointPlot(tuple(points), Axis("held-out nats per token (95% over documents)")),
    "Each arm by itself. Documents vary in difficulty, which widens these intervals; the paired "
    "differences below compare the arms.",
  )


def _control_blocks(data: Mapping[str, Any], labels: Mapping[str, Label]) -> tuple[Block, ...]:
  conditioning, relevance = data.get("conditioning"), data.get("relevance")
  blocks: list[Block] = []
  left: list[Block] = []
  if conditioning:
    gap = conditioning["gap"]
    if gap["value"] < conditioning["gate"]:
      blocks.append(
        Text(
          f"The conditioning gap is {formatting.fixed(gap['value'])} nats per token, below the "
          f"gate of {conditioning['gate']:g}. A synthesizer that does not use d1 can at best match "
          "unconditional samples: any gain here does not come from related documents.",
          "warning",
        )
      )
    facts = {
      "NLL of d2 after its neighbor": Number(conditioning["true_nll"]),
      "NLL of d2 after a random d1": Number(conditioning["random_nll"]),
      "conditioning gap (nats/token)": Number(gap["value"], gap["stderr"]),
      "gate": conditioning["gate"],
      "held-out pairs": conditioning["num_pairs"],
    }
    left.append(Section("Does the synthesizer use d1?", (Facts(facts),)))
  if relevance:
    left.append(Section("Is a sample about its seed?", _relevance_blocks(relevance)))
  right = _differences_section(data, labels)
  columns = [Section("", tuple(left))] if left else []
  columns += [right] if right.blocks else []
  return (*blocks, *((Grid(tuple(columns)),) if columns else ()))


def _relevance_blocks(relevance: Mapping[str, Any]) -> tuple[Block, ...]:
  rows = []
  for label, key in (
    ("a real pair", "real"),
    ("a sample and its seed", "own"),
    ("a sample and a random seed", "random"),
  ):
    found = relevance[key]
    rows.append((label, Bar(found["value"]), Number(found["value"], found["stderr"])))
  columns = (Column("", is_text=True), Column("", is_text=True), Column("cosine"))
  share = formatting.percent(relevance["retained_share"], 1)
  return (
    Table(columns, tuple(rows)),
    Text(
      f"A sample keeps {share} of the similarity of a real pair, after subtracting the similarity "
      "to a random seed.",
      "note",
    ),
  )


def _differences_section(data: Mapping[str, Any], labels: Mapping[str, Label]) -> Section:
  compared = data.get("comparison")
  if not compared:
    return Section("Differences", ())
  differences, oracle = compared["differences"], compared["oracle"]
  shown = [differences[name] for name in labels if name in differences and name != oracle]
  shown += compared["versus"].values()
  points = tuple(
    Point(
      f"{labels[found['first']].text} \N{MINUS SIGN} {labels[found['second']].text}",
      labels[found["first"]].style,
      _signed(found),
      tuple(found["interval"]),
      tuple(found["document_interval"]),
    )
    for found in shown
  )
  if not points:
    return Section("Differences", ())
  caption = (
    "First arm minus second, paired by document. Thick: 95% over documents; thin: including "
    f"{compared['seed_noise']:g} nats of training-seed noise, which decides the claims."
  )
  if oracle:
    caption += f" The oracle, at {formatting.signed(differences[oracle]['value'])}, is not drawn."
  space = "\N{NO-BREAK SPACE}" * 4
  axis = Axis(f"\N{LEFTWARDS ARROW} better{space}nats per token{space}worse \N{RIGHTWARDS ARROW}")
  figure = Figure("Paired differences between arms", PointPlot(points, axis, zero=True), caption)
  return Section("Differences", (figure,))


def _all_in_blocks(data: Mapping[str, Any], labels: Mapping[str, Label]) -> tuple[Block, ...]:
  if not labels:
    return ()
  claims = data["comparison"]["claims"]
  sentences = [c["sentence"] for c in claims if c["claim"] == "gain_at_equal_flops"]
  rows, bars = [], []
  for name, label in labels.items():
    arm = data["arms"][name]
    parts = tuple(arm["flops_parts"].get(part, 0) for part in _PART_STYLES)
    bars.append((label.text, parts))
    rows.append((label, *(Number(n, form="short") for n in (*parts, arm["all_in_flops"]))))
  figure = Figure(
    "All-in FLOPs of every arm",
    BarPlot(tuple(bars), tuple(_PART_STYLES.values()), Axis("FLOPs, all-in", "short")),
    "FLOPs spent for each arm: its own training, and the stages that it needs.",
  )
  legend = Legend(tuple(Label(part, style) for part, style in _PART_STYLES.items()))
  sentence = sentences[0] if sentences else "No arm of equal all-in FLOPs was trained."
  columns = (Column("FLOPs", is_text=True), *(Column(name) for name in (*_PART_STYLES, "all-in")))
  return (Grid((Section("", (legend, figure)), Text(sentence))), Table(columns, tuple(rows)))


def _corpus_blocks(data: Mapping[str, Any]) -> tuple[Block, ...]:
  parts = [("Documents", data.get("corpus")), ("Tokenizer", data.get("tokenizer"))]
  groups = tuple(Section(title, (Facts(facts),)) for title, facts in parts if facts)
  return (Grid(groups),) if groups else ()


def _pair_blocks(data: Mapping[str, Any]) -> tuple[Block, ...]:
  pairs = data.get("pairs")
  if not pairs:
    return ()
  recall = _rounded(pairs["recall"])
  parts: list[Block] = [Facts({**pairs["counts"], "recall of the exact neighbors": recall})]
  if pairs["similarities"]:
    parts.append(
      Figure(
        "Histogram of the similarity of pairs",
        Histogram(
          tuple(pairs["similarities"]), Axis("similarity of d1 and d2 (cosine)"), Axis("pairs")
        ),
        f"{len(pairs['similarities']):,} pairs by their similarity.",
      )
    )
  examples = tuple(
    TextPair(
      Excerpt("d1", pair["d1"], pair["d1_text"]),
      Excerpt(
        "d2",
        f"{pair['d2']} \N{MIDDLE DOT} similarity {formatting.fixed(pair['similarity'])}",
        pair["d2_text"],
      ),
    )
    for pair in data.get("pair_examples", ())
  )
  return (Grid(tuple(parts)), *examples)


def _rounded(found: Mapping[str, Any]) -> Number:
  """An estimate with two digits of its standard error."""
  return Number(found["value"], found["stderr"], digits=formatting.decimals(found["stderr"]))


def _synthesis_blocks(data: Mapping[str, Any], labels: Mapping[str, Label]) -> tuple[Block, ...]:
  columns = {source: _synthesis_column(found) for source, found in data["synthesis"].items()}
  if not columns:
    return ()
  headers = [labels[s].text if s in labels else formatting.words(s) for s in columns]
  names = list(dict.fromkeys(name for column in columns.values() for name in column))
  table = Table(
    (Column("documents", is_text=True), *(Column(header) for header in headers)),
    tuple((name, *(column.get(name) for column in columns.values())) for name in names),
  )
  return (table, *(_example(example) for example in data["examples"]))


def _synthesis_column(found: Mapping[str, Any]) -> dict[str, Any]:
  column = {formatting.words(name): count for name, count in found["counts"].items()}
  for reason, count in found["finish_reasons"].items():
    column[f"ended by {formatting.words(reason)}"] = count
  for name, estimate in found["quality"].items():
    column[f"{formatting.words(name)} ({estimate['unit']})"] = _rounded(estimate)
  return column


def _example(example: Mapping[str, Any]) -> TextPair:
  about = (
    f"{formatting.words(example['source'])} \N{MIDDLE DOT} ended by {example['finish_reason']}"
  )
  if example["seed_text"]:
    seed = Excerpt("Seed", example["seed_id"], example["seed_text"])
  else:
    seed = Excerpt("Seed", "none: sampled unconditionally", None)
  return TextPair(seed, Excerpt("Synthesis", about, example["text"]))
