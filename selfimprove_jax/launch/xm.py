"""Runs work units through xmanager's executors (extra `xmanager`).

Its local executor runs this launcher once per unit, so that logs, retries and records are the same
as without xmanager. Vertex and Kubernetes run the unit's own command in a container.
"""

import asyncio
import dataclasses
import json
import pathlib
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from types import ModuleType
from typing import Any, Literal

from selfimprove_jax.launch import kubernetes, records
from selfimprove_jax.launch.experiment import WorkUnit, shell

# The accelerators for which the Vertex executor of xmanager 0.8.5 finds a single machine.
_VERTEX = {"cpu": None, "l4": "L4_24TH", "a100": "A100"}


def run_here(
  name: str,
  units: Sequence[WorkUnit],
  folder: pathlib.Path,
  *,
  groups: Sequence[tuple[str, ...]],
  command: Sequence[str],
) -> bool:
  """Runs incomplete units on xmanager's local executor; returns whether all are then complete.

  Args:
    folder: holds the records.
    groups: device ids; one unit runs on each group at a time.
    command: this launcher, to which `--only=UNIT` is added.
  """
  xm_local = _xm_local()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  todo = [unit for unit in units if not records.is_complete(folder, unit)]
  if todo:
    try:
      asyncio.run(_run_here(xm_local, name, todo, groups, command))
    except (SystemExit, KeyboardInterrupt) as stop:
      # xmanager ends the shells around its jobs without waiting, and may leave the jobs behind.
      records.stop(folder, todo)
      code = stop.code if isinstance(stop, SystemExit) else 128 + signal.SIGINT
      raise SystemExit(code) from None
    except RuntimeError:
      # xmanager raises a failed unit's error again when an experiment closes. The records show
      # those failures; a unit without a record has another fault.
      if not all(records.read(folder, unit) for unit in todo):
        raise
  return all(records.is_complete(folder, unit) for unit in units)


