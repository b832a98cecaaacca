"""The mesh, and the one table that says which mesh axis a logical axis is laid on.

Mesh axes, from the slowest network to the fastest: `dcn` (slices of a machine joined by a data
center's network: parameters copied, batch split), `data` (the same within a slice), `fsdp`
(parameters and batch sharded alike), `tensor` (heads, feed-forward and vocabulary sharded). No axis
splits positions: batches of 2048 rows give whole rows of 4096 tokens to every chip of 2048, and a
split row would add an exchange of keys and values to every layer.

Axis types are Auto throughout: Flax's logical partitioning does not work with Explicit ones.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("dcn", "data", "fsdp", "tensor")
BATCH_AXES = ("dcn", "data", "fsdp")

RULES = (
  ("batch", BATCH_AXES),
  ("length", None),
  ("act_embed", None),
  ("act_heads", "tensor"),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", "tensor"),
  ("layers", None),
)


def make_mesh(
  *, data: int, fsdp: int, tensor: int, dcn: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """A mesh over all devices; one of the sizes may be -1, for what is left.

  Neighbours on an axis are neighbours in the machine's network where there is one; the last axis
  gets the fastest links.

  Args:
    dcn: slices of TPUs. One pod, GPUs and CPUs take any number, as an outer copy of `data`.
    devices: instead of all there are.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or `dcn` is not the number of
      slices that the TPUs lie on.
  """
  devices = list(jax.devices() if devices is None else devices)
  named = dict(zip(AXES, (dcn, data, fsdp, tensor)))
  given = [size for size in named.values() if size != -1]
  known = math.prod(given)
  if len(given) < len(AXES) - 1 or min(given) < 1 or len(devices) % known:
    raise ValueError(f"mesh {named} does not fit {len(devices)} devices")
  sizes = {axis: len(devices) // known if size == -1 else size for axis, size in named.items()}
  if (places := math.prod(sizes.values())) != len(devices):
    raise ValueError(
      f"mesh {sizes} has {places} places for {len(devices)} devices; "
      f"set one of them to -1 for what is left"
    )
  return Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(sizes, devices):
  # GPUs too have a slice_index, one a machine; but FSDP over machines is usual there. Devices that
  # are only compiled for have none where there is one slice.
  tpus = [device for device in devices if device.platform == "tpu"]
  slices = {device.slice_index for device in tpus if hasattr(device, "slice_index")}
  if len(slices) < 2:
    return mesh_utils.create_device_mesh(
      tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
  if sizes["dcn"] != len(slices):
    raise ValueError(
      f"mesh dcn={sizes['dcn']}, but the {len(devices)} devices lie on {len(slices)} slices; "
      f"set dcn={len(slices)}"
    )
  within = tuple(1 if axis == "dcn" else size for axis, size in sizes.items())
  across = tuple(size if axis == "dcn" else 1 for axis, size in sizes.items())
  return mesh_utils.create_hybrid_device_mesh(
    within, across, devices, allow_split_physical_axes=True
  )


def axis_rules():
  """The context in which the model's logical constraints mean something."""
  return nn.logical_axis_rules(RULES)


def spec(*logical_axes: str | None) -> PartitionSpec:
  """Where an array with these logical axes is laid, by `RULES`."""
  return nn.logical_to_mesh_axes(logical_axes, RULES)


def param_shardings(abstract_params: Any, mesh: Mesh) -> Any:
  """NamedShardings for parameters whose leaves are Flax's logically partitioned boxes.

  Raises:
    ValueError: a mesh axis does not divide the dimension it is laid on; parameter and axis named.
  """
  specs = nn.get_partition_spec(abstract_params)
  shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
  jax.tree.map_with_path(_check_divides, nn.unbox(abstract_params), shardings, specs)
  return shardings


def _check_divides(path, shape, sharding, logical):
  for dim, axes in enumerate(sharding.spec):
    axes = (axes,) if isinstance(axes, str) else (axes or ())
    size = math.prod(sharding.mesh.shape[axis] for axis in axes)
    if shape.shape[dim] % size == 0:
      continue
    if logical[dim] == "kv_heads" and size > shape.shape[dim]:
      raise ValueError(
        f"mesh tensor={size} is more than the model's {shape.shape[dim]} kv heads, and a kv head "
        f"is not split; set tensor to {shape.shape[dim]} or a divisor of it"
      )
    raise ValueError(
      f"mesh axes {axes} of size {size} do not divide dimension {dim} (size {shape.shape[dim]}) "
      f"of parameter {jax.tree_util.keystr(path)}"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over `dcn`, `data` and `fsdp`, everything else whole."""
  return NamedSharding(mesh, spec("batch"))


def num_batch_shards(mesh: Mesh) -> int:
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_rows: int, mesh: Mesh, *, accumulation_steps: int = 1) -> None:
  """Raises ValueError where the rows do not divide over the mesh, or over the parts of a step."""
  shards = num_batch_shards(mesh)
  if batch_rows % (shards * accumulation_steps):
    sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in BATCH_AXES)
    parts = "" if accumulation_steps == 1 else f" times accumulation_steps={accumulation_steps}"
    raise ValueError(
      f"a batch of {batch_rows} rows does not divide over {shards} batch shards ({sizes}){parts}; "
      f"it must be a multiple of {shards * accumulation_steps}"
    )


@functools.cache
def process_rows(mesh: Mesh) -> tuple[int, int]:
  """Which part of a batch this process holds, of how many: (index, count).

  Processes that hold the same rows (`tensor` reaches over them) have the same index.

  Raises:
    ValueError: the rows of two processes overlap without being the same.
  """
  num_shards = num_batch_shards(mesh)
  shards: dict[int, set[int]] = {}
  for device, (span,) in batch_sharding(mesh).devices_indices_map((num_shards,)).items():
    start, _, _ = span.indices(num_shards)
    shards.setdefault(device.process_index, set()).add(start)
  parts = sorted({tuple(sorted(rows)) for rows in shards.values()})
  if sum(map(len, parts)) != num_shards or len({len(part) for part in parts}) > 1:
    raise ValueError(f"mesh {dict(mesh.shape)} deals the rows of a batch unevenly to processes")
  return parts.index(tuple(sorted(shards[jax.process_index()]))), len(parts)


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a batch (its part by `process_rows`) as one global array.

  Raises:
    ValueError: the rows of all processes do not divide over the mesh.
  """
  sharding = batch_sharding(mesh)
  _, num_parts = process_rows(mesh)
  for rows in batch.values():
    check_batch(len(rows) * num_parts, mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
  }


def whole_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Rows that every process has all of, as one global array.

  Raises:
    ValueError: the rows do not divide over the mesh.
  """
  sharding = batch_sharding(mesh)
  for rows in batch.values():
    check_batch(len(rows), mesh)
  return {
    name: jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)
    for name, rows in batch.items()
  }
