"""Request bodies: OpenAI's fields and some of vLLM's, and the errors for invalid ones."""

import dataclasses
import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import Field

from selfimprove_jax.sampling.grammar import Grammar
from selfimprove_jax.sampling.requests import (
  INT32_MAX,
  MAX_STOP_IDS,
  MAX_TOP_LOGPROBS,
  Request,
  SamplingConfig,
)

MAX_N = 64
MAX_STOPS = 16
_DEFAULT_TEXT_TOKENS = 16  # OpenAI's default in /v1/completions


class ApiError(Exception):
  """An error response in OpenAI's format."""

  def __init__(
    self, status: int, message: str, *, code: str | None = None, param: str | None = None
  ):
    super().__init__(message)
    self.status, self.code, self.param = status, code, param

  def headers(self) -> dict[str, str]:
    match self.status:
      case 401:
        return {"www-authenticate": "Bearer", "connection": "close"}
      case 403 | 413 | 415:
        return {"connection": "close"}  # instead of reading the rest of the body
      case 429 | 503:
        return {"retry-after": "1"}
    return {}

  def body(self) -> dict[str, Any]:
    kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
    message = str(self)
    return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class StreamOptions(_Strict):
  """OpenAI's `stream_options`."""

  include_usage: bool = False
  include_obfuscation: bool | None = None  # accepted; this server pads nothing


class SchemaFormat(_Strict):
  """OpenAI's `response_format.json_schema`."""

  name: str | None = None
  description: str | None = None
  schema_: dict[str, Any] = Field(alias="schema")
  strict: bool | None = None


class ResponseFormat(_Strict):
  """OpenAI's `response_format`."""

  type: Literal["text", "json_object", "json_schema"]
  json_schema: SchemaFormat | None = None


Token = Annotated[int, Field(ge=0, le=INT32_MAX)]
Penalty = Annotated[float, Field(ge=-2, le=2)] | None
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Body(_Strict):
  """Fields of both kinds of completion; null means absent.

  `top_k`, `repetition_penalty`, `min_tokens`, `stop_token_ids`, `choices` and `regex` are not
  OpenAI's; its client sends them with `extra_body`.
  """

  model: str
  max_tokens: Annotated[int, Field(ge=0)] | None = None
  n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
  seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
  stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  temperature: Annotated[float, Field(ge=0, le=2)] | None = None
  top_p: Annotated[float, Field(gt=0, le=1)] | None = None
  presence_penalty: Penalty = None
  frequency_penalty: Penalty = None
  logit_bias: dict[str, float] | None = None
  response_format: ResponseFormat | None = None
  top_k: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
  repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
  min_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
  stop_token_ids: Annotated[list[Token], Field(max_length=MAX_STOP_IDS)] | None = None
  choices: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None
  regex: str | None = None
  # Accepted where they ask for no tool: clients send them always.
  tools: list[Any] | None = None
  tool_choice: Literal["none", "auto"] | None = None
  parallel_tool_calls: bool | None = None
  user: Any = None  # accepted and ignored, like the next three: OpenAI uses them for billing
  metadata: Any = None
  service_tier: Any = None
  store: Any = None

  @property
  def wants_usage_chunk(self) -> bool:
    return self.stream_options is not None and self.stream_options.include_usage

  @property
  def echoes_logprobs(self) -> bool:
    """Whether the log-probabilities of the prompt are asked for."""
    return False

  def most_tokens(self, room: int) -> int:
    """Returns the maximum number of new tokens; after the prompt the engine has room for `room`."""
    raise NotImplementedError

  def num_top_logprobs(self) -> int | None:
    """Returns the value for `Request.top_logprobs`."""
    raise NotImplementedError

  def check(self) -> None:
    """Raises ApiError for unsupported fields, and for fields that exclude one another."""
    if self.tools:
      raise ApiError(400, "tools is not supported", param="tools", code="unsupported")
    if self.logit_bias:
      raise ApiError(400, "logit_bias is not supported", param="logit_bias")
    if self.stream_options is not None and not self.stream:
      raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    if self.max_tokens == 0 and not self.echoes_logprobs:
      message = "max_tokens: 0 is possible only with echo and logprobs, in /v1/completions"
      raise ApiError(400, message, param="max_tokens")
    form = self.response_format
    if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
      message = "response_format.json_schema is needed for type 'json_schema', and only for it"
      raise ApiError(400, message, param="response_format")
    constraints = [self.choices, self.regex, form if form and form.type != "text" else None]
    if sum(constraint is not None for constraint in constraints) > 1:
      raise ApiError(400, "choices, regex and a JSON response_format exclude one another")

  def grammar_key(self) -> tuple[str, str] | None:
    """Returns the kind and the definition of the grammar, or None."""
    if self.choices is not None:
      return "choices", json.dumps(self.choices)
    if self.regex is not None:
      return "regex", self.regex
    if self.response_format is None or self.response_format.type == "text":
      return None
    if self.response_format.type == "json_object":
      return "response_format", json.dumps({"type": "object"})
    return "response_format", json.dumps(self.response_format.json_schema.schema_)

  def requests(
    self,
    prompts: list[list[int]],
    *,
    max_length: int,
    grammar: Grammar | None,
    stop_strings: tuple[str, ...],
    special_ids: Mapping[str, int],
  ) -> list[Request]:
    """Returns `n` requests for each prompt, grouped by prompt; the seed is random if not given.

    Args:
      special_ids: the special tokens; one that is a stop string has no text, and stops as a token.
    """
    seed = secrets.randbits(64) if self.seed is None else self.seed % 2**64
    stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
    stop_ids = dict.fromkeys(self.stop_token_ids or ())
    stop_ids |= dict.fromkeys(special_ids[stop] for stop in stops if stop in special_ids)
    stops = [stop for stop in stops if stop not in special_ids]
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    sampling = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
    return [
      Request(
        prompt=prompt,
        max_new_tokens=self.most_tokens(max_length - len(prompt)),
        # The engine's seed has 32 bits, and a client's 64.
        seed=seed % 2**32,
        record_id=seed >> 32,
        sample=sample,
        sampling=SamplingConfig(**sampling),
        min_new_tokens=self.min_tokens or 0,
        stop_ids=tuple(stop_ids),
        stop_strings=(*stops, *stop_strings),
        top_logprobs=self.num_top_logprobs(),
        grammar=grammar,
      )
      for prompt in prompts
      for sample in range(self.n or 1)
    ]


