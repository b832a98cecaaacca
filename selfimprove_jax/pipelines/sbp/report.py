"""Reports an SBP run: the arms, the controls, the synthetic documents, and their cost."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import selfimprove_jax.pipelines.sbp.comparison as comparison
import selfimprove_jax.pipelines.sbp.pipeline as sbp
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.pipelines.common import benchmark_results, report_parts, sbp_table
from selfimprove_jax.pipelines.common.report_parts import estimate
from selfimprove_jax.pipelines.sbp.config import SYNTHETIC, Config
from selfimprove_jax.report import blocks, formatting
from selfimprove_jax.report.formatting import PLUS_MINUS, plus_minus
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Run
from selfimprove_jax.runtime.config import to_json

_Labels = Mapping[str, blocks.Label]

_NUM_EXAMPLES = 6
_MAX_SIMILARITIES = 20_000
# Arms in the order of the report; others follow by name, with the further styles.
_STYLES = {
  "baseline": blocks.Style("gray", "circle"),
  "sbp": blocks.Style("blue", "square"),
  "unconditional": blocks.Style("orange", "up"),
  "random_pairs": blocks.Style("pink", "down"),
  "oracle": blocks.Style("green", "diamond"),
  "baseline_all_in": blocks.Style("silver", "hollow"),
}
_FURTHER_STYLES = tuple(blocks.Style(color, "plus") for color in ("purple", "rust", "teal"))
# The parts of an arm's all-in cost, by the first part of the names of their stages.
_PARTS = {"seed": "seed", "embeddings": "embedding", "synthesizer": "tuning", "samples": "sampling"}
_PART_STYLES = {
  "seed": blocks.Style("silver"),
  "embedding": blocks.Style("pink"),
  "tuning": blocks.Style("blue"),
  "sampling": blocks.Style("sky"),
  "arm": blocks.Style("gray"),
}


def report(run: Run) -> blocks.Report:
  """Reports a finished run, or the complete artifacts of an unfinished one.

  `data` holds the keys of `report_parts.run_data` and, once the stages they need are complete:
    corpus, tokenizer: name -> count or fact
    arms: name -> label, train_targets and losses (of each training), train_tokens, steps,
      train_flops, all_in_flops, flops_parts, seconds, weight_decay, dropout_rate, passes (source ->
      number of epochs), best_validation, final_validation, evals ("heldout_nll" and
      "bits_per_byte"), curve
    comparison: the result of `comparison.compare`
    conditioning: the result of `comparison.conditioning_gap`
    tuning: step kept and steps made; validation loss and gap of the seed model and after tuning
    relevance, pairs, synthesis, examples, pair_examples
    decontamination: texts -> `Findings.summary`, or None where benchmarks were not looked for
    benchmarks: the result of `benchmark_results.compare_models`; `arms.NAME.evals` has its evals
    dynamics: the result of `benchmark_results.dynamics`
  Estimates are {"value", "stderr", "unit", "num_groups"}.
  """
  stages = sbp.stages(run.config)
  made = report_parts.complete_artifacts(run, stages)
  data = report_parts.run_data(run, stages, made) | _results(run.config, made, run.seconds())
  data |= _benchmarks(run.config, made, data.get("arms", {}))
  arms, *others = result_sections(data)
  compared = data.get("comparison", {"verdict": "", "claims": [], "caveats": []})
  return blocks.Report(
    title=run.config.title,
    command=run.command,
    lead=report_parts.lead(compared["verdict"], stages, made),
    claims=tuple(blocks.Claim(*claim.values()) for claim in compared["claims"]),
    caveats=tuple(compared["caveats"]),
    sections=(
      arms,
      *_benchmark_sections(run.config, data),
      *others,
      *report_parts.run_sections(run.command, data),
    ),
    data=data,
  )


def result_sections(data: Mapping[str, Any]) -> tuple[blocks.Section, ...]:
  """Returns the sections with results; a section without complete stages has no blocks."""
  labels = _labels(data.get("arms", {}))
  return (
    blocks.Section("The arms", _arms_blocks(data, labels), in_summary=True),
    blocks.Section("Controls: what else could explain a gain", _control_blocks(data, labels)),
    blocks.Section("At equal all-in FLOPs", _all_in_blocks(data, labels)),
    blocks.Section("Corpus", _corpus_blocks(data)),
    report_parts.decontamination_section(data.get("decontamination", {})),
    blocks.Section("Pairs", _pair_blocks(data)),
    blocks.Section("Synthetic documents", _synthesis_blocks(data, labels)),
  )


# --- from artifacts to numbers


def _results(
  config: Config, made: Mapping[str, Artifact], seconds: Mapping[str, float]
) -> dict[str, Any]:
  data: dict[str, Any] = {}
  if "documents" in made:
    counts = made["tokens"].summary if "tokens" in made else {}
    data["corpus"] = report_parts.corpus_facts(made["documents"].summary) | {
      f"tokens, {part}": found["tokens"] for part, found in counts.items()
    }
  if "tokenizer" in made:
    data["tokenizer"] = made["tokenizer"].summary
  data["decontamination"] = {
    name: artifact.summary.get("decontamination")
    for name, artifact in made.items()
    if name.split("/")[0] in ("documents", "synthetic")
  }
  results = {
    name: _arm_result(name, config, made)
    for name in config.arms
    if made.keys() >= set(sbp.all_in_stages(name, config))
  }
  gap = None
  if "synthesizer/nearest" in made:
    tuned = made["synthesizer/nearest"].summary
    data["conditioning"] = tuned["conditioning"]
    data["tuning"] = {
      "step": tuned["step"],
      "steps_made": tuned["steps_made"],
      "validation": {"untuned": tuned["untuned"]["validation"], "tuned": tuned["best_validation"]},
      "gap": {
        "untuned": tuned["untuned"]["conditioning"]["gap"],
        "tuned": tuned["conditioning"]["gap"],
      },
    }
    gap = Estimate(**data["conditioning"]["gap"])
  if "baseline" in results:
    data["arms"] = {
      name: _arm(name, config, made, result, seconds.get(f"arms/{name}"))
      for name, result in results.items()
    }
    data["comparison"] = comparison.compare(
      list(results.values()),
      config=config.comparison,
      draws_anew=config.draws_anew,
      conditioning_gap=gap,
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
  shown = ("seed_id", "seed_text", "text", "finish_reason")
  data["examples"] = [
    {"source": source, **{key: record[key] for key in shown}}
    for source in sources
    for record in itertools.islice(
      made[f"synthetic/{source}"].read_jsonl("documents.jsonl"), _NUM_EXAMPLES
    )
  ]
  if "relevance" in made:
    data["relevance"] = made["relevance"].summary
  if made.keys() >= {"tokens", "pairs"}:
    data |= _pairs(made["tokens"], made["pairs"])
  return data


def _arm_result(name: str, config: Config, made: Mapping[str, Artifact]) -> comparison.ArmResult:
  arm, summary = config.arms[name], made[f"arms/{name}"].summary
  trainings = [made[stage] for stage in sbp.arm_stages(name, config) if stage in made]
  losses = [report_parts.read_losses(training, "test.jsonl") for training in trainings]
  shared = {"seed": config.seed, "num_parameters": summary["num_parameters"]}
  return comparison.ArmResult(
    name=name,
    label=arm.label,
    nll_SN=np.stack([found["nll"] for found in losses]),
    token_counts=losses[0]["tokens"],
    byte_counts=losses[0]["bytes"],
    groups=losses[0]["group"].tolist(),
    train_targets=tuple(training.summary["targets"] for training in trainings),
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
    "train_targets": list(result.train_targets),
    "losses": result.losses,
    "dropout_rate": result.dropout,
    "flops_parts": parts,
    "seconds": seconds,
    "passes": artifact.summary["passes"],
    "evals": comparison.evals(result),
    "curve": _curve(list(artifact.read_jsonl("curve.jsonl")), result.train_tokens // result.steps),
  }


def _curve(
  records: list[dict[str, Any]], tokens_per_step: int
) -> list[dict[str, float | int | None]]:
  train, validation = report_parts.loss_curve(records)
  points = [(step, {"validation_loss": loss}) for step, loss in validation]
  points += [(step, {"train_loss": loss}) for step, loss in train]
  unset = {"train_loss": None, "validation_loss": None}
  return [
    {"step": step, "tokens": step * tokens_per_step, **unset, **loss}
    for step, loss in sorted(points, key=lambda point: point[0])
  ]


def _pairs(tokens: Artifact, pairs: Artifact) -> dict[str, Any]:
  """Returns `pairs`, and `pair_examples` from evenly spaced places of the list."""
  unique = list(pairs.read_jsonl("unique.jsonl"))
  shown = unique[:: max(1, len(unique) // _NUM_EXAMPLES)][:_NUM_EXAMPLES]
  wanted = {pair[d] for pair in shown for d in ("d1", "d2")}
  texts = {r["id"]: r["text"] for r in tokens.read_jsonl("unique.jsonl") if r["id"] in wanted}
  return {
    "pairs": {
      "counts": pairs.summary["counts"]["unique"],
      "recall": pairs.summary["recall"]["unique"],
      "method": pairs.summary["method"]["unique"],
      "same_group_share": pairs.summary["same_group_share"]["unique"],
      "similarities": [
        pair["similarity"] for pair in unique[:: max(1, -(-len(unique) // _MAX_SIMILARITIES))]
      ],
    },
    "pair_examples": [
      {
        "d1": pair["d1"],
        "d2": pair["d2"],
        "d1_text": texts[pair["d1"]],
        "d2_text": texts[pair["d2"]],
        "similarity": pair["similarity"],
      }
      for pair in shown
    ],
  }


def _benchmarks(
  config: Config, made: Mapping[str, Artifact], arms: dict[str, dict[str, Any]]
) -> dict[str, Any]:
  """Returns `benchmarks` and `dynamics`; adds what an arm scored to its `evals`."""
  tasks = [task for _, task in config.benchmarks.named_tasks.values()]
  if not tasks:
    return {}
  others = [name for name in config.arms if name != comparison.BASELINE]
  trainings = {name: sbp.arm_stages(name, config) for name in (comparison.BASELINE, *others)}
  compared = benchmark_results.compare_models(tasks, made, trainings)
  for name, arm in arms.items():
    arm["evals"] |= compared["evals"][name]
  stages = [stage for names in trainings.values() for stage in names]
  return {"benchmarks": compared, "dynamics": benchmark_results.dynamics(tasks, made, stages)}


# --- from numbers to blocks


def _labels(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, blocks.Label]:
  """Returns the label and style of every arm, in the order of the report."""
  further = sorted(name for name in arms if name not in _STYLES)
  styles = _STYLES | dict(zip(further, itertools.cycle(_FURTHER_STYLES)))
  return {name: blocks.Label(arms[name]["label"], styles[name]) for name in styles if name in arms}


def _benchmark_sections(config: Config, data: Mapping[str, Any]) -> tuple[blocks.Section, ...]:
  if "benchmarks" not in data:
    return ()
  compared = data["benchmarks"]
  labels = _labels({name: vars(arm) for name, arm in config.arms.items()})
  texts = {name: label.text for name, label in labels.items()}
  evals = compared["evals"][comparison.BASELINE]
  of_paper: blocks.Blocks = ()
  if sbp_table.is_complete(evals):
    differences = {
      texts[name]: compared["differences"][name] for name in texts if name != comparison.BASELINE
    }
    of_paper = sbp_table.table(evals, label=texts[comparison.BASELINE], differences=differences)
  tasks = [task for _, task in config.benchmarks.named_tasks.values()]
  first = {sbp.arm_stages(name, config)[0]: label for name, label in labels.items()}
  curves = benchmark_results.curves(tasks, data["dynamics"], first)
  return (
    blocks.Section("Benchmarks", benchmark_results.table(compared, texts), in_summary=True),
    blocks.Section("SBP's benchmarks", of_paper),
    blocks.Section("Benchmarks during the first training of each arm", curves),
  )


def _arms_blocks(data: Mapping[str, Any], labels: _Labels) -> blocks.Blocks:
  if not labels:
    return ()
  compared, rows = data["comparison"], []
  for name, label in labels.items():
    arm, evals = data["arms"][name], data["arms"][name]["evals"]
    difference, share = compared["differences"].get(name), compared["recovered"].get(name)
    passes = tuple(f"{formatting.words(s)} {n:.3g}" for s, n in arm["passes"].items())
    flops = tuple(blocks.Number(arm[key], form="short") for key in ("train_flops", "all_in_flops"))
    rows.append(
      {
        "arm": label,
        "difference to the baseline (95%)": difference
        and blocks.Stack((_signed(difference), blocks.Interval(*difference["interval"]))),
        "held-out nats/token": _stacked(evals["heldout_nll"], arm["losses"]),
        "bits/byte": _stacked(evals["bits_per_byte"]),
        "oracle's gain recovered": share and _stacked(share, form="percent"),
        "validation, best / final": blocks.Stack(
          (blocks.Number(arm["best_validation"]), blocks.Number(arm["final_validation"]))
        ),
        "passes over its data": blocks.Stack(passes),
        "tokens predicted / read": blocks.Stack(
          (
            blocks.Number(arm["train_targets"][0], form="short"),
            blocks.Number(arm["train_tokens"], form="short"),
          )
        ),
        "FLOPs, own / all-in": blocks.Stack(flops),
        "weight decay / dropout": blocks.Stack((arm["weight_decay"], arm["dropout_rate"])),
      }
    )
  page_only = (
    *("bits/byte", "oracle's gain recovered", "validation, best / final"),
    "passes over its data",
  )
  return (
    blocks.Text(
      f"Loss on {compared['num_documents']:,} held-out documents in {compared['num_groups']:,} "
      f"groups ({compared['num_tokens']:,} tokens) at the end of training, {PLUS_MINUS} standard "
      "error over groups; below it, the loss of each training. Differences are paired by document, "
      "and of the means over trainings; negative is better. Tokens predicted are equal within "
      f"{formatting.percent(compared['targets_tolerance'], 1)} or one step; tokens read include "
      "padding."
    ),
    blocks.table(rows, text=("arm",), page_only=page_only),
    blocks.Legend(tuple(labels.values())),
    blocks.Grid((_curves_figure(data, labels), _points_figure(data, labels))),
  )


def _stacked(
  found: Mapping[str, Any], each: Sequence[float] = (), form: blocks.Form = "fixed"
) -> blocks.Stack:
  """Stacks an estimate, its standard error, and the value of each training, if several."""
  parts = (blocks.Number(found["value"], form=form), plus_minus(found["stderr"], form=form))
  values = ", ".join(map(formatting.fixed, each))
  return blocks.Stack((*parts, values) if len(each) > 1 else parts)


def _signed(difference: Mapping[str, Any]) -> blocks.Number:
  return blocks.Number(difference["value"], signed=True)


def _curves_figure(data: Mapping[str, Any], labels: _Labels) -> blocks.Figure:
  """Plots differences to the baseline; next to the early fall, the curves would overlap."""
  base_x, base_y = _validation(data["arms"]["baseline"]["curve"])
  oracle, lines = data["comparison"]["oracle"], []
  for name, label in labels.items():
    x, y = _validation(data["arms"][name]["curve"])
    # Where the baseline was not evaluated yet, or no longer, there is nothing to compare with.
    points = [
      (tokens, loss - float(np.interp(tokens, base_x, base_y)))
      for tokens, loss in zip(x, y)
      if base_x[1] <= tokens <= base_x[-1] * 1.01
    ]
    if name not in ("baseline", oracle) and points:
      lines.append(blocks.Line(label.style, *zip(*points), markers="last"))
  caption = (
    "Validation loss of each arm's first training minus that of the baseline (the line at 0) after "
    "as many tokens; negative is better. All are measured on the same rows, in turn from each "
    "group."
  )
  if oracle:
    caption += " The oracle is not drawn."
  axes = blocks.Axis("tokens read", "short"), blocks.Axis("nats per token")
  return blocks.Figure(
    "Validation loss during training, compared with the baseline's",
    blocks.LinePlot(tuple(lines), *axes, zero=True),
    caption,
  )


def _validation(curve: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
  """Returns the tokens and the losses of the evaluations."""
  found = [(p["tokens"], p["validation_loss"]) for p in curve if p["validation_loss"] is not None]
  return [tokens for tokens, _ in found], [loss for _, loss in found]


def _points_figure(data: Mapping[str, Any], labels: _Labels) -> blocks.Figure:
  losses = [
    (label.text, label.style, data["arms"][name]["evals"]["heldout_nll"])
    for name, label in labels.items()
  ]
  return blocks.Figure(
    "Held-out loss of every arm",
    report_parts.loss_plot(losses),
    "Each arm by itself. Documents vary in difficulty, which widens these intervals; the paired "
    "differences below compare the arms.",
  )


def _control_blocks(data: Mapping[str, Any], labels: _Labels) -> blocks.Blocks:
  warning: blocks.Blocks = ()
  left: list[blocks.Block] = []
  if conditioning := data.get("conditioning"):
    gap, gate = conditioning["gap"], conditioning["gate"]
    if gap["value"] < gate:
      text = (
        f"The conditioning gap is {formatting.fixed(gap['value'])} nats per token, below the gate "
        f"of {gate:g}. A synthesizer that does not use d1 can at best match unconditional samples: "
        "any gain here does not come from related documents."
      )
      warning = (blocks.Text(text, "warning"),)
    facts = {
      "NLL of d2 after its neighbor": blocks.Number(conditioning["true_nll"]),
      "NLL of d2 after a random d1": blocks.Number(conditioning["random_nll"]),
      "conditioning gap (nats/token)": estimate(gap),
      "gate": gate,
      "held-out pairs": conditioning["num_pairs"],
      "groups of these pairs": gap["num_groups"],
    }
    section = (blocks.Facts(facts), *_tuning_blocks(data["tuning"]))
    left.append(blocks.Section("Does the synthesizer use d1?", section))
  if relevance := data.get("relevance"):
    left.append(blocks.Section("Is a sample about its seed?", _relevance_blocks(relevance)))
  right = blocks.Section("Differences", _differences(data, labels))
  columns = tuple(c for c in (blocks.Section("", tuple(left)), right) if c.blocks)
  return (*warning, blocks.Grid(columns)) if columns else ()


def _tuning_blocks(tuning: Mapping[str, Any]) -> blocks.Blocks:
  """Compares the synthesizer with the seed model that it was tuned from."""
  rows = [
    {
      "synthesizer": when,
      "validation loss": blocks.Number(tuning["validation"][when]),
      "conditioning gap": estimate(tuning["gap"][when]),
    }
    for when in ("untuned", "tuned")
  ]
  note = f"Tuned for {tuning['steps_made']:,} steps; the parameters of step {tuning['step']:,} are"
  note += " the best on validation pairs and are kept."
  if not tuning["step"]:
    note += " That is the seed model itself: tuning did not lower the loss."
  return (blocks.table(rows, text=("synthesizer",)), blocks.Text(note, "note"))


def _relevance_blocks(relevance: Mapping[str, Any]) -> blocks.Blocks:
  text, groups = blocks.Column("", is_text=True), blocks.Column("groups")
  rows = tuple(
    (label, blocks.Bar(found["value"]), estimate(found), found["num_groups"])
    for key, label in (
      ("real", relevance["real_pairs"]),
      ("unrelated", "two documents of different groups"),
      ("own", "a sample and its seed"),
      ("random", "a sample and a random seed"),
    )
    if (found := relevance[key])
  )
  how = relevance["real_pairs"]
  note = (
    "There are no real pairs to compare with: no group has two test documents, and pairs chosen by "
    "this similarity would look most similar."
  )
  if share := relevance["retained_share"]:
    written = formatting.text(blocks.Number(share["value"], share["stderr"], form="percent"))
    note = (
      f"A sample keeps {written} (standard error over {share['num_groups']} groups) of the "
      f"similarity of {how}. What a random seed and unrelated documents have is subtracted."
    )
  elif how:
    note = f"For {how} the similarity is not measurably above that of unrelated ones."
  return (
    blocks.Table((text, text, blocks.Column("cosine of TF-IDF vectors"), groups), rows),
    blocks.Text(note, "note"),
  )


def _differences(data: Mapping[str, Any], labels: _Labels) -> blocks.Blocks:
  compared = data.get("comparison", {"differences": {}, "versus": {}, "oracle": None})
  differences, oracle = compared["differences"], compared["oracle"]
  shown = [differences[name] for name in labels if name in differences and name != oracle]
  points = tuple(
    blocks.Point(
      f"{labels[found['first']].text} \N{MINUS SIGN} {labels[found['second']].text}",
      labels[found["first"]].style,
      _signed(found),
      tuple(found["interval"]),
      tuple(found["document_interval"]),
    )
    for found in (*shown, *compared["versus"].values())
  )
  if not points:
    return ()
  caption = (
    f"First arm minus second, paired by document. Thick: 95% over {compared['num_groups']} groups "
    "of documents; thin: including the noise of training seeds, which decides the claims."
  )
  if oracle:
    caption += f" The oracle, at {formatting.signed(differences[oracle]['value'])}, is not drawn."
  space = "\N{NO-BREAK SPACE}" * 4
  axis = f"\N{LEFTWARDS ARROW} better{space}nats per token{space}worse \N{RIGHTWARDS ARROW}"
  plot = blocks.PointPlot(points, blocks.Axis(axis), zero=True)
  return (blocks.Figure("Paired differences between arms", plot, caption),)


def _all_in_blocks(data: Mapping[str, Any], labels: _Labels) -> blocks.Blocks:
  if not labels:
    return ()
  rows, bars = [], []
  for name, label in labels.items():
    arm = data["arms"][name]
    parts = {part: arm["flops_parts"].get(part, 0) for part in _PART_STYLES}
    bars.append((label.text, tuple(parts.values())))
    flops = {**parts, "all-in": arm["all_in_flops"]}
    cells = {part: blocks.Number(n, form="short") for part, n in flops.items()}
    rows.append({"FLOPs": label, **cells})
  axis = blocks.Axis("FLOPs, all-in", "short")
  figure = blocks.Figure(
    "All-in FLOPs of every arm",
    blocks.BarPlot(tuple(bars), tuple(_PART_STYLES.values()), axis),
    "FLOPs spent for each arm: its own training, and the stages that it needs.",
  )
  legend = blocks.Legend(tuple(blocks.Label(part, style) for part, style in _PART_STYLES.items()))
  missing: blocks.Blocks = ()
  if "baseline_all_in" not in labels:
    missing = (blocks.Text("No arm of equal all-in FLOPs was trained."),)
  return (*missing, legend, figure, blocks.table(rows, text=("FLOPs",)))


def _corpus_blocks(data: Mapping[str, Any]) -> blocks.Blocks:
  parts = [("Documents", data.get("corpus")), ("Tokenizer", data.get("tokenizer"))]
  groups = tuple(blocks.Section(title, (blocks.Facts(facts),)) for title, facts in parts if facts)
  return (blocks.Grid(groups),) if groups else ()


def _pair_blocks(data: Mapping[str, Any]) -> blocks.Blocks:
  if "pairs" not in data:
    return ()
  pairs = data["pairs"]
  parts: list[blocks.Block] = [
    blocks.Facts(
      {
        **pairs["counts"],
        "of one group": blocks.Number(pairs["same_group_share"], form="percent"),
        "search": pairs["method"],
        "recall of the exact neighbors": _rounded(pairs["recall"]),
        "groups of the queries": pairs["recall"]["num_groups"],
      }
    )
  ]
  if similarities := tuple(pairs["similarities"]):
    x = blocks.Axis("similarity of d1 and d2 (cosine)")
    plot = blocks.Histogram(similarities, x, blocks.Axis("pairs"))
    caption = f"{len(similarities):,} pairs by their similarity."
    parts.append(blocks.Figure("Histogram of the similarity of pairs", plot, caption))
  examples = []
  for pair in data["pair_examples"]:
    about = f"{pair['d2']} \N{MIDDLE DOT} similarity {formatting.fixed(pair['similarity'])}"
    first = blocks.Excerpt("d1", pair["d1"], pair["d1_text"])
    examples.append(blocks.TextPair(first, blocks.Excerpt("d2", about, pair["d2_text"])))
  return (blocks.Grid(tuple(parts)), *examples)


def _rounded(found: Mapping[str, Any]) -> blocks.Number:
  """Returns an estimate with two digits of its standard error."""
  return estimate(found, digits=formatting.decimals(found["stderr"]))


def _synthesis_blocks(data: Mapping[str, Any], labels: _Labels) -> blocks.Blocks:
  columns = {
    labels[source].text if source in labels else formatting.words(source): _synthesis_column(found)
    for source, found in data["synthesis"].items()
  }
  if not columns:
    return ()
  names = list(dict.fromkeys(name for column in columns.values() for name in column))
  rows = [
    {"documents": name, **{header: column.get(name) for header, column in columns.items()}}
    for name in names
  ]
  table = blocks.table(rows, text=("documents",))
  return (table, *(_example(example) for example in data["examples"]))


def _synthesis_column(found: Mapping[str, Any]) -> dict[str, Any]:
  column = {formatting.words(name): count for name, count in found["counts"].items()}
  for reason, count in found["finish_reasons"].items():
    column[f"ended by {formatting.words(reason)}"] = count
  for name, value in found["quality"].items():
    over = f"{value['num_groups']:,} groups"
    column[f"{formatting.words(name)} ({value['unit']})"] = blocks.Stack((_rounded(value), over))
  return column


def _example(example: Mapping[str, Any]) -> blocks.TextPair:
  source, reason = formatting.words(example["source"]), example["finish_reason"]
  seed = blocks.Excerpt("Seed", "none: sampled unconditionally", None)
  if example["seed_text"]:
    seed = blocks.Excerpt("Seed", example["seed_id"], example["seed_text"])
  about = f"{source} \N{MIDDLE DOT} ended by {reason}"
  return blocks.TextPair(seed, blocks.Excerpt("Synthesis", about, example["text"]))
