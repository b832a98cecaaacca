"""Loads parameters that this package saved in orbax: by `save_params`, or by a stage that trained.

A folder of `save_params` holds params/, the tokenizer's files and model.json (LlamaConfig, context
length and checksums), which is written last, so that a folder with it is complete.
`training.checkpoint.Checkpoints` saves the whole state of a training run. Both restore on any mesh.
"""

import abc
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

import selfimprove_jax.models.checkpoints.tokenizer_files as tokenizer_files
from selfimprove_jax.models.checkpoints.checkpoint import Checkpoint
from selfimprove_jax.models.checkpoints.hf_config import check_size, read_json
from selfimprove_jax.models.checkpoints.tokenizer_files import TokenizerFiles
from selfimprove_jax.models.checksums import DamagedCheckpointError, checksums
from selfimprove_jax.models.llama import Llama, LlamaConfig, abstract_params
from selfimprove_jax.runs import artifacts, storage
from selfimprove_jax.runtime import distributed
from selfimprove_jax.runtime.config import parse, to_json
from selfimprove_jax.runtime.progress import Progress

MODEL_FILE = "model.json"
_PARAMS = "params"
_STEPS = "checkpoints"  # a stage's folder with a folder for each saved step
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
    params: in `config.param_dtype`.
    tokenizer: the folder of a tokenizer to copy, or None.
    max_positions: the model's context length.
  """
  dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
  if dtypes != {config.param_dtype}:
    raise ValueError(f"param_dtype={config.param_dtype!r}, but the parameters are {dtypes}")
  folder = pathlib.Path(folder).absolute()
  check_is_free(folder)
  if tokenizer is not None:
    tokenizer_files.check_tokenizer(tokenizer)
  # Otherwise one process could write before another has checked that the folder is empty.
  distributed.barrier("save_params begins")
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / _PARAMS, params)
  value = {"checksums": checksums(params), "format": _FORMAT, "max_positions": max_positions}
  if distributed.is_main():
    if tokenizer is not None:
      tokenizer_files.copy_tokenizer(tokenizer, folder)
    artifacts.write_json(folder / MODEL_FILE, {**value, "model": to_json(config)})
  distributed.barrier("save_params ends")


def check_is_free(folder: pathlib.Path) -> None:
  """Raises ValueError if a folder to write to is not empty."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"{folder} exists already; name a new folder, or delete it")


class _OrbaxCheckpoint(Checkpoint):
  """Parameters that this package saved, with their checksums."""

  @abc.abstractmethod
  def _stored(self) -> tuple[storage.Path, Mapping[str, int]]:
    """Returns the folder of the parameters and the checksums of the saved ones."""

  def load_params(
    self, mesh: Mesh, config: LlamaConfig, *, progress: Progress = Progress.QUIET
  ) -> Any:
    progress.note(f"reading {self.path}")
    path, saved_checksums = self._stored()
    abstract = abstract_params(Llama(config), mesh)
    # Restored in the saved dtype, or the checksums would differ.
    dtype = self.config.param_dtype
    saved = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), abstract
    )
    try:
      with _reader(mesh) as checkpointer:
        params = checkpointer.restore(_absolute(path), saved)  # orbax refuses relative paths
    except Exception as error:  # orbax and tensorstore raise many types for a damaged file
      raise DamagedCheckpointError(f"{path} can't be read: {error}") from error
    if checksums(params) != saved_checksums:
      raise DamagedCheckpointError(
        f"{path} is damaged: its checksums are not those that were saved"
      )
    leaves, tree = jax.tree.flatten(params)
    del params
    for index, leaf in enumerate(jax.tree.leaves(abstract)):
      # One leaf at a time, so that memory never holds the model in both dtypes.
      leaves[index] = leaves[index].astype(leaf.dtype)
    return jax.tree.unflatten(tree, leaves)

  def tokenizer_files(self) -> TokenizerFiles:
    # `data.packing` begins every training text with BOS.
    return tokenizer_files.read_tokenizer(self._tokenizer_folder(), begins_with_bos=True)


