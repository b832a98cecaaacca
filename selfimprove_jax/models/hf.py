"""Parameters and tokenizers in from Hugging Face folders.

What this process's devices hold of one parameter is read at a time, so no host ever holds a whole
model.
"""

import functools
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import safetensors

from selfimprove_jax.models import hf_config
from selfimprove_jax.models.hf_names import HfTensor, hf_tensors
from selfimprove_jax.models.llama import LlamaConfig

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_TOKENIZER_MODELS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKENIZER_FILES = (
  *_TOKENIZER_MODELS,
  "merges.txt",
  "added_tokens.json",
  "special_tokens_map.json",
  "tokenizer_config.json",
  "chat_template.jinja",
)
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NAMED = 8  # tensors named in an error


class _Weights:
  """The tensors of a folder's safetensors files, of which slices can be read."""

  def __init__(self, folder: str | os.PathLike):
    folder = pathlib.Path(folder)
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
    """safetensors' name: BF16, F8_E4M3."""
    return self._slices[name].get_dtype()

  def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
    return self._slices[name][slices]


def read_dtype(folder: str | os.PathLike) -> str:
  """The dtype of a folder's tensors; float32 where they are of several.

  Raises:
    ValueError: no safetensors files, or a tensor in another dtype than we read.
  """
  weights = _Weights(folder)
  _check_dtypes(weights, sorted(weights.names))
  dtypes = {DTYPES[weights.dtype(name)] for name in weights.names}
  return dtypes.pop() if len(dtypes) == 1 else "float32"


def load_params(folder: str | os.PathLike, *, config: LlamaConfig, abstract: Any) -> Any:
  """The parameters in a Hugging Face folder, each device's part read where it is needed.

  Args:
    config: of `read_config`.
    abstract: shapes, dtypes and shardings of the parameters of `config`; the values are converted
      to these dtypes from the float32, bfloat16 or float16 of the files.

  Raises:
    ValueError: a tensor is missing, is one too many, or has another shape or an unsupported dtype;
      or a file is missing or damaged.
  """
  weights = _Weights(folder)
  prefix = "" if "embed_tokens.weight" in weights.names else "model."
  tensors = hf_tensors(config, prefix=prefix)
  _check_tensors(weights, tensors, config)
  by_path: dict[tuple[str, ...], list[HfTensor]] = {}
  for tensor in tensors:
    by_path.setdefault(tensor.path, []).append(tensor)

  def load(path, leaf):
    layers = by_path[tuple(entry.key for entry in path)]
    array = jax.make_array_from_callback(
      leaf.shape, leaf.sharding, _block_reader(weights, layers, leaf), dtype=leaf.dtype
    )
    return jax.block_until_ready(array)  # else what was read of several waits on the host

  return jax.tree.map_with_path(load, abstract)


def _block_reader(weights, layers, leaf):
  """What gives a block of one of our parameters; copies of it on other devices cost nothing."""

  @functools.cache
  def read(starts_and_stops):
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


def _read(weights, tensor, ranges):
  return tensor.read_ours(functools.partial(weights.read, tensor.name), ranges)


def _check_tensors(weights, tensors, config):
  expected = {tensor.name: tensor for tensor in tensors}
  missing = [name for name in expected if name not in weights.names]
  if missing:
    raise ValueError(f"{weights.folder} lacks {_some(missing)}")
  extra = weights.names - set(expected)
  extra = {name for name in extra if not name.endswith("rotary_emb.inv_freq")}  # a constant
  if config.tie_embeddings and "lm_head.weight" in extra:
    _check_tied(weights, tensors[0].name)
    extra.remove("lm_head.weight")
  if extra:
    raise ValueError(f"{weights.folder} has tensors that the model lacks: {_some(sorted(extra))}")
  wrong = [
    f"{name} {weights.shape(name)} instead of {tensor.shape}"
    for name, tensor in expected.items()
    if weights.shape(name) != tensor.shape
  ]
  if wrong:
    raise ValueError(f"{weights.folder} has tensors of another shape: {_some(wrong)}")
  _check_dtypes(weights, list(expected))


def _check_dtypes(weights, names):
  wrong = [f"{name} {weights.dtype(name)}" for name in names if weights.dtype(name) not in DTYPES]
  if wrong:
    raise ValueError(
      f"{weights.folder} has tensors in an unsupported dtype: {_some(wrong)}; supported are "
      f"{', '.join(DTYPES)}"
    )


def _check_tied(weights, embedding):
  """A head that is written out although it is tied must be the embedding."""
  head = "lm_head.weight"
  equal = weights.shape(head) == weights.shape(embedding)
  equal = equal and weights.dtype(head) == weights.dtype(embedding)
  num_rows = weights.shape(head)[0] if equal else 0
  for start in range(0, num_rows, 4096):  # not whole: the two may be gigabytes
    block = (slice(start, min(start + 4096, num_rows)), slice(None))
    equal = equal and np.array_equal(weights.read(head, block), weights.read(embedding, block))
  if not equal:
    raise ValueError(
      f"{weights.folder} says tie_word_embeddings=True, but its {head} is not its {embedding}"
    )


def _some(items):
  rest = len(items) - _NAMED
  return ", ".join(items[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def read_tokenizer_path(folder: str | os.PathLike) -> pathlib.Path:
  """A Hugging Face folder, once it is seen to hold a tokenizer.

  Raises:
    ValueError: it holds none; the files looked for are named.
  """
  folder = pathlib.Path(folder)
  if not any((folder / name).exists() for name in _TOKENIZER_MODELS):
    raise ValueError(
      f"{folder} has no tokenizer: none of {', '.join(_TOKENIZER_MODELS)}. Name another "
      f"folder that holds the model's tokenizer"
    )
  return folder


def copy_tokenizer(source: str | os.PathLike, target: str | os.PathLike) -> list[str]:
  """Copies the tokenizer's files, chat template included; gives their names."""
  source, target = read_tokenizer_path(source), pathlib.Path(target)
  names = [name for name in _TOKENIZER_FILES if (source / name).exists()]
  for name in names:
    shutil.copyfile(source / name, target / name)
  return names
