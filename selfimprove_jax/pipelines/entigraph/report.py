"""Reports synthetic continued pretraining: what was learned, what was forgotten, and from what."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import selfimprove_jax.pipelines.entigraph.pipeline as entigraph
from selfimprove_jax.evaluation import qa, statistics
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.pipelines.common import benchmark_results, report_parts
from selfimprove_jax.pipelines.entigraph.config import Config
from selfimprove_jax.pipelines.entigraph.corpora import STEPS
from selfimprove_jax.pipelines.entigraph.sources import read_documents
from selfimprove_jax.report import blocks, formatting
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Run
from selfimprove_jax.synthesis import diversity

_COLORS: tuple[blocks.Color, ...] = (
  *("blue", "orange", "green", "pink", "purple", "teal", "rust", "sky"),
)
_INITIAL = "initial"
_OPEN = " + passages"
_MEASURES = {
  "choices": qa.choice_metrics,
  "short_answers": qa.short_answer_metrics,
  "chain_of_thought": qa.cot_metrics,
}
_METRICS = {
  "choices": qa.CHOICE_METRICS,
  "short_answers": qa.SHORT_ANSWER_METRICS,
  "chain_of_thought": qa.COT_METRICS,
}
# The metric of the lead, for each format that is asked.
_HEADLINES = {
  "short_answers": "contains",
  "choices": "acc_norm",
  "chain_of_thought": "acc_asked",
}
_NUM_ANSWERS = 8


def report(run: Run) -> blocks.Report:
  """Reports a finished run, or the complete artifacts of an unfinished one.

  `data` holds the keys of `report_parts.run_data` and, once their stages are complete: `answers`,
  `answers_against_raw` and `open_book` (the form of `benchmark_results.compare_models`, with FORMAT
  for TASK), `subsets`, `passages`, `replay` (the held-out loss on replay by model, and its change),
  `arms`, `corpora`, `diversity`, `synthesis`, `benchmarks` and `decontamination`. Errors are over
  source documents, or over questions if there is one document. With several training seeds, a
  question counts with its mean over them.
  """
  config, stages = run.config, entigraph.stages(run.config)
  made = report_parts.complete_artifacts(run, stages)
  data = report_parts.run_data(run, stages, made) | _results(config, made)
  sections = [
    blocks.Section("Closed-book questions", _answer_blocks(config, data, made), in_summary=True),
    blocks.Section("Scaling", _scaling_blocks(config, data)),
    blocks.Section("Open-book questions", _open_book_blocks(config, data), in_summary=True),
    blocks.Section("What was forgotten", _forgetting_blocks(config, data), in_summary=True),
    blocks.Section("Corpora and training", _corpus_blocks(config, data), in_summary=True),
    blocks.Section("Synthesis", _synthesis_blocks(data, made)),
    blocks.Section("Answers", _examples(config, made)),
  ]
  if data["decontamination"]:
    sections.append(report_parts.decontamination_section(data["decontamination"]))
  return blocks.Report(
    title=config.title,
    command=run.command,
    lead=report_parts.lead(_sentences(config, data), stages, made),
    sections=(*sections, *report_parts.run_sections(run.command, data)),
    data=data,
  )


def _trainings(config: Config) -> dict[str, list[str]]:
  """Returns the names of each arm's trainings, and of the initial model."""
  arms = {arm: [f"{arm}/{seed}" for seed in config.training_seeds] for arm in config.arms}
  return {_INITIAL: [_INITIAL], **arms}


