"""Shows how many calls the synthesis makes at most, and what they cost (`--dry_run`)."""

import collections
import math
from collections.abc import Iterator

import selfimprove_jax.pipelines.entigraph.generators as generators
import selfimprove_jax.pipelines.entigraph.pipeline as pipeline
from selfimprove_jax.data.sources import SourceDocument, read_sources
from selfimprove_jax.language_models.chat_api import Prices, rough_num_tokens
from selfimprove_jax.language_models.protocol import Usage
from selfimprove_jax.pipelines.entigraph.config import Config
from selfimprove_jax.pipelines.entigraph.synthesis import TextsStageConfig
from selfimprove_jax.synthesis import entigraph, study, units
from selfimprove_jax.synthesis.prompts import PromptSet
from selfimprove_jax.synthesis.synthesizer import Synthesizer
from selfimprove_jax.synthesis.units import Unit

# Steps whose calls depend on an earlier step's replies.
_BOUNDED = ("relations", "active_reading")
_NAMES = ("one name", "another name", "a third name")  # stand for entities in a prompt
_STRATEGY = "a strategy to study a document, in one sentence of about this length"


def preview(config: Config) -> str:
  """Returns calls, tokens and dollars of each step of the synthesis, without repeated attempts.

  Tokens of prompts are estimated from their bytes; completions count as the longest that are
  allowed.

  Raises:
    ValueError: the recorded texts cannot be read.
  """
  try:
    documents = read_sources(config.sources.documents)
  except (ValueError, OSError) as error:
    # A plan needs none of the files, which may be on another machine.
    return f"\n== synthesis: calls are not counted, since the sources are not here: {error}"
  steps = [
    stage.config.step
    for stage in pipeline.stages(config)
    if isinstance(stage.config, TextsStageConfig)
  ]
  recorded = _num_recorded(config, documents)
  prices = _prices(config)
  rows, total_usd = [], 0.0
  for step in steps:
    calls, usage = _cost(config, documents, step)
    most = "at most " if step in _BOUNDED else ""
    row = {"step": step, "calls": f"{most}{calls:,}"}
    if recorded is not None:
      row["recorded"] = f"{recorded[step]:,}"
    else:
      row["prompt tokens"] = f"{most}{usage.prompt_tokens:,}"
      row["completion tokens"] = f"at most {usage.completion_tokens:,}"
    if prices:
      usd = min(prices.usd(usage), _max_usd(config, step))
      total_usd += usd
      row["USD"] = f"at most {usd:,.2f}"
    rows.append(row)
  about = f"== synthesis: {len(documents):,} documents, generator {config.generator.kind}"
  lines = ["", about, *_aligned(rows)] if rows else ["", about + ": no step"]
  if prices:
    cap = config.generator.endpoint.max_usd
    limit = "no cap: set generator.endpoint.max_usd" if cap is None else f"hard cap {cap:,.2f} USD"
    total_usd = total_usd if cap is None else min(total_usd, cap)
    lines.append(f"at most {total_usd:,.2f} USD without repeated attempts; {limit}")
  return "\n".join(lines)


def _cost(config: Config, documents: list[SourceDocument], step: str) -> tuple[int, Usage]:
  """Returns the number of calls of a step, and tokens, both as bounds where they are not known."""
  synthesis = config.synthesis
  prompts = PromptSet.load(synthesis.prompts)
  synthesizer = Synthesizer(documents, prompts, synthesis.generation, "")
  num_calls = prompt = completion = 0
  for document in documents:
    for unit, number in _units(config, document, step):
      request = synthesizer.make_request(unit, 0)
      texts = (message["content"] for message in request.prompt)
      num_calls += number
      prompt += number * rough_num_tokens("\n".join(texts))
      completion += number * request.max_tokens
  most = synthesis.relations.max_tokens if step == "relations" else None
  return num_calls, Usage(prompt, completion if most is None else min(completion, most))


def _units(config: Config, document: SourceDocument, step: str) -> Iterator[tuple[Unit, int]]:
  """Yields units of a document, each with the number of those whose prompts are about as long."""
  c, id_ = config.synthesis, document.id
  if step == "entities":
    yield units.entities_unit(id_), 1
  elif step == "relations":
    left = c.relations.max_texts_per_document
    most = units.num_relation_units(entigraph.MAX_ENTITIES)
    for kind, size in ((units.PAIR, 2), (units.TRIPLET, 3)):
      number = most[kind] if left is None else min(left, most[kind])
      left = None if left is None else left - number
      yield Unit(id_, kind, _NAMES[:size]), number
  elif step == "rephrasings":
    for unit in units.rephrase_units(id_, c.rephrase_styles, min(1, c.rephrase_samples)):
      yield unit, c.rephrase_samples
  elif step == "spa":
    for unit in units.spa_units(id_, min(1, c.spa_samples)):
      yield unit, c.spa_samples
  elif step == "strategies":
    yield units.strategy_unit(id_), 1
  elif step == "active_reading":
    yield Unit(id_, units.APPLY, (_STRATEGY,)), c.active_reading_samples * study.MAX_STRATEGIES
  else:
    for unit in units.focal_units(id_, [question.id for question in document.questions], 1):
      yield unit, c.focal_samples


def _num_recorded(config: Config, documents: list[SourceDocument]) -> dict[str, int] | None:
  """Returns the number of recorded texts of each step; None for other generators."""
  if not isinstance(config.generator, generators.RecordedGenerator):
    return None
  ids = {document.id for document in documents}
  texts = generators.recorded_texts(config.generator.folder, ids)
  kinds = collections.Counter(unit.kind.split("/")[0] for unit, _ in texts)
  return collections.Counter(
    entities=kinds["entities"],
    relations=kinds["pair"] + kinds["triplet"],
    rephrasings=kinds["rephrase"],
  )


def _prices(config: Config) -> Prices | None:
  if not isinstance(config.generator, generators.EndpointGenerator) or config.generator.is_free:
    return None
  endpoint = config.generator.endpoint
  return Prices(endpoint.input_usd_per_million, endpoint.output_usd_per_million)


def _max_usd(config: Config, step: str) -> float:
  caps = [config.generator.endpoint.max_usd]
  caps += [config.synthesis.relations.max_usd] if step == "relations" else []
  return min((cap for cap in caps if cap is not None), default=math.inf)


def _aligned(rows: list[dict[str, str]]) -> list[str]:
  cells = [list(rows[0]), *(list(row.values()) for row in rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
