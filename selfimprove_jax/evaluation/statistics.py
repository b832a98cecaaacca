"""Estimates with standard errors over groups of documents.

Documents of one group (passages of one file, questions about one article) are alike, so the error
is that of the draw of groups: cluster-robust, with Student's t for few groups. It covers neither
the draw of a training seed nor that of a model's samples. One group alone tells nothing of the
others: the error is infinite.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Num
from scipy import special

Groups = Sequence[str] | Sequence[int] | np.ndarray
"""The group of each document, by any name."""

_MIN_GAIN_STDERRS = 2.0


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A value, its standard error, the unit of both, and the number of groups behind the error.

  Attributes:
    stderr: infinite for one group; None, as JSON has it, is taken for infinity.
  """

  value: float
  stderr: float | None
  unit: str
  num_groups: int

  def __post_init__(self) -> None:
    if self.stderr is None:
      object.__setattr__(self, "stderr", math.inf)

  @property
  def interval95(self) -> tuple[float, float]:
    """The 95% confidence interval, by Student's t with `num_groups - 1` degrees of freedom."""
    return interval95(self.value, self.stderr, self.num_groups - 1)

  def to_dict(self) -> dict[str, float | int | str | None]:
    fields = dataclasses.asdict(self)
    return fields if math.isfinite(self.stderr) else {**fields, "stderr": None}


def interval95(value: float, stderr: float, degrees: float | int) -> tuple[float, float]:
  """Returns the 95% confidence interval by Student's t with these degrees of freedom."""
  if not math.isfinite(stderr):
    return -math.inf, math.inf
  half = float(special.stdtrit(degrees, 0.975)) * stderr
  return value - half, value + half


def mean(values: Num[np.ndarray, "N"], unit: str, *, groups: Groups) -> Estimate:
  """Estimates the mean over documents of equal weight."""
  return ratio(values, np.ones(len(values)), unit, groups=groups)


def share(flags: Bool[np.ndarray, "N"], *, groups: Groups) -> Estimate:
  """Estimates the share of documents with the flag set."""
  return mean(flags.astype(np.float64), "share", groups=groups)


def weighted_mean(
  nll_sums: Float[np.ndarray, "N"], token_counts: Num[np.ndarray, "N"], *, groups: Groups
) -> Estimate:
  """Estimates nats per token: all nats over all tokens, so that long documents weigh more.

  Args:
    nll_sums: negative log-likelihood of each document, in nats.
    token_counts: predicted tokens of each, positive.
  """
  _check_positive("token_counts", token_counts)
  return ratio(nll_sums, token_counts, "nats per token", groups=groups)


def bits_per_byte(
  nll_sums: Float[np.ndarray, "N"], byte_counts: Num[np.ndarray, "N"], *, groups: Groups
) -> Estimate:
  """Estimates bits per UTF-8 byte, which can be compared between tokenizers."""
  _check_positive("byte_counts", byte_counts)
  return ratio(nll_sums / math.log(2), byte_counts, "bits per byte", groups=groups)


def paired_difference(
  nll_a: Float[np.ndarray, "N"],
  nll_b: Float[np.ndarray, "N"],
  counts: Num[np.ndarray, "N"],
  *,
  groups: Groups,
) -> Estimate:
  """Estimates nats per token of a minus those of b, on the same documents; negative if a is better.

  The standard error is that of the difference: variance that both share cancels.
  """
  return weighted_mean(nll_a - nll_b, counts, groups=groups)


def recovered_share(
  nll_baseline: Float[np.ndarray, "N"],
  nll_arm: Float[np.ndarray, "N"],
  nll_oracle: Float[np.ndarray, "N"],
  *,
  groups: Groups,
) -> Estimate | None:
  """Estimates (baseline - arm) / (baseline - oracle), the arm's share of the oracle's gain.

  Negative if the arm is worse than the baseline. Takes nats of the same documents, whose token
  counts cancel. None if the oracle's gain is at most 2 standard errors: there is no gain to share.
  """
  gain_of_oracle = mean(nll_baseline - nll_oracle, "nats per document", groups=groups)
  if gain_of_oracle.value <= _MIN_GAIN_STDERRS * gain_of_oracle.stderr:
    return None
  unit = "share of the oracle's gain"
  return ratio(nll_baseline - nll_arm, nll_baseline - nll_oracle, unit, groups=groups)


def retained_share(
  own_N: Float[np.ndarray, "N"],
  random_N: Float[np.ndarray, "N"],
  real_P: Float[np.ndarray, "P"],
  unrelated_P: Float[np.ndarray, "P"],
  *,
  groups_N: Groups,
  groups_P: Groups,
) -> Estimate | None:
  """Estimates (own - random) / (real - unrelated): 0 if seeds have no effect, 1 as in real pairs.

  Syntheses and real documents each have a baseline of their own, since two texts by a weak model
  may be alike, or unlike any document, whatever their seeds.

  Args:
    own_N, random_N: similarity of each synthesis to its own seed, and to a random one.
    real_P, unrelated_P: similarity of each real document to a related and to an unrelated one.
    groups_N, groups_P: groups of the syntheses' seeds, and of the real documents.

  Returns:
    None if real pairs are not above unrelated ones by 2 standard errors: no link to retain.
  """
  effect = mean(own_N - random_N, "similarity", groups=groups_N)
  link = mean(real_P - unrelated_P, "similarity", groups=groups_P)
  if link.value <= _MIN_GAIN_STDERRS * link.stderr:
    return None
  # Delta method; syntheses and real pairs are different documents.
  value = effect.value / link.value
  stderr = math.hypot(effect.stderr, value * link.stderr) / link.value
  num_groups = min(effect.num_groups, link.num_groups)
  return Estimate(value, stderr, "share of a real pair's link", num_groups)


def ratio(
  numerators: Num[np.ndarray, "N"],
  denominators: Num[np.ndarray, "N"],
  unit: str,
  *,
  groups: Groups,
) -> Estimate:
  """Estimates the sum of the numerators over the sum of the denominators, which must not be 0.

  The variance is that of the linearized ratio R, with residuals y - R x summed by group first:
  g / (g - 1) * sum of their squares / sum(x)^2 for g groups.
  """
  num_documents, total = len(numerators), float(denominators.sum())
  if len(groups) != num_documents or not num_documents:
    raise ValueError(f"{num_documents} documents, and the groups of {len(groups)}: each has one")
  names, group_N = np.unique(np.asarray(groups), return_inverse=True)
  if total == 0:
    raise ValueError("the denominators add up to 0")
  value = float(numerators.sum()) / total
  if len(names) == 1:
    return Estimate(value, math.inf, unit, 1)
  residuals_G = np.bincount(group_N, weights=numerators - value * denominators)
  variance = len(names) / (len(names) - 1) * float((residuals_G**2).sum()) / total**2
  return Estimate(value, math.sqrt(variance), unit, len(names))


def _check_positive(name: str, counts: Num[np.ndarray, "N"]) -> None:
  if not (counts > 0).all():
    raise ValueError(f"{name} of document {int(np.argmin(counts > 0))} must be positive")