def _results(config: Config, made: Mapping[str, Artifact]) -> dict[str, Any]:
  arms = {name: made[f"arms/{name}"] for name in _trained(config) if f"arms/{name}" in made}
  steps = [step for step in dict.fromkeys(itertools.chain(*STEPS.values())) if step in made]
  names = [name for name in entigraph.corpora_names(config) if f"corpora/{name}/rows" in made]
  checked = {
    **{name: made[f"corpora/{name}/documents"].summary for name in names},
    **({"replay": made["replay/documents"].summary} if "replay/documents" in made else {}),
  }
  keys = ("steps_made", "step", "tokens", "targets", "flops", "passes")
  data: dict[str, Any] = {
    "answers": _compare(config, made, list(_trainings(config))),
    "diversity": made["diversity"].summary if "diversity" in made else {"corpora": {}},
    "subsets": _subsets(config, made),
    "arms": {name: {key: arm.summary[key] for key in keys} for name, arm in arms.items()},
    "corpora": {name: _corpus(made, name) for name in names},
    "synthesis": {step: dict(made[step].summary) for step in steps},
    "replay": _replay_losses(config, made),
    "decontamination": {
      name: found.get("decontamination") for name, found in checked.items() if names
    },
    "benchmarks": _benchmarks(config, made),
  }
  if "passages" in made:
    cells = list(itertools.chain(*((m + _OPEN, m) for m in _trainings(config))))
    data["passages"] = dict(made["passages"].summary)
    data["open_book"] = _compare(config, made, cells)
  if "raw" in config.arms:
    models = ["raw", *(name for name in config.arms if name != "raw")]
    data["answers_against_raw"] = _compare(config, made, models)
  return data


def _trained(config: Config) -> list[str]:
  return [name for name in entigraph.models(config) if name != _INITIAL]


def _corpus(made: Mapping[str, Artifact], name: str) -> dict[str, Any]:
  documents, rows = made[f"corpora/{name}/documents"], made[f"corpora/{name}/rows"]
  return {
    "texts": documents.summary["passages"]["train"],
    "repeated": documents.summary["repeated"],
    "characters": documents.summary["characters"]["train"],
    "tokens": rows.summary["unique"]["tokens"],
  }


def _compare(config: Config, made: Mapping[str, Artifact], models: list[str]) -> dict[str, Any]:
  """Compares models on the questions; the first one is the reference.

  Args:
    models: "initial" or an arm, closed-book, or "MODEL + passages".
  """
  found, trainings = benchmark_results.Comparison(models), _trainings(config)
  for name in config.questions.formats:
    records, sizes = {}, {}
    for model in models:
      book = "open_answers" if model.endswith(_OPEN) else "answers"
      stages = [f"{book}/{training}/{name}" for training in trainings[model.removesuffix(_OPEN)]]
      if all(stage in made for stage in stages):
        records[model] = [list(made[stage].records()) for stage in stages]
        summary = made[stages[0]].summary
        sizes[model] = {key: summary[key] for key in ("examples", "truncated")}
    found.add(name, _METRICS[name], records, sizes)
  return found.to_dict()


def _subsets(config: Config, made: Mapping[str, Artifact]) -> dict[str, Any]:
  """Returns FORMAT/METRIC -> kind of question -> model -> estimate, of the headline metrics."""
  if "sources" not in made:
    return {}
  documents, found = read_documents(made["sources"], "test"), {}
  for name in config.questions.formats:
    of_format: dict[str, dict[str, Any]] = {}
    for model, trainings in _trainings(config).items():
      stages = [f"answers/{training}/{name}" for training in trainings]
      if not all(stage in made for stage in stages):
        continue
      records = [list(made[stage].records()) for stage in stages]
      measured = qa.by_subset(_MEASURES[name], documents, *records)
      for subset, metrics in measured.items():
        estimate = metrics[_HEADLINES[name]].estimate.to_dict()
        of_format.setdefault(subset, {})[model] = estimate
    if len(of_format) > 1:
      found[f"{name}/{_HEADLINES[name]}"] = of_format
  return found


def _replay_losses(config: Config, made: Mapping[str, Artifact]) -> dict[str, Any]:
  """Returns the held-out loss on replay of each model, and its change by training."""
  before = made.get("losses/initial")
  if before is None or "test.jsonl" not in before.shards:
    return {}
  initial = report_parts.read_losses(before, "test.jsonl")
  counts, groups = initial["tokens"], initial["group"]
  found = {
    _INITIAL: {
      "loss": statistics.weighted_mean(initial["nll"], counts, groups=groups).to_dict(),
      "change": None,
    }
  }
  for arm, trainings in _trainings(config).items():
    stages = [f"arms/{name}" for name in trainings]
    if arm == _INITIAL or not all(stage in made for stage in stages):
      continue
    losses = [report_parts.read_losses(made[stage], "test.jsonl")["nll"] for stage in stages]
    nll = np.mean(losses, axis=0)
    found[arm] = {
      "loss": statistics.weighted_mean(nll, counts, groups=groups).to_dict(),
      "change": statistics.paired_difference(nll, initial["nll"], counts, groups=groups).to_dict(),
    }
  return found


