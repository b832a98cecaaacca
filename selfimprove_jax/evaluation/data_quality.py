"""How good synthetic documents are, counted without a judge (SBP's measures of text quality).

The paper reports, in per cent, Repetition, Duplicate@1M, Non-factual, Pair-irrelevance and
Pair-copying. Repetition, duplicates and copying are here as n-gram and shingle rules, whose
thresholds are the caller's (paper value not verified); the two that ask a judging model are not:
`topical_relevance` measures what can be measured of Pair-irrelevance without one.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float

from selfimprove_jax.data import shingles
from selfimprove_jax.evaluation import statistics
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.retrieval import near_duplicates
from selfimprove_jax.synthesis import filters


@dataclasses.dataclass(frozen=True)
class TopicalRelevance:
  """How much of the topical link of a real pair a synthesis has to its seed.

  Attributes:
    own_seed: Mean similarity of a synthesis to the document it was sampled from.
    random_seed: To another seed, drawn at random: what any two documents share.
    real_pairs: Of a real d1 to its real d2.
    retained_share: (own - random) / (real - random); 0 for a synthesizer that does not read its
      seed, 1 for one that is as close to it as real documents are. None where real pairs are not
      above random ones by 2 standard errors.
  """

  own_seed: Estimate
  random_seed: Estimate
  real_pairs: Estimate
  retained_share: Estimate | None


def topical_relevance(
  seeds: Sequence[str],
  syntheses: Sequence[str],
  *,
  real_pairs: Sequence[tuple[str, str]],
  embed: Callable[[Sequence[str]], Float[np.ndarray, "N E"]],
  seed: int,
) -> TopicalRelevance:
  """Similarity of syntheses to their seeds, beside that of random and of real pairs.

  Args:
    seeds: The seed's text of each synthesis.
    real_pairs: (seed text, target text): what the synthesizer was tuned on, or held-out ones.
    embed: Texts -> unit rows; fitted on the corpus, not on the syntheses. A small fit knows its own
      texts too well: on 400 short texts, real pairs that were in the fit came out 8% too weak.
    seed: Of the random pairs.

  Raises:
    ValueError: fewer than two syntheses, different seeds or real pairs, or lists that do not match.
  """
  _check_paired(seeds, syntheses)
  distinct = sorted(set(seeds))
  if len(distinct) < 2:
    raise ValueError("random seeds need at least two different seeds")
  row_of = {text: row for row, text in enumerate(distinct)}
  own_N = np.array([row_of[text] for text in seeds])
  steps_N = np.random.default_rng(seed).integers(1, len(distinct), size=len(seeds))
  seeds_UE, syntheses_NE = embed(distinct), embed(syntheses)
  to_own_N = _similarity(seeds_UE[own_N], syntheses_NE)
  to_random_N = _similarity(seeds_UE[(own_N + steps_N) % len(distinct)], syntheses_NE)
  of_real_P = _similarity(*(embed([pair[side] for pair in real_pairs]) for side in (0, 1)))
  own, random, real = (
    statistics.mean(values, "cosine similarity") for values in (to_own_N, to_random_N, of_real_P)
  )

  retained = None
  link = real.value - random.value
  if link > 2 * math.hypot(real.stderr, random.stderr):
    share = (own.value - random.value) / link
    # linearised: own and random are of the same syntheses, real pairs are other documents
    of_syntheses = statistics.mean(to_own_N - (1 - share) * to_random_N, "")
    stderr = math.hypot(of_syntheses.stderr, share * real.stderr) / link
    retained = Estimate(share, stderr, "share of a real pair's link")
  return TopicalRelevance(own, random, real, retained)


def repetition_rate(texts: Sequence[str], *, max_repetition: float) -> Estimate:
  """Share of looping documents, by the rule of `filters.is_looping` (SBP, Repetition)."""
  return _share(filters.is_looping(text, max_repetition=max_repetition) for text in texts)


def duplicate_rate(
  texts: Sequence[str], *, max_jaccard: float, shingle_size: int, sample_size: int, seed: int
) -> Estimate:
  """Share of documents that nearly repeat an earlier one of a sample (SBP, Duplicate@1M).

  It grows with the sample: compare only rates at the same `sample_size`. The standard error takes
  documents as independent, which is near enough while duplicates are few.
  """
  rows = np.sort(np.random.default_rng(seed).permutation(len(texts))[:sample_size])
  sample = [texts[row] for row in rows]
  earlier = near_duplicates.near_duplicates(
    sample, threshold=max_jaccard, shingle_size=shingle_size
  )
  return _share(other is not None for other in earlier)


def pair_copying_rate(
  seeds: Sequence[str], syntheses: Sequence[str], *, max_jaccard: float, shingle_size: int
) -> Estimate:
  """Share of syntheses that are near-duplicates of their own seed (SBP, Pair-copying)."""
  _check_paired(seeds, syntheses)
  return _share(
    filters.overlap(seed_text, text, shingle_size) > max_jaccard
    for seed_text, text in zip(seeds, syntheses, strict=True)
  )


def copied_share(
  syntheses: Sequence[str], corpus: Iterable[str], *, num_words: int = 8
) -> Estimate:
  """Share of the syntheses' runs of `num_words` words that the corpus holds verbatim.

  Runs are counted once a document. The corpus is read once, not kept. Not a measure of the paper's.

  Raises:
    ValueError: fewer than two syntheses have `num_words` words.
  """
  runs = [shingles.word_shingles(text, num_words) for text in syntheses]
  runs = [of_text for of_text in runs if of_text]
  wanted = frozenset().union(*runs)
  found: set[int] = set()
  for text in corpus:
    found |= wanted & shingles.word_shingles(text, num_words)
  copied_N = np.array([len(of_text & found) for of_text in runs])
  return statistics.ratio(copied_N, np.array([len(of_text) for of_text in runs]), "share")


def _share(flags: Iterable[bool]) -> Estimate:
  return statistics.mean(np.array([float(flag) for flag in flags]), "share")


def _similarity(
  a_NE: Float[np.ndarray, "N E"], b_NE: Float[np.ndarray, "N E"]
) -> Float[np.ndarray, "N"]:
  return np.einsum("NE,NE->N", a_NE, b_NE, dtype=np.float64)


def _check_paired(seeds: Sequence[str], syntheses: Sequence[str]) -> None:
  if len(seeds) != len(syntheses):
    raise ValueError(f"{len(syntheses)} syntheses, but {len(seeds)} seeds")
