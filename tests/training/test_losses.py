import jax
import jax.numpy as jnp
import numpy as np

from selfimprove_jax.training import losses

TOKENS = np.array([[3, 1, 2, 0, 4], [4, 4, 0, 1, 2]], np.int32)
MASK = np.array([[False, True, True, False, True], [False, False, False, True, False]])


def _logits():
  return np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)


def _by_hand():
  log_probs = _logits() - np.log(np.exp(_logits()).sum(-1, keepdims=True))
  return -np.array(
    [[0.0] + [log_probs[b, t - 1, TOKENS[b, t]] for t in range(1, 5)] for b in range(2)]
  )


def test_each_token_is_predicted_from_the_position_before_it_and_the_first_from_nothing():
  nll = losses.next_token_nll(jnp.array(_logits()), jnp.array(TOKENS))
  np.testing.assert_allclose(nll, _by_hand(), atol=1e-6)


def test_only_target_tokens_are_summed_and_counted():
  loss, tokens = losses.loss_sum_and_tokens(
    jnp.array(_logits()), jnp.array(TOKENS), jnp.array(MASK)
  )
  np.testing.assert_allclose(loss, _by_hand()[MASK].sum(), rtol=1e-6)
  assert tokens == 4


def test_positions_that_predict_no_target_get_no_gradient():
  gradient = jax.grad(
    lambda logits: losses.loss_sum_and_tokens(logits, jnp.array(TOKENS), jnp.array(MASK))[0]
  )(jnp.array(_logits()))
  predicts_target = np.roll(MASK, -1, axis=1)
  np.testing.assert_array_equal(np.any(np.asarray(gradient) != 0, axis=-1), predicts_target)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
  loss, tokens = losses.loss_sum_and_tokens(
    jnp.zeros((2, 5, 6)), jnp.array(TOKENS), jnp.array(MASK)
  )
  np.testing.assert_allclose(loss / tokens, np.log(6), rtol=1e-6)
