"""Word shingles: the one notion of overlap that splitting, pairing and filtering share."""

import hashlib
import re

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
  """Lower-cased runs of letters, digits and underscores."""
  return _WORD.findall(text.lower())


def word_shingles(text: str, size: int) -> frozenset[int]:
  """64-bit hashes of every run of `size` consecutive words; empty for a shorter text.

  The hashes are the same in every process (unlike `hash`).
  """
  tokens = words(text)
  runs = (" ".join(tokens[i : i + size]) for i in range(len(tokens) - size + 1))
  return frozenset(
    int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "little") for run in runs
  )


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
  """|a and b| / |a or b|; 0 when both are empty."""
  union = len(a | b)
  return len(a & b) / union if union else 0.0
