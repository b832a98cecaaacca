"""Finds a pipeline by the name of its folder."""

import importlib
import pkgutil
from types import ModuleType

from selfimprove_jax import pipelines
from selfimprove_jax.runtime.config import choices

_SHARED = "common"


def names() -> list[str]:
  return sorted(
    module.name
    for module in pkgutil.iter_modules(pipelines.__path__)
    if module.ispkg and module.name != _SHARED
  )


def load(name: str) -> ModuleType:
  """Imports a pipeline: a module with `Config`, `stages(config)` and `report(run)`.

  It may have `preview(config)`, a text that `--dry_run` prints below its plan.

  Raises:
    ValueError: there is no folder of that name.
  """
  if name not in names():
    raise ValueError(f"pipeline={name!r}: there is no such pipeline{choices(str(name), names())}")
  return importlib.import_module(f"{pipelines.__name__}.{name}")
