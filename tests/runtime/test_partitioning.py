import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from selfimprove_jax.models import llama
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.partitioning import LocalMeshConfig, MeshConfig


def _abstract_params(**changes):
  shape = dict(num_layers=2, embed_dim=16, mlp_dim=32, num_heads=4, num_kv_heads=4, head_dim=4)
  config = llama.LlamaConfig(**{"vocab_size": 32, "tie_embeddings": False, **shape, **changes})
  tokens = jax.ShapeDtypeStruct((1, 2), np.int32)
  init = functools.partial(jax.eval_shape, llama.Llama(config).init, jax.random.key(0))
  return init(tokens, tokens)["params"]


@pytest.mark.parametrize(
  ("sizes", "expected"),
  [((1, -1, 2), (1, 4, 2)), ((-1, 1, 1), (8, 1, 1)), ((2, 2, -1), (2, 2, 2)), ((1, 8, 1),) * 2],
)
def test_a_size_of_minus_one_takes_what_is_left(sizes, expected):
  mesh = partitioning.make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes)))
  assert mesh.shape == dict(zip(partitioning.AXES, (1, *expected)))
  assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize(
  ("sizes", "found"),
  [
    ((1, 3, 1), "fsdp=3 needs 3 devices, and there are 8; an axis of -1 takes"),
    ((1, 3, -1), "fsdp=3 x tensor=-1 needs a multiple of 3 devices, and there are 8"),
    ((2, 2, 1), "data=2 x fsdp=2 needs 4 devices, and there are 8"),
    ((2, 8, 1), "data=2 x fsdp=8 needs 16 devices, and there are 8"),
    ((1, 1, 1), "a mesh of ones needs 1 devices, and there are 8"),
    ((-1, -1, 1), r"only one of \['data', 'fsdp'\] may be -1"),
    ((0, 8, 1), "data=0 must be at least 1, or -1"),
    ((-2, -4, 1), "data=-2 must be at least 1"),
  ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_its_sizes(sizes, found):
  with pytest.raises(ValueError, match=found):
    partitioning.make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes)))


@section
class TwoMeshes:
  """A config with two mesh sections, one of them in a section in a dict."""

  mesh: MeshConfig
  engines: dict[str, LocalMeshConfig]


def test_every_mesh_of_a_config_is_checked_by_path():
  config = TwoMeshes(mesh=MeshConfig(), engines={"a": LocalMeshConfig(data=1, tensor=4)})
  assert [path for path, _ in partitioning.mesh_configs(config)] == ["mesh", "engines.a"]
  partitioning.check_meshes(config, 4)
  # The engine has the devices of one process of several.
  partitioning.check_meshes(config, 64)
  with pytest.raises(ValueError, match=r"^engines\.a: tensor=4 needs 4 devices, and there are 6"):
    partitioning.check_meshes(config, 6)
  config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=3))
  with pytest.raises(ValueError, match=r"^mesh: fsdp=3 needs 3 devices, and there are 4"):
    partitioning.check_meshes(config, 4)


def test_a_local_mesh_takes_the_devices_of_this_process():
  assert LocalMeshConfig(data=2, fsdp=-1).make().shape["fsdp"] == len(jax.local_devices()) // 2
  assert LocalMeshConfig().make(jax.devices()[:2]).shape["data"] == 2


def test_parameters_are_laid_on_the_axes_of_the_table():
  mesh = partitioning.make_mesh(data=1, fsdp=2, tensor=4)
  shardings = partitioning.param_shardings(_abstract_params(), mesh)
  specs = {
    jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec
    for path, sharding in jax.tree.leaves_with_path(shardings)
  }
  layers = {name: spec for name, spec in specs.items() if "scale" not in name}
  assert layers == {
    "embedding_VD": PartitionSpec("tensor", "fsdp"),
    "head_DV": PartitionSpec("fsdp", "tensor"),
    "layers/attention/wq_DNH": PartitionSpec(None, "fsdp", "tensor", None),
    "layers/attention/wk_DKH": PartitionSpec(None, "fsdp", "tensor", None),
    "layers/attention/wv_DKH": PartitionSpec(None, "fsdp", "tensor", None),
    "layers/attention/wo_NHD": PartitionSpec(None, "tensor", None, "fsdp"),
    "layers/mlp/w_gate_DF": PartitionSpec(None, "fsdp", "tensor"),
    "layers/mlp/w_up_DF": PartitionSpec(None, "fsdp", "tensor"),
    "layers/mlp/w_down_FD": PartitionSpec(None, "tensor", "fsdp"),
  }
  assert all(not any(spec) for name, spec in specs.items() if "scale" in name)