def _benchmarks(config: Config, made: Mapping[str, Artifact]) -> dict[str, Any]:
  tasks = [task for _, task in config.benchmarks.named_tasks.values()]
  if not tasks:
    return {}
  stages = entigraph.models(config)
  trainings = {arm: [stages[name] for name in names] for arm, names in _trainings(config).items()}
  return benchmark_results.compare_models(tasks, made, trainings)


def _sentences(config: Config, data: Mapping[str, Any]) -> str:
  """Says for every arm whether it answers more questions than the initial model."""
  key = _headline(config)
  found, sentences = data["answers"], []
  if key not in found["evals"][_INITIAL]:
    return ""
  initial = found["evals"][_INITIAL][key]
  for arm, differences in found["differences"].items():
    if key not in differences:
      continue
    change, value = differences[key], found["evals"][arm][key]["value"]
    low, high = change["interval"]
    verdict = "gain" if low > 0 else "loss" if high < 0 else "no measurable change"
    sentences.append(
      f"{arm}: {formatting.percent(value)} of the closed-book questions ({key}), "
      f"{formatting.percent(initial['value'])} before: {verdict} "
      f"(95% interval of the difference {formatting.interval((low, high))})."
    )
  return " ".join(sentences)


def _labels(config: Config) -> dict[str, str]:
  return {_INITIAL: "initial", **{arm: arm for arm in config.arms}}


def _answer_blocks(
  config: Config, data: Mapping[str, Any], made: Mapping[str, Artifact]
) -> blocks.Blocks:
  labels = _labels(config)
  found = list(benchmark_results.table(data["answers"], labels))
  if not found:
    return ()
  summary = made["sources"].summary
  about = f"Questions: {summary['questions']:,}; source documents: {summary['documents']:,}."
  if summary["documents"] - summary["validation_documents"] == 1:
    about += (
      " There is one document to test on, so the errors are over its questions and say nothing "
      "about other documents."
    )
  found.append(blocks.Text(about))
  rows = [
    {"questions": f"{formatting.words(subset)}, {key}"}
    | {
      label: report_parts.estimate(by_model[model], form="percent") if model in by_model else None
      for model, label in labels.items()
    }
    for key, of_format in data["subsets"].items()
    for subset, by_model in of_format.items()
    if subset != "all"
  ]
  if rows:
    found += [blocks.Text("By kind of question:"), blocks.table(rows, text=("questions",))]
  if len(config.arms) > 1 and "answers_against_raw" in data:
    raw = {name: label for name, label in labels.items() if name != _INITIAL}
    raw = {"raw": raw.pop("raw"), **raw}
    found.append(blocks.Text("The same models, compared with training on the documents alone:"))
    found += benchmark_results.table(data["answers_against_raw"], raw)[:1]
  return tuple(found)


