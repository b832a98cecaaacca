"""Describes the code and the machine that produced a report's numbers."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

_PACKAGES = (
  "selfimprove_jax",
  "jax",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "tensorstore",
  "tokenizers",
  "scikit-learn",
  "scann",
  "numpy",
)


def describe() -> dict[str, Any]:
  """Returns `commit` (None outside a repository), `versions` of packages and `hardware`."""
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {
    "commit": _commit(),
    "versions": {"python": platform.python_version()} | versions,
    "hardware": _hardware(),
  }


def _hardware() -> dict[str, Any]:
  import jax

  devices = jax.devices()
  return {
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "processes": jax.process_count(),
    "cpu_cores": os.cpu_count(),
    "machine": platform.machine(),
  }


def _commit() -> str | None:
  """Returns the commit of the code, with `-dirty` where files differ from it."""
  folder = pathlib.Path(__file__).resolve().parents[2]
  try:
    found = subprocess.run(
      ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return found.stdout.strip()
