"""The wire format of OpenAI's chat and completions API, and the prices of its tokens."""

import bisect
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from selfimprove_jax.language_models import structured
from selfimprove_jax.language_models.openai_client import AttemptError, EndpointError
from selfimprove_jax.language_models.protocol import (
  ScoreRequest,
  TextRequest,
  TokenLogprob,
  Usage,
  is_chat,
  is_token_ids,
)
from selfimprove_jax.language_models.store import Answer
from selfimprove_jax.runs import artifacts

CHAT_PATH, COMPLETIONS_PATH = "/chat/completions", "/completions"
# Upper bound on the tokens that a chat template adds to each message, and to the conversation.
_TEMPLATE_TOKENS = 16
_REFUSAL = "refusal"
# Fields of a body that are set from the request.
_OURS = {
  *("model", "messages", "prompt", "temperature", "top_p", "stop", "seed", "n", "stream"),
  *("max_tokens", "max_completion_tokens", "response_format", "logprobs", "top_logprobs", "echo"),
}
# Fields of a request that are sent if they differ from their defaults. The second line are
# extensions of OpenAI's API by vLLM, SGLang and our own server.
_OPTIONAL = (
  *("stop", "presence_penalty", "frequency_penalty"),
  *("top_k", "repetition_penalty", "stop_ids", "min_tokens"),
)
_MALFORMED = (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError)
_LEAST_LOGPROB, _ROUNDING = -1e9, 1e-3  # some servers' log-probabilities are rounded above 0
_MOST_TOKENS = 2**31  # a larger count in a response's usage is no count


@dataclasses.dataclass(frozen=True)
class Prices:
  """Prices in US dollars per million tokens; both 0 for a server of one's own.

  Discounts for prompts that a provider finds in its own cache are not counted.
  """

  input_per_million: float
  output_per_million: float

  def __post_init__(self) -> None:
    if not (self.input_per_million >= 0 and self.output_per_million >= 0):
      raise ValueError(f"{self}: prices must be at least 0")

  def usd(self, usage: Usage) -> float:
    """Returns the price of some tokens."""
    prompt_price = usage.prompt_tokens * self.input_per_million
    return (prompt_price + usage.completion_tokens * self.output_per_million) / 1e6


