"""Control, Scaling and Performance, which measure test-time compute (s1; arXiv 2501.19393, 3.2).

Each covers the settings of one method, which answers all questions in each setting. A setting's
compute is the measured mean of its thinking tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Num, Shaped

from selfimprove_jax.evaluation import statistics
from selfimprove_jax.evaluation.statistics import Estimate

_TOKENS, _POINTS = 1000, 100  # a slope is in accuracy points per 1,000 tokens


@dataclasses.dataclass(frozen=True)
class Setting:
  """Holds the results of Q questions, which every setting has in the same order.

  Attributes:
    tokens_Q: thinking tokens of each question, summed over its samples.
    groups_Q: group of each question; questions of one group are not independent.
    min_tokens, max_tokens: the demanded range for the mean of `tokens_Q`; None is no upper bound.
  """

  correct_Q: Bool[np.ndarray, "Q"]
  tokens_Q: Num[np.ndarray, "Q"]
  groups_Q: Shaped[np.ndarray, "Q"]
  min_tokens: int = 0
  max_tokens: int | None = None

  @property
  def thinking_tokens(self) -> Estimate:
    """The mean over questions."""
    return statistics.mean(self.tokens_Q, "thinking tokens per question", groups=self.groups_Q)

  @property
  def accuracy(self) -> Estimate:
    """The share of right answers, with its standard error over the draw of questions."""
    return statistics.mean(self.correct_Q.astype(float), "accuracy", groups=self.groups_Q)

  @property
  def is_within(self) -> bool:
    """Whether the mean of the thinking tokens is in the demanded range."""
    return bool(self._within(self.thinking_tokens.value))

  @property
  def share_within(self) -> float:
    """The share of questions whose own thinking tokens are in the demanded range."""
    return float(np.mean(self._within(self.tokens_Q)))

  def _within(self, tokens: Any) -> Any:
    most = np.inf if self.max_tokens is None else self.max_tokens
    return (self.min_tokens <= tokens) & (tokens <= most)


def control(settings: Sequence[Setting]) -> float:
  """Returns the share of settings, at least one, whose compute is in the demanded range."""
  _check_any(settings)
  return sum(setting.is_within for setting in settings) / len(settings)


def scaling(settings: Sequence[Setting]) -> Estimate | None:
  """Estimates the slope of accuracy over compute, in accuracy points per 1,000 thinking tokens.

  The slope (f(b) - f(a)) / (b - a) of the accuracy f is averaged over all pairs of settings with
  compute a < b. Settings of equal compute count as one, with the mean of their accuracies. The
  standard error is over the draw of questions, which pairs the settings; compute counts as exact.

  Returns:
    None if all settings have equal compute.
  """
  _check_any(settings)
  if len({len(setting.correct_Q) for setting in settings}) > 1:
    raise ValueError(
      f"the settings have {[len(setting.correct_Q) for setting in settings]} questions; they must "
      "have the same"
    )
  compute_A, places = np.unique([s.tokens_Q.mean() for s in settings], return_inverse=True)
  if len(compute_A) < 2:
    return None
  correct_SQ = np.stack([setting.correct_Q for setting in settings]).astype(float)
  accuracy_AQ = np.stack([correct_SQ[places == a].mean(axis=0) for a in range(len(compute_A))])
  # The mean slope is linear in the accuracies, so it is a weight for each of them.
  differences_AA = compute_A[:, None] - compute_A[None, :]
  np.fill_diagonal(differences_AA, np.inf)  # a setting forms no pair with itself
  num_pairs = len(compute_A) * (len(compute_A) - 1) / 2
  weights_A = (1 / differences_AA).sum(axis=1) / num_pairs
  slopes_Q = weights_A @ accuracy_AQ * (_TOKENS * _POINTS)
  groups_Q = settings[0].groups_Q
  return statistics.mean(slopes_Q, "accuracy points per 1,000 tokens", groups=groups_Q)


def performance(settings: Sequence[Setting]) -> Estimate:
  """Returns the accuracy of the best setting, which is biased upwards, more so with few questions.

  The standard error is that setting's own.
  """
  _check_any(settings)
  return max((setting.accuracy for setting in settings), key=lambda estimate: estimate.value)


def _check_any(settings: Sequence[Setting]) -> None:
  if not settings:
    raise ValueError("there are no settings to measure")
