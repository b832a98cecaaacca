"""Pairs of related documents (d1, d2): what a synthesizer p(d2 | d1) is tuned on.

SBP (arXiv 2509.15248) keeps D_ST = {(d1, d2): <e(d1), e(d2)> > alpha} among approximate nearest
neighbours, near-duplicates removed by rule. Its alpha, its near-duplicate rule and its caps, if it
has any, are not known to us: paper value not verified, for every threshold here.

Axis letters: Q seeds (queries), C targets (database), M neighbours.
"""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import numpy as np

from selfimprove_jax.data import shingles
from selfimprove_jax.retrieval import ann

NUM_SPECIAL_TOKENS = 3  # BOS d1 SEP d2 EOS


class Pair(TypedDict):
  """A line of a pairs artefact: two documents, by name.

  `similarity` is the inner product of their embeddings; None for a random pair.
  """

  id: str
  d1: str
  d2: str
  similarity: float | None


def make_pairs(
  neighbors: ann.Neighbors,
  *,
  seed_ids: Sequence[str],
  target_ids: Sequence[str],
  seed_texts: Sequence[str],
  target_texts: Sequence[str],
  seed_lengths: Sequence[int],
  target_lengths: Sequence[int],
  min_similarity: float,
  max_jaccard: float,
  shingle_size: int,
  max_uses_per_target: int,
  max_pairs_per_seed: int,
  max_pair_tokens: int,
) -> tuple[list[Pair], dict[str, int]]:
  """Nearest-neighbour pairs, filtered (SBP, pairing).

  Candidates are taken in falling similarity over all seeds, so that a document that is near to
  many goes to its nearest seeds, whatever the order of the corpus.

  Args:
    neighbors: Of each seed, rows of the targets; a seed may be among its own neighbours.
    seed_ids: Names of the seeds; where a target has the same name, it is the same document.
    seed_lengths: In tokens, without special tokens.
    min_similarity: In [0, 1); pairs above it are kept. (Recalled as 0.75 with the paper's
      embedder; paper value not verified, and another embedder needs another.)
    max_jaccard: In [0, 1]; pairs whose word shingles overlap more are near-duplicates and are
      dropped. (Paper value not verified.)
    shingle_size: In words. (Recalled as 13 tokens; paper value not verified.)
    max_uses_per_target: How often a document may be d2, against hubs. (Not known of the paper.)
    max_pairs_per_seed: How often a document may be d1. (Paper value not verified.)
    max_pair_tokens: Of d1, d2 and their 3 special tokens together; longer pairs are dropped.

  Returns:
    The pairs, by seed, then by falling similarity; and counts: "candidates", of which "itself",
    "low_similarity", "too_long", "max_pairs_per_seed", "max_uses_per_target" and "near_duplicate"
    were dropped (each under the first that applies, in this order), and "pairs" are left.

  Raises:
    ValueError: a threshold out of range, lists that do not match, or no pair is left; then the
      message names the threshold that removed most.
  """
  _check_same_length("seed", len(neighbors.ids_QM), seed_ids, seed_texts, seed_lengths)
  _check_same_length("target", len(target_ids), target_texts, target_lengths)
  _check_thresholds(
    min_similarity=min_similarity,
    max_jaccard=max_jaccard,
    shingle_size=shingle_size,
    max_uses_per_target=max_uses_per_target,
    max_pairs_per_seed=max_pairs_per_seed,
  )
  overlap = _shingle_overlap(shingle_size)
  uses_of_seed = collections.Counter()
  uses_of_target = collections.Counter()
  counts = dict.fromkeys(
    [
      *("candidates", "itself", "low_similarity", "too_long", "max_pairs_per_seed"),
      *("max_uses_per_target", "near_duplicate", "pairs"),
    ],
    0,
  )
  kept = []
  for q, c, similarity in _in_falling_similarity(neighbors):
    length = seed_lengths[q] + target_lengths[c] + NUM_SPECIAL_TOKENS
    counts["candidates"] += 1
    if seed_ids[q] == target_ids[c]:
      counts["itself"] += 1
    elif similarity <= min_similarity:
      counts["low_similarity"] += 1
    elif length > max_pair_tokens:
      counts["too_long"] += 1
    elif uses_of_seed[q] >= max_pairs_per_seed:
      counts["max_pairs_per_seed"] += 1
    elif uses_of_target[c] >= max_uses_per_target:
      counts["max_uses_per_target"] += 1
    elif overlap(seed_texts[q], target_texts[c]) > max_jaccard:
      counts["near_duplicate"] += 1
    else:
      counts["pairs"] += 1
      uses_of_seed[q] += 1
      uses_of_target[c] += 1
      kept.append((q, _pair(seed_ids[q], target_ids[c], similarity)))
  if not kept:
    raise ValueError(
      _why_empty(
        counts,
        low_similarity=f"min_similarity={min_similarity}",
        too_long=f"max_pair_tokens={max_pair_tokens}",
        near_duplicate=f"max_jaccard={max_jaccard}",
        itself="being the seed itself (ask for more neighbours)",
      )
    )
  return [pair for _, pair in sorted(kept, key=lambda item: item[0])], counts