@pytest.mark.parametrize(
  ("changes", "mesh", "message"),
  [
    (
      {"num_kv_heads": 2},
      {"data": 1, "fsdp": 2, "tensor": 4},
      r"tensor=4 is more than the model's 2 kv heads.*set tensor to 2 or a divisor",
    ),
    (
      {"mlp_dim": 33},
      {"data": 2, "fsdp": 2, "tensor": 2},
      r"\('tensor',\) of size 2 do not divide dimension 1 \(size 33\).*\['w_down_FD'\]",
    ),
    (
      {"embed_dim": 20},
      {"data": 1, "fsdp": 8, "tensor": 1},
      r"\('fsdp',\) of size 8 do not divide dimension 1 \(size 20\).*\['embedding_VD'\]",
    ),
    (
      {"vocab_size": 33},
      {"data": 4, "fsdp": 1, "tensor": 2},
      r"\('tensor',\) of size 2 do not divide dimension 0 \(size 33\).*\['embedding_VD'\]",
    ),
  ],
)
def test_a_dimension_that_does_not_divide_is_refused_by_parameter_and_axis(changes, mesh, message):
  with pytest.raises(ValueError, match=message):
    partitioning.param_shardings(_abstract_params(**changes), partitioning.make_mesh(**mesh))


@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), (2, 1, 2, 2), (2, 2, 1, 2)])
def test_a_batch_lies_in_rows_over_all_axes_but_tensor(sizes):
  mesh = partitioning.make_mesh(**dict(zip(partitioning.AXES, sizes)))
  rows = np.arange(8 * 3, dtype=np.int32).reshape(8, 3)
  batch = partitioning.global_batch({"tokens": rows}, mesh)
  np.testing.assert_array_equal(batch["tokens"], rows)
  shards = batch["tokens"].addressable_shards
  assert partitioning.num_batch_shards(mesh) == len({shard.index[0].start for shard in shards}) == 4
  assert {shard.data.shape for shard in shards} == {(2, 3)}


def test_parameters_are_copied_over_slices_and_the_batch_is_split_over_them():
  mesh = partitioning.make_mesh(dcn=2, data=1, fsdp=2, tensor=2)
  shardings = partitioning.param_shardings(_abstract_params(), mesh)
  assert shardings["embedding_VD"].spec == PartitionSpec("tensor", "fsdp")
  assert partitioning.batch_sharding(mesh).spec == PartitionSpec(("dcn", "data", "fsdp"))
  # Devices of one slice are next to each other in memory order: the slow axis is the outermost.
  first, second = ([d.id for d in part.flat] for part in mesh.devices)
  assert (first, second) == ([0, 1, 2, 3], [4, 5, 6, 7])


@dataclasses.dataclass(frozen=True)
class _Device:
  """A device of a pod of several slices, which no CPU can be."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v5"
  core_on_chip: int = 0

  @property
  def coords(self):
    place = self.id // 2
    return (place % 2, place // 2, 0)


def test_slices_are_the_outer_axis_whatever_the_order_of_the_devices():
  devices = [_Device(i, slice_index=i % 2) for i in range(8)]
  arranged = partitioning.make_mesh(dcn=2, data=1, fsdp=-1, tensor=2, devices=devices).devices
  assert arranged.shape == (2, 1, 2, 2)
  for index, part in enumerate(arranged):
    assert {device.slice_index for device in part.flat} == {index}


@pytest.mark.parametrize("dcn", [1, 4])
def test_a_mesh_whose_dcn_is_not_the_number_of_slices_is_refused(dcn):
  devices = [_Device(i, slice_index=i % 2) for i in range(8)]
  with pytest.raises(ValueError, match=rf"dcn={dcn}, but the 8 devices are on 2 slices; set dcn=2"):
    partitioning.make_mesh(dcn=dcn, data=-1, fsdp=1, tensor=1, devices=devices)


@pytest.mark.parametrize(
  ("rows", "accumulation_steps", "found"),
  [
    (6, 1, r"6 rows does not divide over 4 batch shards \(dcn=1 x data=2 x fsdp=2\); .* of 4$"),
    (12, 2, r"12 rows.*4 batch shards .* times accumulation_steps=2; .* of 8$"),
  ],
)
def test_a_batch_that_does_not_divide_is_refused_with_its_numbers(rows, accumulation_steps, found):
  mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
  partitioning.check_batch(16, mesh, accumulation_steps=accumulation_steps)
  with pytest.raises(ValueError, match=found):
    partitioning.check_batch(rows, mesh, accumulation_steps=accumulation_steps)


def test_rows_that_do_not_divide_never_become_a_global_batch():
  mesh = partitioning.make_mesh(data=2, fsdp=4, tensor=1)
  with pytest.raises(ValueError, match="6 rows does not divide over 8 batch shards"):
    partitioning.global_batch({"tokens": np.zeros((6, 3), np.int32)}, mesh)


def test_the_logical_constraints_of_the_model_reach_the_compiler():
  mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)

  def constrained(x):
    with partitioning.axis_rules():
      return nn.with_logical_constraint(x + 1, ("batch", "length", "act_embed"))

  with jax.set_mesh(mesh):
    out = jax.jit(constrained)(np.zeros((8, 2, 2), np.float32))
  assert {shard.data.shape for shard in out.addressable_shards} == {(2, 2, 2)}