def rough_num_tokens(text: str) -> int:
  """Returns a quarter of the bytes, typical of English with 100,000 tokens; at least 1."""
  return max(1, -(-len(text.encode(errors="surrogatepass")) // 4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatApi:
  """Translates requests and responses for one model; its fields are arguments of `Endpoint`."""

  model: str
  identity: str
  prices: Prices
  extra_body: Mapping[str, Any]
  max_tokens_field: Literal["max_tokens", "max_completion_tokens"]
  count_tokens: Callable[[str], int]

  def __post_init__(self) -> None:
    if ours := _OURS & set(self.extra_body):
      raise ValueError(f"extra_body sets {sorted(ours)}, which requests set")

  def key(self, request: TextRequest | ScoreRequest) -> str:
    """Returns the SHA-256 of the model, its settings and the request's content."""
    return artifacts.digest([self.identity, dict(self.extra_body), request.key])

  def body(
    self, request: TextRequest | ScoreRequest, *, enforce_schema: bool
  ) -> tuple[str, dict[str, Any]]:
    """Returns the path below the base URL, and the JSON to send there.

    Args:
      enforce_schema: pass a schema in `response_format`; otherwise it is put into the last message.

    Raises:
      ValueError: the API cannot express the request.
    """
    if isinstance(request, ScoreRequest):
      # max_tokens=1, because many servers refuse 0; the sampled token is dropped.
      body = self._common_body(max_tokens=1, temperature=0.0, top_p=1.0)
      return COMPLETIONS_PATH, body | {"prompt": _whole(request), "echo": True, "logprobs": 1}
    schema = structured.schema_of(request)
    if schema is not None and not enforce_schema:
      request = structured.with_instruction(request)
    body = self._common_body(request.max_tokens, request.temperature, request.top_p)
    for name in _OPTIONAL:
      value = getattr(request, name)
      if name in ("stop", "stop_ids"):
        value = list(value)
      if value not in (getattr(TextRequest, name), []):
        body["stop_token_ids" if name == "stop_ids" else name] = value
    if request.seed is not None:
      body["seed"] = _sample_seed(request.seed, request.sample)
    if schema is not None and enforce_schema:
      form = {"name": "reply", "schema": schema, "strict": True}
      body["response_format"] = {"type": "json_schema", "json_schema": form}
    if is_chat(request.prompt):
      if request.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
      return CHAT_PATH, body | {"messages": [dict(message) for message in request.prompt]}
    if request.top_logprobs is not None:
      body["logprobs"] = request.top_logprobs
    is_text = isinstance(request.prompt, str)
    prompt = request.prompt if is_text else [int(token) for token in request.prompt]
    return COMPLETIONS_PATH, body | {"prompt": prompt}

  def _common_body(self, max_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    return {
      "model": self.model,
      self.max_tokens_field: max_tokens,
      "temperature": temperature,
      "top_p": top_p,
      **self.extra_body,
    }

  def answer(self, request: TextRequest | ScoreRequest, payload: Mapping[str, Any]) -> Answer:
    """Returns the answer in a response's JSON.

    Raises:
      AttemptError: the response contains no text.
      EndpointError: the endpoint returns no log-probabilities of prompts, and the request is for a
        score.
    """
    is_score = isinstance(request, ScoreRequest)
    refusal = None
    try:
      choice = payload["choices"][0]
      if is_score or not is_chat(request.prompt):
        text = choice["text"]
      else:
        text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
      reason = _REFUSAL if refusal else choice.get("finish_reason")
    except _MALFORMED:
      said = payload.get("error") or "no choices"
      raise AttemptError(f"an answer without a text: {str(said)[:300]}", billed=True) from None
    if isinstance(text, list):  # parts, not all of which are text
      texts = [part.get("text") if isinstance(part, Mapping) else part for part in text]
      text = "".join(part for part in texts if part is not None) if _are_texts(texts) else text
    if not _are_texts([text, refusal, reason]):
      said = str([text, refusal, reason])[:300]
      raise AttemptError(f"an answer whose text or reason is no text: {said}", billed=True)
    # JSON can spell half of a surrogate pair, which no file can hold.
    text = (refusal or text or "").encode(errors="replace").decode()
    usage = self._usage(request, text, payload.get("usage"))
    logprobs = None
    try:
      if is_score:
        logprobs = self._continuation_logprobs(request, choice, usage)
        text, reason = "", "stop"
      elif request.top_logprobs is not None:
        logprobs = _logprobs(choice, request.top_logprobs)
    except _MALFORMED as error:
      raise AttemptError(f"malformed log-probabilities: {error!r}", billed=True) from None
    return Answer(text, str(reason or "unknown"), usage, self.prices.usd(usage), logprobs)

  def num_prompt_tokens(self, request: TextRequest | ScoreRequest) -> int:
    """Returns about how many tokens the prompt has."""
    return _sum_of_prompt(request, self.count_tokens)

  def most_usage(self, request: TextRequest | ScoreRequest) -> Usage:
    """Returns an upper bound on a call's usage: no token of a text is shorter than a byte."""
    max_tokens = 1
    if isinstance(request, TextRequest):
      max_tokens = request.max_tokens
      if structured.schema_of(request) is not None and is_chat(request.prompt):
        request = structured.with_instruction(request)
    num_bytes = _sum_of_prompt(request, lambda t: len(t.encode(errors="surrogatepass")))
    return Usage(num_bytes, max_tokens, estimated=True)

  def _usage(self, request: TextRequest | ScoreRequest, text: str, said: Any) -> Usage:
    """Returns the usage that a response reports, or an estimate if it reports none."""
    if isinstance(said, Mapping):
      counts = [said.get("prompt_tokens"), said.get("completion_tokens")]
      # A boolean is an integer in Python.
      if all(type(count) is int and 0 <= count <= _MOST_TOKENS for count in counts):
        return Usage(*counts)
    completion = self.count_tokens(text) if text else 0
    return Usage(self.num_prompt_tokens(request), completion, estimated=True)

  def _continuation_logprobs(
    self, request: ScoreRequest, choice: Mapping[str, Any], usage: Usage
  ) -> tuple[TokenLogprob, ...]:
    """Returns the log-probabilities of the continuation's tokens, each with the most likely one."""
    logprobs = _logprobs(choice, 1, is_echo=True) or ()
    num_prompt = len(logprobs) - 1 if usage.estimated else usage.prompt_tokens
    if not 0 < num_prompt <= len(logprobs):
      raise EndpointError(
        f"{self.identity} returns no log-probabilities of the prompt: scores need an endpoint "
        f"whose /completions takes `echo` together with `logprobs`",
        billed=True,
      )
    if isinstance(request.continuation, str):
      offsets = choice["logprobs"]["text_offset"]
      last = offsets[num_prompt - 1] + len(str(logprobs[num_prompt - 1].token))
      end = offsets[num_prompt] if num_prompt < len(offsets) else last
      # Counted from the end, because some servers count the text of a BOS token at the start.
      boundary = end - len(request.continuation)
      first = bisect.bisect_left(offsets, boundary, hi=num_prompt)
      if first == num_prompt or offsets[first] > boundary:
        first -= 1  # a token that spans the boundary is scored whole
    else:
      first = num_prompt - len(request.continuation)
    found = logprobs[first:num_prompt]
    if not all(token.top for token in found):
      raise AttemptError("the echoed tokens lack the most likely ones", billed=True)
    if first < 0 or any(math.isnan(token.logprob) for token in found):
      raise AttemptError("the first token of a prompt has no log-probability", billed=True)
    return found


def _are_texts(values: list[Any]) -> bool:
  return all(value is None or isinstance(value, str) for value in values)


def why_unusable(answer: Answer) -> str | None:
  """Returns why an answer is a refusal or was cut by a content filter, or None."""
  if answer.finish_reason == _REFUSAL:
    return f"the model refuses: {answer.text}"
  if answer.finish_reason == "content_filter":
    return "the endpoint's content filter cut the reply"
  return None


def _sum_of_prompt(request: TextRequest | ScoreRequest, measure: Callable[[str], int]) -> int:
  """Sums a measure over the texts of a prompt, with the template's tokens; ids count as 1."""
  prompt = _whole(request) if isinstance(request, ScoreRequest) else request.prompt
  if is_chat(prompt):
    texts = [message["content"] for message in prompt]
  elif isinstance(prompt, str):
    texts = [prompt]
  else:
    return len(prompt)
  return sum(map(measure, texts)) + _TEMPLATE_TOKENS * (1 + len(texts))


def _whole(request: ScoreRequest) -> str | list[int]:
  """Returns context and continuation as one prompt."""
  context, continuation = request.context, request.continuation
  if not len(context):
    raise ValueError("an endpoint scores no continuation of an empty context")
  if isinstance(context, str) and isinstance(continuation, str):
    return context + continuation
  if is_token_ids(context) and is_token_ids(continuation):
    return [int(token) for token in (*context, *continuation)]
  raise ValueError("an endpoint scores two texts, or token ids after token ids")


def _logprobs(
  choice: Mapping[str, Any], num_top: int, *, is_echo: bool = False
) -> tuple[TokenLogprob, ...] | None:
  """Returns a choice's log-probabilities, in the form of chats or of completions; None without.

  ValueError and the like: they are malformed.
  """
  found = choice.get("logprobs")
  if not isinstance(found, Mapping):
    return None
  if isinstance(found.get("content"), list):
    entries = [
      (
        entry["token"],
        entry["logprob"],
        [(other["token"], other["logprob"]) for other in entry.get("top_logprobs") or ()],
      )
      for entry in found["content"]
    ]
  else:
    tokens, values = found.get("tokens") or (), found.get("token_logprobs") or ()
    tops = found.get("top_logprobs") or [None] * len(tokens)
    ranked = [sorted((top or {}).items(), key=lambda pair: -pair[1])[:num_top] for top in tops]
    entries = list(zip(tokens, values, ranked, strict=True))
  for place, (token, value, top) in enumerate(entries):
    for name, number in [(token, value), *top]:
      # The first token of an echoed prompt has no probability.
      is_first = is_echo and place == 0 and number is None
      is_logprob = type(number) in (int, float) and _LEAST_LOGPROB <= number <= _ROUNDING
      if not isinstance(name, str) or not (is_logprob or is_first):
        raise ValueError(f"{str(name)[:50]!r} has the log-probability {str(number)[:50]}")
  return tuple(
    TokenLogprob(token, math.nan if value is None else float(value), tuple(top))
    for token, value, top in entries
  )


def _sample_seed(seed: int, sample: int) -> int:
  """Returns a seed for each sample, in the 31 bits that every endpoint accepts."""
  return int.from_bytes(hashlib.sha256(f"{seed} {sample}".encode()).digest()[:4], "big") >> 1
