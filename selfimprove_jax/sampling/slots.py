"""What the engine knows of a request under way: its tokens so far, their text, and its end."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from selfimprove_jax.sampling import decode, sampler
from selfimprove_jax.sampling.requests import (
  MAX_STOP_IDS,
  MAX_TOP_LOGPROBS,
  Completion,
  Request,
  TokenLogprobs,
  Update,
)
from selfimprove_jax.sampling.text_stream import TextStream

DecodeText = Callable[[Sequence[int]], str]
OnUpdate = Callable[[Update], None]

_NEVER = np.iinfo(np.int32).max


def check_request(
  request: Request, *, max_length: int, vocab_size: int, has_tokenizer: bool
) -> None:
  """Raises ValueError for a request that can never run, with what would be right."""
  length = len(request.prompt)
  if not 1 <= length < max_length:
    raise ValueError(
      f"a prompt has {length} tokens; it must have between 1 and {max_length - 1}, one less than "
      f"the window of {max_length}"
    )
  if not all(0 <= token < vocab_size for token in request.prompt):
    wrong = next(token for token in request.prompt if not 0 <= token < vocab_size)
    raise ValueError(f"a prompt holds token {wrong}; the model has 0 to {vocab_size - 1}")
  if request.max_new_tokens < 1 or request.min_new_tokens < 0:
    raise ValueError(
      f"max_new_tokens={request.max_new_tokens} must be at least 1 and "
      f"min_new_tokens={request.min_new_tokens} at least 0"
    )
  for name, value, bits in (
    ("seed", request.seed, 32),
    ("record_id", request.record_id, 64),
    ("sample", request.sample, 32),
  ):
    if not 0 <= value < 2**bits:
      raise ValueError(f"{name}={value}; it must be at least 0 and below 2**{bits}")
  if len(request.stop_ids) > MAX_STOP_IDS:
    raise ValueError(f"{len(request.stop_ids)} stop_ids; at most {MAX_STOP_IDS} are possible")
  if request.top_logprobs is not None and not 0 <= request.top_logprobs <= MAX_TOP_LOGPROBS:
    raise ValueError(
      f"top_logprobs={request.top_logprobs}; it must be between 0 and {MAX_TOP_LOGPROBS}"
    )
  if request.grammar and request.grammar.num_words != -(-vocab_size // 32):
    raise ValueError(
      f"the grammar was made for {32 * request.grammar.num_words} tokens or a few less; the model "
      f"has {vocab_size}: give GrammarCompiler the rows of the model's logits as vocab_size"
    )
  if request.stop_strings:
    if not has_tokenizer:
      raise ValueError("stop_strings need an engine with a tokenizer (decode_text)")
    TextStream(lambda _: "", request.stop_strings)  # says what is wrong with them


class Running:
  """A request in a slot."""

  def __init__(
    self,
    request: Request,
    ticket: int,
    *,
    eos_ids: Sequence[int],
    limit: int,
    decode_text: DecodeText | None,
    on_update: OnUpdate | None,
  ):
    """Args:
    limit: tokens it may gain.
    """
    self.request = request
    self.ticket = ticket
    self.completion: Completion | None = None
    self.tokens: list[int] = []
    self.matcher = request.grammar.start() if request.grammar else None
    self._limit = limit
    self._stop_ids = {*request.stop_ids, *(() if request.ignore_eos else eos_ids)}
    self._decode_text = decode_text
    self._on_update = on_update
    # Text as it comes costs time at every token; where nobody wants it, it is made at the end.
    self._stream = None
    if decode_text and (on_update or request.stop_strings):
      self._stream = TextStream(decode_text, request.stop_strings)
    self._logprobs: list[TokenLogprobs] | None = None if request.top_logprobs is None else []

  @property
  def remaining(self) -> int:
    return self._limit - len(self.tokens)

  @property
  def is_streamed(self) -> bool:
    return self._on_update is not None

  def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> int:
    """Takes what was drawn until something ends the completion; gives how much was taken."""
    first = len(self.tokens)
    text = ""
    for index, token in enumerate(tokens):
      if token in self._stop_ids:
        self._end("stop", token)
        break
      self.tokens.append(token)
      if self._logprobs is not None:
        self._logprobs.append(logprobs[index])
      if self._stream:
        text += self._stream.push(token)
      if self._stream and self._stream.stop is not None:
        self._end("stop", self._stream.stop)
      elif self.matcher is not None:
        self._follow_grammar(token)
      if self.completion is None and len(self.tokens) >= self._limit:
        self._end("length", None)
      if self.completion:
        break
    if self._on_update:
      self._update(first, text)
    return len(self.tokens) - first

  def fail(self, reason: str) -> None:
    """Ends it as an error."""
    self._end("error", None, error=reason)
    if self._on_update:
      self._update(len(self.tokens), "")

  def cancel(self) -> None:
    self._end("cancelled", None)

  def _follow_grammar(self, token):
    try:
      self.matcher.accept(token)
    except RuntimeError as error:
      self._end("error", None, error=str(error))
    else:
      if self.matcher.is_finished:
        self._end("stop", None)

  def _end(self, reason, stop, error=None):
    rest = self._stream.finish() if self._stream else ""
    text = None
    if self._decode_text:
      text = self._stream.text if self._stream else self._decode_text(self.tokens)
    self._rest = rest
    self.completion = Completion(self.tokens, reason, text, stop, self._logprobs, error)

  def _update(self, first, text):
    if self.completion:
      text += self._rest
    logprobs = None if self._logprobs is None else self._logprobs[first:]
    shown = text if self._stream else None
    self._on_update(Update(self.tokens[first:], shown, logprobs, self.completion))


def new_rows(
  runs: Sequence[Running], size: int, *, eos_ids: Sequence[int], pad_id: int
) -> decode.Rows:
  """Rows of requests that begin, filled up to `size` with free ones; without their keys."""
  requests = [running.request for running in runs]
  fill = size - len(requests)

  def column(values, free):
    return np.array([*values, *[free] * fill], np.asarray(free).dtype)

  num_stops = MAX_STOP_IDS + len(eos_ids)
  stop_ids_BE = np.full((size, num_stops), -1, np.int32)
  allowed_from_BE = np.zeros((size, num_stops), np.int32)
  for row, request in enumerate(requests):
    ids = (*request.stop_ids, *eos_ids)
    stop_ids_BE[row, : len(ids)] = ids
    allowed_from_BE[row] = request.min_new_tokens
    if request.ignore_eos:
      allowed_from_BE[row, len(request.stop_ids) :] = _NEVER
  default = sampler.SamplingConfig(temperature=0.0)
  return decode.Rows(
    last_B=column([request.prompt[-1] for request in requests], np.int32(pad_id)),
    positions_B=column([len(request.prompt) - 1 for request in requests], np.int32(0)),
    steps_B=np.zeros(size, np.int32),
    limits_B=column([running.remaining for running in runs], np.int32(0)),
    is_done_B=column([False] * len(requests), np.bool_(True)),
    is_failed_B=np.zeros(size, np.bool_),
    keys_B=None,
    stop_ids_BE=stop_ids_BE,
    allowed_from_BE=allowed_from_BE,
    sampling=sampler.row_sampling([*[r.sampling for r in requests], *[default] * fill]),
  )


def features_of(runs: Iterable[Running], *, vocab_size: int) -> decode.Features:
  """What some of the running requests ask for."""
  requests = [running.request for running in runs]
  logprobs = [request.top_logprobs for request in requests if request.top_logprobs is not None]
  # Two programs at most: for the drawn tokens alone, and for as many others as there may be.
  most = min(MAX_TOP_LOGPROBS, vocab_size)
  return decode.Features(
    truncates=any(request.sampling.truncates for request in requests),
    bans=any(request.min_new_tokens or request.ignore_eos for request in requests),
    penalizes=any(request.sampling.penalizes for request in requests),
    is_masked=any(request.grammar is not None for request in requests),
    num_logprobs=None if not logprobs else most if any(logprobs) else 0,
  )


def token_logprobs(drawn: decode.Drawn, slot: int, num: int, num_top: int) -> list[TokenLogprobs]:
  """Of the first `num` tokens drawn in a slot, with the `num_top` most likely ones."""
  found = []
  for step in range(num):
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
      ids, values = drawn.top_ids_NBk[step, slot], drawn.top_logprobs_NBk[step, slot]
      top = tuple(zip(ids[:num_top].tolist(), values[:num_top].tolist()))
    found.append(TokenLogprobs(float(drawn.logprobs_NB[step, slot]), top))
  return found