def _scaling_blocks(config: Config, data: Mapping[str, Any]) -> blocks.Blocks:
  """Plots the headline metric over the synthetic tokens of the arms that form a curve."""
  key = _headline(config)
  evals = data["answers"]["evals"]
  points: dict[str, list[tuple[float, float, float]]] = {}
  for name, arm in config.arms.items():
    found = evals[name].get(key)
    if not arm.curve or found is None or not arm.corpora.keys() <= data["corpora"].keys():
      continue
    tokens = sum(data["corpora"][corpus]["tokens"] for corpus in arm.corpora) * arm.corpus_share
    points.setdefault(arm.curve, []).append((tokens, found["value"], found["stderr"] or 0.0))
  curves = {name: sorted(found) for name, found in points.items() if len(found) > 1}
  if not curves:
    return ()
  labels = [
    blocks.Label(name, blocks.Style(color, "circle")) for name, color in zip(curves, _COLORS)
  ]
  ends = [math.log10(tokens) for found in curves.values() for tokens, _, _ in found]
  lines = [
    blocks.Line(
      label.style,
      tuple(math.log10(tokens) for tokens, _, _ in curves[label.text]),
      tuple(value for _, value, _ in curves[label.text]),
      half_widths=tuple(error for _, _, error in curves[label.text]),
      markers="all",
    )
    for label in labels
  ]
  levels = {
    "before training": evals[_INITIAL][key]["value"],
    "chance": evals[_INITIAL][key]["chance"],
  }
  retrieved = data.get("open_book", {"evals": {}})["evals"].get(_INITIAL + _OPEN, {}).get(key)
  levels["before training, with passages"] = retrieved and retrieved["value"]
  for (name, level), color in zip(levels.items(), ("gray", "silver", "rust")):
    if level is not None:
      labels.append(blocks.Label(name, blocks.Style(color)))
      span = (min(ends), max(ends))
      lines.append(blocks.Line(labels[-1].style, span, (level, level), dashed=True, markers="none"))
  plot = blocks.LinePlot(
    tuple(lines), blocks.Axis("log10 of the tokens of the corpus"), blocks.Axis(key)
  )
  caption = f"{key} after training on parts of a corpus; bars are one standard error."
  return blocks.Legend(tuple(labels)), blocks.Figure("Scaling curve", plot, caption)


def _headline(config: Config) -> str:
  """Returns FORMAT/METRIC of the lead."""
  name = next(name for name in _HEADLINES if name in config.questions.formats)
  return f"{name}/{_HEADLINES[name]}"


def _open_book_blocks(config: Config, data: Mapping[str, Any]) -> blocks.Blocks:
  """Shows the four cells of each arm, and whether it gains something on retrieval alone."""
  if "open_book" not in data:
    return ()
  compared, found = data["open_book"], data["passages"]
  labels = {model: model for model in compared["evals"] if compared["evals"][model]}
  if compared["reference"] not in labels:
    return ()
  key, sentences = _headline(config), []
  for arm in config.arms:
    change = compared["differences"].get(arm + _OPEN, {}).get(key)
    if change is not None:
      low, high = change["interval"]
      verdict = "holds" if low > 0 else "is refuted" if high < 0 else "is not shown"
      sentences.append(
        f"{arm} + passages > passages alone: {verdict} ({key}, difference "
        f"{formatting.signed(change['value'])}, 95% {formatting.interval((low, high))})."
      )
  recall = ", ".join(f"{share:.0%} at {k}" for k, share in found["recall_at_k"].items())
  about = f"{found['chunks']:,} passages; one of the right document is found for {recall}."
  table = benchmark_results.table(compared, labels)[:1]
  return (*map(blocks.Text, (*sentences, about)), *table)


def _forgetting_blocks(config: Config, data: Mapping[str, Any]) -> blocks.Blocks:
  rows = []
  for model, found in data["replay"].items():
    change = found["change"]
    cell: blocks.Cell = None
    if change is not None:
      interval = blocks.Interval(*Estimate(**change).interval95)
      cell = blocks.Stack((report_parts.estimate(change, signed=True), interval))
    rows.append(
      {
        "model": model,
        "held-out replay, nats/token": report_parts.estimate(found["loss"]),
        "after \N{MINUS SIGN} before (95%)": cell,
      }
    )
  made: list[blocks.Block] = []
  if rows:
    made += [
      blocks.table(rows, text=("model",)),
      blocks.Text(
        "The loss on held-out documents of the replay text; a positive change is forgetting. "
        "Errors are over the groups of documents."
      ),
    ]
  if data["benchmarks"]:
    made += benchmark_results.table(data["benchmarks"], _labels(config))
  return tuple(made)


