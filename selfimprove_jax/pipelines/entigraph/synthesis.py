"""Stages that ask the generator for entities and texts, a shard of documents at a time."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from selfimprove_jax.data.sources import SourceDocument
from selfimprove_jax.language_models import Reply, TextRequest
from selfimprove_jax.pipelines.entigraph.generators import (
  GeneratorConfig,
  open_generator,
  recorded_ids,
)
from selfimprove_jax.pipelines.entigraph.sources import read_documents
from selfimprove_jax.runs import artifacts, storage
from selfimprove_jax.runs.stage import Context, Failures
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.progress import Bar
from selfimprove_jax.synthesis import calls, units
from selfimprove_jax.synthesis.prompts import PromptSet
from selfimprove_jax.synthesis.records import GenerationConfig
from selfimprove_jax.synthesis.synthesizer import Synthesizer
from selfimprove_jax.synthesis.units import BudgetConfig, Unit

_LIST_STEPS = ("entities", "strategies")  # with one call per document
_DOCUMENTS_PER_LIST_SHARD = 64
# Number of failed attempts of each unit that `--retry_failed` asks for again.
_TRIED = ".tried.json"
_LOG = ".{}.unfinished"

_Samples = Annotated[int, Field(ge=0)]


@section
class SynthesisConfig:
  """Configures what the generator writes about each source document.

  Attributes:
    prompts: the set of prompts: "default", or "small" for generators below a billion parameters.
    relations: limits of EntiGraph's texts: all pairs of entities, then triplets. Every document has
      an equal share of the tokens and dollars, and one that leaves some unspent passes none on.
    rephrase_styles, rephrase_samples: rephrasings per document and style.
    spa_samples: texts per document and prompt of SPA (arXiv 2603.22213); 0 for none.
    active_reading_samples: texts per study strategy (Active Reading, arXiv 2508.09494).
    focal_samples: texts per question (focal rewriting, arXiv 2603.23562).
    documents_per_shard: documents per file, whose calls are made at the same time; at least 64 in
      steps with one call per document. Within a file, a finished call is never repeated.
  """

  prompts: Literal["default", "small"] = "default"
  generation: GenerationConfig = GenerationConfig()
  relations: BudgetConfig = BudgetConfig()
  rephrase_styles: tuple[Literal["easy", "medium", "hard", "qa"], ...] = ("easy", "medium", "hard")
  rephrase_samples: _Samples = 0
  spa_samples: _Samples = 0
  active_reading_samples: _Samples = 0
  focal_samples: _Samples = 0
  documents_per_shard: Annotated[int, Field(ge=1)] = 1


@section
class TextsStageConfig:
  """Configures a stage of the synthesis.

  Attributes:
    step: what is asked for; the stage's units follow from it.
  """

  step: Literal[
    "entities", "relations", "rephrasings", "spa", "strategies", "active_reading", "focal"
  ]
  generator: GeneratorConfig
  synthesis: SynthesisConfig
  seed: int


def texts(context: Context, config: TextsStageConfig) -> dict[str, Any]:
  """Asks the generator for every unit of a step, and writes a record of each reply or failure.

  A killed run repeats no call that it had recorded. Units that a recorded generator lacks are left
  out, and do not count toward a budget.
  """
  documents = read_documents(context.inputs["sources"])
  size = config.synthesis.documents_per_shard
  if config.step in _LIST_STEPS:
    size = max(size, _DOCUMENTS_PER_LIST_SHARD)
  make_units = _unit_maker(context, config)
  budget = config.synthesis.relations if config.step == "relations" else BudgetConfig()
  available = recorded_ids(config.generator, context.inputs["generator"])
  total = None if available is not None else _num_units(context, config, make_units, documents)
  with context.progress.track(total, label=context.name, unit="texts") as bar:
    meter = _Meter(bar, total)
    shards = context.shards(
      math.ceil(len(documents) / size),
      count=_counts,
      on_made_elsewhere=lambda counts: meter.add(counts["records"], counts["micro_usd"] / 1e6),
    )

    def on_reply(reply: Reply, record: Mapping[str, Any] | None) -> None:
      meter.add(int(record is not None), reply.cost_usd)
      shards.check_preemption()

    answer = None  # made for the first shard: a finished artifact opens no model
    for index in shards:
      answer = answer or _answerer(context, config, documents, on_reply)
      of_shard = documents[index * size : (index + 1) * size]
      asked = _in_order(
        (units.within(_available(make_units(d), available), budget) for d in of_shard), budget
      )
      path = context.folder / shards.name(index)
      for record in calls.read_records(_log_of(path)):
        meter.add(1, record.get("cost_usd", 0.0))
      answer(asked, path, _share(budget, len(of_shard) / len(documents)))
  totals = shards.totals
  names = ("records", "failed", "prompt_tokens", "completion_tokens")
  usd = {"usd": totals["micro_usd"] / 1e6}
  return {name: totals[name] for name in names} | usd


@dataclasses.dataclass
class _Meter:
  """Shows how many texts there are and, where calls cost something, dollars spent and projected."""

  bar: Bar
  total: int | None
  num_texts: int = 0
  usd: float = 0.0

  def add(self, num_texts: int, usd: float) -> None:
    self.num_texts += num_texts
    self.usd += usd
    fields = {}
    if self.usd:
      fields["USD"] = self.usd
      if self.num_texts and self.total is not None:
        fields["USD in all"] = self.usd / self.num_texts * self.total
    self.bar.update(num_texts, **fields)


def _available(found: Iterable[Unit], ids: Container[str] | None) -> Iterator[Unit]:
  return (unit for unit in found if ids is None or unit.id in ids)


def _in_order(of_documents: Iterable[Iterator[Unit]], budget: BudgetConfig) -> Iterator[Unit]:
  """Chains the units of documents, or takes them in turn if a budget may end before the last."""
  if budget.max_tokens is None and budget.max_usd is None:
    return itertools.chain.from_iterable(of_documents)
  return units.interleaved(of_documents)


def _share(budget: BudgetConfig, share: float) -> BudgetConfig:
  """Returns a part of a budget, which does not depend on what other parts leave unspent."""
  tokens, usd = budget.max_tokens, budget.max_usd
  return dataclasses.replace(
    budget,
    max_tokens=None if tokens is None else max(1, round(tokens * share)),
    max_usd=None if usd is None else usd * share,
  )


def _counts(record: Mapping[str, Any]) -> dict[str, int]:
  usage = record.get("usage") or {}
  return {
    "failed": int("failure" in record),
    "prompt_tokens": usage.get("prompt_tokens", 0),
    "completion_tokens": usage.get("completion_tokens", 0),
    "micro_usd": round(1e6 * record.get("cost_usd", 0.0)),  # shards count integers
  }


def _unit_maker(
  context: Context, config: TextsStageConfig
) -> Callable[[SourceDocument], Iterable[Unit]]:
  """Returns a function of a document to the units of the stage's step."""
  c, step = config.synthesis, config.step
  of_document = _listed(context)

  def found(document: SourceDocument, field: str) -> list[str]:
    # A document whose entities or strategies failed has no further texts.
    return of_document.get(document.id, {field: []})[field]

  def relations(document: SourceDocument) -> Iterator[Unit]:
    return units.relation_units(document.id, found(document, "entities"), config.seed)

  makers: dict[str, Callable[[SourceDocument], Iterable[Unit]]] = {
    "entities": lambda d: [units.entities_unit(d.id)],
    "relations": relations,
    "rephrasings": lambda d: units.rephrase_units(d.id, c.rephrase_styles, c.rephrase_samples),
    "spa": lambda d: units.spa_units(d.id, c.spa_samples),
    "strategies": lambda d: [units.strategy_unit(d.id)],
    "active_reading": lambda d: units.apply_units(
      d.id, found(d, "strategies"), c.active_reading_samples
    ),
    "focal": lambda d: units.focal_units(d.id, [q.id for q in d.questions], c.focal_samples),
  }
  return makers[step]


