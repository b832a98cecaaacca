"""Control, Scaling and Performance on settings whose measures are known."""

import numpy as np
import pytest

from selfimprove_jax.pipelines.budget_forcing import metrics
from selfimprove_jax.pipelines.budget_forcing.metrics import Setting


def _setting(accuracy, tokens, *, num_questions=1000, **bounds):
  correct = np.arange(num_questions) < round(accuracy * num_questions)
  return Setting(correct, np.full(num_questions, tokens), np.arange(num_questions), **bounds)


def _scaling(settings):
  return metrics.scaling(settings)


def test_the_scaling_of_a_straight_line_is_its_slope():
  settings = [_setting(0.002 * tokens, tokens) for tokens in (50, 100, 175, 400)]
  assert _scaling(settings).value == pytest.approx(0.002 * 100 * 1000)
  assert _scaling(settings).unit == "accuracy points per 1,000 tokens"


def test_the_scaling_of_a_constant_is_zero():
  estimate = _scaling([_setting(0.4, tokens) for tokens in (10, 20, 70)])
  assert estimate.value == pytest.approx(0, abs=1e-9)


def test_the_scaling_is_the_mean_over_pairs_not_a_fit():
  settings = [_setting(0.1, 1000), _setting(0.5, 2000), _setting(0.4, 4000)]
  slopes = [40 / 1, 30 / 3, -10 / 2]
  assert _scaling(settings).value == pytest.approx(np.mean(slopes))
  assert _scaling(settings[::-1]).value == pytest.approx(np.mean(slopes))


def test_settings_of_equal_compute_count_as_one_with_their_mean_accuracy():
  settings = [_setting(0.1, 1000), _setting(0.3, 1000), _setting(0.4, 2000)]
  assert _scaling(settings).value == pytest.approx(40 - 20)
  assert _scaling(settings[:2]) is None


def test_the_error_of_the_scaling_is_paired_by_question():
  rng = np.random.default_rng(0)
  hard = rng.random(400) < 0.5
  settings = [Setting(hard, np.full(400, n), np.arange(400)) for n in (100, 200)]
  assert _scaling(settings).stderr == pytest.approx(0)
  independent = [
    Setting(rng.random(400) < 0.5, np.full(400, n), np.arange(400)) for n in (100, 200)
  ]
  expected = np.hypot(*(setting.accuracy.stderr for setting in independent)) * 100 / 0.1
  assert _scaling(independent).stderr == pytest.approx(expected, rel=0.1)


def test_control_with_one_outlier_of_five_is_four_fifths():
  settings = [_setting(0.5, tokens, max_tokens=500) for tokens in (100, 300, 500, 501, 20)]
  assert metrics.control(settings) == 0.8
  assert metrics.control([_setting(0.5, 99, min_tokens=100), _setting(0.5, 10**6)]) == 0.5


def test_the_compute_of_a_setting_is_the_mean_over_its_questions():
  setting = Setting(
    np.array([True, False, True]),
    np.array([10, 20, 90]),
    np.arange(3),
    min_tokens=15,
    max_tokens=40,
  )
  assert setting.thinking_tokens.value == 40
  assert setting.is_within
  assert setting.share_within == pytest.approx(1 / 3)
  assert setting.accuracy.value == pytest.approx(2 / 3)
  assert setting.accuracy.stderr == pytest.approx(np.sqrt(2 / 9 / 2))


def test_performance_is_the_accuracy_of_the_best_setting():
  settings = [_setting(0.2, 100), _setting(0.5, 200), _setting(0.4, 300)]
  assert metrics.performance(settings) == settings[1].accuracy


def test_settings_with_other_questions_are_not_compared():
  with pytest.raises(ValueError, match=r"have \[10, 20\] questions"):
    _scaling([_setting(0.5, 1, num_questions=10), _setting(0.5, 2, num_questions=20)])
  with pytest.raises(ValueError, match="there are no settings"):
    metrics.control([])


def test_questions_of_one_group_count_as_one_in_the_errors():
  correct, tokens = np.repeat([True, False, True, False], 5), np.arange(20)
  alike = Setting(correct, tokens, np.repeat(["a", "b", "c", "d"], 5)).accuracy
  apart = Setting(correct, tokens, np.arange(20)).accuracy
  assert (alike.num_groups, alike.value) == (4, apart.value)
  assert alike.stderr == pytest.approx(np.std([1, 0, 1, 0], ddof=1) / 2)
  assert alike.stderr > 2 * apart.stderr
