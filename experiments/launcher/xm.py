"""Work units through the `xmanager` package (extra `xmanager`), which keeps its own list of them.

Here, on its local executor, each is this launcher for that one unit, so that logs, retries and
records are as without xmanager. Vertex and Kubernetes run the unit's own command in a container.
"""

import asyncio
import json
import pathlib
import signal
import sys
from collections.abc import Sequence
from typing import Any

from experiments.launcher import kubernetes, records
from experiments.launcher.experiment import WorkUnit, shell

# What the Vertex executor of xmanager 0.8.5 finds a machine for, as one worker.
_VERTEX = {"cpu": None, "l4": "L4_24TH", "a100": "A100"}


def run_here(
  name: str,
  units: Sequence[WorkUnit],
  folder: pathlib.Path,
  *,
  groups: Sequence[tuple[str, ...]],
  command: Sequence[str],
) -> bool:
  """Runs every unit that is not complete on xmanager's local executor; whether all are at the end.

  Args:
    folder: of the records.
    groups: of devices; as many units run at a time.
    command: this launcher, to which `--only=UNIT` is added.

  Raises:
    ImportError: xmanager is not installed.
  """
  xm_local = _xm_local()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  todo = [unit for unit in units if not records.is_complete(folder, unit)]
  if todo:
    try:
      asyncio.run(_run_here(xm_local, name, todo, groups, command))
    except (SystemExit, KeyboardInterrupt) as stop:
      # xmanager would end the shells around its jobs, and leave the jobs.
      records.stop(folder, todo)
      code = stop.code if isinstance(stop, SystemExit) else 128 + signal.SIGINT
      raise SystemExit(code) from None
    except RuntimeError:
      # Leaving an experiment, xmanager raises once more what a failed unit raised; of those the
      # records tell. Anything else has left units without a record.
      if not all(records.read(folder, unit) for unit in todo):
        raise
  return all(records.is_complete(folder, unit) for unit in units)


async def _run_here(xm_local, name, units, groups, command):
  from xmanager import xm

  free: asyncio.Queue = asyncio.Queue()
  for group in groups:
    free.put_nowait(group)

  async def run_one(experiment, executable, unit):
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
    [executable] = experiment.package(
      [
        xm.Packageable(
          executable_spec=xm.Binary(path=command[0]), executor_spec=xm_local.Local.Spec()
        )
      ]
    )
    print(f"xmanager experiment {experiment.experiment_id}", flush=True)
    await asyncio.gather(*(run_one(experiment, executable, unit) for unit in units))


def check_remote(
  experiment: str, units: Sequence[WorkUnit], *, executor: str, image: str | None
) -> None:
  """Whether the executor can carry the units.

  Raises:
    ValueError: there is no image, folders are of this machine, or the resource is not served.
  """
  if not image:
    raise ValueError(f"--executor={executor} needs --image: a container image with the package")
  for unit in units:
    if not any(flag.startswith("--workdir=gs://") for flag in unit.flags):
      raise ValueError(f"--executor={executor} needs --root=gs://...: units run elsewhere")
    if executor == "kubernetes":
      kubernetes.object_name(experiment, unit)
  resource = units[0].resource
  if executor == "vertex" and (resource.kind not in _VERTEX or resource.processes > 1):
    raise ValueError(
      f"the Vertex executor of xmanager 0.8.5 serves one process on {', '.join(_VERTEX)}, "
      f"and a unit takes {resource.describe()}: use --executor=kubernetes"
    )


def describe(
  experiment: str,
  units: Sequence[WorkUnit],
  *,
  executor: str,
  image: str,
  retries: int,
  grace_s: float,
) -> str:
  """Every unit's command; for Kubernetes also the objects, which `kubectl apply -f -` reads."""
  lines = []
  for unit in units:
    lines += [f"# {unit.number} {unit.name}", f"# {shell(unit.argv, unit.environment)}"]
    if executor == "kubernetes":
      made = kubernetes.objects(experiment, unit, image=image, retries=retries, grace_s=grace_s)
      document = {"apiVersion": "v1", "kind": "List", "items": made}
      lines += ["kubectl apply -f - <<'END'", json.dumps(document, indent=1), "END"]
    else:
      lines.append(f"# Vertex: {vertex_resources(unit)}, image {image}")
  return "\n".join(lines)


def run_remotely(
  experiment: str,
  units: Sequence[WorkUnit],
  *,
  executor: str,
  image: str,
  retries: int,
  grace_s: float,
) -> None:
  """Hands every unit to Vertex or to a Kubernetes cluster, and leaves.

  Raises:
    ImportError: xmanager is not installed.
  """
  xm_local = _xm_local()
  asyncio.run(_submit(xm_local, experiment, units, executor, image, retries, grace_s))


async def _submit(xm_local, name, units, executor, image, retries, grace_s):
  from xmanager import xm
  from xmanager.xm_local import executables

  # Packaging would pull the image and push it to a registry of its own: it is there already.
  executable = executables.GoogleContainerRegistryImage(
    name=name, image_path=image, args=xm.SequentialArgs(), env_vars={}
  )
  async with xm_local.create_experiment(experiment_title=name) as experiment:
    for unit in units:
      if executor == "vertex":
        runs_on = xm_local.Vertex(xm.JobRequirements(**vertex_resources(unit)))
      else:
        runs_on = xm_local.Kubernetes()
        made = kubernetes.objects(name, unit, image=image, retries=retries, grace_s=grace_s)
        _launch_as(xm_local.Kubernetes, made)
      job = xm.Job(
        executable=executable,
        executor=runs_on,
        name=unit.name,
        args=unit.argv,
        env_vars=dict(unit.environment),
      )
      await experiment.add(job)
      print(f"{unit.name}: handed to {executor}", flush=True)


def _launch_as(executor_type, made):
  """Lets the executor create these objects in the place of those that xmanager would make.

  An executor registers its own way of launching when it is made, so this comes after.
  """
  from xmanager.cloud import kubernetes as xm_kubernetes
  from xmanager.xm_local import registry

  async def launch(local_experiment_unit, job_group):
    del local_experiment_unit, job_group  # one job for each unit, whose objects these are
    return [xm_kubernetes.KubernetesHandle(jobs=[create(xm_kubernetes.client().api_client, made)])]

  registry.register(executor_type, launch=launch)


def create(api_client: Any, made: Sequence[dict[str, Any]]) -> Any:
  """Creates a unit's Service and Job in the cluster's default namespace; gives the Job."""
  from kubernetes import client

  service, job = made
  client.CoreV1Api(api_client).create_namespaced_service(namespace="default", body=service)
  return client.BatchV1Api(api_client).create_namespaced_job(namespace="default", body=job)


def vertex_resources(unit: WorkUnit) -> dict[str, float]:
  """What xmanager's `JobRequirements` is made from: devices, cores and bytes of memory."""
  resources: dict[str, float] = {}
  if kind := _VERTEX[unit.resource.kind]:
    resources[kind] = unit.resource.devices
  if unit.resource.cpus:
    resources["CPU"] = unit.resource.cpus
  if unit.resource.memory_gib:
    resources["RAM"] = unit.resource.memory_gib * 2**30
  return resources


def _xm_local():
  try:
    from xmanager import xm_local
  except ImportError as error:
    raise ImportError(
      f"--backend=xmanager needs the package: pip install 'selfimprove_jax[xmanager]' ({error})"
    ) from error
  return xm_local