def _listed(context: Context) -> dict[str, dict[str, Any]]:
  """Returns the record of each document's entities or strategies, for a step that needs them."""
  for role in ("entities", "strategies"):
    if role in context.inputs:
      records = context.inputs[role].records()
      return {record["document"]: record for record in records if "failure" not in record}
  return {}


def _num_units(
  context: Context,
  config: TextsStageConfig,
  make_units: Callable[[SourceDocument], Iterable[Unit]],
  documents: list[SourceDocument],
) -> int:
  """Returns the number of units of a step, without a budget's tokens and dollars."""
  if config.step != "relations":
    return sum(len(list(make_units(document))) for document in documents)
  numbers = (
    sum(units.num_relation_units(len(record["entities"])).values())
    for record in _listed(context).values()
  )
  limit = config.synthesis.relations.max_texts_per_document
  return sum(number if limit is None else min(number, limit) for number in numbers)


def _answerer(
  context: Context,
  config: TextsStageConfig,
  documents: list[SourceDocument],
  on_reply: Callable[[Reply, Mapping[str, Any] | None], None],
) -> Callable[[Iterable[Unit], storage.Path, BudgetConfig], None]:
  """Returns a function that asks for units and leaves their records in a file."""
  c = config.synthesis
  model = open_generator(config.generator, context.inputs["generator"])
  prompts = PromptSet.load(c.prompts)
  synthesizer = Synthesizer(documents, prompts, c.generation, model.name)
  tried = _read_tried(context.folder)
  # Recorded texts are those of first attempts.
  max_attempts = 1 if config.generator.kind == "recorded" else c.generation.max_attempts

  def make_request(unit: Unit, attempt: int) -> TextRequest:
    return synthesizer.make_request(unit, attempt + tried.get(unit.id, 0))

  def read(unit: Unit, request: TextRequest, reply: Reply, attempt: int) -> dict[str, Any]:
    return synthesizer.read(unit, request, reply, attempt + tried.get(unit.id, 0))

  def answer(asked: Iterable[Unit], path: storage.Path, budget: BudgetConfig) -> None:
    # Each record is kept as soon as it is there. The log becomes the shard by a rename.
    log = _log_of(path)
    calls.answer(
      asked,
      model=model,
      make_request=make_request,
      read=read,
      log_path=log,
      max_attempts=max_attempts,
      on_reply=on_reply,
      budget=budget,
    )
    log.rename(path)

  return answer


