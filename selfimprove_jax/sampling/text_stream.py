"""Incremental detokenization: whole characters only, and no beginning of a stop string."""

from collections.abc import Callable, Sequence

# `tokenizers.decoders.DecodeStream` does not replace this: it has no flush, so that a text which
# ends amid a character loses its end, and its cost per token grows with the length of a run of
# broken UTF-8, which untrained models write.

_BROKEN = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, and a token at least one.
_CHARACTER_TOKENS = 4


class TextStream:
  """Text of a growing list of tokens, cut before the first stop string.

  The pieces add up to `decode_text` of all tokens, cut before the stop string: the one that is
  complete first, and the longest of those that end at the same character, wherever tokens begin and
  end. The cost of a token does not depend on the tokens before it.

  A text that follows another one keeps the space that SentencePiece tokenizers would strip from the
  beginning of a text: `context` is the end of the tokens before it.

  Exception: if the tokenizer decodes each broken byte to one U+FFFD (SentencePiece's byte
  fallback), invalid UTF-8 may give another number of them than `decode_text` of all tokens.
  """

  def __init__(
    self,
    decode_text: Callable[[Sequence[int]], str],
    stop_strings: Sequence,
    context: Sequence[int] = (),
  ):
    """Args:
      decode_text: token ids to text, without special tokens.
      context: tokens that precede the text, which they are not part of.

    Raises:
      ValueError: a stop string is empty or not a string, or `stop_strings` is a string.
    """
    if isinstance(stop_strings, str):
      raise ValueError(f"stop_strings is the string {stop_strings!r}; it must be a list of strings")
    self._decode = decode_text
    self._stops = _StopStrings(stop_strings) if len(stop_strings) else None
    # The window holds tokens that are decoded together: some whose text was sent, because a token's
    # text depends on whether one precedes it, and then `_num_pending` whose text was not.
    self._window = list(context)
    self._window_text = decode_text(context) if self._window else ""
    if self._window_text.endswith(_BROKEN):  # amid a character, which the text may complete
      self._window, self._window_text = [], ""
    self._num_pending = 0
    self._sent = self._window_text  # the part of the window's text that was sent
    self._parts: list[str] = []

  @property
  def text(self) -> str:
    """All text that is certain, cut before the stop string."""
    return "".join(self._parts)

  @property
  def stop(self) -> str | None:
    """The stop string that was found, or None."""
    return self._stops.found if self._stops else None

  def push(self, token: int) -> str:
    """Returns the text that this token made certain; "" after a stop string."""
    if self.stop is not None:
      return ""
    text = self._decode([*self._window, token])
    # Decode it twice in a row: a token that is only a space may be stripped at the beginning.
    if text == self._window_text and not self._decode([token, token]):
      return ""  # a special token, which would hide from the next one what precedes it
    self._window.append(token)
    self._num_pending += 1
    return self._emit(self._advance(text))

  def finish(self) -> str:
    """Returns what was held back, when no more tokens follow."""
    if self.stop is not None:
      return ""
    rest = self._unsent(self._window_text)
    self._sent = self._window_text
    return self._emit(rest, last=True)

  def _advance(self, text: str) -> str:
    """Returns the text of the window that no later token can change, and moves the window."""
    num_broken = len(text) - len(text.rstrip(_BROKEN))
    is_stuck = self._num_pending >= _CHARACTER_TOKENS
    # A trailing U+FFFD may be part of a character. After four tokens it would be complete, so the
    # bytes are invalid UTF-8, and only the last U+FFFD may still become a character.
    held = min(1, num_broken) if is_stuck else num_broken
    certain = text[: len(text) - held]
    unsent = self._unsent(certain)
    if is_stuck or not held:
      kept = _CHARACTER_TOKENS if held else self._num_pending
      self._window = self._window[-kept:]
      self._num_pending = kept if held else 0
      text = self._decode(self._window)
      self._sent = text[: len(text) - held]
    elif unsent:
      self._sent = certain
    self._window_text = text
    return unsent

  def _unsent(self, text: str) -> str:
    return "" if self._sent.startswith(text) else text.removeprefix(self._sent)

  def _emit(self, text: str, last: bool = False) -> str:
    if self._stops:
      text = self._stops.push(text)
      if last:
        text += self._stops.finish()
    if text:
      self._parts.append(text)
    return text


class _StopStrings:
  """Finds the stop string that is complete first (Aho and Corasick 1975)."""

  def __init__(self, stop_strings: Sequence):
    for stop in stop_strings:
      if not isinstance(stop, str) or not stop:
        raise ValueError(f"a stop string is {stop!r}; it must be a string of at least 1 character")
    prefixes = {stop[:end] for stop in stop_strings for end in range(len(stop) + 1)}
    longest_first = sorted(stop_strings, key=len, reverse=True)
    self._ended_by = {
      prefix: next((stop for stop in longest_first if prefix.endswith(stop)), None)
      for prefix in prefixes
    }
    self._begun = ""  # the longest suffix of the text that begins a stop string
    self.found: str | None = None

  def push(self, text: str) -> str:
    """Returns text that is certainly before any stop string; nothing after one was found."""
    if self.found is not None:
      return ""
    begun, ended_by = self._begun, self._ended_by
    whole, first = begun + text, len(begun)
    for end, character in enumerate(text, first + 1):
      begun += character
      while begun not in ended_by:
        begun = begun[1:]
      if ended_by[begun] is not None:
        self.found, self._begun = ended_by[begun], ""
        return whole[: end - len(self.found)]
    self._begun = begun
    return whole[: len(whole) - len(begun)]

  def finish(self) -> str:
    begun, self._begun = self._begun, ""
    return begun
