"""EntiGraph: lists the entities of a document, and relates pairs and triplets of them.

arXiv 2409.07431, section 2.2. Our prompts are our own; a list that cannot be read is asked for a
bounded number of times, and `units.BudgetConfig` bounds the triplets, which the paper's code does
not.
"""

from typing import Any

from selfimprove_jax.data.sources import SourceDocument
from selfimprove_jax.language_models.protocol import TextRequest
from selfimprove_jax.synthesis import records, units
from selfimprove_jax.synthesis.prompts import PromptSet
from selfimprove_jax.synthesis.records import GenerationConfig, Origin
from selfimprove_jax.synthesis.units import Unit

MIN_ENTITIES, MAX_ENTITIES = 2, 100
# More entities than are kept are counted, not refused, but a model that loops must come to an end.
_MAX_LISTED = 2 * MAX_ENTITIES
_PLACEHOLDERS = ("first", "second", "third")

ENTITIES_SCHEMA = {
  "type": "object",
  "properties": {
    "summary": {"type": "string"},
    "entities": {
      "type": "array",
      "items": {"type": "string"},
      "minItems": MIN_ENTITIES,
      "maxItems": _MAX_LISTED,
    },
  },
  "required": ["summary", "entities"],
  "additionalProperties": False,
}


def make_request(
  unit: Unit,
  source: SourceDocument,
  prompts: PromptSet,
  generation: GenerationConfig,
  attempt: int,
) -> TextRequest:
  """Returns the call of a unit of kind entities, pair or triplet; `attempt` counts from 0."""
  is_list = unit.kind == units.ENTITIES
  max_tokens = generation.max_tokens.entities if is_list else generation.max_tokens.relation
  return records.text_request(
    unit,
    source,
    prompts,
    generation,
    attempt,
    max_tokens=max_tokens,
    values=dict(zip(_PLACEHOLDERS, unit.key)),
    json_schema=ENTITIES_SCHEMA if is_list else None,
  )


def read(origin: Origin, source: SourceDocument) -> dict[str, Any]:
  """Returns the record of a reply; that of a list of entities has these fields instead of `text`.

  `summary`; `entities`, without repetitions; `not_in_document`, those of them that do not occur in
  the document's text, up to case and white space; and `num_cut`, the number of entities beyond
  `MAX_ENTITIES`, which are left out.
  """
  if origin.unit.kind != units.ENTITIES:
    return records.read_text(origin)
  if (reason := records.why_unusable(origin.reply)) is not None:
    return origin.failure(reason)
  listed, value = records.texts_of(origin.reply.parsed, "entities"), origin.reply.parsed
  if listed is None or not isinstance(value.get("summary"), str):
    return origin.failure("error: the reply has no JSON value with a summary and entities")
  entities = records.unique_texts(listed)
  if len(entities) < MIN_ENTITIES:
    return origin.failure(f"fewer than {MIN_ENTITIES} entities")
  kept = entities[:MAX_ENTITIES]
  text = " ".join(source.text.split()).casefold()
  return origin.record(
    summary=value["summary"].strip(),
    entities=kept,
    not_in_document=[entity for entity in kept if entity.casefold() not in text],
    num_cut=len(entities) - len(kept),
  )
