"""Our models out, as Hugging Face folders.

One file's tensors are on the host at a time.
"""

import functools
import json
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from selfimprove_jax import distributed
from selfimprove_jax.models import hf, hf_config
from selfimprove_jax.models.hf_names import hf_tensors
from selfimprove_jax.models.llama import LlamaConfig

_logger = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"


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
) -> None:
  """Writes a folder that transformers' `AutoModelForCausalLM` reads.

  The folder appears whole, by a rename. In a run of several processes all must call this, and the
  first one writes.

  Args:
    folder: must not exist, or be empty.
    params: sharded in any way.
    tokenizer: folder of the tokenizer to write beside; None writes weights alone.
    generation: content of generation_config.json (token ids, sampling defaults); None for no file.
    max_positions: context length that config.json names.
    dtype: of the tensors: float32, bfloat16 or float16.
    max_shard_bytes: of each safetensors file, and so of what the host holds; a larger tensor gets
      a file of its own.

  Raises:
    ValueError: transformers has no such architecture; `dtype` is unknown, or float16 can't hold the
      values; the folder is not empty; `tokenizer` holds none.
  """
  folder = pathlib.Path(folder)
  if dtype not in hf.DTYPES.values():
    raise ValueError(f"dtype={dtype!r} can't be written; choose one of {list(hf.DTYPES.values())}")
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"{folder} is there already; name a new folder or delete it")
  value = hf_config.config_json(config, dtype=dtype, max_positions=max_positions)
  if generation is not None:
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    value |= {name: generation[name] for name in ids if name in generation}
  if tokenizer is None:
    _logger.warning("no tokenizer was given: %s gets weights alone", folder)
  else:
    hf.read_tokenizer_path(tokenizer)

  distributed.barrier("save_pretrained begins")  # all have seen that the folder is free
  writes = distributed.is_main()
  temporary = folder.with_name(f".{folder.name}.tmp")
  if writes:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
  _write_weights(temporary, params, config, jnp.dtype(dtype), max_shard_bytes, writes)
  if writes:
    if tokenizer is not None:
      hf.copy_tokenizer(tokenizer, temporary)
    if generation is not None:
      _write_json(temporary / GENERATION_FILE, generation)
    _write_json(temporary / hf_config.CONFIG_FILE, value)
    for file in temporary.iterdir():
      # safetensors makes files that only their owner may read.
      shutil.copymode(temporary / hf_config.CONFIG_FILE, file)
      with file.open("rb") as opened:
        os.fsync(opened.fileno())
    temporary.replace(folder)
  distributed.barrier("save_pretrained ends")


def _write_weights(folder, params, config, dtype, max_shard_bytes, writes):
  shards, free = [], 0
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
      if writes:
        arrays[tensor.name] = tensor.to_hf(array)
        weight_map[tensor.name] = name
    if writes:
      # transformers reads no file without this note.
      safetensors.numpy.save_file(arrays, folder / name, metadata={"format": "pt"})
  if writes and len(shards) > 1:
    total = sum(int(np.prod(t.shape)) * dtype.itemsize for tensors in shards for t in tensors)
    _write_json(
      folder / hf.INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _fetch(leaf, layer, dtype):
  """One layer of a parameter on the host, whole, whichever process's devices hold its parts."""
  if leaf.is_fully_addressable:
    return np.asarray(_pick(leaf, layer, dtype))
  replicated = NamedSharding(leaf.sharding.mesh, PartitionSpec())
  return np.asarray(_pick_to(replicated)(leaf, layer, dtype).addressable_data(0))


def _pick_layer(leaf, layer, dtype):
  if layer is not None:
    leaf = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
  return leaf.astype(dtype)


_pick = jax.jit(_pick_layer, static_argnames="dtype")


@functools.cache
def _pick_to(sharding):
  return jax.jit(_pick_layer, static_argnames="dtype", out_shardings=sharding)


def _write_json(path, value):
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
