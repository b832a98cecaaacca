import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from selfimprove_jax.models.llama import abstract_params
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.training import losses, optimizer, train_step

MESHES = {
  "1x8x1": {"data": 1, "fsdp": 8, "tensor": 1},
  "1x4x2": {"data": 1, "fsdp": 4, "tensor": 2},
  "1x2x4": {"data": 1, "fsdp": 2, "tensor": 4},
  "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}
DROPOUT_KEY = jax.random.key(7)
SPIKES = optimizer.SkipSpikesConfig(window=2)


def _run(setup, mesh, batches, accumulation_steps=1):
  """Makes a step of each batch; returns the state and the metrics of every step."""
  step_fn = setup.step_fn(mesh, accumulation_steps)
  state, history = setup.state(mesh), []
  for batch in batches:
    state, metrics = step_fn(state, partitioning.global_batch(batch, mesh), DROPOUT_KEY)
    history.append(jax.tree.map(float, metrics))
  return state, history


@pytest.fixture(scope="module")
def reference(make_setup, batches, one_device_mesh):
  """Three steps on one device."""
  return _run(make_setup(), one_device_mesh, batches[:3])


@pytest.mark.parametrize(
  "name", ["2x2x2", *(pytest.param(n, marks=pytest.mark.slow) for n in MESHES if n != "2x2x2")]
)
def test_every_mesh_gives_the_losses_and_parameters_of_one_device(
  name, make_setup, batches, reference
):
  # Dropout is on: its draws must not depend on the mesh either.
  mesh = partitioning.make_mesh(**MESHES[name])
  state, history = _run(make_setup(), mesh, batches[:3])
  expected_state, expected = reference
  for found, wanted in zip(history, expected, strict=True):
    assert found == pytest.approx(wanted, rel=2e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, expected_state.params
  )
  _check_shardings(state, mesh)


def _check_shardings(state, mesh):
  """Every moment is sharded as its parameter; no device holds more than its part of either."""
  by_name = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree.leaves_with_path(state.params)
  }
  moments = [
    (name, leaf)
    for path, leaf in jax.tree.leaves_with_path(state.opt_state)
    for name in by_name
    if jax.tree_util.keystr(path, simple=True, separator="/").endswith("/" + name)
  ]
  assert len(moments) == 2 * len(by_name)
  for name, moment in moments:
    assert moment.sharding.is_equivalent_to(by_name[name].sharding, moment.ndim), name
  ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
  for leaf in [by_name["embedding_VD"], by_name["layers/mlp/w_up_DF"]]:
    assert leaf.addressable_shards[0].data.size * ways == leaf.size


def test_the_metrics_are_those_of_the_whole_batch_before_the_update(
  make_setup, batches, one_device_mesh
):
  setup = make_setup(dropout_rate=0.0)
  state = setup.state(one_device_mesh)
  batch = {name: jnp.array(rows) for name, rows in batches[0].items()}
  logits, _ = jax.jit(setup.model.apply)(
    {"params": state.params}, batch["tokens"], batch["positions"], batch["segment_ids"]
  )
  log_probs = jax.nn.log_softmax(logits)[:, :-1]
  nll = -jnp.take_along_axis(log_probs, batch["tokens"][:, 1:, None], axis=2)[..., 0]
  loss = jnp.mean(nll, where=batch["loss_mask"][:, 1:])
  _, (first, second) = _run(setup, one_device_mesh, batches[:2])
  assert first["loss"] == pytest.approx(float(loss), rel=1e-5)
  assert first["tokens"] == batches[0]["loss_mask"].sum()
  assert (first["learning_rate"], second["learning_rate"]) == pytest.approx((0.0, 5e-3))


def test_the_logged_learning_rate_is_that_of_the_update_after_a_skipped_spike():
  tx = optimizer.skip_spikes(optax.sgd(schedule := lambda step: 0.5**step), SPIKES)
  state = train_step.TrainState(jnp.int32(0), {"x": jnp.float32(0)}, tx.init({"x": jnp.float32(0)}))

  def loss(params, batch, key):
    return params["x"] * batch["gradient"], {}

  rates, updates = [], []
  for gradient in (1.0, float("nan"), 1.0):
    before = state.params["x"]
    state, metrics = train_step.train_step(
      state,
      {"loss_mask": jnp.ones((1, 2), bool), "gradient": jnp.float32(gradient)},
      jax.random.key(0),
      loss=loss,
      tx=tx,
      learning_rate=schedule,
      accumulation_steps=1,
    )
    rates.append(float(metrics["learning_rate"]))
    updates.append(float(before - state.params["x"]))
  assert updates == [1.0, 0.0, 0.5]
  assert rates == [1.0, 0.5, 0.5]


def test_dropout_is_on_in_training_and_new_in_each_step(make_setup, batches, one_device_mesh):
  _, dropped = _run(make_setup(), one_device_mesh, [batches[0]] * 2)
  _, whole = _run(make_setup(dropout_rate=0.0), one_device_mesh, [batches[0]])
  # The first step's learning rate is 0: the second sees the same parameters and rows.
  assert len({round(m["loss"], 5) for m in (*dropped, *whole)}) == 3


