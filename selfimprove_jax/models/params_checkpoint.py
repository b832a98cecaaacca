"""A model's parameters by themselves, as an orbax folder.

  params/       the parameters
  tokenizer.json, ...
  model.json    LlamaConfig, context length and checksums; written last, and with it the folder is
                complete

It restores on any mesh. A training run's own checkpoints, with the optimizer's state, are
`checkpoint.Checkpoints`.
"""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from selfimprove_jax import artifacts, distributed
from selfimprove_jax.models import hf
from selfimprove_jax.models.checksums import DamagedCheckpointError, checksums
from selfimprove_jax.models.hf_config import read_json
from selfimprove_jax.models.llama import LlamaConfig

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
  """Writes the parameters; every process of a run must call this.

  Args:
    folder: must not exist, or be empty.
    tokenizer: folder of the tokenizer to put beside, or None.
    max_positions: context length of the model, which a Hugging Face export of it names.

  Raises:
    ValueError: the folder is not empty, `tokenizer` holds no tokenizer, or the parameters are not
      in `config.param_dtype`.
  """
  dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
  if dtypes != {config.param_dtype}:
    raise ValueError(f"param_dtype={config.param_dtype!r}, but the parameters are {dtypes}")
  folder = pathlib.Path(folder).absolute()
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"{folder} is there already; name a new folder or delete it")
  if tokenizer is not None:
    hf.read_tokenizer_path(tokenizer)
  distributed.barrier("save_params begins")  # all have seen that the folder is free
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / _PARAMS, params)
  value = {
    "checksums": checksums(params),
    "format": _FORMAT,
    "max_positions": max_positions,
    "model": dataclasses.asdict(config),
  }
  if distributed.is_main():
    if tokenizer is not None:
      hf.copy_tokenizer(tokenizer, folder)
    artifacts.write_json(folder / MODEL_FILE, value)
  distributed.barrier("save_params ends")


def read_config(folder: str | os.PathLike) -> LlamaConfig:
  """The model whose parameters a folder holds.

  Raises:
    ValueError: the folder is unfinished, or of another format.
  """
  return LlamaConfig(**_read(folder)["model"])


def read_max_positions(folder: str | os.PathLike) -> int:
  """The context length that was saved with the parameters."""
  return _read(folder)["max_positions"]


def load_params(folder: str | os.PathLike, *, abstract: Any) -> Any:
  """The parameters, on the shardings and in the dtypes of `abstract`.

  Raises:
    DamagedCheckpointError: they can't be read, or are not what was saved.
  """
  value = _read(folder)
  path = pathlib.Path(folder).absolute() / _PARAMS
  # As they were saved, so that the checksums can be compared; converted after.
  saved_dtype = LlamaConfig(**value["model"]).param_dtype
  saved = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, saved_dtype, sharding=x.sharding), abstract
  )
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      params = checkpointer.restore(path, saved)
  except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
    raise DamagedCheckpointError(f"{path} can't be read: {error}") from error
  if checksums(params) != value["checksums"]:
    raise DamagedCheckpointError(f"{path} is damaged: checksums are not those saved")
  leaves, tree = jax.tree.flatten(params)
  del params
  for index, leaf in enumerate(jax.tree.leaves(abstract)):
    leaves[index] = leaves[index].astype(
      leaf.dtype
    )  # frees the one saved, so memory holds one model
  return jax.tree.unflatten(tree, leaves)


def _read(folder):
  value = read_json(pathlib.Path(folder) / MODEL_FILE)
  if value["format"] != _FORMAT:
    raise ValueError(f"{folder} has format {value['format']}; this version reads {_FORMAT}")
  return value