def _corpus_blocks(config: Config, data: Mapping[str, Any]) -> blocks.Blocks:
  made: list[blocks.Block] = []
  if data["corpora"]:
    rows = [{"corpus": name, **found} for name, found in data["corpora"].items()]
    made.append(blocks.table(rows, text=("corpus",)))
  rows = []
  for name, found in data["arms"].items():
    passes = ", ".join(f"{corpus} {share:.2f}" for corpus, share in found["passes"].items())
    rows.append(
      {
        "arm": name,
        "target tokens": blocks.Number(found["targets"], form="short"),
        "steps": found["steps_made"],
        "kept step": found["step"],
        "passes": passes,
        "FLOPs": blocks.Number(found["flops"], form="short"),
      }
    )
  if rows:
    made.append(blocks.table(rows, text=("arm", "passes"), page_only=("FLOPs",)))
  if measured := data["diversity"]["corpora"]:
    rows = [
      {
        "corpus": name,
        **{
          f"{size}-grams of the source": blocks.Number(
            found[f"source_overlap_{size}"], form="percent", digits=2
          )
          for size in diversity.OVERLAP_SIZES
        },
        "distinct 4-grams per 10,000": blocks.Number(
          found["distinct_4grams"], found["distinct_4grams_stderr"], form="fixed", digits=0
        ),
        "compression": blocks.Number(found["compression_ratio"], digits=2),
        "embedding distance": blocks.Number(found.get("embedding_distance"), digits=3),
      }
      for name, found in measured.items()
    ]
    about = f"Diversity, of {data['diversity']['num_words']:,} words of each synthetic corpus:"
    hidden = [f"{size}-grams of the source" for size in (2, 16)]
    made += [blocks.Text(about), blocks.table(rows, text=("corpus",), page_only=hidden)]
  repeated = {n: c["repeated"] for n, c in data["corpora"].items() if c["repeated"]}
  made += [
    blocks.Text(f"{number:,} texts of the corpus {name} were dropped: others have the same text.")
    for name, number in repeated.items()
  ]
  return tuple(made)


def _synthesis_blocks(data: Mapping[str, Any], made: Mapping[str, Artifact]) -> blocks.Blocks:
  if not data["synthesis"]:
    return ()
  rows = [
    {
      "step": formatting.words(step),
      "records": found["records"],
      "failed": found["failed"],
      "prompt tokens": blocks.Number(found["prompt_tokens"], form="short"),
      "completion tokens": blocks.Number(found["completion_tokens"], form="short"),
    }
    for step, found in data["synthesis"].items()
  ]
  failures = [
    {
      "step": formatting.words(step),
      "unit": record["id"],
      "document": record["document"],
      "asked for": ", ".join((record["kind"], *record["key"])),
      "reason": record["failure"]["reason"],
    }
    for step in data["synthesis"]
    for record in made[step].records()
    if "failure" in record
  ]
  found: list[blocks.Block] = [blocks.table(rows, text=("step",))]
  if failures:
    found += [
      blocks.Text(f"The first of {len(failures)} failures:"),
      blocks.table(failures[:_NUM_ANSWERS], text=tuple(failures[0])),
    ]
  return tuple(found)


def _examples(config: Config, made: Mapping[str, Artifact]) -> blocks.Blocks:
  """Shows the first generated answers of every model, as they are."""
  names = [name for name in config.questions.formats if name != "choices"]
  found: list[blocks.Block] = []
  for name in names:
    records: dict[str, Sequence[dict[str, Any]]] = {}
    for model, trainings in _trainings(config).items():
      stage = f"answers/{trainings[0]}/{name}"
      if stage in made:
        records[model] = list(itertools.islice(made[stage].records(), _NUM_ANSWERS))
    if not records:
      continue
    rows = []
    for answers in zip(*records.values(), strict=True):
      asked = answers[0]["prompts"][0].rstrip().splitlines()
      question = next((line for line in reversed(asked) if line.startswith("Question:")), asked[-1])
      row = {"question": question, "accepted": ", ".join(answers[0]["answers"][:2])}
      rows.append(row | {m: repr(a["generation"]) for m, a in zip(records, answers)})
    found.append(blocks.Text(f"{formatting.words(name).capitalize()}, raw:"))
    found.append(blocks.table(rows, text=tuple(rows[0])))
  return tuple(found)
