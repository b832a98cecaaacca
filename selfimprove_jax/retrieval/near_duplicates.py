"""Finds near-duplicate texts: MinHash and LSH propose, the exact overlap of shingles decides.

Two texts are near-duplicates if the Jaccard overlap of their word shingles exceeds `threshold`. LSH
misses some (`collision_probability`). Texts with fewer words than a shingle have no shingles and
are never near-duplicates. Memory holds the texts, and 4 bytes x `_NUM_PERM` per text.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from selfimprove_jax.data import shingles

_NUM_PERM = 128  # hash functions per signature
_SEED = 0  # of the hash functions; decides only which near-duplicates LSH misses
_MIN_RECALL = 0.98  # of pairs whose overlap is exactly the threshold


def near_duplicates(
  texts: Sequence[str], *, threshold: float, shingle_size: int
) -> list[int | None]:
  """Returns for each text the index of the first earlier text that it nearly repeats, or None.

  The earlier text may itself repeat a third; the caller chooses which ones to keep.

  Args:
    threshold: in [0, 1); near-duplicates overlap more.
    shingle_size: in words.
  """
  lsh = _new_lsh(threshold)
  found: list[int | None] = []
  for i, (own, signature) in enumerate(_signatures(texts, shingle_size)):
    candidates = sorted(lsh.query(signature)) if own else []
    found.append(
      next((j for j in candidates if _repeats(own, texts[j], threshold, shingle_size)), None)
    )
    if own:
      lsh.insert(i, signature)
  return found


def near_duplicates_of(
  references: Iterable[str], texts: Sequence[str], *, threshold: float, shingle_size: int
) -> list[int | None]:
  """Returns for each text the index of the first reference that it nearly repeats, or None.

  Reads the references once and keeps none, so they may be a whole corpus: the index holds the
  texts, and each reference is looked up in it.
  """
  lsh = _new_lsh(threshold)
  for i, (own, signature) in enumerate(_signatures(texts, shingle_size)):
    if own:
      lsh.insert(i, signature)
  found: list[int | None] = [None] * len(texts)
  for j, (own, signature) in enumerate(_signatures(references, shingle_size)):
    for i in lsh.query(signature) if own else []:
      if found[i] is None and _repeats(own, texts[i], threshold, shingle_size):
        found[i] = j
  return found


def collision_probability(jaccard: float, bands: int, rows: int) -> float:
  """Returns the probability that `bands` bands of `rows` hashes propose a pair: LSH's S-curve."""
  return 1 - (1 - jaccard**rows) ** bands


def choose_bands(threshold: float, num_perm: int) -> int:
  """Returns the fewest bands that propose 98% of the pairs whose overlap is exactly `threshold`.

  More bands would propose more pairs to reject. If no number suffices, every hash is a band.
  """
  for bands in range(1, num_perm):
    is_divisor = num_perm % bands == 0
    if is_divisor and collision_probability(threshold, bands, num_perm // bands) >= _MIN_RECALL:
      return bands
  return num_perm


def _new_lsh(threshold: float) -> Any:
  import rensa

  if not 0 <= threshold < 1:
    raise ValueError(f"threshold={threshold} must be in [0, 1): near-duplicates overlap more")
  # rensa does not apply the threshold in `query`, which returns everything that shares a band.
  return rensa.RMinHashLSH(threshold, _NUM_PERM, choose_bands(threshold, _NUM_PERM))


def _signatures(texts: Iterable[str], shingle_size: int) -> Iterator[tuple[frozenset[int], Any]]:
  """Yields each text's shingles and their MinHash."""
  import rensa

  for text in texts:
    own = shingles.word_shingles(text, shingle_size)
    tokens = [shingle.to_bytes(8, "little") for shingle in own]  # rensa takes no integers
    yield own, rensa.RMinHash.from_token_sets([tokens], _NUM_PERM, _SEED)[0]


def _repeats(own: frozenset[int], text: str, threshold: float, shingle_size: int) -> bool:
  return shingles.jaccard(own, shingles.word_shingles(text, shingle_size)) > threshold