def _check_thresholds(*, min_similarity, max_jaccard, **at_least_1):
  if not 0 <= min_similarity < 1:
    raise ValueError(f"min_similarity={min_similarity}: it is in [0, 1)")
  if not 0 <= max_jaccard <= 1:
    raise ValueError(f"max_jaccard={max_jaccard}: it is in [0, 1]")
  if min(at_least_1.values()) < 1:
    given = ", ".join(f"{name}={value}" for name, value in at_least_1.items())
    raise ValueError(f"{given}: each is at least 1")


def _shingle_overlap(size: int) -> Callable[[str, str], float]:
  """Jaccard's similarity of two texts' shingles; those of a text are made once."""

  @functools.cache  # as arrays: a set of Python integers is ten times as large
  def shingle_array(text: str) -> np.ndarray:
    return np.fromiter(shingles.word_shingles(text, size), np.uint64)

  return lambda a, b: shingles.jaccard(
    *(frozenset(shingle_array(text).tolist()) for text in (a, b))
  )


def random_pairs(
  pairs: Sequence[Pair], *, lengths: Mapping[str, int], max_pair_tokens: int, seed: int
) -> list[Pair]:
  """The control of `make_pairs`: the same d1's and the same d2's, each as often, joined at random.

  No pair is one of `pairs`, joins a document with itself, occurs twice or is longer than
  `max_pair_tokens`. (The paper has no such control; its reviewers asked for it.)

  Args:
    lengths: Name of a document -> its tokens.

  Raises:
    ValueError: no such joining was found (few pairs, few documents or a narrow window).
  """
  d1s = [pair["d1"] for pair in pairs]
  rng = np.random.default_rng(seed)
  d2s = [pairs[i]["d2"] for i in rng.permutation(len(pairs))]
  related = set(zip(d1s, [pair["d2"] for pair in pairs], strict=True))
  uses = collections.Counter(zip(d1s, d2s, strict=True))

  def is_allowed(d1: str, d2: str) -> bool:
    fits = lengths[d1] + lengths[d2] + NUM_SPECIAL_TOKENS <= max_pair_tokens
    return fits and d1 != d2 and (d1, d2) not in related

  for i in range(len(pairs)):
    if is_allowed(d1s[i], d2s[i]) and uses[d1s[i], d2s[i]] == 1:
      continue
    start = int(rng.integers(len(pairs)))
    for j in (*range(start, len(pairs)), *range(start)):
      swapped = [(d1s[i], d2s[j]), (d1s[j], d2s[i])]
      if i != j and all(is_allowed(*pair) and not uses[pair] for pair in swapped):
        uses.subtract([(d1s[i], d2s[i]), (d1s[j], d2s[j])])
        uses.update(swapped)
        d2s[i], d2s[j] = d2s[j], d2s[i]
        break
    else:
      raise ValueError(
        f"no random partner was found for {d1s[i]!r} among {len(pairs)} pairs: random pairs need "
        f"more pairs, or a max_pair_tokens above {max_pair_tokens}"
      )
  return [_pair(d1, d2, None) for d1, d2 in zip(d1s, d2s, strict=True)]


def _pair(d1: str, d2: str, similarity: float | None) -> Pair:
  rounded = None if similarity is None else round(similarity, 6)
  return {"id": f"{d1}|{d2}", "d1": d1, "d2": d2, "similarity": rounded}


def _in_falling_similarity(neighbors: ann.Neighbors) -> list[tuple[int, int, float]]:
  """(row of the seed, row of the target, similarity), all of them, nearest first."""
  q_N, m_N = np.nonzero(neighbors.ids_QM != ann.NO_NEIGHBOR)
  ids_N, scores_N = neighbors.ids_QM[q_N, m_N], neighbors.scores_QM[q_N, m_N]
  order_N = np.lexsort((ids_N, q_N, -scores_N))
  columns = (q_N[order_N], ids_N[order_N], scores_N[order_N])
  return list(zip(*(column.tolist() for column in columns), strict=True))


def _check_same_length(name: str, length: int, *lists: Sequence) -> None:
  lengths = [len(values) for values in lists]
  if any(other != length for other in lengths):
    raise ValueError(f"there are {length} {name}s, but their lists hold {lengths}")


def _why_empty(counts: Mapping[str, int], **names: str) -> str:
  removed = sorted(names, key=lambda reason: -counts[reason])
  if not counts["candidates"]:
    return "no pair is left: no seed has a neighbour"
  parts = [f"{names[reason]} removed {counts[reason]}" for reason in removed if counts[reason]]
  return f"no pair is left of {counts['candidates']} candidates: {', '.join(parts)}"