async def _run_here(
  xm_local: ModuleType,
  name: str,
  units: Sequence[WorkUnit],
  groups: Sequence[tuple[str, ...]],
  command: Sequence[str],
) -> None:
  from xmanager import xm

  free: asyncio.Queue[tuple[str, ...]] = asyncio.Queue()
  for group in groups:
    free.put_nowait(group)

  async def run_one(experiment: Any, executable: Any, unit: WorkUnit) -> None:
    group = await free.get()
    devices = [f"--devices={','.join(group)}"] if group else []
    executor = xm_local.Local(experimental_stream_output=False)
    arguments = [*command[1:], f"--only={unit.name}", *devices]
    work_unit = await experiment.add(
      xm.Job(executable=executable, executor=executor, name=unit.name, args=arguments)
    )
    try:
      await work_unit.wait_until_complete()
    except xm.ExperimentUnitFailedError:
      print(f"{unit.name}: xmanager's work unit {work_unit.work_unit_id} failed", flush=True)
    finally:
      free.put_nowait(group)

  async with xm_local.create_experiment(experiment_title=name) as experiment:
    binary = xm.Binary(path=command[0])
    [executable] = experiment.package(
      [xm.Packageable(executable_spec=binary, executor_spec=xm_local.Local.Spec())]
    )
    print(f"xmanager experiment {experiment.experiment_id}", flush=True)
    await asyncio.gather(*(run_one(experiment, executable, unit) for unit in units))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remote:
  """Runs a container on Vertex or Kubernetes; `kubernetes.objects` explains its fields."""

  experiment: str
  executor: Literal["vertex", "kubernetes"]
  image: str | None
  retries: int
  grace_s: float

  def check(self, units: Sequence[WorkUnit]) -> None:
    """Raises ValueError for a missing image, local folders, or an unsupported resource."""
    if not self.image:
      raise ValueError(
        f"--executor={self.executor} needs --image: a container image with the package"
      )
    for unit in units:
      if not any(flag.startswith("--workdir=gs://") for flag in unit.argv):
        raise ValueError(f"--executor={self.executor} needs --root=gs://...: units run elsewhere")
      if self.executor == "kubernetes":
        kubernetes.object_name(self.experiment, unit)
    resource = units[0].resource
    if self.executor == "vertex" and (resource.kind not in _VERTEX or resource.processes > 1):
      raise ValueError(
        f"the Vertex executor of xmanager 0.8.5 serves one process on {', '.join(_VERTEX)}, "
        f"and a unit takes {resource.describe()}: use --executor=kubernetes"
      )

  def describe(self, units: Sequence[WorkUnit]) -> str:
    """Formats every unit's command, and for Kubernetes the objects that `kubectl apply` reads."""
    lines = []
    for unit in units:
      lines += [f"# {unit.number} {unit.name}", f"# {shell(unit.argv, unit.environment)}"]
      if self.executor == "kubernetes":
        document = {"apiVersion": "v1", "kind": "List", "items": self._objects(unit)}
        lines += ["kubectl apply -f - <<'END'", json.dumps(document, indent=1), "END"]
      else:
        lines.append(f"# Vertex: {vertex_resources(unit)}, image {self.image}")
    return "\n".join(lines)

  def submit(self, units: Sequence[WorkUnit]) -> None:
    """Submits every unit to Vertex or to a Kubernetes cluster, and does not wait for them."""
    asyncio.run(self._submit(_xm_local(), units))

  async def _submit(self, xm_local: ModuleType, units: Sequence[WorkUnit]) -> None:
    from xmanager import xm
    from xmanager.xm_local import executables, registry

    # Not packaged: that would pull the image and push it to the registry that it is in already.
    executable = executables.GoogleContainerRegistryImage(
      name=self.experiment, image_path=self.image, args=xm.SequentialArgs(), env_vars={}
    )
    async with xm_local.create_experiment(experiment_title=self.experiment) as experiment:
      for unit in units:
        if self.executor == "vertex":
          runs_on = xm_local.Vertex(xm.JobRequirements(**vertex_resources(unit)))
        else:
          runs_on = xm_local.Kubernetes()
          # Making an executor registers xmanager's own launch function, so replace it afterwards.
          registry.register(xm_local.Kubernetes, launch=_launcher(self._objects(unit)))
        options = {"args": list(unit.argv), "env_vars": dict(unit.environment)}
        await experiment.add(
          xm.Job(executable=executable, executor=runs_on, name=unit.name, **options)
        )
        print(f"{unit.name}: submitted to {self.executor}", flush=True)

  def _objects(self, unit: WorkUnit) -> list[dict[str, Any]]:
    return kubernetes.objects(
      self.experiment, unit, image=str(self.image), retries=self.retries, grace_s=self.grace_s
    )


def _launcher(made: Sequence[dict[str, Any]]) -> Callable[..., Awaitable[list[Any]]]:
  """Returns a launch function that creates these objects in place of xmanager's own."""

  async def launch(local_experiment_unit: Any, job_group: Any) -> list[Any]:
    from kubernetes import client
    from xmanager.cloud import kubernetes as xm_kubernetes

    del local_experiment_unit, job_group  # one job per unit, made of these objects
    api_client = xm_kubernetes.client().api_client
    service, job = made
    client.CoreV1Api(api_client).create_namespaced_service(namespace="default", body=service)
    created = client.BatchV1Api(api_client).create_namespaced_job(namespace="default", body=job)
    return [xm_kubernetes.KubernetesHandle(jobs=[created])]

  return launch


def vertex_resources(unit: WorkUnit) -> dict[str, float]:
  """Returns arguments of xmanager's `JobRequirements`: devices, cores and bytes of memory."""
  resources: dict[str, float] = {}
  if kind := _VERTEX[unit.resource.kind]:
    resources[kind] = unit.resource.devices
  if unit.resource.cpus:
    resources["CPU"] = unit.resource.cpus
  if unit.resource.memory_gib:
    resources["RAM"] = unit.resource.memory_gib * 2**30
  return resources


def _xm_local() -> ModuleType:
  try:
    from xmanager import xm_local
  except ImportError as error:
    raise ImportError(
      f"--backend=xmanager needs the package: pip install 'selfimprove_jax[xmanager]' ({error})"
    ) from error
  return xm_local
