"""Loads models from Hugging Face folders.

Each process reads only the parts of a parameter that its devices hold, one parameter at a time, so
no host needs memory for a whole model.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
from jax.sharding import Mesh

import selfimprove_jax.models.checkpoints.hf_config as hf_config
from selfimprove_jax.models.checkpoints.checkpoint import Checkpoint
from selfimprove_jax.models.checkpoints.hf_names import (
  HfTensor,
  check_shapes,
  hf_tensors,
  some,
  tensors_by_path,
)
from selfimprove_jax.models.llama import Llama, LlamaConfig, abstract_params

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class _Weights:
  """Reads slices of the tensors in a folder's safetensors files."""

  def __init__(self, folder: pathlib.Path):
    files = {}
    if (folder / INDEX_FILE).exists():
      files = hf_config.read_json(folder / INDEX_FILE)["weight_map"]
    opened = {}
    for file in sorted(set(files.values()) or {WEIGHTS_FILE}):
      try:
        opened[file] = safetensors.safe_open(folder / file, framework="numpy")
      except FileNotFoundError:
        raise ValueError(f"{folder} has no {file}: its weights must be safetensors") from None
      except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / file} is damaged: {error}") from error
    if not files:
      files = dict.fromkeys(opened[WEIGHTS_FILE].keys(), WEIGHTS_FILE)
    self.folder = folder
    try:
      self._slices = {name: opened[file].get_slice(name) for name, file in files.items()}
    except safetensors.SafetensorError as error:
      raise ValueError(f"{folder / INDEX_FILE} does not fit its files: {error}") from error

  @property
  def names(self) -> set[str]:
    return set(self._slices)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._slices[name].get_shape())

  def dtype(self, name: str) -> str:
    """Returns the dtype in safetensors' spelling: BF16, F8_E4M3."""
    return self._slices[name].get_dtype()

  def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
    return self._slices[name][slices]


class HfCheckpoint(Checkpoint):
  """A folder in the format of transformers: config.json and safetensors files."""

  kind = "hf"

  @functools.cached_property
  def config(self) -> LlamaConfig:
    return hf_config.read_config(self.path)

  @property
  def max_positions(self) -> int:
    return hf_config.read_json(self.path / hf_config.CONFIG_FILE)["max_position_embeddings"]

  @property
  def dtype(self) -> str:
    weights = _Weights(self.path)
    _check_dtypes(weights, sorted(weights.names))
    dtypes = {DTYPES[weights.dtype(name)] for name in weights.names}
    return dtypes.pop() if len(dtypes) == 1 else "float32"

  def load_params(self, mesh: Mesh, config: LlamaConfig) -> Any:
    weights = _Weights(self.path)
    prefix = "" if "embed_tokens.weight" in weights.names else "model."
    tensors = hf_tensors(config, prefix=prefix)
    _check_tensors(weights, tensors, config)
    by_path = tensors_by_path(tensors)

    def load(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
      layers = by_path[tuple(entry.key for entry in path)]
      array = jax.make_array_from_callback(
        leaf.shape, leaf.sharding, _block_reader(weights, layers, leaf), dtype=leaf.dtype
      )
      # Transfers are asynchronous: without this, the host would hold several parameters at a time.
      return jax.block_until_ready(array)

    return jax.tree.map_with_path(load, abstract_params(Llama(config), mesh))


def _block_reader(
  weights: _Weights, layers: Sequence[HfTensor], leaf: jax.ShapeDtypeStruct
) -> Callable[[tuple[slice, ...]], np.ndarray]:
  """Returns a function that reads a block of one of our parameters."""

  @functools.cache  # several devices may hold copies of a block
  def read(starts_and_stops: tuple[tuple[int, int], ...]) -> np.ndarray:
    ranges = tuple(slice(*pair) for pair in starts_and_stops)
    if layers[0].layer is None:
      return _read(weights, layers[0], ranges).astype(leaf.dtype)
    rows, *inner = ranges
    block = np.empty([r.stop - r.start for r in ranges], leaf.dtype)
    for out, tensor in zip(block, layers[rows]):
      out[...] = _read(weights, tensor, tuple(inner))
    return block

  return lambda index: read(
    tuple(r.indices(size)[:2] for r, size in zip(index, leaf.shape, strict=True))
  )


def _read(weights: _Weights, tensor: HfTensor, ranges: tuple[slice, ...]) -> np.ndarray:
  return tensor.read_ours(functools.partial(weights.read, tensor.name), ranges)


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
  check_shapes(weights.folder, found, expected)
  _check_dtypes(weights, list(expected))


def _check_dtypes(weights: _Weights, names: Sequence[str]) -> None:
  wrong = [f"{name} {weights.dtype(name)}" for name in names if weights.dtype(name) not in DTYPES]
  if wrong:
    raise ValueError(
      f"{weights.folder} has tensors in an unsupported dtype: {some(wrong)}; supported are "
      f"{', '.join(DTYPES)}"
    )


def _check_tied(weights: _Weights, embedding: str) -> None:
  """Checks that the head equals the embedding, where a file stores both although they are tied."""
  head = "lm_head.weight"
  equal = weights.shape(head) == weights.shape(embedding)
  equal = equal and weights.dtype(head) == weights.dtype(embedding)
  num_rows = weights.shape(head)[0] if equal else 0
  for start in range(0, num_rows, 4096):  # in blocks, since both may take gigabytes
    block = (slice(start, min(start + 4096, num_rows)), slice(None))
    equal = equal and np.array_equal(weights.read(head, block), weights.read(embedding, block))
  if not equal:
    raise ValueError(
      f"{weights.folder} says tie_word_embeddings=True, but its {head} is not its {embedding}"
    )
