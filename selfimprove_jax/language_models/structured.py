"""Structured replies from models that may violate the schema: ask, validate, ask for a repair."""

import dataclasses
import json
import re
from typing import Any

from selfimprove_jax.language_models.protocol import TextRequest

_CHOICE = "choice"
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def schema_of(request: TextRequest) -> dict[str, Any] | None:
  """Returns the JSON schema that a reply must match, or None.

  Choices become the values of an object's only field, since endpoints that enforce schemas require
  an object at the root.
  """
  if request.choices:
    return {
      "type": "object",
      "properties": {_CHOICE: {"type": "string", "enum": list(request.choices)}},
      "required": [_CHOICE],
      "additionalProperties": False,
    }
  return None if request.json_schema is None else dict(request.json_schema)


def check_schema(schema: dict[str, Any]) -> None:
  """Raises ValueError if a value is not a JSON schema."""
  import jsonschema

  try:
    jsonschema.validators.validator_for(schema).check_schema(schema)
  except jsonschema.SchemaError as error:
    raise ValueError(f"json_schema is not a JSON schema: {error.message}") from None


def read(request: TextRequest, text: str) -> tuple[Any, str | None]:
  """Returns (value, None) for a valid reply, else (None, problem).

  Accepts a value in a fenced block or surrounded by prose, and a choice without its object.
  """
  import jsonschema

  if request.choices and text.strip() in request.choices:
    return text.strip(), None
  value, problem = _parse(text)
  if problem is not None:
    return None, problem
  schema = schema_of(request)
  validator = jsonschema.validators.validator_for(schema)(schema)
  if error := jsonschema.exceptions.best_match(validator.iter_errors(value)):
    return None, f"at {error.json_path}: {error.message}"
  return (value[_CHOICE] if request.choices else value), None


def with_instruction(request: TextRequest) -> TextRequest:
  """Returns the request with its schema in the last message, for endpoints that enforce none."""
  text = (
    "Answer with one JSON value that is valid against this JSON schema, and with nothing else:\n"
    + json.dumps(schema_of(request))
  )
  last = request.prompt[-1]
  asked = {**last, "content": f"{last['content']}\n\n{text}"}
  return dataclasses.replace(request, prompt=[*request.prompt[:-1], asked])


def repair_turn(request: TextRequest, text: str, problem: str) -> TextRequest:
  """Returns the conversation with an invalid reply, its problem, and a request for another."""
  answer = {"role": "assistant", "content": text}
  ask = f"This is not what was asked for: {problem}. Answer again, with the valid JSON value alone."
  return dataclasses.replace(
    request, prompt=[*request.prompt, answer, {"role": "user", "content": ask}]
  )


def _parse(text: str) -> tuple[Any, str | None]:
  fenced = _FENCED.search(text)
  text = (fenced.group(1) if fenced else text).strip()
  try:
    return json.loads(text), None
  except ValueError as error:
    problem = f"it is not JSON ({error})"
  # Prose before the value may contain brackets, so each one is tried as its beginning.
  for start in re.finditer(r"[{\[]", text):
    try:
      return json.JSONDecoder().raw_decode(text, start.start())[0], None
    except ValueError:
      continue
  return None, problem
