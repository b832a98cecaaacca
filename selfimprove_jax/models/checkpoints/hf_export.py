"""Writes models as Hugging Face folders; the host holds the tensors of one file at a time."""

import functools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

import selfimprove_jax.models.checkpoints.hf as hf
import selfimprove_jax.models.checkpoints.hf_config as hf_config
import selfimprove_jax.models.checkpoints.tokenizer_files as tokenizer_files
from selfimprove_jax.models.checkpoints.hf_names import HfTensor, hf_tensors
from selfimprove_jax.models.checkpoints.params_checkpoint import check_is_free
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.runtime import distributed
from selfimprove_jax.runtime.progress import Bar, Progress

_logger = logging.getLogger(__name__)


def save_pretrained(
  folder: str | os.PathLike,
  params: Any,
  config: LlamaConfig,
  *,
  tokenizer: str | os.PathLike | None,
  generation: dict[str, Any] | None,
  max_positions: int,
  dtype: str,
  max_shard_bytes: int = 5 * 10**9,
  progress: Progress = Progress.QUIET,
) -> None:
  """Writes a folder that transformers' `AutoModelForCausalLM` reads.

  A rename creates the folder once it is complete. Every process of a job must call this; the main
  process writes.

  Args:
    folder: must not exist, or be empty.
    params: with any sharding.
    tokenizer: the folder of a tokenizer to copy; None writes only the weights.
    generation: content of generation_config.json (token ids, sampling defaults); None for no file.
    max_positions: the context length to write to config.json.
    dtype: dtype of the tensors: float32, bfloat16 or float16.
    max_shard_bytes: largest size of a safetensors file, which bounds the host's memory; a larger
      tensor gets its own file.
    progress: shows the bytes that were written.

  Raises:
    ValueError: transformers has no such architecture, or float16 can't hold the values.
  """
  folder = pathlib.Path(folder)
  if dtype not in hf.DTYPES.values():
    raise ValueError(f"dtype={dtype!r} can't be written; choose one of {list(hf.DTYPES.values())}")
  check_is_free(folder)
  value = hf_config.config_json(config, dtype=dtype, max_positions=max_positions)
  if generation is not None:
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    value |= {name: generation[name] for name in ids if name in generation}
  if tokenizer is None:
    _logger.warning("no tokenizer was given: %s gets only weights", folder)
  else:
    tokenizer_files.check_tokenizer(tokenizer)

  # Otherwise one process could write before another has checked that the folder is empty.
  distributed.barrier("save_pretrained begins")
  writes = distributed.is_main()
  temporary = folder.with_name(f".{folder.name}.tmp")
  if writes:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
  total = config.num_parameters * jnp.dtype(dtype).itemsize
  with progress.track(total, "writing", "bytes") as bar:
    _write_weights(temporary, params, config, jnp.dtype(dtype), max_shard_bytes, writes, bar)
  if writes:
    if tokenizer is not None:
      tokenizer_files.copy_tokenizer(tokenizer, temporary)
    if generation is not None:
      _write_json(temporary / tokenizer_files.GENERATION_FILE, generation)
    _write_json(temporary / hf_config.CONFIG_FILE, value)
    for file in temporary.iterdir():
      # safetensors creates files that only their owner may read.
      shutil.copymode(temporary / hf_config.CONFIG_FILE, file)
      with file.open("rb") as opened:
        os.fsync(opened.fileno())
    temporary.replace(folder)
  distributed.barrier("save_pretrained ends")


def _write_weights(
  folder: pathlib.Path,
  params: Any,
  config: LlamaConfig,
  dtype: np.dtype,
  max_shard_bytes: int,
  writes: bool,
  bar: Bar,
) -> None:
  """Writes the safetensors files and their index; processes that do not write only gather."""
  shards: list[list[HfTensor]] = []
  free = 0
  for tensor in hf_tensors(config):
    num_bytes = int(np.prod(tensor.shape)) * dtype.itemsize
    if num_bytes > free or not shards:
      shards.append([])
      free = max_shard_bytes
    shards[-1].append(tensor)
    free -= num_bytes
  weight_map = {}
  for index, tensors in enumerate(shards, 1):
    name = hf.WEIGHTS_FILE
    if len(shards) > 1:
      name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
    arrays = {}
    for tensor in tensors:
      array = _fetch(functools.reduce(dict.__getitem__, tensor.path, params), tensor.layer, dtype)
      if dtype == np.float16 and not np.isfinite(array).all():
        raise ValueError(f"float16 can't hold the values of {tensor.name}; choose bfloat16")
      bar.update(array.nbytes)
      if writes:
        arrays[tensor.name] = tensor.to_hf(array)
        weight_map[tensor.name] = name
    if writes:
      # transformers refuses a file without this metadata.
      safetensors.numpy.save_file(arrays, folder / name, metadata={"format": "pt"})
  if writes and len(shards) > 1:
    total = sum(int(np.prod(t.shape)) * dtype.itemsize for tensors in shards for t in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / hf.INDEX_FILE, index)


def _fetch(leaf: jax.Array, layer: int | None, dtype: np.dtype) -> np.ndarray:
  """Copies one layer of a parameter to the host, from the devices of all processes."""
  if leaf.is_fully_addressable:
    return np.asarray(_picker(None)(leaf, layer, dtype))
  # No process can read the others' devices: an all-gather gives each of them the whole layer.
  replicated = NamedSharding(leaf.sharding.mesh, PartitionSpec())
  return np.asarray(_picker(replicated)(leaf, layer, dtype).addressable_data(0))


@functools.cache  # one compilation per sharding, not one per call
def _picker(out_sharding: NamedSharding | None) -> Callable[..., jax.Array]:
  def pick(leaf: jax.Array, layer: int | jax.Array | None, dtype: np.dtype) -> jax.Array:
    if layer is not None:
      leaf = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    return leaf.astype(dtype)

  return jax.jit(pick, static_argnames="dtype", out_shardings=out_sharding)


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
