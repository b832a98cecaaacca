"""Token by token to text: no half character leaves, and no beginning of a stop string."""

from collections.abc import Callable, Sequence

_BROKEN = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, and a token at least one.
_CHARACTER_TOKENS = 4


class TextStream:
  """The text of a growing list of tokens, and whether a stop string has ended it.

  All text together is `decode_text` of all tokens, cut before the stop string. The stop string is
  the one that is whole first, and of two that end at one character the longer, wherever tokens
  begin and end. The cost of a token depends neither on how many came before nor on what they are.

  Where a tokenizer writes each broken byte as one U+FFFD (SentencePiece's byte fallback), bytes
  that are no UTF-8 may give another number of them than `decode_text` of all tokens does.
  """

  def __init__(self, decode_text: Callable[[Sequence[int]], str], stop_strings: Sequence):
    """Args:
      decode_text: ids to text, without special tokens.
      stop_strings: any number of them.

    Raises:
      ValueError: a stop string is empty, or no string; or `stop_strings` is itself a string.
    """
    if isinstance(stop_strings, str):
      raise ValueError(f"stop_strings is the string {stop_strings!r}; it must be a list of strings")
    self._decode = decode_text
    self._stops = _StopStrings(stop_strings) if len(stop_strings) else None
    # Tokens that are decoded together: some whose text is out, since a token's text depends on
    # whether one precedes it, and `_num_pending` that follow.
    self._window: list[int] = []
    self._window_text = ""
    self._num_pending = 0
    self._sent = ""  # the beginning of the window's text that is out
    self._parts: list[str] = []

  @property
  def text(self) -> str:
    """All that is certain, cut before the stop string."""
    return "".join(self._parts)

  @property
  def stop(self) -> str | None:
    """The stop string that was found."""
    return self._stops.found if self._stops else None

  def push(self, token: int) -> str:
    """The text that became certain by this token; "" after a stop string."""
    if self.stop is not None:
      return ""
    text = self._decode([*self._window, token])
    # Twice, as one that is only a space may be stripped from where a text begins.
    if text == self._window_text and not self._decode([token, token]):
      return ""  # a special token: in the window it would hide what precedes
    self._window.append(token)
    self._num_pending += 1
    return self._emit(self._advance(text))

  def finish(self) -> str:
    """What was held back, when no token follows."""
    if self.stop is not None:
      return ""
    rest = self._unsent(self._window_text)
    self._sent = self._window_text
    return self._emit(rest, last=True)

  def _advance(self, text):
    """Text of the window that no further token can change."""
    num_broken = len(text) - len(text.rstrip(_BROKEN))
    stuck = self._num_pending >= _CHARACTER_TOKENS
    # A character has arrived in part. Where it had time to become whole, the bytes are no UTF-8,
    # and of them only the last U+FFFD may still become a character.
    held = min(1, num_broken) if stuck else num_broken
    certain = text[: len(text) - held]
    unsent = self._unsent(certain)
    if stuck or not held:
      kept = _CHARACTER_TOKENS if held else self._num_pending
      self._window = self._window[-kept:]
      self._num_pending = kept if held else 0
      text = self._decode(self._window)
      self._sent = text[: len(text) - held]
    elif unsent:
      self._sent = certain
    self._window_text = text
    return unsent

  def _unsent(self, text):
    return "" if self._sent.startswith(text) else text.removeprefix(self._sent)

  def _emit(self, text, last=False):
    if self._stops:
      text = self._stops.push(text)
      if last:
        text += self._stops.finish()
    if text:
      self._parts.append(text)
    return text


class _StopStrings:
  """Finds the stop string that is whole first (Aho and Corasick 1975)."""

  def __init__(self, stop_strings):
    for stop in stop_strings:
      if not isinstance(stop, str) or not stop:
        raise ValueError(f"a stop string is {stop!r}; it must be a string of at least 1 character")
    prefixes = {stop[:end] for stop in stop_strings for end in range(len(stop) + 1)}
    longest_first = sorted(stop_strings, key=len, reverse=True)
    self._ended_by = {
      prefix: next((stop for stop in longest_first if prefix.endswith(stop)), None)
      for prefix in prefixes
    }
    self._begun = ""  # the longest end of the text that begins a stop string
    self.found: str | None = None

  def push(self, text):
    """What is certain to be before any stop string; after one is found, nothing."""
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

  def finish(self):
    begun, self._begun = self._begun, ""
    return begun
