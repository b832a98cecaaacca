"""A request in a slot: its tokens so far, their text, and its end."""

from collections.abc import Callable, Sequence

from selfimprove_jax.sampling.requests import (
  INT32_MAX,
  MAX_STOP_IDS,
  MAX_TOP_LOGPROBS,
  Completion,
  Request,
  TokenLogprobs,
  Update,
)
from selfimprove_jax.sampling.text_stream import TextStream

# Enough for a character that tokens share, and for a token before it that has a text.
_CONTEXT_TOKENS = 8

DecodeText = Callable[[Sequence[int]], str]
OnUpdate = Callable[[Update], None]


def check_request(
  request: Request, *, max_length: int, vocab_size: int, has_tokenizer: bool
) -> None:
  """Raises ValueError for a request that can never run."""
  check_tokens("a prompt", request.prompt, most=max_length - 1, vocab_size=vocab_size)
  if request.max_new_tokens < 1 or not 0 <= request.min_new_tokens <= INT32_MAX:
    raise ValueError(
      f"max_new_tokens={request.max_new_tokens} must be at least 1, and "
      f"min_new_tokens={request.min_new_tokens} between 0 and {INT32_MAX}"
    )
  for name, value, bits in (
    ("seed", request.seed, 32),
    ("record_id", request.record_id, 64),
    ("sample", request.sample, 32),
  ):
    if not 0 <= value < 2**bits:
      raise ValueError(f"{name}={value}; it must be at least 0 and below 2**{bits}")
  check_shared(request.shared)
  if len(request.stop_ids) > MAX_STOP_IDS:
    raise ValueError(f"{len(request.stop_ids)} stop_ids; at most {MAX_STOP_IDS} are possible")
  for token in request.stop_ids:
    if not 0 <= token < vocab_size:
      raise ValueError(f"stop_ids holds token {token}; the model has 0 to {vocab_size - 1}")
  if request.top_logprobs is not None and not 0 <= request.top_logprobs <= MAX_TOP_LOGPROBS:
    raise ValueError(
      f"top_logprobs={request.top_logprobs}; it must be between 0 and {MAX_TOP_LOGPROBS}"
    )
  if request.grammar and request.grammar.num_words != -(-vocab_size // 32):
    raise ValueError(
      f"the grammar was compiled for a vocabulary of at most {32 * request.grammar.num_words} "
      f"tokens and the model has {vocab_size}: pass the number of the model's logits to "
      f"GrammarCompiler as vocab_size"
    )
  if request.stop_strings:
    if not has_tokenizer:
      raise ValueError("stop_strings need an engine with a tokenizer (decode_text)")
    TextStream(lambda _: "", request.stop_strings)  # raises for empty ones


def check_tokens(name: str, tokens: Sequence[int], *, most: int, vocab_size: int) -> None:
  """Raises ValueError for too few or too many tokens, or for one outside the vocabulary."""
  if not 1 <= len(tokens) <= most:
    raise ValueError(
      f"{name} has {len(tokens)} tokens; it must have between 1 and {most}, one less than "
      f"max_length={most + 1}"
    )
  for token in tokens:
    if not 0 <= token < vocab_size:
      raise ValueError(f"{name} holds token {token}; the model has 0 to {vocab_size - 1}")


def check_shared(shared: Sequence[int]) -> None:
  """Raises ValueError for a shared part of fewer than 0 tokens."""
  for end in shared:
    if end < 0:
      raise ValueError(f"shared holds {end}; a part of a prompt ends at 0 tokens or later")


class Running:
  """A request in a slot, as the host sees it."""

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
    limit: number of tokens it may draw.
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
    # Incremental decoding costs time at every token; without a reader the text is decoded once, at
    # the end.
    self._stream = None
    if decode_text and (on_update or request.stop_strings):
      self._stream = self._new_stream()
    self._rest = ""
    self._logprobs: list[TokenLogprobs] | None = None if request.top_logprobs is None else []

  def _new_stream(self) -> TextStream:
    context = self.request.prompt[-_CONTEXT_TOKENS:]
    return TextStream(self._decode_text, self.request.stop_strings, context)

  @property
  def remaining(self) -> int:
    """Number of tokens it may still draw."""
    return self._limit - len(self.tokens)

  @property
  def is_streamed(self) -> bool:
    return self._on_update is not None

  def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> int:
    """Appends drawn tokens until one ends the completion; returns how many were appended."""
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
    """Ends the completion as an error."""
    try:
      self._end("error", None, error=reason)
    except Exception:  # the text may be what failed
      self.completion = Completion(self.tokens, "error", "", None, self._logprobs, reason)
    if self._on_update:
      self._update(len(self.tokens), "")

  def cancel(self) -> None:
    """Ends the completion without an update."""
    self._end("cancelled", None)

  def _follow_grammar(self, token: int) -> None:
    try:
      self.matcher.accept(token)
    except RuntimeError as error:
      self._end("error", None, error=str(error))
    else:
      if self.matcher.is_finished:
        self._end("stop", None)

  def _end(self, reason: str, stop: int | str | None, error: str | None = None) -> None:
    self._rest = self._stream.finish() if self._stream else ""
    text = None
    if self._decode_text:
      text = self._stream.text if self._stream else self._text()
    self.completion = Completion(self.tokens, reason, text, stop, self._logprobs, error)

  def _text(self) -> str:
    """Decodes the tokens at once, as a stream would one by one."""
    context = self.request.prompt[-_CONTEXT_TOKENS:]
    before, whole = self._decode_text(context), self._decode_text([*context, *self.tokens])
    if whole.startswith(before):
      return whole[len(before) :]
    return self._decode_text(self.tokens)  # the context ends amid a character

  def _update(self, first: int, text: str) -> None:
    if self.completion:
      text += self._rest
    logprobs = None if self._logprobs is None else self._logprobs[first:]
    shown = text if self._stream else None
    self._on_update(Update(self.tokens[first:], shown, logprobs, self.completion))