def _log_of(shard: storage.Path) -> storage.Path:
  return shard.with_name(_LOG.format(shard.name))


def _read_tried(folder: storage.Path) -> dict[str, int]:
  path = folder / _TRIED
  return artifacts.read_json(path) if path.exists() else {}


def _count_failures(folder: storage.Path) -> int:
  """Returns the number of failed units of a step, complete or not."""
  logs = (*_files(folder, "{}"), *_files(folder, _LOG))
  return sum("failure" in record for log in logs for record in calls.read_records(log))


def _remove_failures(folder: storage.Path) -> None:
  """Turns the shards of a step into unfinished ones, without the records of failed units.

  The number of their attempts is kept, so that the next ones are other samples: the same ones would
  fail again, and an endpoint's answers are cached.
  """
  for shard in _files(folder, "{}"):
    shard.rename(_log_of(shard))
  logs = _files(folder, _LOG)
  failed = (record for log in logs for record in calls.read_records(log) if "failure" in record)
  tried = {record["id"]: record["failure"]["attempts"] for record in failed}
  artifacts.write_json(folder / _TRIED, _read_tried(folder) | tried)
  for log in logs:
    calls.retry_failures(log)


def _files(folder: storage.Path, form: str) -> list[storage.Path]:
  return sorted(folder.glob(form.format("[0-9]*.jsonl"))) if folder.exists() else []


FAILURES = Failures(_count_failures, _remove_failures)
"""Finds failed units, for the stages of generators whose further attempts differ."""
