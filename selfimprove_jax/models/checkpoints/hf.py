"""Loads models from Hugging Face folders.

Each process reads only the blocks of a parameter that its devices hold, one parameter at a time, so
no host needs memory for a whole model.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import safetensors
from jax.sharding import Mesh

import selfimprove_jax.models.checkpoints.hf_config as hf_config
import selfimprove_jax.models.checkpoints.hf_names as hf_names
from selfimprove_jax.models.checkpoints.checkpoint import Checkpoint
from selfimprove_jax.models.checkpoints.hf_names import HfTensor
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.runtime.progress import Progress

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class _Weights:
  """Reads slices of the tensors in a folder's safetensors files."""

  def __init__(self, folder: pathlib.Path):
    files = {}
    if (folder / INDEX_FILE).exists():
      files = _read_index(folder / INDEX_FILE)
    opened = {}
    for file in sorted(set(files.values()) or {WEIGHTS_FILE}):
      try:
        opened[file] = safetensors.safe_open(folder / file, framework="numpy")
      except FileNotFoundError:
        raise ValueError(f"{folder} has no {file}: its weights must be safetensors") from None
      except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{folder / file} is damaged: {error}") from error
    if not files:
      files = dict.fromkeys(opened[WEIGHTS_FILE].keys(), WEIGHTS_FILE)
    self.folder, self.names = folder, set(files)
    try:
      self._slices = {name: opened[file].get_slice(name) for name, file in files.items()}
    except safetensors.SafetensorError as error:
      raise ValueError(f"{folder / INDEX_FILE} does not fit its files: {error}") from error

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._slices[name].get_shape())

  def dtype(self, name: str) -> str:
    """Returns the dtype in safetensors' spelling: BF16, F8_E4M3."""
    return self._slices[name].get_dtype()

  def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
    return self._slices[name][slices]


def _read_index(path: pathlib.Path) -> dict[str, str]:
  """Returns the file of each tensor."""
  files = hf_config.read_json(path).get("weight_map")
  if not isinstance(files, dict) or not files:
    raise ValueError(f"{path} has no weight_map, the file of each tensor")
  for name, file in files.items():
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
      raise ValueError(f"{path} puts {name} into {file!r}, which is no file of its folder")
  return files


class HfCheckpoint(Checkpoint):
  """A folder in the format of transformers: config.json and safetensors files."""

  kind = "hf"

  @functools.cached_property
  def config(self) -> LlamaConfig:
    return hf_config.read_config(self.path)

  @property
  def max_positions(self) -> int:
    path, name = self.path / hf_config.CONFIG_FILE, "max_position_embeddings"
    return hf_config.check_size(path, name, hf_config.read_json(path).get(name))

  @property
  def dtype(self) -> str:
    weights = _Weights(self.path)
    _check_dtypes(weights, sorted(weights.names))
    dtypes = {DTYPES[weights.dtype(name)] for name in weights.names}
    return dtypes.pop() if len(dtypes) == 1 else "float32"

  def load_params(
    self, mesh: Mesh, config: LlamaConfig, *, progress: Progress = Progress.QUIET
  ) -> Any:
    weights = _Weights(self.path)
    hf_names.check_layers(self.path, weights.names, config)
    prefix = "" if "embed_tokens.weight" in weights.names else "model."
    tensors = hf_names.hf_tensors(config, prefix=prefix)
    _check_tensors(weights, tensors, config)
    make_reader = functools.partial(_block_reader, weights)
    return hf_names.place_params(config, mesh, tensors, make_reader, progress)


def _block_reader(
  weights: _Weights, layers: Sequence[HfTensor], leaf: jax.ShapeDtypeStruct
) -> hf_names.Reader:
  @functools.cache  # several devices may hold copies of a block
  def read(starts_and_stops: tuple[tuple[int, int], ...]) -> np.ndarray:
    ranges = tuple(slice(*pair) for pair in starts_and_stops)
    block = np.empty([r.stop - r.start for r in ranges], leaf.dtype)
    if layers[0].layer is None:
      parts = [(block, layers[0])]
    else:
      parts, ranges = zip(block, layers[ranges[0]]), ranges[1:]
    for out, tensor in parts:
      out[...] = tensor.read_ours(functools.partial(weights.read, tensor.name), ranges)
    return block

  return lambda index: read(
    tuple(r.indices(size)[:2] for r, size in zip(index, leaf.shape, strict=True))
  )


def _check_tensors(weights: _Weights, tensors: Sequence[HfTensor], config: LlamaConfig) -> None:
  found = {
    name: weights.shape(name)
    for name in weights.names
    if not name.endswith("rotary_emb.inv_freq")  # a constant, which old files contain
  }
  expected = {tensor.name: tensor.shape for tensor in tensors}
  if config.tie_embeddings and "lm_head.weight" in found:
    _check_tied(weights, tensors[0].name)
    del found["lm_head.weight"]
  hf_names.check_shapes(weights.folder, found, expected)
  _check_dtypes(weights, list(expected))


def _check_dtypes(weights: _Weights, names: Sequence[str]) -> None:
  wrong = [f"{name} {weights.dtype(name)}" for name in names if weights.dtype(name) not in DTYPES]
  if wrong:
    raise ValueError(
      f"{weights.folder} has tensors in an unsupported dtype: {hf_names.some(wrong)}; supported "
      f"are {', '.join(DTYPES)}"
    )


def _check_tied(weights: _Weights, embedding: str) -> None:
  """Checks that the head equals the embedding in a file that stores both although they are tied."""
  head = "lm_head.weight"
  shape, dtype = weights.shape(head), weights.dtype(head)
  # In blocks, since both may take gigabytes.
  blocks = [(slice(i, min(i + 4096, shape[0])), slice(None)) for i in range(0, shape[0], 4096)]
  if (shape, dtype) != (weights.shape(embedding), weights.dtype(embedding)) or not all(
    np.array_equal(weights.read(head, block), weights.read(embedding, block)) for block in blocks
  ):
    raise ValueError(
      f"{weights.folder} has tie_word_embeddings=True, but its {head} is not its {embedding}"
    )
