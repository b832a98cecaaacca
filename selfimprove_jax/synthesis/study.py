"""Ways to study a document: SPA's tasks, Active Reading, and rewriting with a question in view.

SPA is arXiv 2603.22213, Active Reading 2508.09494, focal rewriting 2603.23562; the prompts are our
own.
"""

from typing import Any

from selfimprove_jax.data.sources import SourceDocument
from selfimprove_jax.language_models.protocol import TextRequest
from selfimprove_jax.synthesis import records, units
from selfimprove_jax.synthesis.prompts import PromptSet
from selfimprove_jax.synthesis.records import GenerationConfig, Origin
from selfimprove_jax.synthesis.units import Unit

MAX_STRATEGIES = 50

STRATEGIES_SCHEMA = {
  "type": "object",
  "properties": {
    "strategies": {
      "type": "array",
      "items": {"type": "string"},
      "minItems": 1,
      "maxItems": MAX_STRATEGIES,
    },
  },
  "required": ["strategies"],
  "additionalProperties": False,
}


def make_request(
  unit: Unit,
  source: SourceDocument,
  prompts: PromptSet,
  generation: GenerationConfig,
  attempt: int,
) -> TextRequest:
  """Returns the call of a unit of a kind `spa/TASK`, `active_reading/...` or focal.

  A focal call shows the question alone: neither its choices nor its answers.

  Args:
    attempt: from 0.

  Raises:
    ValueError: the document has no question of the id that a focal unit names.
  """
  values = {}
  if unit.kind == units.APPLY:
    values["strategy"] = unit.key[0]
  elif unit.kind == units.FOCAL:
    values["question"] = _question(source, unit.key[0])
  return records.text_request(
    unit,
    source,
    prompts,
    generation,
    attempt,
    max_tokens=generation.max_tokens.study,
    values=values,
    json_schema=STRATEGIES_SCHEMA if unit.kind == units.STRATEGIES else None,
  )


def read(origin: Origin, source: SourceDocument) -> dict[str, Any]:
  """Returns the record of a reply; that of a list of strategies has `strategies`, not `text`."""
  del source  # no kind compares a reply with its document
  if origin.unit.kind != units.STRATEGIES:
    return records.read_text(origin)
  if (reason := records.why_unusable(origin.reply)) is not None:
    return origin.failure(reason)
  strategies = records.unique_texts(records.texts_of(origin.reply.parsed, "strategies") or ())
  if not strategies:
    return origin.failure("error: the reply has no JSON value with a list of strategies")
  return origin.record(strategies=strategies[:MAX_STRATEGIES])


def _question(source: SourceDocument, id_: str) -> str:
  for question in source.questions:
    if question.id == id_:
      return question.question
  raise ValueError(f"the document {source.id!r} has no question {id_!r}")
