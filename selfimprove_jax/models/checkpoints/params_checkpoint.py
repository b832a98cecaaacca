"""Saves and loads a model's parameters by themselves, as an orbax folder.

  params/       the parameters
  tokenizer.json, ...
  model.json    LlamaConfig, context length and checksums; written last, so that a folder with it is
                complete

It restores on any mesh. `training.checkpoint.Checkpoints` saves the whole state of a training run.
"""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

import selfimprove_jax.models.checkpoints.tokenizer_files as tokenizer_files
from selfimprove_jax.models.checkpoints.checkpoint import Checkpoint
from selfimprove_jax.models.checkpoints.hf_config import read_json
from selfimprove_jax.models.checkpoints.tokenizer_files import TokenizerFiles
from selfimprove_jax.models.checksums import DamagedCheckpointError, checksums
from selfimprove_jax.models.llama import Llama, LlamaConfig, abstract_params
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runtime import distributed
from selfimprove_jax.runtime.config import parse, to_json

MODEL_FILE = "model.json"
_PARAMS = "params"
_FORMAT = 1


def save_params(
  folder: str | os.PathLike,
  params: Any,
  config: LlamaConfig,
  *,
  tokenizer: str | os.PathLike | None,
  max_positions: int,
) -> None:
  """Writes the parameters; every process of a job must call this.

  Args:
    folder: must not exist, or be empty.
    tokenizer: the folder of a tokenizer to copy, or None.
    max_positions: the model's context length.

  Raises:
    ValueError: the folder is not empty, `tokenizer` holds no tokenizer, or the parameters are not
      in `config.param_dtype`.
  """
  dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
  if dtypes != {config.param_dtype}:
    raise ValueError(f"param_dtype={config.param_dtype!r}, but the parameters are {dtypes}")
  folder = pathlib.Path(folder).absolute()
  check_is_free(folder)
  if tokenizer is not None:
    tokenizer_files.check_tokenizer(tokenizer)
  # All processes have seen the folder empty before one of them writes to it.
  distributed.barrier("save_params begins")
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / _PARAMS, params)
  value = {
    "checksums": checksums(params),
    "format": _FORMAT,
    "max_positions": max_positions,
    "model": to_json(config),
  }
  if distributed.is_main():
    if tokenizer is not None:
      tokenizer_files.copy_tokenizer(tokenizer, folder)
    artifacts.write_json(folder / MODEL_FILE, value)
  distributed.barrier("save_params ends")


def check_is_free(folder: pathlib.Path) -> None:
  """Raises ValueError if a folder to write to is not empty."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"{folder} exists already; name a new folder, or delete it")


class ParamsCheckpoint(Checkpoint):
  """A folder that `save_params` wrote."""

  kind = "orbax"

  @functools.cached_property
  def _saved(self) -> dict[str, Any]:
    value = read_json(self.path / MODEL_FILE)
    if value["format"] != _FORMAT:
      raise ValueError(f"{self.path} has format {value['format']}; this version reads {_FORMAT}")
    return value

  @functools.cached_property
  def config(self) -> LlamaConfig:
    return parse_config(self._saved["model"])

  @property
  def max_positions(self) -> int:
    return self._saved["max_positions"]

  def load_params(self, mesh: Mesh, config: LlamaConfig) -> Any:
    path, saved_dtype = self.path / _PARAMS, self.config.param_dtype
    return restore(path, mesh, config, saved_dtype, self._saved["checksums"])

  def tokenizer_files(self) -> TokenizerFiles:
    # `data.packing` begins every training text with BOS.
    return tokenizer_files.read_tokenizer(self.path, begins_with_bos=True)


def parse_config(value: Mapping[str, Any]) -> LlamaConfig:
  """Reads a config from JSON; accepts the form of earlier versions."""
  # Earlier: `unrolled` named a layout that is not stored, and null was no RoPE scaling.
  kept = {k: v for k, v in value.items() if k != "unrolled" and v is not None}
  return parse(LlamaConfig, kept)


def restore(
  path: pathlib.Path,
  mesh: Mesh,
  config: LlamaConfig,
  saved_dtype: str,
  saved_checksums: Mapping[str, int],
) -> Any:
  """Restores parameters in orbax's format onto a mesh, in `config.param_dtype`.

  Raises:
    DamagedCheckpointError: they cannot be read, or are not those that were saved.
  """
  abstract = abstract_params(Llama(config), mesh)
  # In the saved dtype, or the checksums would differ.
  saved = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, saved_dtype, sharding=x.sharding), abstract
  )
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      params = checkpointer.restore(path.absolute(), saved)  # orbax refuses relative paths
  except Exception as error:  # orbax and tensorstore raise many types for a damaged file
    raise DamagedCheckpointError(f"{path} can't be read: {error}") from error
  if checksums(params) != saved_checksums:
    raise DamagedCheckpointError(f"{path} is damaged: its checksums are not those that were saved")
  leaves, tree = jax.tree.flatten(params)
  del params
  for index, leaf in enumerate(jax.tree.leaves(abstract)):
    # One leaf at a time, so that memory never holds the model in both dtypes.
    leaves[index] = leaves[index].astype(leaf.dtype)
  return jax.tree.unflatten(tree, leaves)
