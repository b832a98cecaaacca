"""Requests to the sampling engine and their results: token ids in, token ids and text out."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from selfimprove_jax.runtime.config import section
from selfimprove_jax.sampling.grammar import Grammar

INT32_MAX = 2**31 - 1  # numbers of a request go to the device as int32
MAX_TOP_LOGPROBS = 20
MAX_STOP_IDS = 8

# As float32 on the device, larger ones would be infinite.
_Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]


@section
class SamplingConfig:
  """How the next token is drawn from the model's logits.

  Attributes:
    temperature: 0 is greedy: the most likely token.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the most likely tokens until their probabilities add up to this, including the token
      that crosses it; 1 keeps all. Applied after `top_k`, at the given temperature.
    repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that are in
      the prompt or were drawn before (Keskar et al. 2019); 1 is none.
    presence_penalty: subtracted from the logits of tokens that were drawn before (OpenAI).
    frequency_penalty: subtracted once for each time that the token was drawn (OpenAI).
  """

  temperature: Annotated[_Finite, Field(ge=0)] = 1.0
  top_k: Annotated[int, Field(ge=0, le=INT32_MAX)] = 0
  top_p: Annotated[_Finite, Field(gt=0, le=1)] = 1.0
  repetition_penalty: Annotated[_Finite, Field(ge=1e-6)] = 1.0
  presence_penalty: _Finite = 0.0
  frequency_penalty: _Finite = 0.0

  @property
  def truncates(self) -> bool:
    return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)

  @property
  def penalizes(self) -> bool:
    changes = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
    return any(changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One completion to sample.

  Its tokens depend on the parameters and on this request alone, not on the other requests of the
  batch, nor on where or when it runs.

  Attributes:
    prompt: token ids, at least one.
    shared: ends, in tokens, of the parts of the prompt that other requests begin with too. Each
      part is prefilled once, in a call of its own.
    max_new_tokens: at least 1; the engine's `max_length` may end the completion earlier.
    seed, record_id, sample: the key of its random numbers, each at least 0; `seed` and `sample`
      below 2**32, `record_id` below 2**64. Consecutive requests of one prompt share its prefill;
      give them different `sample` numbers.
    min_new_tokens: stop tokens can't be drawn before this many tokens.
    stop_ids: tokens that end the completion, in addition to the engine's end of sequence.
    stop_strings: strings that end it; `text` is cut before the string.
    ignore_eos: the end of sequence is never drawn.
    top_logprobs: None for no logprobs, 0 for those of the drawn tokens, k (at most
      `MAX_TOP_LOGPROBS`) for those of the k most likely tokens of each step too.
    grammar: constrains the text, token by token.
  """

  prompt: Sequence[int]
  max_new_tokens: int
  shared: Sequence[int] = ()
  seed: int = 0
  record_id: int = 0
  sample: int = 0
  sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
  min_new_tokens: int = 0
  stop_ids: tuple[int, ...] = ()
  stop_strings: tuple[str, ...] = ()
  ignore_eos: bool = False
  top_logprobs: int | None = None
  grammar: Grammar | None = None


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
  """Log-probabilities (natural) of one step, before temperature, penalties and truncation.

  Attributes:
    logprob: log-probability of the drawn token.
    top: (token, log-probability) of the most likely tokens, in descending order.
  """

  logprob: float
  top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
  """Result of a `Request`.

  Attributes:
    tokens: the new tokens, without the stop token.
    finish_reason: `stop` (a stop token, a stop string, or the end of the grammar), `length`
      (`max_new_tokens` or the engine's `max_length`), `cancelled` or `error`.
    text: the decoded tokens, cut before the stop string; None if the engine has no tokenizer.
    stop: the token or string that ended the completion, or None.
    logprobs: one for each of `tokens`, if the request asked for them.
    error: the reason, if `finish_reason` is `error`.
  """

  tokens: list[int]
  finish_reason: str
  text: str | None = None
  stop: int | str | None = None
  logprobs: list[TokenLogprobs] | None = None
  error: str | None = None


@dataclasses.dataclass(frozen=True)
class Update:
  """Progress of a request since its last update, for streaming.

  Attributes:
    tokens: new tokens.
    text: new text that no later token can change. It may lag behind the tokens (an incomplete
      character, the beginning of a stop string); None if the engine has no tokenizer.
    logprobs: one for each of `tokens`, if the request asked for them.
    completion: the whole completion, in the last update only.
  """

  tokens: list[int]
  text: str | None
  logprobs: list[TokenLogprobs] | None
  completion: Completion | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreRequest:
  """A continuation whose log-likelihood given a prompt is wanted.

  Attributes:
    prompt: token ids, at least one: the first token of a text has no probability.
    continuation: token ids, at least one.
    shared: as in `Request`; for choices of one question, all of the prompt.
    num_top: most likely tokens to return at each place, at most `MAX_TOP_LOGPROBS`.
  """

  prompt: Sequence[int]
  continuation: Sequence[int]
  shared: Sequence[int] = ()
  num_top: int = 0


@dataclasses.dataclass(frozen=True)
class ContinuationScore:
  """Result of a `ScoreRequest`.

  Attributes:
    logprobs: float32 log-probability (natural) of each continuation token; empty on an error.
    is_greedy: each token is the most likely one given those before it; of equally likely tokens
      the first counts.
    error: why there is no score.
    top: (token, log-probability) of the most likely tokens at each place, in descending order.
  """

  logprobs: np.ndarray
  is_greedy: bool
  error: str | None = None
  top: tuple[tuple[tuple[int, float], ...], ...] = ()

  @property
  def logprob(self) -> float:
    """Log-likelihood of the whole continuation."""
    return float(np.sum(self.logprobs, dtype=np.float64))
