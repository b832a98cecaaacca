"""Control, Scaling and Performance: how well test-time compute is controlled, and what it buys.

The three measures of s1 (arXiv 2501.19393, 3.2) over the runs of one method: a run is all questions
answered in one setting, its compute a the thinking tokens that were measured, f(a) its accuracy.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Num

from selfimprove_jax.evaluation import statistics
from selfimprove_jax.evaluation.statistics import Estimate

_TOKENS, _POINTS = 1000, 100  # of a slope: accuracy points per 1,000 tokens


@dataclasses.dataclass(frozen=True)
class Run:
  """All Q questions, answered in one setting.

  Attributes:
    correct_Q: whether the answer was right; the same questions in the same order in every run.
    tokens_Q: thinking tokens spent on each, all samples together.
    min_tokens, max_tokens: what was demanded of the mean of `tokens_Q`; no upper bound is None.
  """

  correct_Q: Bool[np.ndarray, "Q"]
  tokens_Q: Num[np.ndarray, "Q"]
  min_tokens: int = 0
  max_tokens: int | None = None

  @property
  def thinking_tokens(self) -> Estimate:
    """Per question."""
    return statistics.mean(self.tokens_Q, "thinking tokens per question")

  @property
  def accuracy(self) -> Estimate:
    """Share of the questions, with the standard error over the draw of questions."""
    return statistics.mean(self.correct_Q.astype(float), "accuracy")

  @property
  def is_within(self) -> bool:
    """Whether the compute is what was demanded."""
    return self.min_tokens <= self.thinking_tokens.value <= _or_infinite(self.max_tokens)

  @property
  def share_within(self) -> float:
    """Share of the questions, each by itself, on which it was."""
    high = _or_infinite(self.max_tokens)
    return float(np.mean((self.tokens_Q >= self.min_tokens) & (self.tokens_Q <= high)))


def _or_infinite(bound: int | None) -> float:
  return math.inf if bound is None else float(bound)


def control(runs: Sequence[Run]) -> float:
  """Share of the runs whose measured compute is within the bounds that were demanded; 1 is best.

  Raises:
    ValueError: there are no runs.
  """
  _check_any(runs)
  return sum(run.is_within for run in runs) / len(runs)


def scaling_points_per_1000_tokens(runs: Sequence[Run]) -> Estimate | None:
  """Mean slope of accuracy over all pairs of runs, in accuracy points per 1,000 thinking tokens.

  (f(b) - f(a)) / (b - a), meant over the pairs a < b; it should be above 0. Runs of equal compute
  count as one, whose accuracy is the mean of theirs: they have no slope between them.

  The standard error is over the draw of questions, on which all runs are paired; compute is taken
  as exact.

  Returns:
    None where all runs have equal compute: there is no slope.

  Raises:
    ValueError: there are no runs, they are not of the same questions, or these are fewer than two.
  """
  _check_any(runs)
  if len({len(run.correct_Q) for run in runs}) > 1:
    raise ValueError(
      f"the runs have {[len(run.correct_Q) for run in runs]} questions, not the same"
    )
  compute_A, correct_AQ = _merged(runs)
  if len(compute_A) < 2:
    return None
  weights_A = _slope_weights(compute_A)
  slopes_Q = weights_A @ correct_AQ * (_TOKENS * _POINTS)
  return statistics.mean(slopes_Q, "accuracy points per 1,000 tokens")


def _merged(
  runs: Sequence[Run],
) -> tuple[Float[np.ndarray, "A"], Float[np.ndarray, "A Q"]]:
  """Compute in ascending order, each once, and of each question how many of its runs are right."""
  compute = np.array([run.tokens_Q.mean() for run in runs])
  compute_A, places = np.unique(compute, return_inverse=True)
  correct = np.stack([run.correct_Q for run in runs]).astype(float)
  return compute_A, np.stack(
    [correct[places == place].mean(axis=0) for place in range(len(compute_A))]
  )


def _slope_weights(compute_A: Float[np.ndarray, "A"]) -> Float[np.ndarray, "A"]:
  """What each accuracy is multiplied by in the mean slope, which is linear in them."""
  differences_AA = compute_A[:, None] - compute_A[None, :]
  np.fill_diagonal(differences_AA, np.inf)
  num_pairs = len(compute_A) * (len(compute_A) - 1) / 2
  return (1 / differences_AA).sum(axis=1) / num_pairs


def performance(runs: Sequence[Run]) -> Estimate:
  """The accuracy of the best run, with its own standard error.

  The best of several is picked by its luck too: with few questions this is too high.

  Raises:
    ValueError: there are no runs, or fewer than two questions.
  """
  _check_any(runs)
  return max((run.accuracy for run in runs), key=lambda estimate: estimate.value)


def _check_any(runs):
  if not runs:
    raise ValueError("there are no runs")