def test_uneven_micro_batches_give_the_update_of_the_whole_batch(
  make_setup, batches, one_device_mesh
):
  setup = make_setup(dropout_rate=0.0)
  uneven = [{name: rows.copy() for name, rows in batch.items()} for batch in batches[:2]]
  for batch in uneven:
    batch["loss_mask"][1::4] = False  # one of the micro-batches has no target at all
    batch["loss_mask"][2::4, 4:] = False
  whole, expected = _run(setup, one_device_mesh, uneven)
  parts, found = _run(setup, one_device_mesh, uneven, accumulation_steps=4)
  for a, b in zip(found, expected, strict=True):
    assert a == pytest.approx(b, rel=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), parts.params, whole.params)
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), whole.params, setup.state(one_device_mesh).params
  )
  assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.slow
def test_accumulation_on_a_mesh_gives_the_result_of_one_device(
  make_setup, batches, one_device_mesh
):
  setup = make_setup(dropout_rate=0.0)
  mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
  _, expected = _run(setup, one_device_mesh, batches[:2])
  _, found = _run(setup, mesh, batches[:2], accumulation_steps=2)
  for a, b in zip(found, expected, strict=True):
    assert a == pytest.approx(b, rel=2e-5)


@pytest.mark.parametrize("accumulation_steps", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_any_loss_trains_and_its_metrics_add_up_over_micro_batches(
  make_setup, batches, one_device_mesh, accumulation_steps
):
  setup = make_setup(dropout_rate=0.0)
  next_token = losses.next_token_loss(setup.model)

  def loss(params, batch, key):
    value, metrics = next_token(params, batch, key)
    rows = jnp.float32(len(batch["tokens"]))
    return 2.0 * value, metrics | {"rows": rows, "weight": jnp.sum(batch["weights"])}

  step_fn = setup.step_fn_of(loss, one_device_mesh, accumulation_steps)
  batch = partitioning.global_batch(batches[0], one_device_mesh)
  _, metrics = step_fn(setup.state(one_device_mesh), batch, DROPOUT_KEY)
  _, (plain,) = _run(setup, one_device_mesh, batches[:1])
  assert metrics["rows"] == 8
  assert metrics["weight"] == pytest.approx(1.0, rel=1e-5)
  assert metrics["loss"] == pytest.approx(2 * plain["loss"], rel=1e-5)
  assert metrics["grad_norm"] == pytest.approx(2 * plain["grad_norm"], rel=1e-5)


def test_a_batch_without_targets_has_no_loss_and_no_gradient(make_setup, batches, one_device_mesh):
  setup = make_setup(dropout_rate=0.0)
  empty = batches[0] | {"loss_mask": np.zeros_like(batches[0]["loss_mask"])}
  _, (metrics,) = _run(setup, one_device_mesh, [empty])
  assert metrics["loss"] == metrics["grad_norm"] == 0.0


def test_the_next_state_reuses_the_buffers_of_the_donated_one(make_setup, batches):
  setup = make_setup()
  mesh = partitioning.make_mesh(data=1, fsdp=4, tensor=2)
  step_fn = setup.step_fn(mesh)
  batch = partitioning.global_batch(batches[0], mesh)

  def buffers(state):
    return {
      shard.data.unsafe_buffer_pointer(): shard.data.nbytes
      for leaf in jax.tree.leaves(state)
      for shard in leaf.addressable_shards
    }

  state = setup.state(mesh)
  before = buffers(state)
  after, _ = step_fn(state, batch, DROPOUT_KEY)  # an unusable donation would warn
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  reused = sum(size for pointer, size in before.items() if pointer in buffers(after))
  assert reused == sum(before.values())


def test_a_state_made_from_parameters_copies_them(make_setup, batches, one_device_mesh):
  setup = make_setup()
  first = setup.state(one_device_mesh, seed=3)
  begun = train_step.init_state(
    setup.model, setup.tx, one_device_mesh, key=jax.random.key(0), params=first.params
  )
  jax.tree.map(np.testing.assert_array_equal, begun.params, first.params)
  batch = partitioning.global_batch(batches[0], one_device_mesh)
  setup.step_fn(one_device_mesh)(begun, batch, DROPOUT_KEY)
  assert np.isfinite(first.params["embedding_VD"]).all()


def test_the_abstract_state_describes_the_real_one(make_setup):
  setup = make_setup()
  mesh = partitioning.make_mesh(data=1, fsdp=4, tensor=2)

  def describe(leaf):
    return leaf.shape, leaf.dtype, leaf.sharding

  state = jax.tree.map(describe, setup.state(mesh))
  assert state == jax.tree.map(describe, setup.abstract(mesh))
  params = abstract_params(setup.model, mesh)
  assert jax.tree.map(describe, params) == state.params


def test_initial_parameters_do_not_depend_on_the_mesh(make_setup, one_device_mesh):
  setup = make_setup()
  on_many = setup.state(partitioning.make_mesh(data=1, fsdp=4, tensor=2))
  jax.tree.map(np.testing.assert_array_equal, on_many.params, setup.state(one_device_mesh).params)
