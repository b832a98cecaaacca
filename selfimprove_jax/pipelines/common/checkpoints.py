"""Stage that records a pretrained checkpoint, so that later stages notice when it has changed."""

from collections.abc import Mapping
from typing import Any

from selfimprove_jax.models.checkpoints import Checkpoint, open_checkpoint
from selfimprove_jax.runs.artifacts import Artifact, ArtifactError
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section, to_json


@section
class CheckpointConfig:
  """A pretrained model.

  Attributes:
    path: a Hugging Face folder, a GGUF file, or an orbax folder of `save_params`.
  """

  path: str


def checkpoint(context: Context, config: CheckpointConfig) -> dict[str, Any]:
  """Records a checkpoint; its weights stay where they are.

  Raises:
    ValueError: there is no model at the path, or none that we can run.
  """
  del context  # the artifact is its summary
  return describe_checkpoint(config.path, changes={})


def describe_checkpoint(path: str, *, changes: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what identifies a checkpoint, and how it is computed with.

  Args:
    changes: fields of `LlamaConfig` to set; see `Checkpoint.compute_config`.

  Raises:
    ValueError: there is no model at the path, or `changes` sets what its weights were trained for.
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
  """Opens the checkpoint that a stage has recorded.

  Raises:
    ArtifactError: its files have changed since.
  """
  path = artifact.summary["path"]
  opened = open_checkpoint(path)
  if opened.digest != artifact.summary["digest"]:
    raise ArtifactError(
      f"the files of the checkpoint {path} are not those that {artifact.folder} recorded; restore "
      f"them, or use another workdir"
    )
  return opened