class ChatBody(Body):
  """Body of /v1/chat/completions."""

  messages: list[dict[str, Any]]
  max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
  logprobs: bool | None = None
  top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

  def most_tokens(self, room: int) -> int:
    return self.max_completion_tokens or self.max_tokens or room

  def num_top_logprobs(self) -> int | None:
    return (self.top_logprobs or 0) if self.logprobs else None

  def check(self) -> None:
    super().check()
    if self.top_logprobs and not self.logprobs:
      raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")


Tokens = Annotated[list[Token], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


class TextBody(Body):
  """Body of /v1/completions."""

  prompt: Text | Tokens | Annotated[list[Text | Tokens], Field(min_length=1, max_length=MAX_N)]
  logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
  echo: bool | None = None
  best_of: Annotated[int, Field(ge=1)] | None = None

  @property
  def echoes_logprobs(self) -> bool:
    return bool(self.echo) and self.logprobs is not None

  def most_tokens(self, room: int) -> int:
    return _DEFAULT_TEXT_TOKENS if self.max_tokens is None else self.max_tokens

  def num_top_logprobs(self) -> int | None:
    return self.logprobs

  def prompts(self) -> list[str | list[int]]:
    """Returns the prompts as a list, also if there is one."""
    several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
    return self.prompt if several else [self.prompt]

  def check(self) -> None:
    super().check()
    if self.echoes_logprobs and self.stream:
      raise ApiError(400, "echo with logprobs can't be streamed", param="stream")
    if self.best_of is not None and self.best_of != (self.n or 1):
      raise ApiError(400, "best_of is not supported unless it equals n", param="best_of")
    if len(self.prompts()) * (self.n or 1) > MAX_N:
      raise ApiError(400, f"prompts times n may be at most {MAX_N}", param="n")


AnyBody = TypeVar("AnyBody", bound=Body)


def _without_nulls(body: bytes) -> bytes:
  """Drops the fields that are null, also those that this server does not know."""
  try:
    fields = pydantic_core.from_json(body)
  except ValueError:
    return body  # the model tells what is wrong
  if not isinstance(fields, dict) or None not in fields.values():
    return body
  kept = {name: value for name, value in fields.items() if value is not None}
  return pydantic_core.to_json(kept, inf_nan_mode="constants")


def parse(kind: type[AnyBody], body: bytes) -> AnyBody:
  """Parses a request body.

  Raises:
    ApiError: status 400, with the name of the field and what is wrong with it.
  """
  try:
    parsed = kind.model_validate_json(_without_nulls(body))
  except pydantic.ValidationError as error:
    faults = error.errors(include_url=False, include_context=False)
    first = faults[0]
    param = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
      name = ".".join(map(str, first["loc"]))
      raise ApiError(400, f"{name} is not supported", param=param, code="unsupported") from None
    # A field of a union type has one fault for each alternative.
    reasons = dict.fromkeys(f["msg"] for f in faults if not param or f["loc"][0] == param)
    where = f"{param}: " if param else "the body is not a valid request: "
    raise ApiError(400, where + "; or: ".join(reasons), param=param) from None
  parsed.check()
  return parsed
