"""Replies of a given form from models that may not keep to it: ask, check, ask to repair."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from selfimprove_jax.language_models.protocol import TextRequest

_CHOICE = "choice"
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def schema_of(request: TextRequest) -> dict[str, Any] | None:
  """The JSON schema that the reply must match; choices are the values of an object's one field.

  An object, because endpoints that enforce schemas want one at the root.
  """
  if request.choices:
    return {
      "type": "object",
      "properties": {_CHOICE: {"type": "string", "enum": list(request.choices)}},
      "required": [_CHOICE],
      "additionalProperties": False,
    }
  return None if request.json_schema is None else dict(request.json_schema)


def check_schema(schema: Mapping[str, Any]) -> None:
  """Raises ValueError for what is no JSON schema."""
  import jsonschema

  try:
    jsonschema.validators.validator_for(schema).check_schema(schema)
  except jsonschema.SchemaError as error:
    raise ValueError(f"json_schema is no JSON schema: {error.message}") from None


def read(request: TextRequest, text: str) -> tuple[Any, str | None]:
  """The value in a reply, and None; or None, and what is wrong with it.

  A value in a fenced block, or with words around it, is taken too; a choice may stand for itself.
  """
  if request.choices and text.strip() in request.choices:
    return text.strip(), None
  value, problem = _parse(text)
  if problem is None:
    problem = _violation(schema_of(request), value)
  if problem is not None:
    return None, problem
  return (value[_CHOICE] if request.choices else value), None


def with_instruction(request: TextRequest) -> TextRequest:
  """The request with its schema spelt out, for endpoints that take none."""
  text = (
    "Answer with one JSON value that is valid against this JSON schema, and with nothing else:\n"
    + json.dumps(schema_of(request))
  )
  last = request.prompt[-1]
  asked = {**last, "content": f"{last['content']}\n\n{text}"}
  return dataclasses.replace(request, prompt=[*request.prompt[:-1], asked])


def repair_turn(request: TextRequest, text: str, problem: str) -> TextRequest:
  """The conversation with the reply that is not valid, and what is wrong with it."""
  answer = {"role": "assistant", "content": text}
  ask = f"This is not what was asked for: {problem}. Answer again, with the valid JSON value alone."
  return dataclasses.replace(
    request, prompt=[*request.prompt, answer, {"role": "user", "content": ask}]
  )


def _parse(text):
  fenced = _FENCED.search(text)
  text = (fenced.group(1) if fenced else text).strip()
  try:
    return json.loads(text), None
  except ValueError as error:
    problem = f"it is not JSON ({error})"
  for start in re.finditer(r"[{\[]", text):
    try:
      return json.JSONDecoder().raw_decode(text, start.start())[0], None
    except ValueError:
      continue
  return None, problem


def _violation(schema, value):
  import jsonschema

  validator = jsonschema.validators.validator_for(schema)(schema)
  error = jsonschema.exceptions.best_match(validator.iter_errors(value))
  return None if error is None else f"at {error.json_path}: {error.message}"
