"""Completions in OpenAI's response format, whole or as chunks of a stream."""

import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from selfimprove_jax.sampling.requests import Completion, TokenLogprobs, Update

_LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks; OpenAI's value


def usage(num_prompt_tokens: int, completions: Sequence[Completion]) -> dict[str, int]:
  """Returns the token counts of a response."""
  new_tokens = sum(len(completion.tokens) for completion in completions)
  return {
    "prompt_tokens": num_prompt_tokens,
    "completion_tokens": new_tokens,
    "total_tokens": num_prompt_tokens + new_tokens,
  }


class Format:
  """Formats one response; subclasses say what a choice contains.

  `first`, `part` and `last` are the contents of a chunk's choice at the beginning of a stream, for
  new tokens, and at its end.
  """

  object = chunk_object = prefix = ""
  has_usage_chunk = False  # if so, the other chunks say that they have no usage

  def __init__(self, model: str, token_bytes: Callable[[int], bytes]):
    self._token_bytes = token_bytes
    self._head = {
      "id": f"{self.prefix}-{secrets.token_hex(12)}",
      "created": int(time.time()),
      "model": model,
    }

  def whole(self, completions: Sequence[Completion], num_prompt_tokens: int) -> dict[str, Any]:
    """Returns the response to a request without streaming."""
    choices = [
      {"index": index, **self.choice(index, completion), "finish_reason": completion.finish_reason}
      for index, completion in enumerate(completions)
    ]
    counts = usage(num_prompt_tokens, completions)
    return {**self._head, "object": self.object, "choices": choices, "usage": counts}

  def chunk(self, index: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
    choice = {"index": index, **content, "finish_reason": finish}
    usage = {"usage": None} if self.has_usage_chunk else {}
    return {**self._head, "object": self.chunk_object, "choices": [choice], **usage}

  def usage_chunk(self, counts: dict[str, int]) -> dict[str, Any]:
    return {**self._head, "object": self.chunk_object, "choices": [], "usage": counts}

  def chunks(self, index: int, update: Update) -> list[dict[str, Any]]:
    """Returns the chunks for an update of a choice."""
    found = []
    if update.text or update.logprobs:
      found.append(self.chunk(index, self.part(index, update), None))
    if update.completion is not None:
      found.append(self.chunk(index, self.last(), update.completion.finish_reason))
    return found

  def first(self) -> list[dict[str, Any]]:
    return []

  def choice(self, index: int, completion: Completion) -> dict[str, Any]:
    raise NotImplementedError

  def part(self, index: int, update: Update) -> dict[str, Any]:
    raise NotImplementedError

  def last(self) -> dict[str, Any]:
    raise NotImplementedError

  def _spelling(self, token: int) -> str:
    """Returns a token as text; part of a character is escaped as OpenAI does."""
    value = self._token_bytes(token)
    try:
      return value.decode()
    except UnicodeDecodeError:
      return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)


class ChatFormat(Format):
  """Responses of /v1/chat/completions."""

  object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

  def __init__(self, model: str, token_bytes: Callable[[int], bytes], num_choices: int):
    super().__init__(model, token_bytes)
    self._num_choices = num_choices

  def first(self) -> list[dict[str, Any]]:
    delta = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
    return [self.chunk(index, delta, None) for index in range(self._num_choices)]

  def choice(self, index: int, completion: Completion) -> dict[str, Any]:
    message = {"role": "assistant", "content": completion.text, "refusal": None}
    return {"message": message, "logprobs": self._logprobs(completion)}

  def part(self, index: int, update: Update) -> dict[str, Any]:
    return {"delta": {"content": update.text}, "logprobs": self._logprobs(update)}

  def last(self) -> dict[str, Any]:
    return {"delta": {}, "logprobs": None}

  def _logprobs(self, found: Completion | Update) -> dict[str, Any] | None:
    if found.logprobs is None:
      return None
    content = [
      {
        **self._token(token, place.logprob),
        "top_logprobs": [self._token(top, logprob) for top, logprob in place.top],
      }
      for token, place in zip(found.tokens, found.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}

  def _token(self, token: int, logprob: float) -> dict[str, Any]:
    value = list(self._token_bytes(token))
    return {"token": self._spelling(token), "logprob": _finite(logprob), "bytes": value}


class TextFormat(Format):
  """Responses of /v1/completions."""

  object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

  def __init__(self, model: str, token_bytes: Callable[[int], bytes], echoes: Sequence[str]):
    """Args:
    echoes: the text that each choice begins with: its prompt, or "".
    """
    super().__init__(model, token_bytes)
    self._echoes = echoes
    self._offsets = [0] * len(echoes)
    # Tokens and log-probabilities of each choice's prompt, if they are echoed; the first has none.
    self.prompts: list[tuple[list[int], list[TokenLogprobs | None]]] = []

  def first(self) -> list[dict[str, Any]]:
    return [
      self.chunk(index, {"text": echo, "logprobs": None}, None)
      for index, echo in enumerate(self._echoes)
      if echo
    ]

  def choice(self, index: int, completion: Completion) -> dict[str, Any]:
    text = self._echoes[index] + completion.text
    return {"text": text, "logprobs": self._logprobs(index, completion)}

  def part(self, index: int, update: Update) -> dict[str, Any]:
    return {"text": update.text, "logprobs": self._logprobs(index, update)}

  def last(self) -> dict[str, Any]:
    return {"text": "", "logprobs": None}

  def _logprobs(self, index: int, found: Completion | Update) -> dict[str, Any] | None:
    if found.logprobs is None:
      return None
    tokens, places = self.prompts[index] if self.prompts else ([], [])
    tokens, places = [*tokens, *found.tokens], [*places, *found.logprobs]
    lengths = [_num_characters(self._token_bytes(token)) for token in tokens]
    *offsets, self._offsets[index] = itertools.accumulate(lengths, initial=self._offsets[index])
    return {
      "tokens": [self._spelling(token) for token in tokens],
      "token_logprobs": [None if place is None else _finite(place.logprob) for place in places],
      "top_logprobs": [
        place and {self._spelling(token): _finite(logprob) for token, logprob in place.top}
        for place in places
      ],
      "text_offset": offsets,
    }


def _num_characters(value: bytes) -> int:
  """Counts the characters that begin in some bytes of UTF-8."""
  return sum(byte & 0xC0 != 0x80 for byte in value)


def _finite(logprob: float) -> float:
  return max(logprob, _LEAST_LOGPROB)
