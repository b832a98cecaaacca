"""Structured replies from models that may violate the schema: ask, validate, ask for a repair."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from selfimprove_jax.language_models.protocol import TextRequest

_CHOICE = "choice"
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_MAX_DEPTH = 64  # what reads a value later, such as a validator, recurses
_MAX_DIGITS = 1000
_BRACKET = re.compile(r"[{\[]")
_MAX_TRIES = 1000  # brackets tried in one text: each costs a time that grows with the text


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
  """Raises ValueError for a value that is not a JSON schema, or one that refers to another file."""
  import jsonschema
  import referencing.exceptions

  try:
    validator = _validator(schema)
    validator.check_schema(schema)
    for reference in _references(schema):
      validator._resolver.lookup(reference)
    next(validator.iter_errors(None), None)
  except jsonschema.SchemaError as error:
    raise ValueError(f"json_schema is not a JSON schema: {error.message}") from None
  except referencing.exceptions.Unresolvable as error:
    raise ValueError(
      f"json_schema refers to {error.ref!r}, which is not in it; other files are never fetched"
    ) from None
  except RecursionError:
    raise ValueError("json_schema refers to itself without end, or is nested too deeply") from None


def read(request: TextRequest, text: str) -> tuple[Any, str | None]:
  """Returns (value, None) for a valid reply, else (None, problem).

  A value may stand in a fenced block or be surrounded by prose, and a choice may stand without its
  object. If several values are complete, the last one that matches the schema is the reply.
  """
  if request.choices and text.strip() in request.choices:
    return text.strip(), None
  validator = _validator(schema_of(request))
  problem = None
  for value, said in _candidates(text):
    if said is None:
      said = _problem(validator, value)
    if said is None:
      return (value[_CHOICE] if request.choices else value), None
    problem = problem or said
  return None, problem


def _validator(schema: dict[str, Any]) -> Any:
  import jsonschema
  import jsonschema_specifications

  # Without a registry, jsonschema fetches what a schema refers to.
  registry = jsonschema_specifications.REGISTRY
  return jsonschema.validators.validator_for(schema)(schema, registry=registry)


def _problem(validator: Any, value: Any) -> str | None:
  """Returns how a value violates its schema, or None."""
  import jsonschema

  try:
    if error := jsonschema.exceptions.best_match(validator.iter_errors(value)):
      return f"at {error.json_path}: {error.message}"
  except RecursionError:
    return "it is nested too deeply for its schema"
  return None


def _references(schema: Any) -> Iterator[str]:
  waiting = [schema]
  while waiting:
    value = waiting.pop()
    if isinstance(value, dict):
      for name in ("$ref", "$dynamicRef"):
        if isinstance(value.get(name), str):
          yield value[name]
      waiting.extend(value.values())
    elif isinstance(value, list):
      waiting.extend(value)


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


def _candidates(text: str) -> Iterator[tuple[Any, str | None]]:
  """Yields the JSON values in a text, each with its problem, in the order of preference.

  The whole text, or else the last object or list in prose, or else the last fenced value.
  """
  whole = _decode(text.strip(), 0)
  if whole.end == len(text.strip()) and whole.end:
    yield whole.value, whole.problem
    return
  found, start = [], 0
  # After a failure the search continues behind it: pieces of a value that is damaged or was cut
  # are no answers.
  for _ in range(_MAX_TRIES):
    if (bracket := _BRACKET.search(text, start)) is None:
      break
    decoded = _decode(text, bracket.start())
    if decoded.is_value:
      found.append((decoded.value, decoded.problem))
    start = max(decoded.end, bracket.end())
  fenced = [_decode(block.strip(), 0) for block in _FENCED.findall(text)]
  yield from reversed(found)
  yield from ((block.value, block.problem) for block in reversed(fenced) if block.is_value)
  if not found:
    yield None, whole.problem or "it is not JSON (text follows the value)"


@dataclasses.dataclass(frozen=True)
class _Decoded:
  """A JSON value in a text, or where and why there is none."""

  end: int
  value: Any = None
  problem: str | None = None
  is_value: bool = True


def _decode(text: str, start: int) -> _Decoded:
  try:
    value, end = _DECODER.raw_decode(text, start)
  except json.JSONDecodeError as error:
    # The position of a string without an end is its beginning.
    end = len(text) if error.msg.startswith("Unterminated string") else error.pos
    return _Decoded(end, problem=f"it is not JSON ({error})", is_value=False)
  except RecursionError:
    problem = f"it is nested more than {_MAX_DEPTH} levels deep"
    return _Decoded(len(text), problem=problem, is_value=False)
  return _Decoded(end, value, _not_storable(value))


def _not_storable(value: Any) -> str | None:
  """Returns why a value cannot be written as JSON and read by any reader, or None."""
  level = [value]
  for _ in range(_MAX_DEPTH + 1):
    inside: list[Any] = []
    for one in level:
      if isinstance(one, dict):
        inside += [*one, *one.values()]
      elif isinstance(one, list):
        inside += one
      elif isinstance(one, float) and not math.isfinite(one):
        return "it contains NaN, Infinity, or a number too large to be one in JSON"
      elif isinstance(one, str) and not one.isascii() and _has_surrogate(one):
        return "it contains half of a surrogate pair"
    if not (level := inside):
      return None
  return f"it is nested more than {_MAX_DEPTH} levels deep"


def _has_surrogate(text: str) -> bool:
  return any("\ud800" <= character <= "\udfff" for character in text)


def _integer(digits: str) -> int | float:
  return int(digits) if len(digits) <= _MAX_DIGITS else math.nan


_DECODER = json.JSONDecoder(parse_int=_integer)
