"""The Kubernetes objects of a work unit: an indexed Job, one pod for each process, and a Service.

xmanager 0.8.5 makes a job of one pod that asks for GPUs at most, and leaves TPUs out of what a pod
asks for. These ask for the slice by its topology, and give the pods names by which they find each
other: `jax.distributed` does the rest.
"""

import math
import re
from typing import Any

from experiments.launcher.experiment import WorkUnit

# What Google Kubernetes Engine names them in node labels.
_ACCELERATORS = {
  "v4": "tpu-v4-podslice",
  "v5p": "tpu-v5p-slice",
  "v5e": "tpu-v5-lite-podslice",
  "v6e": "tpu-v6e-slice",
  "l4": "nvidia-l4",
  "a100": "nvidia-tesla-a100",
  "a100_80gib": "nvidia-a100-80gb",
  "h100": "nvidia-h100-80gb",
  "h200": "nvidia-h200-141gb",
  "b200": "nvidia-b200",
}


def object_name(experiment: str, unit: WorkUnit) -> str:
  """A name that Kubernetes accepts: lower case, digits and dashes, 52 characters at most."""
  name = re.sub(r"[^a-z0-9]+", "-", f"{experiment}-{unit.name}".lower()).strip("-")
  if len(name) > 52:  # 63 for a pod, which adds its index and a few letters
    raise ValueError(f"{name!r} is too long for Kubernetes: experiment and unit, 52 characters")
  return name


def objects(
  experiment: str, unit: WorkUnit, *, image: str, retries: int, grace_s: float
) -> list[dict[str, Any]]:
  """The Service and the Job of one unit, as `kubectl apply -f -` reads them.

  Args:
    image: container image with the package installed.
    retries: how often a failing pod is started again; each goes on from the unit's folder.
    grace_s: seconds between SIGTERM and the end.

  Raises:
    ValueError: the names are too long for Kubernetes.
  """
  name = object_name(experiment, unit)
  resource = unit.resource
  limits: dict[str, str] = {}
  selector = {}
  if resource.is_tpu:
    limits["google.com/tpu"] = str(resource.devices)
    selector["cloud.google.com/gke-tpu-accelerator"] = _ACCELERATORS[resource.kind]
    selector["cloud.google.com/gke-tpu-topology"] = str(resource.topology)
  elif resource.is_gpu:
    limits["nvidia.com/gpu"] = str(resource.devices)
    selector["cloud.google.com/gke-accelerator"] = _ACCELERATORS[resource.kind]
  pods_per_host = resource.processes // resource.hosts
  requests = {}
  if resource.cpus:
    requests["cpu"] = f"{resource.cpus / pods_per_host:g}"
  if resource.memory_gib:
    requests["memory"] = f"{resource.memory_gib * 1024 // pods_per_host}Mi"
  pod: dict[str, Any] = {
    "subdomain": name,
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": math.ceil(grace_s),
    "nodeSelector": selector,
    "containers": [
      {
        "name": "unit",
        "image": image,
        "command": unit.argv,
        "env": [{"name": key, "value": value} for key, value in unit.environment.items()],
        "resources": {"limits": limits, "requests": requests},
      }
    ],
  }
  spec: dict[str, Any] = {
    "completionMode": "Indexed",
    "completions": resource.processes,
    "parallelism": resource.processes,
    # One failing pod takes the others with it: all of them count.
    "backoffLimit": retries * resource.processes,
    "template": {"metadata": {"labels": {"unit": name}}, "spec": pod},
  }
  if resource.hours:
    spec["activeDeadlineSeconds"] = math.ceil(resource.hours * 3600)
  service = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": name},
    "spec": {"clusterIP": "None", "selector": {"unit": name}},
  }
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}
  return [service, job]
