"""One protocol for all that asks a language model for text.

  messages = [{"role": "user", "content": "Name a prime."}]
  [reply] = model.generate([TextRequest(prompt=messages, max_tokens=64)])

`generate` takes an iterator and gives one, so a corpus of requests streams through it.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from selfimprove_jax import artifacts

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRequest:
  """One text to sample.

  Attributes:
    prompt: messages (`role` and `content` of each), or a text to go on from as it stands.
    max_tokens: the most new tokens.
    id: names the request in errors and in its reply; the local engine draws its random numbers
      from it, or, where it is empty, from the content.
    temperature, top_p: 0 takes the most likely token; `top_p` in (0, 1].
    stop: texts that end the reply and are left out of it.
    seed: of the random numbers, in [0, 2**32); None leaves them to the model.
    sample: tells several replies to one prompt apart, in [0, 2**32).
    json_schema: what the reply must be valid against, as JSON; it is in `Reply.parsed` then.
    choices: the reply must be one of these texts.

  Raises:
    ValueError: a value is out of its range; prompt or a stop text is empty; a role is unknown; a
      schema and choices are both given.
  """

  prompt: str | Sequence[Mapping[str, str]]
  max_tokens: int
  id: str = ""
  temperature: float = 1.0
  top_p: float = 1.0
  stop: Sequence = ()
  seed: int | None = None
  sample: int = 0
  json_schema: Mapping[str, Any] | None = None
  choices: Sequence[str] = ()

  def __post_init__(self):
    if self.max_tokens < 1:
      raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
    if not self.temperature >= 0 or not 0 < self.top_p <= 1:
      raise ValueError(
        f"temperature is {self.temperature} and top_p {self.top_p}; they must be at least 0, and "
        f"in (0, 1]"
      )
    for name, number in (("seed", self.seed), ("sample", self.sample)):
      if number is not None and not 0 <= number < 2**32:
        raise ValueError(f"{name} is {number}; it must be in [0, 2**32)")
    for name in ("stop", "choices"):
      texts = getattr(self, name)
      if isinstance(texts, str) or not all(isinstance(t, str) and t for t in texts):
        raise ValueError(f"{name} is {texts!r}; it must be a sequence of texts that are not empty")
    if self.choices and self.json_schema is not None:
      raise ValueError("json_schema and choices are both given; one of them says what is allowed")
    if not self.prompt:
      raise ValueError(f"prompt is {self.prompt!r}; it must be a text, or at least one message")
    if not isinstance(self.prompt, str):
      _check_messages(self.prompt)

  @property
  def key(self) -> str:
    """SHA-256 of all that the reply may depend on: everything but `id`."""
    return artifacts.digest(self._content())

  def to_json(self) -> dict[str, Any]:
    """What `from_json` makes the request of again."""
    return {"id": self.id, **self._content(), "json_schema": self.json_schema}

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "TextRequest":
    return cls(**value)

  def _content(self):
    prompt = self.prompt if isinstance(self.prompt, str) else [dict(m) for m in self.prompt]
    return {
      "prompt": prompt,
      "max_tokens": self.max_tokens,
      "temperature": float(self.temperature),
      "top_p": float(self.top_p),
      "stop": list(self.stop),
      "seed": self.seed,
      "sample": self.sample,
      # As text: the order of a schema's properties is that of the reply's, and digests sort keys.
      "json_schema": None if self.json_schema is None else json.dumps(self.json_schema),
      "choices": list(self.choices),
    }


@dataclasses.dataclass(frozen=True)
class Usage:
  """Tokens read and written.

  Attributes:
    estimated: the model did not say; they were counted here.
  """

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
  """What a request gave.

  Attributes:
    id: the request's.
    text: as it was sampled; empty if nothing was.
    finish_reason: `stop`, `length`, or what else the model said; `error` if it gave no text.
    usage: of all turns, where repairs were needed.
    parsed: the value, if a JSON schema was asked for, or the choice; None if `error` is set.
    error: why this is no reply to go on with, or None.
    cached: it was there; nothing was paid now.
    cost_usd: what its turns cost when they were made.
  """

  id: str
  text: str
  finish_reason: str
  usage: Usage
  parsed: Any = None
  error: str | None = None
  cached: bool = False
  cost_usd: float = 0.0

  @classmethod
  def failed(cls, request: TextRequest, error: str) -> "Reply":
    """Of a request that gave no text."""
    return cls(id=request.id, text="", finish_reason="error", usage=Usage(0, 0), error=error)

  def to_json(self) -> dict[str, Any]:
    """What `from_json` makes the reply of again."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Reply":
    return cls(**{**value, "usage": Usage(**value["usage"])})


@runtime_checkable
class LanguageModel(Protocol):
  """Gives texts for requests: `LocalModel`, `Endpoint`, `TranscriptModel`, `RecordingModel`.

  Attributes:
    name: the model's, for reports.
  """

  name: str

  def generate(self, requests: Iterable[TextRequest]) -> Iterator[Reply]:
    """A reply for each request, in their order; `Reply.error` says that one has failed.

    Requests are taken as they are needed, some way ahead of the replies: they may be endless, and
    may not wait for a reply. What would fail every request alike is raised.
    """
    ...

  def close(self) -> None:
    """Ends it; what is under way and will be paid for is waited for and kept."""
    ...


def _check_messages(messages):
  for message in messages:
    if set(message) != {"role", "content"} or message["role"] not in ROLES:
      raise ValueError(
        f"a message is {dict(message)!r}; it must have a role ({', '.join(ROLES)}) and a content"
      )
