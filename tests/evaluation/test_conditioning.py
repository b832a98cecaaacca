import numpy as np
import pytest

from selfimprove_jax.evaluation import conditioning

TRUE = np.array([10.0, 24.0, 6.0])
RANDOM = np.array([14.0, 25.0, 9.0])
TOKENS = np.array([5, 8, 3])


def test_the_gap_is_what_a_random_neighbour_costs_a_token():
  found = conditioning.conditioning_gap(TRUE, RANDOM, TOKENS, gate=0.1)
  assert found["true_nll"] == pytest.approx(40 / 16)
  assert found["random_nll"] == pytest.approx(48 / 16)
  assert found["gap"]["value"] == pytest.approx(8 / 16)
  assert found["gap"]["unit"] == "nats per token"
  assert (found["gate"], found["num_pairs"]) == (0.1, 3)


def test_its_standard_error_is_over_pairs_so_what_both_find_hard_cancels():
  harder = np.array([100.0, -3.0, 50.0])
  found = conditioning.conditioning_gap(TRUE, RANDOM, TOKENS, gate=0.1)
  shifted = conditioning.conditioning_gap(TRUE + harder, RANDOM + harder, TOKENS, gate=0.1)
  residuals = (RANDOM - TRUE) - 0.5 * TOKENS
  assert found["gap"]["stderr"] == pytest.approx((1.5 * (residuals**2).sum()) ** 0.5 / 16)
  assert shifted["gap"] == pytest.approx(found["gap"])


def test_a_synthesizer_that_does_not_read_d1_has_no_gap():
  found = conditioning.conditioning_gap(TRUE, TRUE.copy(), TOKENS, gate=0.1)
  assert (found["gap"]["value"], found["gap"]["stderr"]) == (0.0, 0.0)
