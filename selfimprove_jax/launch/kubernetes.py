"""Makes a work unit's Kubernetes objects: an indexed Job, one pod per process, and a Service.

xmanager 0.8.5 makes a job of one pod that can request GPUs but no TPUs. These objects request a TPU
slice by its topology, and give the pods DNS names by which `jax.distributed` connects them.
"""

import math
import re
from typing import Any

from selfimprove_jax.launch.experiment import WorkUnit

# Node labels of Google Kubernetes Engine.
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
  """Returns a name that Kubernetes accepts: at most 52 lower-case letters, digits and dashes."""
  name = re.sub(r"[^a-z0-9]+", "-", f"{experiment}-{unit.name}".lower()).strip("-")
  if len(name) > 52:  # 63 for a pod, whose name adds an index and a few letters
    raise ValueError(f"{name!r} is too long for Kubernetes: experiment and unit, 52 characters")
  return name


def objects(
  experiment: str, unit: WorkUnit, *, image: str, retries: int, grace_s: float
) -> list[dict[str, Any]]:
  """Returns the Service and the Job of one unit, as `kubectl apply -f -` reads them.

  Args:
    image: container image with the package installed.
    retries: how often a failing pod is restarted; it continues from the unit's folder.
    grace_s: seconds from SIGTERM to SIGKILL.
  """
  name = object_name(experiment, unit)
  resource = unit.resource
  pods_per_host = resource.processes // resource.hosts
  limits, selector, requests = {}, {}, {}
  if resource.is_tpu:
    limits = {"google.com/tpu": str(resource.devices)}
    selector = {
      "cloud.google.com/gke-tpu-accelerator": _ACCELERATORS[resource.kind],
      "cloud.google.com/gke-tpu-topology": resource.topology,
    }
  elif resource.is_gpu:
    limits = {"nvidia.com/gpu": str(resource.devices)}
    selector = {"cloud.google.com/gke-accelerator": _ACCELERATORS[resource.kind]}
  if resource.cpus:
    requests["cpu"] = f"{resource.cpus / pods_per_host:g}"
  if resource.memory_gib:
    requests["memory"] = f"{resource.memory_gib * 1024 // pods_per_host}Mi"
  pod: dict[str, Any] = {
    "subdomain": name,  # gives each pod a DNS name under the Service
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": math.ceil(grace_s),
    "nodeSelector": selector,
    "containers": [
      {
        "name": "unit",
        "image": image,
        "command": list(unit.argv),
        "env": [{"name": key, "value": value} for key, value in unit.environment.items()],
        "resources": {"limits": limits, "requests": requests},
      }
    ],
  }
  spec: dict[str, Any] = {
    "completionMode": "Indexed",
    "completions": resource.processes,
    "parallelism": resource.processes,
    # One failing pod makes all pods of its unit fail, and each of them counts.
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
