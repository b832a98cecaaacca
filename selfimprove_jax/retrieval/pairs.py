"""Pairs related documents (d1, d2), from which a synthesizer p(d2 | d1) is tuned.

SBP (arXiv 2509.15248) keeps D_ST = {(d1, d2): <e(d1), e(d2)> > alpha} among approximate nearest
neighbors and removes near-duplicates by a rule. We do not know its alpha, its near-duplicate rule
or its caps, if it has any: no threshold here is a verified paper value.

Axis letters: Q seeds (queries), C targets (database), M neighbors.
"""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypedDict

import numpy as np
from pydantic import Field

from selfimprove_jax.data import shingles
from selfimprove_jax.retrieval import ann
from selfimprove_jax.runtime.config import section

NUM_SPECIAL_TOKENS = 3  # BOS d1 SEP d2 EOS


@section
class PairFilterConfig:
  """Filters of neighbor pairs.

  Attributes:
    min_similarity: pairs above it are kept. (Recalled as 0.75 with the paper's embedder; other
      embedders need other values.)
    max_jaccard: pairs whose word shingles overlap more are near-duplicates and are dropped.
    max_uses_per_target: how often a document may be d2; limits hubs.
    max_pairs_per_seed: how often a document may be d1.
  """

  min_similarity: Annotated[float, Field(ge=0, lt=1)]
  max_jaccard: Annotated[float, Field(ge=0, le=1)]
  max_uses_per_target: Annotated[int, Field(ge=1)]
  max_pairs_per_seed: Annotated[int, Field(ge=1)]


class Pair(TypedDict):
  """A record of a pairs artifact: the ids of two documents.

  `similarity` is the inner product of their embeddings; None for a random pair.
  """

  id: str
  d1: str
  d2: str
  similarity: float | None


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

  Takes candidates in falling similarity over all seeds, so that a document that is near to many
  goes to its nearest seeds, whatever the order of the corpus.

  Args:
    neighbors: rows of `targets` for each seed; a seed may be among its own neighbors.
    seeds: documents, each with "id", "text" and "num_tokens" (without special tokens).
    targets: the same; a target with the id of a seed is the same document.
    shingle_size: in words. (Recalled as 13 tokens; not verified.)
    max_pair_tokens: longer pairs, special tokens included, are dropped.

  Returns:
    The pairs, by seed, then by falling similarity; and counts: "candidates", of which "itself",
    "low_similarity", "too_long", "max_pairs_per_seed", "max_uses_per_target" and "near_duplicate"
    were dropped (each under the first that applies, in this order), and "pairs" are left.

  Raises:
    ValueError: no pair is left; the message names the thresholds that removed most.
  """
  overlap = _shingle_overlap(shingle_size)
  uses_of_seed: collections.Counter[int] = collections.Counter()
  uses_of_target: collections.Counter[int] = collections.Counter()
  counts = dict.fromkeys(
    [
      *("candidates", "itself", "low_similarity", "too_long", "max_pairs_per_seed"),
      *("max_uses_per_target", "near_duplicate", "pairs"),
    ],
    0,
  )
  kept = []
  for q, c, similarity in _in_falling_similarity(neighbors):
    seed, target = seeds[q], targets[c]
    counts["candidates"] += 1
    if seed["id"] == target["id"]:
      counts["itself"] += 1
    elif similarity <= config.min_similarity:
      counts["low_similarity"] += 1
    elif seed["num_tokens"] + target["num_tokens"] + NUM_SPECIAL_TOKENS > max_pair_tokens:
      counts["too_long"] += 1
    elif uses_of_seed[q] >= config.max_pairs_per_seed:
      counts["max_pairs_per_seed"] += 1
    elif uses_of_target[c] >= config.max_uses_per_target:
      counts["max_uses_per_target"] += 1
    # Last, because it reads the texts.
    elif overlap(seed["text"], target["text"]) > config.max_jaccard:
      counts["near_duplicate"] += 1
    else:
      counts["pairs"] += 1
      uses_of_seed[q] += 1
      uses_of_target[c] += 1
      kept.append((q, _pair(seed["id"], target["id"], similarity)))
  if not kept:
    raise ValueError(
      _why_empty(
        counts,
        low_similarity=f"min_similarity={config.min_similarity}",
        too_long=f"max_pair_tokens={max_pair_tokens}",
        near_duplicate=f"max_jaccard={config.max_jaccard}",
        itself="being the seed itself (search more neighbors)",
      )
    )
  # The sort is stable: within a seed, similarity still falls.
  return [pair for _, pair in sorted(kept, key=lambda item: item[0])], counts


def _shingle_overlap(size: int) -> Callable[[str, str], float]:
  """Returns the Jaccard similarity of two texts, a function that caches each text's shingles."""

  @functools.cache  # as arrays: a set of Python integers takes ten times the memory
  def shingle_array(text: str) -> np.ndarray:
    return np.fromiter(shingles.word_shingles(text, size), np.uint64)

  def overlap(a: str, b: str) -> float:
    return shingles.jaccard(*(frozenset(shingle_array(text).tolist()) for text in (a, b)))

  return overlap


def random_pairs(
  pairs: Sequence[Pair], *, lengths: Mapping[str, int], max_pair_tokens: int, seed: int
) -> list[Pair]:
  """Joins the same d1s and d2s, each as often, at random: the control of `make_pairs`.

  No random pair is among `pairs`, joins a document with itself, occurs twice or exceeds
  `max_pair_tokens`. The paper has no such control.

  Args:
    lengths: document id -> number of tokens.

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

  # Repair a random permutation by swaps; each swap leaves two allowed pairs, so one pass is enough.
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
        f"found no random partner for {d1s[i]!r} among {len(pairs)} pairs: random pairs need more "
        f"pairs, or a max_pair_tokens above {max_pair_tokens}"
      )
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


def _why_empty(counts: Mapping[str, int], **names: str) -> str:
  removed = sorted(names, key=lambda reason: -counts[reason])
  if not counts["candidates"]:
    return "no pair is left: no seed has a neighbor"
  parts = [f"{names[reason]} removed {counts[reason]}" for reason in removed if counts[reason]]
  return f"no pair is left of {counts['candidates']} candidates: {', '.join(parts)}"
