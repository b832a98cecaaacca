"""Estimates with standard errors over documents.

A standard error here is over the draw of documents from their source. It does not cover the draw of
a training seed: two arms that differ by twice their paired standard error may still differ by no
more than two runs of one arm do.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Float, Num

_Z95 = 1.959964
_MIN_GAIN_STDERRS = 2.0


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A value, its standard error, and the unit of both."""

  value: float
  stderr: float
  unit: str

  @property
  def interval95(self) -> tuple[float, float]:
    """The 95% confidence interval by the normal approximation: value -+ 1.96 standard errors."""
    return self.value - _Z95 * self.stderr, self.value + _Z95 * self.stderr

  def to_dict(self) -> dict[str, float | str]:
    return dataclasses.asdict(self)


def mean(values: Num[np.ndarray, "N"], unit: str) -> Estimate:
  """Estimates the mean over documents of equal weight.

  Raises:
    ValueError: fewer than two documents.
  """
  return ratio(values, np.ones(len(values)), unit)


def share(flags: Bool[np.ndarray, "N"]) -> Estimate:
  """Estimates the share of documents that a flag is set for.

  Raises:
    ValueError: fewer than two documents.
  """
  return mean(flags.astype(np.float64), "share")


def weighted_mean(nll_sums: Float[np.ndarray, "N"], token_counts: Num[np.ndarray, "N"]) -> Estimate:
  """Estimates nats per token: all nats over all tokens, so that long documents weigh more.

  Args:
    nll_sums: negative log-likelihood of each document, in nats.
    token_counts: predicted tokens of each, positive.

  Raises:
    ValueError: fewer than two documents, or one without tokens.
  """
  _check_positive("token_counts", token_counts)
  return ratio(nll_sums, token_counts, "nats per token")


def bits_per_byte(nll_sums: Float[np.ndarray, "N"], byte_counts: Num[np.ndarray, "N"]) -> Estimate:
  """Estimates bits per UTF-8 byte, which can be compared between tokenizers.

  Raises:
    ValueError: fewer than two documents, or one without bytes.
  """
  _check_positive("byte_counts", byte_counts)
  return ratio(nll_sums / math.log(2), byte_counts, "bits per byte")


def paired_difference(
  nll_a: Float[np.ndarray, "N"], nll_b: Float[np.ndarray, "N"], counts: Num[np.ndarray, "N"]
) -> Estimate:
  """Estimates nats per token of a minus those of b, on the same documents; negative if a is better.

  The standard error is that of the difference: variance that both share cancels.

  Raises:
    ValueError: see `weighted_mean`.
  """
  return weighted_mean(nll_a - nll_b, counts)


def recovered_share(
  nll_baseline: Float[np.ndarray, "N"],
  nll_arm: Float[np.ndarray, "N"],
  nll_oracle: Float[np.ndarray, "N"],
) -> Estimate | None:
  """Estimates (baseline - arm) / (baseline - oracle), the arm's share of the oracle's gain.

  Negative if the arm is worse than the baseline. Works on nats of the same documents, whose token
  counts cancel.

  Returns:
    None if the oracle's gain is not above 2 of its standard errors: there is no gain to share.

  Raises:
    ValueError: fewer than two documents.
  """
  gain_of_oracle = mean(nll_baseline - nll_oracle, "nats per document")
  if gain_of_oracle.value <= _MIN_GAIN_STDERRS * gain_of_oracle.stderr:
    return None
  return ratio(nll_baseline - nll_arm, nll_baseline - nll_oracle, "share of the oracle's gain")


def retained_share(
  own_N: Float[np.ndarray, "N"], random_N: Float[np.ndarray, "N"], real_P: Float[np.ndarray, "P"]
) -> Estimate | None:
  """Estimates (own - random) / (real - random), how much of a real pair's link syntheses retain.

  0 for a synthesizer that ignores its seed, 1 for one as close to it as real pairs are.

  Args:
    own_N: similarity of each synthesis to its own seed.
    random_N: similarity of each synthesis to a random seed.
    real_P: similarities of real pairs.

  Returns:
    None if real pairs are not above random ones by 2 standard errors: there is no link to retain.

  Raises:
    ValueError: fewer than two syntheses or real pairs.
  """
  own, random, real = (mean(values, "cosine similarity") for values in (own_N, random_N, real_P))
  link = real.value - random.value
  if link <= _MIN_GAIN_STDERRS * math.hypot(real.stderr, random.stderr):
    return None
  value = (own.value - random.value) / link
  # Delta method: own and random belong to the same syntheses, so they enter as one difference; real
  # pairs are other documents, so they enter as an independent term.
  of_syntheses = mean(own_N - (1 - value) * random_N, "cosine similarity")
  stderr = math.hypot(of_syntheses.stderr, value * real.stderr) / link
  return Estimate(value, stderr, "share of a real pair's link")


def ratio(
  numerators: Num[np.ndarray, "N"], denominators: Num[np.ndarray, "N"], unit: str
) -> Estimate:
  """Estimates the sum of the numerators over the sum of the denominators.

  The variance is that of the linearized ratio, n / (n - 1) * sum((y - R x)^2) / sum(x)^2.

  Raises:
    ValueError: fewer than two documents, or the denominators add up to zero.
  """
  num_documents, total = len(numerators), float(denominators.sum())
  if num_documents < 2:
    raise ValueError(f"{num_documents} documents: a standard error needs at least 2")
  if total == 0:
    raise ValueError("the denominators add up to 0")
  value = float(numerators.sum()) / total
  residuals = numerators - value * denominators
  variance = num_documents / (num_documents - 1) * float((residuals**2).sum()) / total**2
  return Estimate(value, math.sqrt(variance), unit)


def _check_positive(name: str, counts: Num[np.ndarray, "N"]) -> None:
  if not (counts > 0).all():
    raise ValueError(f"{name} of document {int(np.argmin(counts > 0))} must be positive")
