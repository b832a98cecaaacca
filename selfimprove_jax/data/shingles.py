"""Word shingles, which splitting, pairing and filtering compare texts by."""

import hashlib
import re

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
  """Returns the lower-cased runs of letters, digits and underscores."""
  return _WORD.findall(text.lower())


def word_shingles(text: str, size: int) -> frozenset[int]:
  """Returns 64-bit hashes of every run of `size` consecutive words; none for a shorter text."""
  tokens = words(text)
  runs = (" ".join(tokens[i : i + size]) for i in range(len(tokens) - size + 1))
  # Not `hash`, which differs between processes.
  return frozenset(
    int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "little") for run in runs
  )


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
  """Returns |a and b| / |a or b|; 0 if both are empty."""
  union = len(a | b)
  return len(a & b) / union if union else 0.0
