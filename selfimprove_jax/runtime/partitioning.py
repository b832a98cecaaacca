"""The device mesh, and the table from logical axes to mesh axes.

Mesh axes, from the slowest interconnect to the fastest: `dcn` (TPU slices joined by a data center
network: parameters replicated, batch sharded), `data` (the same within a slice), `fsdp` (parameters
and batch sharded), `tensor` (heads, feed-forward and vocabulary sharded). No axis shards positions:
a batch of 2048 rows gives whole rows of 4096 tokens to each of 2048 chips, and a sharded row would
add an exchange of keys and values to every layer.

Axis types are Auto throughout: Flax's logical partitioning does not work with Explicit ones.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from selfimprove_jax.runtime.config import section

AXES = ("dcn", "data", "fsdp", "tensor")
BATCH_AXES = ("dcn", "data", "fsdp")
_REST = -1  # the size of an axis that takes the devices which the other axes leave

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


@section
class MeshConfig:
  """Sizes of the mesh axes; one of them may be -1, for the devices that the others leave.

  Attributes:
    dcn: number of TPU slices. On one slice, GPUs and CPUs any number, as an outer part of `data`.
  """

  dcn: int = 1
  data: int = _REST
  fsdp: int = 1
  tensor: int = 1

  def __post_init__(self) -> None:
    sizes = self._given()
    for axis, size in sizes.items():
      if size < 1 and size != _REST:
        raise ValueError(f"{axis}={size} must be at least 1, or -1 for the devices that are left")
    if list(sizes.values()).count(_REST) > 1:
      axes = [axis for axis, size in sizes.items() if size == _REST]
      raise ValueError(f"only one of {axes} may be -1; set the others to their number of devices")

  def _given(self) -> dict[str, int]:
    return dict(zip(AXES, (self.dcn, self.data, self.fsdp, self.tensor), strict=True))

  def sizes(self, num_devices: int) -> dict[str, int]:
    """Returns the size of each axis on a number of devices.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    given = self._given()
    known = math.prod(size for size in given.values() if size != _REST)
    shown = " x ".join(f"{axis}={size}" for axis, size in given.items() if size != 1)
    if num_devices % known or (_REST not in given.values() and known != num_devices):
      needs = "a multiple of " if _REST in given.values() else ""
      raise ValueError(
        f"{shown or 'a mesh of ones'} needs {needs}{known} devices, and there are {num_devices}; "
        f"an axis of -1 takes the devices that the others leave"
      )
    return {axis: num_devices // known if s == _REST else s for axis, s in given.items()}

  def make(self, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh over the given devices, or over all devices of the job.

    Neighbors on an axis are neighbors in the machine's interconnect where it has a topology; the
    last axis gets the fastest links.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `dcn` is not the number of
        slices that the TPUs are on.
    """
    devices = list(jax.devices() if devices is None else devices)
    device_grid = _arrange(self.sizes(len(devices)), devices)
    return Mesh(device_grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@section
class LocalMeshConfig(MeshConfig):
  """A mesh over the devices of one process, such as that of a sampling engine."""

  def make(self, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh over the given devices, or over those attached to this process."""
    return MeshConfig.make(self, jax.local_devices() if devices is None else devices)


def make_mesh(
  *, data: int, fsdp: int, tensor: int, dcn: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """Makes a mesh from axis sizes; see `MeshConfig`."""
  return MeshConfig(dcn=dcn, data=data, fsdp=fsdp, tensor=tensor).make(devices)


def check_meshes(config: Any, num_devices: int, path: str = "") -> None:
  """Checks every mesh section of a config against a number of devices.

  Raises:
    ValueError: one does not fit; the message begins with its place, below `path`.
  """
  for where, mesh_config in mesh_configs(config, path):
    local = isinstance(mesh_config, LocalMeshConfig)
    try:
      # How many devices a process has is not known here; all of them together are a multiple.
      known = math.prod(size for size in mesh_config._given().values() if size != _REST)
      mesh_config.sizes(known if local and num_devices % known == 0 else num_devices)
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from None


def mesh_configs(config: Any, path: str = "") -> Iterator[tuple[str, MeshConfig]]:
  """Yields the path and the value of every mesh section in a config."""
  if isinstance(config, MeshConfig):
    yield path, config
  elif dataclasses.is_dataclass(config):
    for field in dataclasses.fields(config):
      where = f"{path}.{field.name}" if path else field.name
      yield from mesh_configs(getattr(config, field.name), where)
  elif isinstance(config, dict):
    for name, value in config.items():
      yield from mesh_configs(value, f"{path}.{name}")


def _arrange(sizes: dict[str, int], devices: Sequence[Any]) -> np.ndarray:
  # GPUs have a slice_index too, one per machine, but FSDP across machines is usual there. Devices
  # of a topology that is only compiled for have none if it is a single slice.
  tpus = [device for device in devices if device.platform == "tpu"]
  slices = {device.slice_index for device in tpus if hasattr(device, "slice_index")}
  if len(slices) < 2:
    return mesh_utils.create_device_mesh(
      tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
  if sizes["dcn"] != len(slices):
    raise ValueError(
      f"dcn={sizes['dcn']}, but the {len(devices)} devices are on {len(slices)} slices; set "
      f"dcn={len(slices)}"
    )
  within = tuple(1 if axis == "dcn" else size for axis, size in sizes.items())
  across = tuple(size if axis == "dcn" else 1 for axis, size in sizes.items())
  return mesh_utils.create_hybrid_device_mesh(
    within, across, devices, allow_split_physical_axes=True
  )


def axis_rules() -> contextlib.AbstractContextManager[None]:
  """Returns the context in which the model's logical sharding constraints apply."""
  return nn.logical_axis_rules(RULES)


def spec(*logical_axes: str | None) -> PartitionSpec:
  """Returns the mesh axes of an array with these logical axes, by `RULES`."""
  return nn.logical_to_mesh_axes(logical_axes, RULES)


def param_shardings(abstract_params: Any, mesh: Mesh) -> Any:
  """Returns NamedShardings of parameters whose leaves are Flax's logically partitioned boxes.

  Raises:
    ValueError: a mesh axis does not divide the dimension that it shards.
  """
  specs = nn.get_partition_spec(abstract_params)
  shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
  jax.tree.map_with_path(_check_divides, nn.unbox(abstract_params), shardings, specs)
  return shardings


def _check_divides(path: Any, shape: Any, sharding: NamedSharding, logical: Any) -> None:
  for dim, axes in enumerate(sharding.spec):
    axes = (axes,) if isinstance(axes, str) else (axes or ())
    size = math.prod(sharding.mesh.shape[axis] for axis in axes)
    if shape.shape[dim] % size == 0:
      continue
    if logical[dim] == "kv_heads" and size > shape.shape[dim]:
      raise ValueError(
        f"mesh tensor={size} is more than the model's {shape.shape[dim]} kv heads, and a kv head "
        f"cannot be sharded; set tensor to {shape.shape[dim]} or a divisor of it"
      )
    raise ValueError(
      f"mesh axes {axes} of size {size} do not divide dimension {dim} (size {shape.shape[dim]}) "
      f"of parameter {jax.tree_util.keystr(path)}"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Shards the leading axis, the rows, over `dcn`, `data` and `fsdp`."""
  return NamedSharding(mesh, spec("batch"))


def num_batch_shards(mesh: Mesh) -> int:
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_rows: int, mesh: Mesh, *, accumulation_steps: int = 1) -> None:
  """Raises ValueError if the rows do not divide over the mesh and the micro-batches of a step."""
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
  """Returns which part of a batch this process holds, of how many: (index, count).

  Processes that hold the same rows, because `tensor` spans them, have the same index.

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
    raise ValueError(
      f"mesh {dict(mesh.shape)} distributes the rows of a batch unevenly over processes"
    )
  return parts.index(tuple(sorted(shards[jax.process_index()]))), len(parts)


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Makes one global array of the rows that each process holds, its part by `process_rows`.

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
  """Makes one global array of rows that every process holds in full.

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
