"""The protocol of language models: requests for text and for scores, and what models return.

  messages = [{"role": "user", "content": "Name a prime."}]
  [reply] = model.generate([TextRequest(prompt=messages, max_tokens=64)])
  [score] = model.score([ScoreRequest(context="2 + 2 =", continuation=" 4")])

`generate` and `score` map an iterator to an iterator, so any number of requests streams through.
"""

import dataclasses
import json
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from selfimprove_jax.runs import artifacts

ROLES = ("system", "developer", "user", "assistant", "tool")
Prompt = str | Sequence[Any]
"""A text to continue, messages of a chat (`role` and `content`), or token ids."""

# Fields of a request that were added later -> their value in the content if they are not set.
_ADDED_LATER = {
  "top_k": 0,
  "repetition_penalty": 1.0,
  "presence_penalty": 0.0,
  "frequency_penalty": 0.0,
  "stop_ids": [],
  "min_tokens": 0,
  "top_logprobs": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRequest:
  """A request to sample one text; see `sampling.requests.SamplingConfig` for how tokens are drawn.

  Attributes:
    prompt: token ids are used as they are; a text gets the model's prefix (such as BOS), messages
      are rendered by its chat template.
    id: names the request in errors and in its reply. The local engine seeds its random numbers
      from it, or from the content where it is empty.
    stop: texts that end the reply; they are not part of it.
    stop_ids: token ids that end the reply, in addition to the end of sequence.
    min_tokens: no stop token is sampled before this many tokens.
    top_logprobs: None for no log-probabilities, 0 for those of the sampled tokens, k for those of
      the k most likely tokens at each position too.
    seed: seed of the random numbers, in [0, 2**32); None for the model's own.
    sample: distinguishes several replies to one prompt, in [0, 2**32).
    record_id: seeds the local engine's random numbers instead of `id`, in [0, 2**64).
    json_schema: JSON schema that the reply must match; the value is in `Reply.parsed`.
    choices: texts of which the reply must be one; excludes `json_schema`.
    shared: ends of the parts of the prompt that other requests begin with too (instructions, a
      document), so that a local model computes them once. They count characters of a text or of
      the messages' contents taken together, or tokens of token ids. Not part of the content.
  """

  prompt: Prompt
  max_tokens: int
  id: str = ""
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  stop: Sequence[Any] = ()
  stop_ids: Sequence[Any] = ()
  min_tokens: int = 0
  top_logprobs: int | None = None
  seed: int | None = None
  sample: int = 0
  record_id: int | None = None
  json_schema: Mapping[str, Any] | None = None
  choices: Sequence[str] = ()
  shared: Sequence[int] = ()

  def __post_init__(self) -> None:
    allowed = {
      "max_tokens": (self.max_tokens >= 1, "at least 1"),
      "min_tokens": (0 <= self.min_tokens <= self.max_tokens, "in [0, max_tokens]"),
      "temperature": (self.temperature >= 0, "at least 0"),
      "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
      "top_logprobs": ((self.top_logprobs or 0) >= 0, "at least 0, or None"),
      "seed": (0 <= (self.seed or 0) < 2**32, "in [0, 2**32), or None"),
      "sample": (0 <= self.sample < 2**32, "in [0, 2**32)"),
      "record_id": (0 <= (self.record_id or 0) < 2**64, "in [0, 2**64), or None"),
      "stop": (_are_texts(self.stop), "a sequence of texts that are not empty"),
      "choices": (_are_texts(self.choices), "a sequence of texts that are not empty"),
      "shared": (all(end >= 0 for end in self.shared), "numbers of at least 0"),
      "stop_ids": (not len(self.stop_ids) or is_token_ids(self.stop_ids), "token ids"),
    }
    for name, (is_allowed, rule) in allowed.items():
      if not is_allowed:
        raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {rule}")
    if self.choices and self.json_schema is not None:
      raise ValueError("json_schema and choices are both given; at most one of them may be")
    _check_prompt("prompt", self.prompt)

  @property
  def key(self) -> str:
    """SHA-256 of the content: everything but `id`, `record_id` and `shared`."""
    return artifacts.digest(self._content())

  def to_json(self) -> dict[str, Any]:
    """Returns the arguments that make this request, as JSON values."""
    named: dict[str, Any] = {"id": self.id}
    if self.record_id is not None:
      named["record_id"] = self.record_id
    if self.shared:
      named["shared"] = list(self.shared)
    return {**named, **self._content(), "json_schema": self.json_schema}

  def _content(self) -> dict[str, Any]:
    content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    del content["id"], content["record_id"], content["shared"]
    # Equal requests must have equal digests, which distinguish 1 from 1.0.
    for name in ("temperature", "top_p", *(n for n in content if n.endswith("_penalty"))):
      content[name] = float(content[name])
    content |= {
      "prompt": _prompt_to_json(self.prompt),
      "stop": list(self.stop),
      "stop_ids": [int(token) for token in self.stop_ids],
      "choices": list(self.choices),
      # As text, since digests sort keys: the order of a schema's properties is the reply's order.
      "json_schema": None if self.json_schema is None else json.dumps(self.json_schema),
    }
    # Caches of paid answers are keyed by this content. A field that was added later is part of it
    # only when it is set, so that the keys of earlier requests stay valid.
    return {n: v for n, v in content.items() if n not in _ADDED_LATER or v != _ADDED_LATER[n]}


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
  """Natural log-probabilities at one position, before temperature and truncation.

  Attributes:
    token: sampled token: its id from a local model, its text from an endpoint.
    top: the most likely tokens and their log-probabilities, most likely first.
  """

  token: int | str
  logprob: float
  top: tuple[tuple[int | str, float], ...] = ()

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "TokenLogprob":
    """Returns the log-probability that `dataclasses.asdict` turned into JSON values."""
    return cls(**{**value, "top": tuple(map(tuple, value["top"]))})


@dataclasses.dataclass(frozen=True)
class Usage:
  """Numbers of tokens; `estimated` if they were counted here and not reported by the model."""

  prompt_tokens: int
  completion_tokens: int
  estimated: bool = False

  def __add__(self, other: "Usage") -> "Usage":
    return Usage(
      self.prompt_tokens + other.prompt_tokens,
      self.completion_tokens + other.completion_tokens,
      self.estimated or other.estimated,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
  """A model's reply to a `TextRequest`.

  Attributes:
    text: sampled text, or the choice; empty if there is none.
    finish_reason: `stop`, `length`, or another reason that the model named; `error` without a text.
    usage: tokens, summed over all repair turns.
    parsed: the JSON value, or the choice, that was asked for; None if `error` is set.
    error: why the reply is unusable, or None.
    cached: whether the reply was in the cache, so that nothing was paid for it now.
    cost_usd: price of its calls when they were made.
    tokens: ids of the new tokens without the stop token; None from an endpoint.
    logprobs: one for each token, if the request asked for them and the model reports them.
  """

  id: str
  text: str
  finish_reason: str
  usage: Usage
  parsed: Any = None
  error: str | None = None
  cached: bool = False
  cost_usd: float = 0.0
  tokens: tuple[int, ...] | None = None
  logprobs: tuple[TokenLogprob, ...] | None = None

  @classmethod
  def failed(cls, request: TextRequest, error: str) -> "Reply":
    """Returns the reply to a request that gave no text."""
    return cls(id=request.id, text="", finish_reason="error", usage=Usage(0, 0), error=error)

  def to_json(self) -> dict[str, Any]:
    """Returns JSON values that `from_json` reads."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Reply":
    """Returns the reply that `to_json` wrote."""
    made = {**value, "usage": Usage(**value["usage"])}
    if value.get("tokens") is not None:
      made["tokens"] = tuple(value["tokens"])
    if value.get("logprobs") is not None:
      made["logprobs"] = tuple(map(TokenLogprob.from_json, value["logprobs"]))
    return cls(**made)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreRequest:
  """A request for the log-likelihood of a continuation, given its context.

  Two texts are tokenized together, as one text: a token that spans the boundary is scored whole.

  Attributes:
    context: a text, messages, or token ids; a text and ids may be empty.
    continuation: a text or token ids, not empty.
    id: names the request in errors and in its score.
    shared: as in `TextRequest`, of the context; for choices of one question, all of it.
  """

  context: Prompt
  continuation: str | Sequence[Any]
  id: str = ""
  shared: Sequence[int] = ()

  def __post_init__(self) -> None:
    if len(self.context):
      _check_prompt("context", self.context)
    if any(end < 0 for end in self.shared):
      raise ValueError(f"shared is {self.shared!r}; it must be numbers of at least 0")
    if not len(self.continuation) or not (
      isinstance(self.continuation, str) or is_token_ids(self.continuation)
    ):
      raise ValueError(
        f"continuation is {self.continuation!r}; it must be a text or token ids, and not empty"
      )

  @property
  def key(self) -> str:
    """SHA-256 of the content: everything but `id` and `shared`."""
    return artifacts.digest(
      {n: value for n, value in self.to_json().items() if n not in ("id", "shared")}
    )

  def to_json(self) -> dict[str, Any]:
    """Returns the arguments that make this request, as JSON values."""
    context, continuation = map(_prompt_to_json, (self.context, self.continuation))
    made = {"id": self.id, "context": context, "continuation": continuation}
    return made | {"shared": list(self.shared)} if self.shared else made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
  """The log-likelihood of a continuation.

  Attributes:
    logprob: natural log-probability of the continuation, summed over its tokens.
    num_tokens: tokens of the continuation.
    is_greedy: whether each token is the most likely one given all before it.
    error: why there is no score, or None.
    cached, cost_usd: as in `Reply`.
  """

  id: str
  logprob: float
  num_tokens: int
  is_greedy: bool
  error: str | None = None
  cached: bool = False
  cost_usd: float = 0.0

  @classmethod
  def failed(cls, request: ScoreRequest, error: str) -> "Score":
    """Returns the score of a request that could not be scored; its log-probability is NaN."""
    return cls(id=request.id, logprob=float("nan"), num_tokens=0, is_greedy=False, error=error)

  def to_json(self) -> dict[str, Any]:
    """Returns JSON values that `from_json` reads."""
    values = dataclasses.asdict(self)
    return values if self.error is None else values | {"logprob": None}  # JSON has no NaN

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Score":
    """Returns the score that `to_json` wrote."""
    return cls(**value if value["logprob"] is not None else {**value, "logprob": float("nan")})


@runtime_checkable
class LanguageModel(Protocol):
  """A model that samples and scores texts, such as `LocalModel` and `Endpoint`."""

  name: str

  def generate(self, requests: Iterable[TextRequest]) -> Iterator[Reply]:
    """Yields a reply to each request, in order; `Reply.error` marks one that failed.

    Requests are read ahead of the replies by a bounded number, so they may be endless, but must not
    depend on earlier replies. A failure that would repeat for every request is raised.
    """
    ...

  def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Score]:
    """Yields the score of each request, in order; `Score.error` marks one that failed."""
    ...

  def close(self) -> None:
    """Frees what the model holds; calls in flight that will be billed finish and are stored."""
    ...


def is_chat(prompt: Prompt) -> bool:
  """Returns whether a valid prompt is messages."""
  return len(prompt) > 0 and isinstance(prompt[0], Mapping)


def is_token_ids(value: Any) -> bool:
  """Returns whether a value is a sequence of token ids, at least one."""
  return len(value) > 0 and all(isinstance(token, numbers.Integral) for token in value)


def _are_texts(value: Any) -> bool:
  return not isinstance(value, str) and all(isinstance(text, str) and text for text in value)


def _check_prompt(name: str, prompt: Prompt) -> None:
  if not len(prompt):
    raise ValueError(f"{name} is {prompt!r}; it must be a text, token ids, or at least one message")
  if isinstance(prompt, str) or is_token_ids(prompt):
    return
  for message in prompt:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
      raise ValueError(f"a message is {message!r}; it must have a role and a content")
    if message["role"] not in ROLES:
      raise ValueError(f"a message has role {message['role']!r}; there are {', '.join(ROLES)}")


def _prompt_to_json(prompt: Prompt) -> str | list[Any]:
  if isinstance(prompt, str):
    return prompt
  return [dict(m) if isinstance(m, Mapping) else int(m) for m in prompt]
