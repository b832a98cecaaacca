import gc
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.models.checksums import DamagedCheckpointError, checksums
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.training import checkpoint, train_step


@pytest.fixture
def setup(make_setup):
  return make_setup()


@pytest.fixture
def state(setup, one_device_mesh):
  """A state in which every leaf has different numbers."""
  r = np.random.default_rng(0)
  state = setup.state(one_device_mesh)

  def fill(leaf):
    return jnp.array(r.normal(size=leaf.shape) * 10 if leaf.ndim else 7, leaf.dtype)

  return jax.tree.map(fill, state)


def _at(state, step):
  """The state of another step, with other parameters."""
  return state.replace(step=jnp.int32(step), params=jax.tree.map(lambda x: x + step, state.params))


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


def test_a_restored_state_is_the_saved_one_to_the_last_bit(tmp_path, setup, state, one_device_mesh):
  state = _at(state, 5)
  state.params["embedding_VD"] = state.params["embedding_VD"].at[0, 0].set(-0.0).at[0, 1].set(1e-42)
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.restore_last(setup.abstract(one_device_mesh)) is None
    checkpoints.save(state)
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    _assert_same_bits(checkpoints.restore_last(setup.abstract(one_device_mesh)), state)


@pytest.mark.parametrize(
  ("data", "fsdp", "tensor"), [pytest.param(1, 4, 2, marks=pytest.mark.slow), (2, 2, 2)]
)
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


def test_a_save_keeps_the_bytes_of_a_state_that_is_overwritten_meanwhile(tmp_path):
  # Large, so that it is still being written while the next steps run.
  state = train_step.TrainState(
    step=jnp.int32(0), params={"w": jnp.zeros((1500, 1000))}, opt_state={"m": jnp.zeros(1_000_000)}
  )
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  # Donated: the new numbers overwrite those that are being saved.
  step_fn = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  with checkpoint.Checkpoints(tmp_path, keep=9) as checkpoints:
    for _ in range(3):
      checkpoints.save(state)
      for _ in range(5):
        state = step_fn(state)
    checkpoints.wait()
    for step in checkpoints.steps():
      params = checkpoints.restore_params(step, abstract.params)
      np.testing.assert_array_equal(params["w"], step)
    restored = checkpoints.restore_last(abstract)
  assert (checkpoints.steps(), int(restored.step)) == ([0, 5, 10], 10)
  np.testing.assert_array_equal(restored.opt_state["m"], 10)


def test_the_last_steps_and_the_protected_one_stay(tmp_path, state):
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in range(1, 7):
      checkpoints.save(_at(state, step), protect=frozenset([2]) if step > 1 else frozenset())
      # The one being written, the two before it, and the protected one.
      assert set(checkpoints.steps()) <= {step, step - 1, step - 2, 2}
    checkpoints.wait()
    assert checkpoints.steps() == [2, 5, 6]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]


def test_the_last_step_on_disk_stays_until_the_next_is_there(tmp_path, state):
  def on_disk():
    return [path.name for path in tmp_path.iterdir() if path.name.isdecimal()]

  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(_at(state, step))
      assert str(step - 1) in on_disk() or step == 1
  assert on_disk() == ["3"]


def test_reading_deletes_nothing(tmp_path, setup, state, one_device_mesh):
  _save(tmp_path, state)
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    params = checkpoints.restore_params(2, setup.abstract(one_device_mesh).params)
    checkpoints.wait()
  _assert_same_bits(params, _at(state, 2).params)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]


def test_a_step_on_disk_is_not_saved_again(tmp_path, state):
  _save(tmp_path, state, steps=[1])
  before = {path: path.read_bytes() for path in _files(tmp_path)}
  _save(tmp_path, state, steps=[1])
  assert {path: path.read_bytes() for path in _files(tmp_path)} == before


def _largest(folder):
  return max(_files(folder), key=lambda path: path.stat().st_size)


def _truncate(step):
  path = _largest(step / "params")
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_byte(step):
  path = _largest(step / "optimizer")
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def _swap_params(step):
  """Puts in files of another step, which are intact, so no format notices."""
  shutil.rmtree(step / "params")
  shutil.copytree(step.parent / "1" / "params", step / "params")


def _swap_optimizer(step):
  shutil.rmtree(step / "optimizer")
  shutil.copytree(step.parent / "1" / "optimizer", step / "optimizer")


