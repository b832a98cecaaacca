"""Pairs related documents (d1, d2), from which a synthesizer p(d2 | d1) is tuned.

SBP (arXiv 2509.15248) keeps D_ST = {(d1, d2): <e(d1), e(d2)> > alpha} among approximate nearest
neighbors and removes near-duplicates by a rule. We do not know its alpha, its near-duplicate rule
or its caps, if it has any: no threshold here is a verified paper value.

Axis letters: Q seeds (queries), C targets (database), M neighbors.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypedDict

import numpy as np
from pydantic import Field

from selfimprove_jax.data import shingles
from selfimprove_jax.retrieval import ann
from selfimprove_jax.runtime.config import section

NUM_SPECIAL_TOKENS = 3  # BOS d1 SEP d2 EOS
_MAX_MOVES = 100
DROP_REASONS = (
  *("itself", "same_document", "same_group", "low_similarity", "too_long"),
  *("max_pairs_per_seed", "max_uses_per_target", "near_duplicate"),
)


@section
class PairFilterConfig:
  """Configures the filters of neighbor pairs.

  Attributes:
    min_similarity: keeps pairs above it. (Recalled as 0.75 with the paper's embedder; other
      embedders need other values.)
    max_jaccard: drops pairs whose word shingles overlap more, as near-duplicates.
    max_uses_per_target: how often a document may be d2; limits hubs.
    max_pairs_per_seed: how often a document may be d1.
    same_group: also pair passages of different documents of one group (a file, a book, a site),
      whose text is often similar without being about the same subject. Passages of one document are
      never paired.
  """

  min_similarity: Annotated[float, Field(ge=0, lt=1)]
  max_jaccard: Annotated[float, Field(ge=0, le=1)]
  max_uses_per_target: Annotated[int, Field(ge=1)]
  max_pairs_per_seed: Annotated[int, Field(ge=1)]
  same_group: bool = False


class Pair(TypedDict):
  """Stores the ids of two documents."""

  id: str
  d1: str
  d2: str
  similarity: float | None  # inner product of the embeddings; None for a random pair


def make_pairs(
  neighbors: ann.Neighbors,
  seeds: Sequence[Mapping[str, Any]],
  targets: Sequence[Mapping[str, Any]],
  config: PairFilterConfig,
  *,
  shingle_size: int,
  max_pair_tokens: int,
) -> tuple[list[Pair], dict[str, int]]:
  """Filters nearest-neighbor pairs (SBP, pairing).

  Takes candidates in falling similarity over all seeds, so that a document near to many seeds goes
  to its nearest ones, regardless of the order of the corpus.

  Args:
    neighbors: rows of `targets` for each seed; a seed may be among its own neighbors.
    seeds: passages, each with "id", "document" (the id of the document it is from), "group", "text"
      and "num_tokens" (without special tokens).
    targets: the same; a target with the id of a seed is the same passage.
    shingle_size: in words. (Recalled as 13 tokens; not verified.)
    max_pair_tokens: drops longer pairs, special tokens included.

  Returns:
    The pairs, by seed, then by falling similarity; and counts of "candidates", of those dropped
    (each under the first of `DROP_REASONS` that applies) and of "pairs".

  Raises:
    ValueError: no pair is left; the message names the thresholds that removed most.
  """
  overlap = _shingle_overlap(shingle_size)
  uses_of_seed: collections.Counter[int] = collections.Counter()
  uses_of_target: collections.Counter[int] = collections.Counter()
  counts = dict.fromkeys(("candidates", *DROP_REASONS, "pairs"), 0)
  kept = []
  for q, c, similarity in _in_falling_similarity(neighbors):
    seed, target = seeds[q], targets[c]
    if too_close := _too_close(seed, target, config):
      outcome = too_close
    elif similarity <= config.min_similarity:
      outcome = "low_similarity"
    elif seed["num_tokens"] + target["num_tokens"] + NUM_SPECIAL_TOKENS > max_pair_tokens:
      outcome = "too_long"
    elif uses_of_seed[q] >= config.max_pairs_per_seed:
      outcome = "max_pairs_per_seed"
    elif uses_of_target[c] >= config.max_uses_per_target:
      outcome = "max_uses_per_target"
    # Last, because it reads the texts.
    elif overlap(seed["text"], target["text"]) > config.max_jaccard:
      outcome = "near_duplicate"
    else:
      outcome = "pairs"
      uses_of_seed[q] += 1
      uses_of_target[c] += 1
      kept.append((q, _pair(seed["id"], target["id"], similarity)))
    counts["candidates"] += 1
    counts[outcome] += 1
  if not kept:
    raise ValueError(_why_empty(counts, config, max_pair_tokens))
  # The sort is stable: within a seed, similarity still falls.
  return [pair for _, pair in sorted(kept, key=lambda item: item[0])], counts


def _too_close(
  seed: Mapping[str, Any], target: Mapping[str, Any], config: PairFilterConfig
) -> str | None:
  """Returns why two passages are no pair, whatever they say; None if they may be one."""
  if seed["id"] == target["id"]:
    return "itself"
  if seed["document"] == target["document"]:
    return "same_document"
  if seed["group"] == target["group"] and not config.same_group:
    return "same_group"
  return None


def _shingle_overlap(size: int) -> Callable[[str, str], float]:
  """Returns a function: the Jaccard similarity of two texts, with their shingles cached."""

  @functools.cache  # as arrays: a set of Python integers takes ten times the memory
  def shingle_array(text: str) -> np.ndarray:
    return np.fromiter(shingles.word_shingles(text, size), np.uint64)

  def overlap(a: str, b: str) -> float:
    return shingles.jaccard(*(frozenset(shingle_array(text).tolist()) for text in (a, b)))

  return overlap


def random_pairs(
  pairs: Sequence[Pair],
  documents: Mapping[str, Mapping[str, Any]],
  config: PairFilterConfig,
  *,
  max_pair_tokens: int,
  seed: int,
) -> list[Pair]:
  """Joins the same d1s and d2s, each as often, at random: the control of `make_pairs`.

  No random pair is among `pairs`, joins passages of one document (nor of one group, unless
  `same_group`), occurs twice or exceeds `max_pair_tokens`. The paper has no such control.

  Args:
    documents: id -> passage, as `make_pairs` takes them.

  Raises:
    ValueError: found no such pairs (there are few pairs or documents, or the window is narrow).
  """
  d1s = [pair["d1"] for pair in pairs]
  rng = np.random.default_rng(seed)
  d2s = [pairs[i]["d2"] for i in rng.permutation(len(pairs))]
  related = set(zip(d1s, [pair["d2"] for pair in pairs], strict=True))
  uses = collections.Counter(zip(d1s, d2s, strict=True))

  def is_allowed(d1: str, d2: str) -> bool:
    a, b = documents[d1], documents[d2]
    fits = a["num_tokens"] + b["num_tokens"] + NUM_SPECIAL_TOKENS <= max_pair_tokens
    return fits and not _too_close(a, b, config) and (d1, d2) not in related

  def is_free(i: int, j: int) -> bool:
    """Tells whether d1 number i may be joined with d2 number j, and is not yet."""
    return is_allowed(d1s[i], d2s[j]) and not uses[d1s[i], d2s[j]]

  def is_good(i: int) -> bool:
    return is_allowed(d1s[i], d2s[i]) and uses[d1s[i], d2s[i]] == 1

  # Repair a random permutation by swaps. Where no swap leaves two good pairs, one that leaves one
  # moves the fault to the other place, which may have more choice.
  for number in range(len(pairs)):
    i, moves = number, 0
    while not is_good(i):
      start = int(rng.integers(len(pairs)))
      free = (j for j in (*range(start, len(pairs)), *range(start)) if is_free(i, j))
      first = next(free, None)
      if first is None or moves == _MAX_MOVES:
        raise ValueError(
          f"found no random partner for {d1s[i]!r} among {len(pairs)} pairs: random pairs need "
          f"more pairs, or a max_pair_tokens above {max_pair_tokens}"
        )
      j = next((j for j in itertools.chain([first], free) if is_free(j, i)), first)
      uses.subtract([(d1s[i], d2s[i]), (d1s[j], d2s[j])])
      d2s[i], d2s[j] = d2s[j], d2s[i]
      uses.update([(d1s[i], d2s[i]), (d1s[j], d2s[j])])
      i, moves = (i if is_good(j) else j), moves + 1
  return [_pair(d1, d2, None) for d1, d2 in zip(d1s, d2s, strict=True)]


def _pair(d1: str, d2: str, similarity: float | None) -> Pair:
  rounded = None if similarity is None else round(similarity, 6)
  return {"id": f"{d1}|{d2}", "d1": d1, "d2": d2, "similarity": rounded}


def _in_falling_similarity(neighbors: ann.Neighbors) -> list[tuple[int, int, float]]:
  """Returns (row of the seed, row of the target, similarity) of all candidates, nearest first."""
  q_N, m_N = np.nonzero(neighbors.ids_QM != ann.NO_NEIGHBOR)
  ids_N, scores_N = neighbors.ids_QM[q_N, m_N], neighbors.scores_QM[q_N, m_N]
  order_N = np.lexsort((ids_N, q_N, -scores_N))  # the last key is the first to sort by
  columns = (q_N[order_N], ids_N[order_N], scores_N[order_N])
  return list(zip(*(column.tolist() for column in columns), strict=True))


def _why_empty(counts: Mapping[str, int], config: PairFilterConfig, max_pair_tokens: int) -> str:
  if not counts["candidates"]:
    return "no pair is left: no seed has a neighbor"
  knobs = {  # not the caps on uses, which leave at least one pair
    "low_similarity": f"min_similarity={config.min_similarity}",
    "too_long": f"max_pair_tokens={max_pair_tokens}",
    "near_duplicate": f"max_jaccard={config.max_jaccard}",
    "itself": "being the seed itself (search more neighbors)",
    "same_document": "being of the seed's document (search more neighbors)",
    "same_group": "same_group=False (or search more neighbors)",
  }
  reasons = sorted((reason for reason in knobs if counts[reason]), key=lambda r: -counts[r])
  parts = [f"{knobs[reason]} removed {counts[reason]}" for reason in reasons]
  return f"no pair is left of {counts['candidates']} candidates: {', '.join(parts)}"