class ParamsCheckpoint(_OrbaxCheckpoint):
  """A folder that `save_params` wrote."""

  kind = "orbax"

  @functools.cached_property
  def _saved(self) -> dict[str, Any]:
    path = self.path / MODEL_FILE
    value = read_json(path)
    if value.get("format") != _FORMAT:
      raise ValueError(f"{path} has format {value.get('format')}; this version reads {_FORMAT}")
    for name in ("model", "checksums"):
      if not isinstance(value.get(name), dict):
        raise ValueError(f"{path} has {name}={value.get(name)!r}; it must be an object")
    return value

  @functools.cached_property
  def config(self) -> LlamaConfig:
    try:
      return _parse_config(self._saved["model"])
    except ValueError as error:
      raise ValueError(f"{self.path / MODEL_FILE} describes no model: {error}") from error

  @property
  def max_positions(self) -> int:
    name = "max_positions"
    return check_size(self.path / MODEL_FILE, name, self._saved.get(name))

  def _stored(self) -> tuple[storage.Path, Mapping[str, int]]:
    return self.path / _PARAMS, self._saved["checksums"]


def saved_steps(folder: storage.Path) -> list[int]:
  """Returns the training steps whose checkpoints a stage's folder holds."""
  return sorted(int(p.name) for p in (folder / _STEPS).iterdir() if p.name.isdigit())


class StageCheckpoint(_OrbaxCheckpoint):
  """The folder of a stage that trained a model, as in `runs/sbp_quick/arms/sbp`."""

  kind = "stage"

  def __init__(self, path: str | os.PathLike, *, step: int | None):
    """Opens a stage; raises ArtifactError if it is unfinished or damaged."""
    super().__init__(path)
    self._summary = artifacts.open_artifact(self.path).summary
    if not {"model", "step", "checksums"} <= self._summary.keys():
      raise ValueError(f"the stage {self.path} trained no model")
    self.step = self._summary["step"] if step is None else step
    steps = saved_steps(self.path)
    if self.step not in steps:
      raise ValueError(f"{self.path} has no checkpoint of step {self.step}; it has {steps}")

  @functools.cached_property
  def config(self) -> LlamaConfig:
    return _parse_config({**self._summary["model"], "dropout_rate": 0.0})

  @property
  def max_positions(self) -> int:
    """The context of the checkpoint that it started from, or the row length of its training."""
    if "max_positions" in self._summary:
      return self._summary["max_positions"]
    config = json.loads((self.path / "config.json").read_bytes())["config"]
    return config["seq_len"] if "seq_len" in config else config["training"]["seq_len"]

  def _stored(self) -> tuple[storage.Path, Mapping[str, int]]:
    folder = self.path / _STEPS / str(self.step)
    if self.step == self._summary["step"]:
      return folder / _PARAMS, self._summary["checksums"]
    metadata = json.loads((folder / "checksums" / "metadata").read_bytes())
    return folder / _PARAMS, metadata["params"]

  def _tokenizer_folder(self) -> pathlib.Path:
    for parent in _absolute(self.path).parents:
      if (parent / "tokenizer" / "manifest.json").exists():
        return artifacts.open_artifact(parent / "tokenizer").path("tokenizer")
    raise ValueError(f"no folder above {self.path} has a stage named tokenizer")

  def _paths(self) -> Iterable[pathlib.Path]:
    # Without the logs, which a stage appends to.
    yield from (self.path / "config.json", self.path / "manifest.json")
    yield from (p for p in (self.path / _STEPS / str(self.step)).rglob("*") if p.is_file())


def _reader(mesh: Mesh) -> ocp.StandardCheckpointer:
  """Returns what restores onto a mesh; onto a mesh of this process without waiting for others.

  Otherwise orbax has a barrier after restoring, at which all processes would have to restore
  equally often. Processes that score their own shards load what these need.
  """
  index = jax.process_index()
  if {device.process_index for device in mesh.devices.flat} != {index}:
    return ocp.StandardCheckpointer()
  alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
  return ocp.StandardCheckpointer(multiprocessing_options=alone)


def _absolute(path: storage.Path) -> storage.Path:
  return path if storage.is_remote(path) else path.resolve()


def _parse_config(value: Mapping[str, Any]) -> LlamaConfig:
  # Earlier versions wrote `unrolled`, a layout that is not stored, and null for no RoPE scaling.
  kept = {k: v for k, v in value.items() if k != "unrolled" and v is not None}
  return parse(LlamaConfig, kept)
