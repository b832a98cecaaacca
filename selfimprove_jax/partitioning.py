"""The mesh, and the one table that says which mesh axis a logical axis is laid on.

Mesh axes: `data` (copies of the parameters), `fsdp` (parameters and batch sharded alike), `tensor`
(heads, feed-forward and vocabulary sharded). Axis types are Auto throughout: Flax's logical
partitioning does not work with Explicit ones.
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

RULES = (
  ("batch", ("data", "fsdp")),
  ("length", None),
  ("act_embed", None),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", "tensor"),
  ("layers", None),
)


def make_mesh(*, data: int, fsdp: int, tensor: int) -> Mesh:
  """A mesh over every device; one of the sizes may be -1, for what is left.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  sizes = [data, fsdp, tensor]
  num_devices = jax.device_count()
  given = [size for size in sizes if size != -1]
  known = int(np.prod(given))
  if len(given) < len(sizes) - 1 or min(given) < 1 or num_devices % known:
    raise ValueError(f"mesh {dict(zip(AXES, sizes))} does not fit {num_devices} devices")
  sizes = [num_devices // known if size == -1 else size for size in sizes]
  if int(np.prod(sizes)) != num_devices:
    raise ValueError(
      f"mesh {dict(zip(AXES, sizes))} has {int(np.prod(sizes))} places for {num_devices} devices; "
      f"set one of them to -1 for what is left"
    )
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_rules():
  """The context in which the model's logical constraints mean something."""
  return nn.logical_axis_rules(RULES)


def param_shardings(abstract_params: Any, mesh: Mesh) -> Any:
  """NamedShardings for parameters whose leaves are Flax's logically partitioned boxes.

  Raises:
    ValueError: a mesh axis does not divide the dimension it is laid on; parameter and axis named.
  """
  specs = nn.get_partition_spec(abstract_params)
  shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
  shapes = nn.unbox(abstract_params)
  jax.tree.map_with_path(_check_divides, shapes, shardings)
  return shardings


def _check_divides(path, shape, sharding):
  for dim, axes in enumerate(sharding.spec):
    axes = (axes,) if isinstance(axes, str) else (axes or ())
    size = int(np.prod([sharding.mesh.shape[axis] for axis in axes]))
    if shape.shape[dim] % size:
      raise ValueError(
        f"mesh axes {axes} of size {size} do not divide dimension {dim} (size {shape.shape[dim]}) "
        f"of parameter {jax.tree_util.keystr(path)}"
      )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over `data` and `fsdp`, everything else whole."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def num_batch_shards(mesh: Mesh) -> int:
  return mesh.shape["data"] * mesh.shape["fsdp"]


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a batch as one global array."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
  }
