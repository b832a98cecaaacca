"""What is asked of the engine, and what it gives: token ids in, token ids and text out."""

import dataclasses
from collections.abc import Sequence

from selfimprove_jax.sampling.grammar import Grammar
from selfimprove_jax.sampling.sampler import SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One completion to sample.

  Its tokens depend on the parameters, `prompt`, `seed`, `record_id`, `sample`, and on what is asked
  for below; not on what else is sampled beside it, nor where or when.

  Attributes:
    prompt: token ids, at least one.
    max_new_tokens: at least 1; less where the engine's window ends.
    seed, record_id, sample: what its random numbers are made of, each at least 0; `seed` and
      `sample` below 2**32, `record_id` below 2**64. Requests of one prompt that stand one after
      another share its prefill; give them different `sample` numbers.
    min_new_tokens: no stop token is drawn before as many.
    stop_ids: tokens that end the completion beside the engine's end of sequence.
    stop_strings: texts that end it; they and what follows them are left out of `text`.
    ignore_eos: the end of sequence ends nothing and is never drawn.
    top_logprobs: None for no logprobs, 0 for those of the drawn tokens, k (at most
      `MAX_TOP_LOGPROBS`) for those of the k most likely tokens at each place too.
    grammar: what the text must match, or None.
  """

  prompt: Sequence[int]
  max_new_tokens: int
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


MAX_TOP_LOGPROBS = 20
MAX_STOP_IDS = 8


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
  """Natural logarithms of probabilities at one place, before temperature and truncation.

  Attributes:
    logprob: of the drawn token.
    top: the most likely tokens and theirs, likeliest first.
  """

  logprob: float
  top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
  """What a request gave.

  Attributes:
    tokens: the new tokens, without the stop token.
    finish_reason: `stop` (a stop token or string, or the grammar's end), `length`
      (`max_new_tokens`, or the window is full), `cancelled` or `error`.
    text: of the tokens, cut before the stop string; None if the engine has no tokenizer.
    stop: the token or string that ended it, or None.
    logprobs: one for each of `tokens`, if they were asked for.
    error: what went wrong, if `finish_reason` is `error`.
  """

  tokens: list[int]
  finish_reason: str
  text: str | None = None
  stop: int | str | None = None
  logprobs: list[TokenLogprobs] | None = None
  error: str | None = None


@dataclasses.dataclass(frozen=True)
class Update:
  """What a request gained since the last update: for streaming.

  Attributes:
    tokens: new tokens.
    text: text that is now certain; it may lag behind the tokens (half a character, the beginning of
      a stop string), and is None if the engine has no tokenizer.
    logprobs: one for each of `tokens`, if they were asked for.
    completion: the whole, in the last update only.
  """

  tokens: list[int]
  text: str | None
  logprobs: list[TokenLogprobs] | None
  completion: Completion | None
