"""Estimates against known truths and drawn samples."""

import collections
import json
import math

import numpy as np
import pytest

from selfimprove_jax.evaluation import statistics


def draw(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
  """Documents whose loss per token depends on their length, as real ones do."""
  counts = rng.integers(5, 200, size=num)
  return counts * (4 - counts / 200 + 0.5 * rng.standard_normal(num)), counts


def each(num: int) -> np.ndarray:
  """A group for each document."""
  return np.arange(num)


def test_long_documents_weigh_more():
  estimate = statistics.weighted_mean(np.array([10.0, 90.0]), np.array([10, 30]), groups=each(2))
  assert estimate.value == 2.5
  assert estimate.unit == "nats per token"


def test_equal_lengths_give_the_textbook_standard_error():
  values = np.array([1.0, 2.0, 4.0, 7.0])
  expected = values.std(ddof=1) / 2
  assert statistics.mean(values, "x", groups=each(4)).stderr == pytest.approx(expected)
  estimate = statistics.weighted_mean(10 * values, np.full(4, 10), groups=each(4))
  assert (estimate.value, estimate.stderr) == (pytest.approx(3.5), pytest.approx(expected))


def test_intervals_hold_the_truth_as_often_as_they_say():
  rng = np.random.default_rng(0)
  population_nll, population_counts = draw(rng, 1_000_000)
  truth = population_nll.sum() / population_counts.sum()
  held = 0
  for _ in range(2000):
    low, high = statistics.weighted_mean(*draw(rng, 100), groups=each(100)).interval95
    held += low <= truth <= high
  assert held / 2000 == pytest.approx(0.95, abs=0.02)


def test_intervals_of_passages_of_few_files_hold_the_truth_as_often_as_they_say():
  """Passages of a file are alike, and files differ in length; as if independent: 50%."""
  rng = np.random.default_rng(0)
  held = collections.Counter()
  for _ in range(1000):
    sizes = rng.integers(2, 30, size=20)
    groups = np.repeat(each(20), sizes)
    counts = rng.integers(5, 200, size=len(groups))
    of_file = 0.3 * rng.standard_normal(20)
    nll = counts * (4 + of_file[groups] + 0.5 * rng.standard_normal(len(groups)))
    for name, by in (("clustered", groups), ("apart", each(len(groups)))):
      low, high = statistics.weighted_mean(nll, counts, groups=by).interval95
      held[name] += low <= 4 <= high
  assert held["clustered"] / 1000 == pytest.approx(0.95, abs=0.03)
  assert held["apart"] / 1000 < 0.7


def test_a_group_counts_as_one_however_it_is_cut():
  """By hand: documents that are doubled within their group add nothing that is known."""
  values, groups = np.array([1.0, 2.0, 4.0, 7.0]), ["a", "b", "c", "d"]
  whole = statistics.mean(values, "x", groups=groups)
  doubled = statistics.mean(np.repeat(values, 2), "x", groups=np.repeat(groups, 2))
  assert (doubled.value, doubled.stderr) == (whole.value, pytest.approx(whole.stderr))
  assert doubled.num_groups == 4


def test_pairing_takes_out_what_both_find_hard():
  rng = np.random.default_rng(0)
  nll_a, counts = draw(rng, 200)
  nll_b = nll_a - 0.1 * counts + 0.1 * rng.standard_normal(200)
  difference = statistics.paired_difference(nll_a, nll_b, counts, groups=each(200))
  assert difference.value == pytest.approx(0.1, abs=0.001)
  assert difference.stderr < 0.02 * statistics.weighted_mean(nll_a, counts, groups=each(200)).stderr


def test_bits_per_byte_does_not_depend_on_the_tokenizer():
  nats = np.log(2) * np.array([8.0, 16.0])
  estimate = statistics.bits_per_byte(nats, np.array([8, 4]), groups=each(2))
  assert estimate.value == pytest.approx(2.0)
  assert estimate.unit == "bits per byte"


def test_recovered_share_and_its_interval():
  rng = np.random.default_rng(0)
  held, shares = 0, []
  for _ in range(1000):
    baseline, counts = draw(rng, 100)
    oracle = baseline - counts * (0.5 + 0.2 * rng.standard_normal(100))
    arm = baseline - counts * (0.1 + 0.2 * rng.standard_normal(100))
    estimate = statistics.recovered_share(baseline, arm, oracle, groups=each(100))
    low, high = estimate.interval95
    held += low <= 0.2 <= high
    shares.append(estimate.value)
  assert np.mean(shares) == pytest.approx(0.2, abs=0.01)
  assert held / 1000 == pytest.approx(0.95, abs=0.025)


def test_there_is_no_share_of_a_gain_that_is_not_there():
  rng = np.random.default_rng(0)
  baseline, counts = draw(rng, 100)
  noise = counts * rng.standard_normal(100)

  def share(arm: np.ndarray, oracle: np.ndarray) -> statistics.Estimate | None:
    return statistics.recovered_share(baseline, arm, oracle, groups=each(100))

  assert share(baseline - 1, baseline + noise - noise.mean()) is None
  assert share(baseline - 1, baseline + 1) is None
  assert share(baseline + 1, baseline - 2).value == -0.5


def test_an_estimate_is_json():
  estimate = statistics.Estimate(4.0, 0.5, "nats per token", 11)
  assert json.loads(json.dumps(estimate.to_dict())) == {
    "value": 4.0,
    "stderr": 0.5,
    "unit": "nats per token",
    "num_groups": 11,
  }
  # Student's t with 10 degrees of freedom: 2.228.
  assert estimate.interval95 == pytest.approx((4 - 1.114, 4 + 1.114), abs=1e-3)


def test_one_group_alone_has_no_interval():
  found = statistics.weighted_mean(np.array([1.0, 2.0]), np.array([3, 3]), groups=["a", "a"])
  assert (found.value, found.stderr, found.num_groups) == (0.5, math.inf, 1)
  assert found.interval95 == (-math.inf, math.inf)
  assert statistics.Estimate(**json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_an_empty_document_and_a_missing_group_are_refused():
  with pytest.raises(ValueError, match="token_counts of document 1"):
    statistics.weighted_mean(np.array([1.0, 0.0]), np.array([3, 0]), groups=each(2))
  with pytest.raises(ValueError, match="2 documents, and the groups of 3"):
    statistics.mean(np.array([1.0, 0.0]), "x", groups=each(3))
