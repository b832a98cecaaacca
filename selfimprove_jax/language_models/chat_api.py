"""Requests and answers as OpenAI's chat and completions API writes them, and what they cost."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

from selfimprove_jax import artifacts
from selfimprove_jax.language_models import structured
from selfimprove_jax.language_models.protocol import TextRequest, Usage
from selfimprove_jax.language_models.store import Answer
from selfimprove_jax.language_models.transport import AttemptError

CHAT_PATH, COMPLETIONS_PATH = "/chat/completions", "/completions"
# What a chat template puts around a message, and around them all, at the most.
_TEMPLATE_TOKENS = 16
_REFUSAL = "refusal"


@dataclasses.dataclass(frozen=True)
class Prices:
  """US dollars for a million tokens; both 0 for a server of one's own.

  Discounts for prompts that a provider finds in its own cache are not reckoned with.
  """

  input_per_million: float
  output_per_million: float

  def __post_init__(self):
    if not (self.input_per_million >= 0 and self.output_per_million >= 0):
      raise ValueError(f"{self}: prices must be at least 0")

  def usd(self, usage: Usage) -> float:
    """The price of so many tokens."""
    million_usd = (
      usage.prompt_tokens * self.input_per_million
      + usage.completion_tokens * self.output_per_million
    )
    return million_usd / 1e6


def rough_num_tokens(text: str) -> int:
  """A quarter of the bytes, as in English text with a vocabulary of 100,000; at least 1."""
  return max(1, -(-len(text.encode(errors="surrogatepass")) // 4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatApi:
  """One model of one endpoint; the fields are `Endpoint`'s arguments."""

  model: str
  identity: str
  prices: Prices
  extra_body: Mapping[str, Any]
  max_tokens_field: Literal["max_tokens", "max_completion_tokens"]
  count_tokens: Callable[[str], int]

  def __post_init__(self):
    ours = {"model", "messages", "prompt", "temperature", "top_p", "stop", "seed", "n", "stream"}
    ours |= {"max_tokens", "max_completion_tokens", "response_format"}
    if ours & set(self.extra_body):
      raise ValueError(f"extra_body sets {sorted(ours & set(self.extra_body))}, which requests set")

  def key(self, request: TextRequest) -> str:
    """SHA-256 of the model, its settings and all of the request but its id: no code is in it."""
    return artifacts.digest([self.identity, dict(self.extra_body), request.key])

  def body(self, request: TextRequest, *, enforce_schema: bool) -> tuple[str, dict[str, Any]]:
    """The path under the base URL, and the JSON to send there.

    Args:
      enforce_schema: the endpoint is to keep the model to the schema; else it is told in words.
    """
    schema = structured.schema_of(request)
    if schema is not None and not enforce_schema:
      request = structured.with_instruction(request)
    body = {
      "model": self.model,
      self.max_tokens_field: request.max_tokens,
      "temperature": request.temperature,
      "top_p": request.top_p,
      **self.extra_body,
    }
    if request.stop:
      body["stop"] = list(request.stop)
    if request.seed is not None:
      body["seed"] = _sample_seed(request.seed, request.sample)
    if schema is not None and enforce_schema:
      form = {"name": "reply", "schema": schema, "strict": True}
      body["response_format"] = {"type": "json_schema", "json_schema": form}
    if isinstance(request.prompt, str):
      return COMPLETIONS_PATH, body | {"prompt": request.prompt}
    return CHAT_PATH, body | {"messages": [dict(message) for message in request.prompt]}

  def answer(self, request: TextRequest, payload: Mapping[str, Any]) -> Answer:
    """What an answer's JSON says.

    Raises:
      AttemptError: it holds no text.
    """
    try:
      choice = payload["choices"][0]
      if isinstance(request.prompt, str):
        text, refusal = choice["text"], None
      else:
        text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
      reason = _REFUSAL if refusal else choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
      said = payload.get("error") or "no choices"
      raise AttemptError(f"an answer without a text: {str(said)[:300]}", billed=True) from None
    if isinstance(text, list):  # parts, of which some are text
      text = "".join(part.get("text", "") for part in text)
    text = refusal or text or ""
    usage = self._usage(request, text, payload.get("usage"))
    return Answer(text, str(reason or "unknown"), usage, self.prices.usd(usage))

  def num_prompt_tokens(self, request: TextRequest) -> int:
    """About how many tokens the prompt has."""
    return sum(self.count_tokens(text) for text in _texts(request)) + _template_tokens(request)

  def most_usage(self, request: TextRequest) -> Usage:
    """More than a call can take: no token of a prompt is shorter than a byte."""
    if structured.schema_of(request) is not None:
      request = structured.with_instruction(request)
    num_bytes = sum(len(text.encode(errors="surrogatepass")) for text in _texts(request))
    return Usage(num_bytes + _template_tokens(request), request.max_tokens, estimated=True)

  def _usage(self, request, text, said):
    try:
      prompt, completion = said["prompt_tokens"], said["completion_tokens"]
      if isinstance(prompt, int) and isinstance(completion, int) and min(prompt, completion) >= 0:
        return Usage(prompt, completion)
    except (KeyError, TypeError):
      pass
    completion = self.count_tokens(text) if text else 0
    return Usage(self.num_prompt_tokens(request), completion, estimated=True)


def why_unusable(answer: Answer) -> str | None:
  """Why the endpoint did not answer, or None: it refused, or its content filter cut the reply."""
  if answer.finish_reason == _REFUSAL:
    return f"the model refuses: {answer.text}"
  if answer.finish_reason == "content_filter":
    return "the endpoint's content filter cut the reply"
  return None


def _texts(request):
  if isinstance(request.prompt, str):
    return [request.prompt]
  return [message["content"] for message in request.prompt]


def _template_tokens(request):
  return _TEMPLATE_TOKENS * (1 + len(_texts(request)))


def _sample_seed(seed, sample):
  """Different for each sample, in the 31 bits that every endpoint takes."""
  return int.from_bytes(hashlib.sha256(f"{seed} {sample}".encode()).digest()[:4], "big") >> 1
