"""Near-duplicate texts: MinHash and LSH propose, the exact overlap of shingles decides.

A text is a near-duplicate of another if the Jaccard overlap of their word shingles is more than
`threshold`. LSH may miss one now and then (`collision_probability`); what it proposes is verified.
Texts with fewer words than a shingle have no shingles and are near-duplicates of nothing.

Memory: 4 bytes x `num_perm` a text, and the texts. A larger corpus goes shard by shard.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from selfimprove_jax.data import shingles

_MIN_RECALL = 0.98  # of pairs whose overlap is just the threshold


def near_duplicates(
  texts: Sequence[str], *, threshold: float, shingle_size: int, num_perm: int = 128, seed: int = 0
) -> list[int | None]:
  """For each text the index of the first earlier text that it nearly repeats, or None.

  The earlier text may repeat a third itself: what to keep is the caller's choice.

  Args:
    threshold: In [0, 1); a near-duplicate overlaps more.
    shingle_size: In words.
    num_perm: Hash functions in a signature.
    seed: Of the hash functions; it decides only which near-duplicates LSH misses.

  Raises:
    ValueError: `threshold` is out of range.
  """
  lsh = _new_lsh(threshold, num_perm)
  found: list[int | None] = []
  for i, (own, signature) in enumerate(_signatures(texts, shingle_size, num_perm, seed)):
    candidates = sorted(lsh.query(signature)) if own else []
    found.append(
      next((j for j in candidates if _repeats(own, texts[j], threshold, shingle_size)), None)
    )
    if own:
      lsh.insert(i, signature)
  return found


def near_duplicates_of(
  references: Iterable[str],
  texts: Sequence[str],
  *,
  threshold: float,
  shingle_size: int,
  num_perm: int = 128,
  seed: int = 0,
) -> list[int | None]:
  """For each text the index of the first reference that it nearly repeats, or None.

  The references are read once and not kept, so they may be a whole corpus.

  Args and raises: see `near_duplicates`.
  """
  lsh = _new_lsh(threshold, num_perm)
  for i, (own, signature) in enumerate(_signatures(texts, shingle_size, num_perm, seed)):
    if own:
      lsh.insert(i, signature)
  found: list[int | None] = [None] * len(texts)
  for j, (own, signature) in enumerate(_signatures(references, shingle_size, num_perm, seed)):
    for i in lsh.query(signature) if own else []:
      if found[i] is None and _repeats(own, texts[i], threshold, shingle_size):
        found[i] = j
  return found


def collision_probability(jaccard: float, bands: int, rows: int) -> float:
  """The S-curve: how likely `bands` bands of `rows` hashes propose a pair of that overlap."""
  return 1 - (1 - jaccard**rows) ** bands


def choose_bands(threshold: float, num_perm: int) -> int:
  """The fewest bands that propose 98% of the pairs whose overlap is just `threshold`.

  Fewer bands propose fewer pairs in vain. Where no number of bands is enough, every hash is a band.
  """
  divisors = [bands for bands in range(1, num_perm + 1) if num_perm % bands == 0]
  for bands in divisors:
    if collision_probability(threshold, bands, num_perm // bands) >= _MIN_RECALL:
      return bands
  return num_perm


def _new_lsh(threshold: float, num_perm: int) -> Any:
  import rensa

  if not 0 <= threshold < 1:
    raise ValueError(f"threshold={threshold}: a Jaccard overlap to exceed, in [0, 1)")
  # rensa's own threshold is not used: `query` gives all that collide in a band
  return rensa.RMinHashLSH(threshold, num_perm, choose_bands(threshold, num_perm))


def _signatures(
  texts: Iterable[str], shingle_size: int, num_perm: int, seed: int
) -> Iterator[tuple[frozenset[int], Any]]:
  import rensa

  for text in texts:
    own = shingles.word_shingles(text, shingle_size)
    tokens = [shingle.to_bytes(8, "little") for shingle in own]
    yield own, rensa.RMinHash.from_token_sets([tokens], num_perm, seed)[0]


def _repeats(own: frozenset[int], text: str, threshold: float, shingle_size: int) -> bool:
  return shingles.jaccard(own, shingles.word_shingles(text, shingle_size)) > threshold
