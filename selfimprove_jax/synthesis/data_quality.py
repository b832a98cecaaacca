"""Measures the quality of synthetic documents without a judging model, as one number per text.

The SBP paper reports, in percent, Repetition, Duplicate@1M, Non-factual, Pair-irrelevance and
Pair-copying. Here repetition, duplicates and copying are n-gram and shingle rules with the caller's
thresholds (not verified paper values). The paper's other two ask a judging model; `similarities`
measures the part of Pair-irrelevance that needs none.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from pydantic import Field

from selfimprove_jax.data import shingles
from selfimprove_jax.retrieval import near_duplicates
from selfimprove_jax.runtime.config import section
from selfimprove_jax.synthesis import filters

_RUN_WORDS = 8


@section
class QualityConfig:
  """Configures the measurement of duplicates.

  Attributes:
    sample_size: texts to find duplicates among; the rate grows with it.
  """

  sample_size: Annotated[int, Field(ge=2)]


@section
class RelevanceConfig:
  """Configures the measurement of similarity between syntheses and their seeds.

  Attributes:
    dim: dimensions of the TF-IDF embedding.
    sample_size: largest number of syntheses and of real pairs to compare.
  """

  dim: Annotated[int, Field(ge=1)]
  sample_size: Annotated[int, Field(ge=2)]


def looping(texts: Sequence[str], *, max_repetition: float) -> Bool[np.ndarray, "N"]:
  """Flags looping documents by the rule of `filters.is_looping` (SBP, Repetition)."""
  return np.array([filters.is_looping(text, max_repetition=max_repetition) for text in texts], bool)


def duplicates(
  texts: Sequence[str], *, sample_size: int, max_jaccard: float, shingle_size: int, seed: int
) -> tuple[Int64[np.ndarray, "S"], Bool[np.ndarray, "S"]]:
  """Flags the documents of a sample that nearly repeat an earlier one of it (SBP, Duplicate@1M).

  Returns the sample's places in `texts`, and the flags. Only rates at the same `sample_size` are
  comparable.
  """
  rows = np.sort(np.random.default_rng(seed).permutation(len(texts))[:sample_size])
  earlier = near_duplicates.near_duplicates(
    [texts[row] for row in rows], threshold=max_jaccard, shingle_size=shingle_size
  )
  return rows, np.array([other is not None for other in earlier], bool)


def copies_of_seed(
  seeds: Sequence[str], syntheses: Sequence[str], *, max_jaccard: float, shingle_size: int
) -> Bool[np.ndarray, "N"]:
  """Flags syntheses that are near-duplicates of their own seed (SBP, Pair-copying)."""
  _check_paired(seeds, syntheses)
  overlaps = [filters.overlap(*pair, shingle_size) for pair in zip(seeds, syntheses, strict=True)]
  return np.array(overlaps) > max_jaccard


def copied_runs(
  syntheses: Sequence[str], corpus: Iterable[str]
) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
  """Counts each synthesis's runs of 8 words that the corpus holds verbatim, and all its runs.

  Counts a run once per document; a synthesis shorter than a run has none. Reads the corpus once
  and does not keep it. The paper has no such measure.
  """
  runs = [shingles.word_shingles(text, _RUN_WORDS) for text in syntheses]
  wanted = frozenset().union(*runs)
  found: set[int] = set()
  for text in corpus:
    found |= wanted & shingles.word_shingles(text, _RUN_WORDS)
  counts = [(len(of_text & found), len(of_text)) for of_text in runs]
  copied_N, all_N = np.array(counts, np.int64).reshape(-1, 2).T
  return copied_N, all_N


@dataclasses.dataclass(frozen=True)
class Similarities:
  """Cosine similarities of syntheses to documents.

  `evaluation.statistics.retained_share` turns them into a share of a real pair's similarity.

  Attributes:
    own_N: each synthesis to the document that it was sampled from.
    random_N: each synthesis to another seed, drawn at random, as a baseline.
    real_P: the texts of each pair of real documents that are related.
    unrelated_P: the first text of each such pair to one that it is not related with.
  """

  own_N: Float64[np.ndarray, "N"]
  random_N: Float64[np.ndarray, "N"]
  real_P: Float64[np.ndarray, "P"]
  unrelated_P: Float64[np.ndarray, "P"]


def similarities(
  seeds: Sequence[str],
  syntheses: Sequence[str],
  *,
  real: Sequence[tuple[str, str, str]],
  embed: Callable[[Sequence[str]], Float[np.ndarray, "N E"]],
  seed: int,
) -> Similarities:
  """Compares syntheses with their own and with random seeds, and the texts of real pairs.

  Args:
    seeds: text of each synthesis's seed; at least two differ.
    real: a text, one that is related to it by something else than this similarity (which would
      find its own choice most similar), and one that is not related to it; may be empty.
    embed: texts -> unit rows; fitted on the corpus, not on the syntheses. A small fit overfits its
      own texts: on 400 short texts, real pairs that were in the fit came out 8% too weak.
    seed: seeds the choice of random seeds.
  """
  _check_paired(seeds, syntheses)
  distinct = sorted(set(seeds))
  if len(distinct) < 2:
    raise ValueError("random seeds need at least two different seeds")
  row_of = {text: row for row, text in enumerate(distinct)}
  own_N = np.array([row_of[text] for text in seeds])
  # A step of 1 to U - 1 around the circle of U seeds never ends on the own seed.
  steps_N = np.random.default_rng(seed).integers(1, len(distinct), size=len(seeds))
  seeds_UE, syntheses_NE = embed(distinct), embed(syntheses)
  texts_PE, related_PE, unrelated_PE = (embed([texts[i] for texts in real]) for i in range(3))
  return Similarities(
    own_N=_inner_products(seeds_UE[own_N], syntheses_NE),
    random_N=_inner_products(seeds_UE[(own_N + steps_N) % len(distinct)], syntheses_NE),
    real_P=_inner_products(texts_PE, related_PE),
    unrelated_P=_inner_products(texts_PE, unrelated_PE),
  )


def _inner_products(
  a_NE: Float[np.ndarray, "N E"], b_NE: Float[np.ndarray, "N E"]
) -> Float64[np.ndarray, "N"]:
  return np.einsum("NE,NE->N", a_NE, b_NE, dtype=np.float64)


def _check_paired(seeds: Sequence[str], syntheses: Sequence[str]) -> None:
  if len(seeds) != len(syntheses):
    raise ValueError(f"{len(syntheses)} syntheses, but {len(seeds)} seeds")
