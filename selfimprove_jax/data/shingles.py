"""Hashes runs of words (shingles), by which splitting, pairing and filtering compare texts."""

import functools
import hashlib
import unicodedata
from collections.abc import Sequence

import regex

# Scripts that are written without spaces. Unicode calls those of Southeast Asia (Thai, Lao, Khmer,
# Myanmar, ...) Complex_Context, because only a dictionary knows where their words end.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Line_Break=Complex_Context}"
# Marks belong to words: Python's own `\w` would end a Hindi word at every vowel sign.
_SPACED = rf"[\p{{L}}\p{{M}}\p{{N}}_--[{_UNSPACED}]]+"
# The first alternative finds ASCII words twice as fast as the last one would.
_WORD = regex.compile(rf"(?V1)[a-z0-9_]++(?![^\x00-\x7f])|[{_UNSPACED}]|{_SPACED}")


def words(text: str) -> list[str]:
  """Returns the lower-cased words: runs of letters, marks, digits and underscores.

  In scripts without spaces every character is returned by itself, and counts as half a word in the
  functions below: a run of 20 Chinese characters is shared by chance about as often as one of 10
  English words. So no dictionary decides, and a copy is found wherever it begins.
  """
  return _WORD.findall(unicodedata.normalize("NFC", text.lower()))


def num_words(tokens: Sequence[str]) -> int:
  """Returns how many words the result of `words` counts as."""
  return sum(_half_words(tokens)) // 2


def runs(tokens: Sequence[str], size: int) -> list[str]:
  """Returns every run of `size` consecutive words; none if there are fewer."""
  found, lengths = [], _half_words(tokens)
  end = length = 0
  for start in range(len(tokens)):
    while length < 2 * size and end < len(tokens):
      length += lengths[end]
      end += 1
    if length < 2 * size:
      break
    found.append(" ".join(tokens[start:end]))
    length -= lengths[start]
  return found


def tail(tokens: Sequence[str], size: int) -> Sequence[str]:
  """Returns the last `size` words, or all if there are fewer."""
  tokens = tokens[-2 * size :]
  lengths = _half_words(tokens)
  start, length = len(tokens), 0
  while start and length < 2 * size:
    start -= 1
    length += lengths[start]
  return tokens[start:]


def word_shingles(text: str, size: int) -> frozenset[int]:
  """Returns 64-bit hashes of every run of `size` consecutive words; none for a shorter text."""
  return frozenset(map(run_hash, runs(words(text), size)))


def run_hash(run: str) -> int:
  """Hashes to 64 bits, unlike `hash` to the same ones in every process."""
  return int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "little")


def _half_words(tokens: Sequence[str]) -> list[int]:
  return [1 if len(token) == 1 and _is_unspaced(token) else 2 for token in tokens]


@functools.cache
def _is_unspaced(character: str) -> bool:
  return regex.match(f"[{_UNSPACED}]", character) is not None


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
  """Returns |a and b| / |a or b|; 0 if both are empty."""
  union = len(a | b)
  return len(a & b) / union if union else 0.0
