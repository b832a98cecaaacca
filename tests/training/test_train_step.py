import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax import partitioning
from selfimprove_jax.models.params import abstract_params
from selfimprove_jax.training import train_step

MESHES = {
  "1x8x1": {"data": 1, "fsdp": 8, "tensor": 1},
  "1x4x2": {"data": 1, "fsdp": 4, "tensor": 2},
  "1x2x4": {"data": 1, "fsdp": 2, "tensor": 4},
  "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}
DROPOUT_KEY = jax.random.key(7)


def _run(setup, mesh, batches, accumulation_steps=1):
  """The state after a step of each batch, and the metrics of every step."""
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


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_losses_and_the_parameters_of_one_device(
  name, make_setup, batches, reference
):
  # With dropout on: what is dropped must not depend on the mesh either.
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
  """Every moment lies as its parameter does, and no device holds more than its part of either."""
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


def test_dropout_is_on_in_training_and_anew_in_each_step(make_setup, batches, one_device_mesh):
  _, dropped = _run(make_setup(), one_device_mesh, [batches[0]] * 2)
  _, whole = _run(make_setup(dropout_rate=0.0), one_device_mesh, [batches[0]])
  # The first step's learning rate is 0: the second sees the same parameters and rows.
  assert len({round(m["loss"], 5) for m in (*dropped, *whole)}) == 3


def test_accumulating_uneven_parts_gives_the_update_of_the_whole_batch(
  make_setup, batches, one_device_mesh
):
  setup = make_setup(dropout_rate=0.0)
  uneven = [{name: rows.copy() for name, rows in batch.items()} for batch in batches[:2]]
  for batch in uneven:
    batch["loss_mask"][1::4] = False  # one of the parts has no target at all
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


def test_accumulation_on_a_mesh_keeps_every_device_busy_with_the_same_result(
  make_setup, batches, one_device_mesh
):
  setup = make_setup(dropout_rate=0.0)
  mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
  _, expected = _run(setup, one_device_mesh, batches[:2])
  _, found = _run(setup, mesh, batches[:2], accumulation_steps=2)
  for a, b in zip(found, expected, strict=True):
    assert a == pytest.approx(b, rel=2e-5)


def test_a_batch_that_does_not_divide_into_its_parts_is_refused(
  make_setup, batches, one_device_mesh
):
  with pytest.raises(ValueError, match=r"8 rows.* into 3 accumulation_steps"):
    _run(make_setup(), one_device_mesh, batches[:1], accumulation_steps=3)


def test_a_batch_without_targets_changes_nothing_but_by_decay(make_setup, batches, one_device_mesh):
  setup = make_setup(dropout_rate=0.0)
  empty = batches[0] | {"loss_mask": np.zeros_like(batches[0]["loss_mask"])}
  _, (metrics,) = _run(setup, one_device_mesh, [empty])
  assert metrics["loss"] == metrics["grad_norm"] == 0.0


def test_the_donated_state_lends_its_buffers_to_the_next(make_setup, batches):
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


def test_a_state_begun_from_parameters_leaves_them_alive(make_setup, batches, one_device_mesh):
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
