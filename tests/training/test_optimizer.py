import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.training import optimizer


def _params():
  return {
    "embedding_VD": jnp.full((2, 2), 2.0),
    "layers": {"mlp_norm": {"scale": jnp.full(2, 2.0)}, "w_up_DF": jnp.full((2, 2), 2.0)},
  }


def _adamw(schedule, *, weight_decay=0.0, clip_norm=1e9):
  return optimizer.adamw(
    schedule, weight_decay=weight_decay, b1=0.9, b2=0.95, eps=1e-8, clip_norm=clip_norm
  )


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine_to_the_last_step():
  rate = optimizer.warmup_cosine(peak_lr=1.0, final_lr=0.1, warmup_steps=4, num_steps=12)
  rates = [float(rate(step)) for step in range(13)]
  np.testing.assert_allclose(rates[:5], [0, 0.25, 0.5, 0.75, 1.0], rtol=1e-6)
  np.testing.assert_allclose(rates[8], 0.55, rtol=1e-6)
  np.testing.assert_allclose(rates[12], 0.1, rtol=1e-6)
  assert all(a > b for a, b in itertools.pairwise(rates[4:]))


def test_without_warm_up_the_first_step_has_the_peak_rate():
  rate = optimizer.warmup_cosine(peak_lr=1.0, final_lr=0.0, warmup_steps=0, num_steps=10)
  assert float(rate(0)) == 1.0
  assert float(rate(10)) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("warmup_steps", [-1, 10, 11])
def test_a_warm_up_that_does_not_fit_the_run_is_refused(warmup_steps):
  with pytest.raises(ValueError, match=rf"warmup_steps={warmup_steps} must.*num_steps=10"):
    optimizer.warmup_cosine(peak_lr=1.0, final_lr=0.0, warmup_steps=warmup_steps, num_steps=10)


def test_decay_is_the_rate_times_the_weight_on_all_but_the_norms():
  tx = _adamw(lambda step: 0.1, weight_decay=0.5)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, _params()), tx.init(_params()), _params())
  np.testing.assert_allclose(updates["embedding_VD"], -0.1 * 0.5 * 2.0, rtol=1e-6)
  np.testing.assert_allclose(updates["layers"]["w_up_DF"], -0.1 * 0.5 * 2.0, rtol=1e-6)
  np.testing.assert_array_equal(updates["layers"]["mlp_norm"]["scale"], 0.0)


def test_the_first_update_is_the_rate_in_the_direction_of_the_sign():
  tx = _adamw(lambda step: 0.1)
  gradient = jax.tree.map(lambda x: jnp.full_like(x, -3.0), _params())
  updates, _ = tx.update(gradient, tx.init(_params()), _params())
  jax.tree.map(lambda u: np.testing.assert_allclose(u, 0.1, rtol=1e-5), updates)


def test_gradients_are_clipped_by_their_norm_over_all_parameters():
  gradient = jax.tree.map(lambda x: jnp.full_like(x, 7.0), _params())
  tx = _adamw(lambda step: 0.1, clip_norm=1.0)
  _, state = tx.update(gradient, tx.init(_params()), _params())
  (first_moment,) = [
    leaf
    for path, leaf in jax.tree.leaves_with_path(state)
    if ".mu" in jax.tree_util.keystr(path) and "embedding" in jax.tree_util.keystr(path)
  ]
  np.testing.assert_allclose(first_moment, 0.1 * 10**-0.5, rtol=1e-5)  # 10 entries in all
