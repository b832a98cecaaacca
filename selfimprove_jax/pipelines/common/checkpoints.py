"""Records pretrained checkpoints, so that later stages notice changes, and loads models."""

import functools
from collections.abc import Mapping
from typing import Any

from selfimprove_jax.language_models import local
from selfimprove_jax.language_models.local import ComputeConfig, LocalModel
from selfimprove_jax.models.checkpoints import Checkpoint, open_checkpoint
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.runs.artifacts import Artifact, ArtifactError
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section, to_json
from selfimprove_jax.runtime.partitioning import LocalMeshConfig
from selfimprove_jax.sampling.engine import EngineConfig


@section
class CheckpointConfig:
  """A pretrained model.

  Attributes:
    path: a Hugging Face folder, a GGUF file, or an orbax folder of `save_params`.
  """

  path: str


def checkpoint(context: Context, config: CheckpointConfig) -> dict[str, Any]:
  """Records a checkpoint without copying its weights; ValueError if it is none that we can run."""
  del context  # the artifact is its summary
  return describe_checkpoint(config.path, changes={})


@functools.cache
def planned_config(path: str) -> LlamaConfig | None:
  """Returns the config of a checkpoint, to plan with; None if it cannot be read here and now."""
  try:
    return open_checkpoint(path).compute_config({})
  except (ValueError, OSError):
    return None


def describe_checkpoint(path: str, *, changes: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a checkpoint's identity and config.

  Args:
    changes: fields of `LlamaConfig` to set; see `Checkpoint.compute_config`.
  """
  opened = open_checkpoint(path)
  model_config = opened.compute_config(changes)
  return {
    "path": path,
    "kind": opened.kind,
    "dtype": opened.dtype,
    "model": to_json(model_config),
    "num_parameters": model_config.num_parameters,
    "max_positions": opened.max_positions,
    "digest": opened.digest,
  }


def open_recorded(artifact: Artifact) -> Checkpoint:
  """Opens the checkpoint that a stage recorded; ArtifactError if its files have changed since."""
  path = artifact.summary["path"]
  opened = open_checkpoint(path)
  if opened.digest != artifact.summary["digest"]:
    raise ArtifactError(
      f"the files of the checkpoint {path} are not those that {artifact.folder} recorded; restore "
      f"them, or use another workdir"
    )
  return opened


_loaded: dict[tuple[Any, ...], LocalModel] = {}  # the last one that `load_model` returned


def load_model(
  checkpoint: Artifact,
  mesh: LocalMeshConfig,
  compute: ComputeConfig,
  engine: EngineConfig,
  *,
  step: int | None = None,
) -> LocalModel:
  """Loads the checkpoint that the stage `checkpoint` recorded, or the model that a stage trained.

  Stages of one process share the model: its weights are loaded and its programs compiled once. The
  model that was loaded before is closed.

  Args:
    step: the training step to load of a stage that trained; None for its result.

  Raises:
    ValueError: `engine.max_length` exceeds the model's context.
    artifacts.ArtifactError: the checkpoint has changed since it was recorded.
  """
  if "path" in checkpoint.summary:
    path, digest = str(open_recorded(checkpoint).path), checkpoint.summary["digest"]
  else:
    path, digest = str(checkpoint.folder), checkpoint.digest
  key = (path, digest, step, mesh, compute, engine)  # with other files it is another model
  if key not in _loaded:
    while _loaded:  # before the next one takes memory
      _loaded.popitem()[1].close()
    slots, length = engine.num_slots, engine.max_length
    opened = open_checkpoint(path, step=step)
    _loaded[key] = local.load(
      opened, mesh.make(), num_slots=slots, max_length=length, compute=compute
    )
  return _loaded[key]
