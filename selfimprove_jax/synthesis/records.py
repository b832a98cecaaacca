"""What all kinds of units share: how calls are sampled, and the records of their replies."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field

from selfimprove_jax.data.sources import SourceDocument
from selfimprove_jax.language_models.protocol import Reply, TextRequest
from selfimprove_jax.runtime.config import section
from selfimprove_jax.synthesis.prompts import PromptSet
from selfimprove_jax.synthesis.units import Unit

ATTEMPT_STRIDE = 1 << 20
"""The difference between the `sample` of a request and that of its next attempt."""

_MAX_REFUSAL_CHARACTERS = 400
_MAX_RAW_CHARACTERS = 2000
_REFUSAL = re.compile(
  r"[\s\"“*#]*(?:(?:i['’]m|i am|we['’]re|we are)\s+(?:very |so |really |truly |deeply )?"
  r"(?:sorry|unable|not able)|sorry\b|apologies\b|i (?:must |do )?apologi[sz]e|"
  r"(?:unfortunately,? )?i\s+(?:can['’]?t|cannot|can not|won['’]t|will not|must decline)\b|"
  r"as an? (?:ai|artificial intelligence|(?:large )?language model)\b)",
  re.IGNORECASE,
)


@section
class MaxTokensConfig:
  """The maximum number of new tokens of a reply, by the kind of unit.

  Attributes:
    entities: of lists of entities, with their summary.
    relation: of texts about pairs and triplets.
    rephrase: of rephrased documents, which are about as long as the document.
    study: of lists of strategies, SPA's and Active Reading's texts, and focal rewrites.
  """

  entities: Annotated[int, Field(ge=1)] = 4096
  relation: Annotated[int, Field(ge=1)] = 2048
  rephrase: Annotated[int, Field(ge=1)] = 8192
  study: Annotated[int, Field(ge=1)] = 4096


@section
class GenerationConfig:
  """Configures how the texts of units are sampled.

  Attributes:
    temperature: of all kinds; EntiGraph and its baselines use 1.0 everywhere (2409.07431).
    max_attempts: maximum number of calls for a unit; each samples another text.
  """

  temperature: Annotated[float, Field(ge=0)] = 1.0
  top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
  max_tokens: MaxTokensConfig = MaxTokensConfig()
  seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
  max_attempts: Annotated[int, Field(ge=1, le=1000)] = 3


def text_request(
  unit: Unit,
  source: SourceDocument,
  prompts: PromptSet,
  generation: GenerationConfig,
  attempt: int,
  *,
  max_tokens: int,
  values: Mapping[str, str] | None = None,
  json_schema: Mapping[str, Any] | None = None,
) -> TextRequest:
  """Returns the call of a unit, whose id is the unit's.

  Args:
    attempt: from 0; each attempt is another sample.
    values: the placeholders of the unit's prompt.
  """
  if unit.document != source.id:
    raise ValueError(f"the unit is about {unit.document!r}, and the document is {source.id!r}")
  if unit.sample >= ATTEMPT_STRIDE:
    raise ValueError(f"sample is {unit.sample}; it must be below {ATTEMPT_STRIDE}")
  messages, shared = prompts.render(unit.kind, source, **(values or {}))
  return TextRequest(
    prompt=messages,
    id=unit.id,
    max_tokens=max_tokens,
    temperature=generation.temperature,
    top_p=generation.top_p,
    seed=generation.seed,
    sample=unit.sample + ATTEMPT_STRIDE * attempt,
    json_schema=json_schema,
    shared=(shared,),
  )


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where a reply comes from.

  Attributes:
    prompt: hash of the texts that made the prompt.
    model: name of the model.
    attempt: from 0.
  """

  unit: Unit
  request: TextRequest
  reply: Reply
  prompt: str
  model: str
  attempt: int

  def record(self, **fields: Any) -> dict[str, Any]:
    """Returns the record of a finished unit, with the fields that hold its content."""
    usage, reply = self.reply.usage, self.reply
    return {
      **self._beginning(),
      **fields,
      "finish_reason": reply.finish_reason,
      "usage": dataclasses.asdict(usage),
    }

  def failure(self, reason: str) -> dict[str, Any]:
    """Returns the record of a failed attempt; `raw` is the beginning of what the model wrote."""
    raw = self.reply.text[:_MAX_RAW_CHARACTERS]
    failure = {"reason": reason, "attempts": self.attempt + 1, "raw": raw}
    return {**self._beginning(), "failure": failure}

  def _beginning(self) -> dict[str, Any]:
    unit = self.unit
    return {
      "id": unit.id,
      "document": unit.document,
      "kind": unit.kind,
      "key": list(unit.key),
      "sample": unit.sample,
      "prompt": self.prompt,
      "model": self.model,
      "seed": self.request.seed,
    }


def why_unusable(reply: Reply) -> str | None:
  """Returns why a reply is no text to train on, or None.

  A refusal is a reply of under 400 characters that begins like one.
  """
  if reply.error is not None:
    return f"error: {reply.error}"
  if not reply.text.strip():
    return "empty"
  if reply.finish_reason == "length":
    return "cut at its length"
  if len(reply.text) < _MAX_REFUSAL_CHARACTERS and _REFUSAL.match(reply.text):
    return "refusal"
  return None


def read_text(origin: Origin) -> dict[str, Any]:
  """Returns the record of a reply that is a text: finished with `text`, or failed."""
  reason = why_unusable(origin.reply)
  return origin.record(text=origin.reply.text.strip()) if reason is None else origin.failure(reason)


def unique_texts(texts: Iterable[str]) -> list[str]:
  """Returns texts without repetitions and empty ones, in order.

  White space is normalized. Texts that differ in case alone are one, in the first spelling.
  """
  found: dict[str, str] = {}
  for text in texts:
    normalized = " ".join(text.split())
    if normalized:
      found.setdefault(normalized.casefold(), normalized)
  return list(found.values())


def texts_of(value: Any, field: str) -> list[str] | None:
  """Returns the list of texts in a field of a reply's JSON value; None if there is no such list."""
  texts = value.get(field) if isinstance(value, dict) else None
  is_list = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
  return texts if is_list else None
