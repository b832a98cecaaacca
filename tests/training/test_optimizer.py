import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from selfimprove_jax.training.config import TrainingConfig
from selfimprove_jax.training.optimizer import SkipSpikesConfig


def _params():
  return {
    "embedding_VD": jnp.full((2, 2), 2.0),
    "layers": {"mlp_norm": {"scale": jnp.full(2, 2.0)}, "w_up_DF": jnp.full((2, 2), 2.0)},
  }


def _adamw(schedule, *, weight_decay=0.0, clip_norm=1e9):
  return _make("adamw", schedule, weight_decay=weight_decay, clip_norm=clip_norm)


def _make(name, schedule=lambda step: 0.1, *, weight_decay=0.0, clip_norm=1e9, **options):
  training = TrainingConfig(
    batch_rows=1, peak_lr=1.0, final_lr=0.0, optimizer=name, clip_norm=clip_norm, **options
  )
  tx = training.make_optimizer(schedule, weight_decay=weight_decay)
  update = jax.jit(tx.update)  # op by op, Muon takes seconds
  return tx._replace(update=lambda *args, loss=1.0: update(*args, loss=jnp.float32(loss)))


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


def _layer_params():
  r = np.random.default_rng(0)
  shapes = {
    "wq_DNH": (3, 8, 2, 4),
    "wo_NHD": (3, 2, 4, 8),
    "w_up_DF": (3, 8, 16),
    "bq_NH": (3, 2, 4),
  }
  layers = {name: jnp.array(r.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
  return {"embedding_VD": jnp.ones((5, 8)), "layers": layers}


def test_muon_orthogonalizes_updates_of_matrices_and_leaves_the_rest_to_adamw():
  params = _layer_params()
  gradients = jax.tree.map(lambda x: x + 0.1, params)
  tx = _make("muon", weight_decay=0.5)
  adamw = optax.adamw(0.1, b1=0.9, b2=0.95, weight_decay=0.5, nesterov=True)
  updates, _ = tx.update(gradients, tx.init(params), params)
  plain, _ = adamw.update(gradients, adamw.init(params), params)
  for name, rows in {"wq_DNH": 8, "wo_NHD": 8, "w_up_DF": 8}.items():
    undecayed = updates["layers"][name] + 0.1 * 0.5 * params["layers"][name]
    for matrix in np.asarray(undecayed).reshape(3, rows, -1):
      singular = np.linalg.svd(matrix, compute_uv=False)
      assert singular.max() < 2.5 * singular.min(), name
      # About as large as AdamW's usual updates, so that one rate fits both.
      assert 0.5 * 0.1 * 0.2 < np.sqrt(np.mean(matrix**2)) < 2 * 0.1 * 0.2
  np.testing.assert_allclose(updates["embedding_VD"], plain["embedding_VD"], rtol=1e-5)
  undecayed = plain["layers"]["bq_NH"] + 0.1 * 0.5 * params["layers"]["bq_NH"]
  np.testing.assert_allclose(updates["layers"]["bq_NH"], undecayed, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_first_moment_can_be_kept_in_bfloat16(name):
  params = _layer_params()
  state = _make(name, momentum_dtype="bfloat16").init(params)
  moments = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.bfloat16]
  assert sum(leaf.size for leaf in moments) == sum(leaf.size for leaf in jax.tree.leaves(params))


_SPIKES = SkipSpikesConfig(window=4, num_deviations=6.0)


def _run_spikes(values):
  """Applies gradients of these norms and losses; returns parameter and state after each."""
  params = {"embedding_VD": jnp.zeros(1)}
  tx = _make("adamw", skip_spikes=_SPIKES)
  state, history = tx.init(params), []
  for norm, loss in values:
    updates, state = tx.update({"embedding_VD": jnp.full(1, norm)}, state, params, loss=loss)
    params = jax.tree.map(jnp.add, params, updates)
    history.append((float(params["embedding_VD"][0]), state))
  return history


@pytest.mark.parametrize("spike", [(50.0, 1.0), (1.0, 50.0), (np.nan, 1.0), (1.0, np.inf)])
def test_a_step_with_a_spike_of_loss_or_gradient_is_skipped_and_counted(spike):
  calm = [(1.0 + 0.01 * i, 1.0 - 0.01 * i) for i in range(8)]
  without = _run_spikes(calm)
  with_spike = _run_spikes([*calm[:5], spike, *calm[5:]])
  assert with_spike[5][0] == with_spike[4][0]
  assert with_spike[-1][0] == without[-1][0]
  assert int(with_spike[-1][1].num_skipped) == 1
  assert int(without[-1][1].num_skipped) == 0


def test_no_finite_number_is_a_spike_before_the_window_is_full():
  history = _run_spikes([(1.0, 1.0), (1.0, 1.0), (90.0, 90.0), (1.0, 1.0)])
  assert int(history[-1][1].num_skipped) == 0
