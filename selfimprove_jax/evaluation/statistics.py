"""Estimates with standard errors over documents.

A standard error here is over the draw of documents from the source they were drawn from. It says
nothing about the draw of a training seed: two arms that differ by twice their paired standard error
may still differ by no more than two runs of one arm do.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Num

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
    """The normal approximation: value -+ 1.96 standard errors."""
    return self.value - _Z95 * self.stderr, self.value + _Z95 * self.stderr

  def to_dict(self) -> dict[str, float | str]:
    return dataclasses.asdict(self)


def mean(values: Num[np.ndarray, "N"], unit: str) -> Estimate:
  """Mean over documents of equal weight; for 0s and 1s it is a share.

  Raises:
    ValueError: fewer than two documents.
  """
  return ratio(values, np.ones(len(values)), unit)


def weighted_mean(nll_sums: Float[np.ndarray, "N"], token_counts: Num[np.ndarray, "N"]) -> Estimate:
  """Nats per token of N documents: all nats over all tokens, so that long documents weigh more.

  Args:
    nll_sums: Negative log-likelihood of each document, in nats.
    token_counts: Predicted tokens of each, positive.

  Raises:
    ValueError: fewer than two documents, or one without tokens.
  """
  _check_positive("token_counts", token_counts)
  return ratio(nll_sums, token_counts, "nats per token")


def bits_per_byte(nll_sums: Float[np.ndarray, "N"], byte_counts: Num[np.ndarray, "N"]) -> Estimate:
  """Bits per UTF-8 byte of N documents, which is comparable between tokenizers.

  Raises:
    ValueError: fewer than two documents, or one without bytes.
  """
  _check_positive("byte_counts", byte_counts)
  return ratio(nll_sums / math.log(2), byte_counts, "bits per byte")


def paired_difference(
  nll_a: Float[np.ndarray, "N"], nll_b: Float[np.ndarray, "N"], counts: Num[np.ndarray, "N"]
) -> Estimate:
  """Nats per token of a minus those of b, on the same N documents; negative where a is better.

  The standard error is that of the difference: what the two find hard alike cancels.

  Raises:
    ValueError: see `weighted_mean`.
  """
  return weighted_mean(nll_a - nll_b, counts)


def recovered_share(
  nll_baseline: Float[np.ndarray, "N"],
  nll_arm: Float[np.ndarray, "N"],
  nll_oracle: Float[np.ndarray, "N"],
) -> Estimate | None:
  """(baseline - arm) / (baseline - oracle): the share of the oracle's gain that an arm recovers.

  Negative where the arm is worse than the baseline. In nats over the same N documents; token counts
  would cancel.

  Returns:
    None where the oracle's gain is not above 2 of its standard errors: there is no gain to share.

  Raises:
    ValueError: fewer than two documents.
  """
  gain_of_oracle = mean(nll_baseline - nll_oracle, "nats per document")
  if gain_of_oracle.value <= _MIN_GAIN_STDERRS * gain_of_oracle.stderr:
    return None
  return ratio(nll_baseline - nll_arm, nll_baseline - nll_oracle, "share of the oracle's gain")


def ratio(
  numerators: Num[np.ndarray, "N"], denominators: Num[np.ndarray, "N"], unit: str
) -> Estimate:
  """Sum of the numerators over the sum of the denominators: the ratio estimator.

  Its variance is that of its linearisation, n / (n - 1) * sum((y - R x)^2) / sum(x)^2.

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
    raise ValueError(f"{name} of document {int(np.argmin(counts > 0))} is not positive")