def _rename_checksums(step):
  path = step / "checksums" / "metadata"
  path.write_text(path.read_text().replace('"params"', '"qarams"'))


def _change_a_checksum(step):
  path = step / "checksums" / "metadata"
  sums = json.loads(path.read_text())
  sums["params"]["['embedding_VD']"] ^= 1
  path.write_text(json.dumps(sums))


@pytest.fixture
def collected():
  """Collects, within the test, the unawaited coroutines that orbax leaves when a read fails."""
  yield
  gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize(
  "damage",
  [
    _truncate,
    _flip_a_byte,
    lambda step: _largest(step / "params").unlink(),
    lambda step: shutil.rmtree(step / "optimizer"),
    lambda step: (step / "checksums" / "metadata").unlink(),
    _swap_params,
    _swap_optimizer,
    _rename_checksums,
    _change_a_checksum,
  ],
  ids=[
    "truncated",
    "flipped",
    "missing",
    "no_optimizer",
    "no_checksums",
    "other_params",
    "other_optimizer",
    "other_checksums",
    "changed_checksum",
  ],
)
def test_a_damaged_step_is_reported_and_the_one_before_is_used(
  tmp_path, setup, state, one_device_mesh, damage, caplog
):
  _save(tmp_path, state)
  damage(tmp_path / "3")
  abstract = setup.abstract(one_device_mesh)
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    if damage is not _swap_optimizer:
      with pytest.raises(DamagedCheckpointError, match=r"/3 "):
        optimizer = {"opt_state": abstract.opt_state, "step": abstract.step}
        checkpoints._restore(3, params=abstract.params, optimizer=optimizer)
    with caplog.at_level(logging.WARNING, logger=checkpoint.__name__):
      _assert_same_bits(checkpoints.restore_last(abstract), _at(state, 2))
    assert str(tmp_path / "3") in caplog.text
    assert "going back" in caplog.text
    assert checkpoints.steps() == [1, 2]
    assert (tmp_path / "3.damaged").is_dir()
    checkpoints.save(_at(state, 3))
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    _assert_same_bits(checkpoints.restore_last(abstract), _at(state, 3))


def test_a_leftover_of_a_killed_save_is_ignored_and_deleted(
  tmp_path, setup, state, one_device_mesh
):
  _save(tmp_path, state, steps=[1, 2])
  leftover = tmp_path / "3.orbax-checkpoint-tmp"
  shutil.copytree(tmp_path / "2", leftover)
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    assert checkpoints.steps() == [1, 2]
    restored = checkpoints.restore_last(setup.abstract(one_device_mesh))
    _assert_same_bits(restored, _at(state, 2))
    checkpoints.save(_at(state, 3))
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("collected")
def test_parameters_that_are_missing_or_damaged_are_refused(
  tmp_path, setup, state, one_device_mesh
):
  _save(tmp_path, state)
  _swap_params(tmp_path / "3")
  abstract = setup.abstract(one_device_mesh).params
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    _assert_same_bits(checkpoints.restore_params(2, abstract), _at(state, 2).params)
    with pytest.raises(DamagedCheckpointError, match=r"/3 is damaged: the checksums of its params"):
      checkpoints.restore_params(3, abstract)
    with pytest.raises(DamagedCheckpointError, match=r"/9 can't be read"):
      checkpoints.restore_params(9, abstract)


def test_a_checksum_depends_on_bits_and_places_but_not_on_the_sharding():
  x = jnp.arange(16, dtype=jnp.float32).reshape(4, 4)
  (expected,) = checksums({"x": x}).values()
  changed = [
    x.at[2, 3].set(-x[2, 3]),
    x.at[0, 0].set(-0.0),
    x.at[1, 1].set(jnp.nextafter(x[1, 1], jnp.float32(9))),
    x.T,
    x[::-1],
  ]
  assert expected not in [checksums({"x": y})["['x']"] for y in changed]
  mesh = partitioning.make_mesh(data=1, fsdp=4, tensor=2)
  spec = jax.sharding.PartitionSpec("fsdp", "tensor")
  sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
  assert checksums({"x": sharded}) == checksums({"x": x})
  assert checksums({"x": x.astype(jnp.bfloat16), "step": jnp.int32(3)}).keys() == {
    "['x']",
    "['step']",
  }
