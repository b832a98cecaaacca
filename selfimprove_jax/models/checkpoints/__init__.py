"""Pretrained checkpoints: Hugging Face folders, GGUF files, orbax folders, trained stages."""

import os

from selfimprove_jax.models.checkpoints.checkpoint import Checkpoint
from selfimprove_jax.models.checkpoints.gguf import GgufCheckpoint
from selfimprove_jax.models.checkpoints.hf import HfCheckpoint
from selfimprove_jax.models.checkpoints.hf_config import CONFIG_FILE
from selfimprove_jax.models.checkpoints.params_checkpoint import (
  MODEL_FILE,
  ParamsCheckpoint,
  StageCheckpoint,
  saved_steps,
)
from selfimprove_jax.models.checkpoints.tokenizer_files import TokenizerFiles
from selfimprove_jax.runs import storage

__all__ = ["Checkpoint", "TokenizerFiles", "open_checkpoint", "saved_steps"]


def open_checkpoint(path: str | os.PathLike, *, step: int | None = None) -> Checkpoint:
  """Opens the pretrained model at a path; loads no weights.

  Args:
    path: a Hugging Face folder, a .gguf file, a folder of `params_checkpoint.save_params`, or the
      folder of a stage that trained a model, which may be in a bucket (gs://).
    step: the training step to open in a stage; None is the one that the stage chose.

  Raises:
    artifacts.ArtifactError: the stage is unfinished or damaged.
  """
  path = storage.path(path)
  # Checked before Hugging Face: a stage has a config.json too.
  is_stage = (path / "manifest.json").is_file() or (path / "checkpoints").is_dir()
  if is_stage and not any(path.glob("*.safetensors")):
    return StageCheckpoint(path, step=step)
  if storage.is_remote(path):
    raise ValueError(f"{path} is no trained stage of a run, and other models are read from disks")
  if step is not None:
    raise ValueError(f"step={step} is for a trained stage of a run, which {path} is not")
  if path.is_file() and path.suffix == ".gguf":
    return GgufCheckpoint(path)
  if (path / MODEL_FILE).is_file():
    return ParamsCheckpoint(path)
  if (path / CONFIG_FILE).is_file():
    return HfCheckpoint(path)
  raise ValueError(
    f"{path} holds no model: it is neither a .gguf file nor a folder with {CONFIG_FILE} (Hugging "
    f"Face), {MODEL_FILE} (parameters in orbax) or manifest.json (a trained stage of a run)"
  )
