"""Describes what a work unit runs on: CPUs, GPUs or a slice of a TPU pod.

TPU slices are named as in Google's documents, `v5p:8x8x8`: generation, and chips along each edge.
"""

import dataclasses
import math
import re
from typing import Any

GPUS = ("l4", "a100", "a100_80gib", "h100", "h200", "b200")
# generation: (edges, most chips in a slice), from Google Cloud's TPU documents.
_TPUS = {"v4": (3, 4096), "v5p": (3, 6144), "v5e": (2, 256), "v6e": (2, 256)}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_CHIPS_PER_HOST = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resource:
  """Describes devices, processes and limits of one work unit; made by `cpu`, `gpu` or `tpu`.

  Attributes:
    kind: `cpu`, a GPU such as `h100`, or a TPU generation such as `v5p`.
    devices: JAX devices per process.
    processes: processes per unit, spread evenly over the hosts.
    topology: chips along each edge of a TPU slice, such as `8x8x8`; None for CPUs and GPUs.
    cpus, memory_gib: cores and GiB of memory per host; None leaves them to the backend.
    hours: time limit on a cluster; None leaves it to the backend.
  """

  kind: str
  devices: int
  processes: int
  hosts: int
  topology: str | None = None
  cpus: int | None = None
  memory_gib: int | None = None
  hours: float | None = None

  def __post_init__(self) -> None:
    for name in ("devices", "processes", "hosts", "cpus", "memory_gib"):
      value = getattr(self, name)
      if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"{name}={value!r} of a resource must be an integer of at least 1")
    if self.hours is not None and self.hours <= 0:
      raise ValueError(f"hours={self.hours!r} of a resource must be above 0")
    if self.processes % self.hosts:
      raise ValueError(
        f"{self.processes} processes cannot be spread evenly over {self.hosts} hosts"
      )

  @property
  def is_gpu(self) -> bool:
    return self.kind in GPUS

  @property
  def is_tpu(self) -> bool:
    return self.kind in _TPUS

  @property
  def total_devices(self) -> int:
    return self.devices * self.processes

  def describe(self) -> str:
    """Formats the resource in one line: `16 x h100, 2 processes on 2 hosts, 24 h`."""
    name = f"{self.kind}:{self.topology}" if self.topology else self.kind
    parts = [f"{self.total_devices} x {name}"]
    parts.append(f"{count(self.processes, 'process')} on {count(self.hosts, 'host')}")
    if self.cpus:
      parts.append(f"{count(self.cpus, 'core')} per host")
    if self.memory_gib:
      parts.append(f"{self.memory_gib} GiB per host")
    if self.hours:
      parts.append(f"{self.hours:g} h")
    return ", ".join(parts)


def cpu(*, devices: int = 1, processes: int = 1, hosts: int = 1, **limits: Any) -> Resource:
  """Describes CPU cores, which each process sees as `devices` JAX devices.

  `limits` here and below: `cpus`, `memory_gib` and `hours` of `Resource`.
  """
  return Resource(kind="cpu", devices=devices, processes=processes, hosts=hosts, **limits)


def gpu(kind: str, *, devices: int = 1, hosts: int = 1, **limits: Any) -> Resource:
  """Describes `devices` GPUs on each of `hosts` machines, one process per machine."""
  if kind not in GPUS:
    raise ValueError(f"GPU {kind!r} is unknown; there are {', '.join(GPUS)}")
  return Resource(kind=kind, devices=devices, processes=hosts, hosts=hosts, **limits)


def tpu(slice_name: str, **limits: Any) -> Resource:
  """Describes a slice of a TPU pod, such as `v5p:8x8x8`, one process per host."""
  kind, _, topology = slice_name.partition(":")
  if kind not in _TPUS:
    raise ValueError(
      f"TPU {kind!r} of {slice_name!r} is unknown; there are {', '.join(_TPUS)}, as in v5p:8x8x8"
    )
  edges, most = _TPUS[kind]
  shapes = _FLAT if edges == 2 else _SMALL_CUBES
  larger = f" or edges in rising multiples of 4, up to {most} chips (4x4x8)" if edges == 3 else ""
  if topology not in shapes and not (larger and _is_cuboid_of_fours(topology, most)):
    raise ValueError(
      f"topology {topology!r} of {slice_name!r} is unknown: {kind} has {', '.join(shapes)}{larger}"
    )
  chips = math.prod(map(int, topology.split("x")))
  hosts = 1 if edges == 2 and chips <= 8 else chips // _CHIPS_PER_HOST
  return Resource(
    kind=kind, devices=chips // hosts, processes=hosts, hosts=hosts, topology=topology, **limits
  )


def _is_cuboid_of_fours(topology: str, most: int) -> bool:
  if not re.fullmatch(r"\d+x\d+x\d+", topology, re.ASCII):
    return False
  sizes = [int(edge) for edge in topology.split("x")]
  fours = all(size >= 4 and size % 4 == 0 for size in sizes)
  return fours and sizes == sorted(sizes) and math.prod(sizes) <= most


def count(number: int, noun: str) -> str:
  """Formats a number with its noun: `1 process`, `2 processes`."""
  plural = noun + ("es" if noun.endswith("s") else "s")
  return f"{number} {noun if number == 1 else plural}"
