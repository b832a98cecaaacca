import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.runtime import partitioning
from selfimprove_jax.training import losses

B, T, D, V = 8, 5, 12, 16
_r = np.random.default_rng(0)
HIDDEN = _r.normal(size=(B, T, D)).astype(np.float32)
HEAD = _r.normal(size=(V, D)).astype(np.float32)
TOKENS = _r.integers(0, V, (B, T)).astype(np.int32)
MASK = _r.random((B, T)) < 0.5
MASK[:, 0] = False
ARGUMENTS = tuple(map(jnp.array, (HIDDEN, HEAD, TOKENS)))
WEIGHTS = np.asarray(losses.target_weights(jnp.array(MASK)))


def _by_hand():
  logits = HIDDEN @ HEAD.T
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll = np.zeros((B, T))
  for b in range(B):
    for t in range(1, T):
      nll[b, t] = -log_probs[b, t - 1, TOKENS[b, t]]
  return nll


def _plain_loss(hidden, head):
  logits = jnp.dot(hidden, head.T)[:, :-1]
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.array(TOKENS)[:, 1:, None], axis=2)
  return -jnp.sum(picked[..., 0] * jnp.array(WEIGHTS)[:, 1:])


def test_each_token_is_predicted_from_the_position_before_it():
  nll = losses.next_token_nll(*ARGUMENTS)
  np.testing.assert_allclose(nll, _by_hand(), atol=1e-5)


def test_a_target_weighs_one_over_their_number():
  np.testing.assert_allclose(WEIGHTS, MASK / MASK.sum(), rtol=1e-6)
  assert not losses.target_weights(jnp.zeros((2, 3), bool)).any()


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
  loss = losses.weighted_loss(jnp.zeros((B, T, D)), *ARGUMENTS[1:], jnp.array(WEIGHTS))
  np.testing.assert_allclose(loss, np.log(V), rtol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 40, None])
def test_chunks_change_neither_the_loss_nor_its_gradient(chunk_tokens):
  loss_fn = functools.partial(losses.weighted_loss, chunk_tokens=chunk_tokens)
  loss, gradients = jax.value_and_grad(loss_fn, argnums=(0, 1))(*ARGUMENTS, jnp.array(WEIGHTS))
  expected, expected_gradients = jax.value_and_grad(_plain_loss, argnums=(0, 1))(*ARGUMENTS[:2])
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  for found, right in zip(gradients, expected_gradients):
    np.testing.assert_allclose(found, right, atol=1e-6)
  nll = losses.next_token_nll(*ARGUMENTS, chunk_tokens=chunk_tokens)
  np.testing.assert_allclose(np.sum(nll * WEIGHTS), expected, rtol=1e-6)


def test_a_function_of_the_loss_scales_the_gradient():
  gradient = jax.grad(lambda h: 3.0 * losses.weighted_loss(h, *ARGUMENTS[1:], jnp.array(WEIGHTS)))
  expected = jax.grad(lambda h: 3.0 * _plain_loss(h, HEAD))
  np.testing.assert_allclose(gradient(jnp.array(HIDDEN)), expected(jnp.array(HIDDEN)), atol=1e-6)


def test_positions_that_predict_no_target_get_no_gradient():
  gradient = jax.grad(losses.weighted_loss)(*ARGUMENTS, jnp.array(WEIGHTS))
  predicts_target = np.roll(MASK, -1, axis=1)
  np.testing.assert_array_equal(np.any(np.asarray(gradient) != 0, axis=-1), predicts_target)


@pytest.mark.parametrize(
  "sizes",
  [
    (2, 2, 2),
    *(pytest.param(s, marks=pytest.mark.slow) for s in [(8, 1, 1), (1, 4, 2), (1, 1, 8)]),
  ],
)
def test_a_mesh_changes_neither_the_loss_nor_its_gradient(sizes):
  mesh = partitioning.make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
  # Chunks are smaller than a device's tokens, so gradients are summed over chunks and devices.
  grad = jax.value_and_grad(functools.partial(losses.weighted_loss, chunk_tokens=3), (0, 1))
  arguments = (*ARGUMENTS, jnp.array(WEIGHTS))
  expected, (dhidden, dhead) = grad(*arguments)
  with jax.set_mesh(mesh):
    loss, gradients = jax.jit(grad)(*arguments)
    nll = jax.jit(functools.partial(losses.next_token_nll, chunk_tokens=3))(*arguments[:3])
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(gradients[0], dhidden, atol=1e-6)
  np.testing.assert_allclose(gradients[1], dhead, atol=1e-6)
  np.testing.assert_allclose(nll, _by_hand(), atol=1e-5)


def test_the_logits_of_a_large_vocabulary_are_never_in_memory_at_once():
  shapes = (2, 512, 8), (32_000, 8), (2, 512), (2, 512)
  dtypes = ("float32", "float32", "int32", "float32")
  arguments = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes)]
  whole = 2 * 512 * 32_000 * 4

  def temporary_bytes(chunk_tokens):
    grad = jax.grad(functools.partial(losses.weighted_loss, chunk_tokens=chunk_tokens), (0, 1))
    return jax.jit(grad).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

  assert temporary_bytes(64) < whole / 4 < whole <= temporary_bytes(1024)
