import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax import partitioning
from selfimprove_jax.training import checkpoint


@pytest.fixture
def setup(make_setup):
  return make_setup()


@pytest.fixture
def state(setup, one_device_mesh):
  """A state whose every leaf holds numbers of its own."""
  r = np.random.default_rng(0)
  state = setup.state(one_device_mesh)

  def fill(leaf):
    return jnp.array(r.normal(size=leaf.shape) * 10 if leaf.ndim else 7, leaf.dtype)

  return jax.tree.map(fill, state)


def _at(state, step):
  """The state of another step: other parameters too."""
  return state.replace(
    step=jnp.int32(step), params=jax.tree.map(lambda x: x + step, state.params)
  )


def _assert_same_bits(found, expected):
  def same(a, b):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

  jax.tree.map(same, found, expected)


def _save(folder, state, steps=(1, 2, 3), keep=3):
  with checkpoint.Checkpoints(folder, keep=keep) as checkpoints:
    for step in steps:
      checkpoints.save(_at(state, step))


def _files(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_restored_is_what_was_saved_to_the_last_bit(tmp_path, setup, state):
  state = _at(state, 5)
  state.params["embedding_VD"] = state.params["embedding_VD"].at[0, 0].set(-0.0).at[0, 1].set(1e-42)
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.restore_last(setup.abstract(state.step.sharding.mesh)) is None
    checkpoints.save(state)
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    _assert_same_bits(checkpoints.restore_last(setup.abstract(state.step.sharding.mesh)), state)


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(1, 4, 2), (2, 2, 2)])
def test_a_state_is_restored_on_another_mesh(
  tmp_path, setup, state, one_device_mesh, data, fsdp, tensor
):
  mesh = partitioning.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
  abstract = setup.abstract(mesh)
  _save(tmp_path / "one", state, steps=[1])
  with checkpoint.Checkpoints(tmp_path / "one", keep=1) as checkpoints:
    on_many = checkpoints.restore_last(abstract)
  _assert_same_bits(on_many, _at(state, 1))
  jax.tree.map(lambda x, a: pytest.fail() if x.sharding != a.sharding else None, on_many, abstract)
  _save(tmp_path / "many", on_many, steps=[1])
  with checkpoint.Checkpoints(tmp_path / "many", keep=1) as checkpoints:
    back = checkpoints.restore_last(setup.abstract(one_device_mesh))
  _assert_same_bits(back, _at(on_many, 1))
