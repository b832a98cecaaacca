"""Measures the quality of synthetic documents without a judging model, as one number per text.

The SBP paper reports, in percent, Repetition, Duplicate@1M, Non-factual, Pair-irrelevance and
Pair-copying. Here repetition, duplicates and copying are n-gram and shingle rules whose thresholds
are the caller's (not verified paper values). The other two ask a judging model; `similarities`
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
  """Measurement of duplicates.

  Attributes:
    sample_size: texts among which duplicates are counted; the rate grows with it.
  """

  sample_size: Annotated[int, Field(ge=2)]


@section
class RelevanceConfig:
  """Measurement of the similarity between syntheses and their seeds.

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
) -> Bool[np.ndarray, "S"]:
  """Flags the documents of a sample that nearly repeat an earlier one of it (SBP, Duplicate@1M).

  Only rates at the same `sample_size` are comparable. A standard error that takes the flags as
  independent is close while duplicates are few.
  """
  rows = np.sort(np.random.default_rng(seed).permutation(len(texts))[:sample_size])
  earlier = near_duplicates.near_duplicates(
    [texts[row] for row in rows], threshold=max_jaccard, shingle_size=shingle_size
  )
  return np.array([other is not None for other in earlier], bool)


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

  Counts a run once per document, and leaves out syntheses shorter than a run. Reads the corpus once
  and does not keep it. Not a measure of the paper's.
  """
  runs = [shingles.word_shingles(text, _RUN_WORDS) for text in syntheses]
  runs = [of_text for of_text in runs if of_text]
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
    random_N: each synthesis to another seed, drawn at random: what any two documents share.
    real_P: each real d1 to its real d2.
  """

  own_N: Float64[np.ndarray, "N"]
  random_N: Float64[np.ndarray, "N"]
  real_P: Float64[np.ndarray, "P"]


def similarities(
  seeds: Sequence[str],
  syntheses: Sequence[str],
  *,
  real_pairs: Sequence[tuple[str, str]],
  embed: Callable[[Sequence[str]], Float[np.ndarray, "N E"]],
  seed: int,
) -> Similarities:
  """Compares syntheses with their own and with random seeds, and the texts of real pairs.

  Args:
    seeds: text of each synthesis's seed.
    real_pairs: (seed text, target text): what the synthesizer was tuned on, or held-out pairs.
    embed: texts -> unit rows; fitted on the corpus, not on the syntheses. A small fit knows its own
      texts too well: on 400 short texts, real pairs that were in the fit came out 8% too weak.
    seed: seeds the choice of random seeds.

  Raises:
    ValueError: there are fewer than two different seeds, or the lists do not match.
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
  return Similarities(
    own_N=_inner_products(seeds_UE[own_N], syntheses_NE),
    random_N=_inner_products(seeds_UE[(own_N + steps_N) % len(distinct)], syntheses_NE),
    real_P=_inner_products(*(embed([pair[side] for pair in real_pairs]) for side in (0, 1))),
  )


def _inner_products(
  a_NE: Float[np.ndarray, "N E"], b_NE: Float[np.ndarray, "N E"]
) -> Float64[np.ndarray, "N"]:
  return np.einsum("NE,NE->N", a_NE, b_NE, dtype=np.float64)


def _check_paired(seeds: Sequence[str], syntheses: Sequence[str]) -> None:
  if len(seeds) != len(syntheses):
    raise ValueError(f"{len(syntheses)} syntheses, but {len(seeds)} seeds")
