"""Loads models from GGUF files, llama.cpp's format; needs the extra `gguf`.

Supports the architectures llama, qwen2 and qwen3 with weights in F32, F16, BF16, Q8_0 and Q4_1,
which become plain floating-point parameters.
"""

import functools
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import selfimprove_jax.models.checkpoints.gguf_tokenizer as gguf_tokenizer
import selfimprove_jax.models.checkpoints.tokenizer_files as tokenizer_files
from selfimprove_jax.models.checkpoints.checkpoint import Checkpoint
from selfimprove_jax.models.checkpoints.hf_names import (
  HfTensor,
  check_shapes,
  hf_tensors,
  tensors_by_path,
)
from selfimprove_jax.models.checkpoints.tokenizer_files import TokenizerFiles
from selfimprove_jax.models.llama import (
  Llama,
  LlamaConfig,
  RopeScaling,
  abstract_params,
  rope_frequencies,
)

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_1")
# Hugging Face's names after `model.layers.N.` -> llama.cpp's names after `blk.N.`.
_LAYER_NAMES = {
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}
_OTHER_NAMES = {
  "model.embed_tokens.weight": "token_embd.weight",
  "model.norm.weight": "output_norm.weight",
  "lm_head.weight": "output.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"


@functools.lru_cache(maxsize=1)  # reading the metadata takes seconds
def _open(path: str, modified: int) -> Any:
  del modified  # a part of the key, so that a file that was replaced is read again
  try:
    import gguf
  except ImportError:
    raise ImportError(
      "reading a .gguf file needs the package gguf: pip install 'selfimprove_jax[gguf]'"
    ) from None
  try:
    return gguf.GGUFReader(path)
  except ValueError as error:
    raise ValueError(f"{path} is not a whole GGUF file: {error}") from error


class _File:
  """The metadata and tensors of a GGUF file."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._reader = _open(str(path), path.stat().st_mtime_ns)
    self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
    self.architecture = self["general.architecture"]
    if self.architecture not in _ARCHITECTURES:
      raise ValueError(
        f"{path} has architecture {self.architecture!r}; supported are {_ARCHITECTURES}"
      )

  def get(self, key: str, default: Any = None) -> Any:
    """Returns a metadata value; `{arch}` in the key stands for the architecture."""
    field = self._reader.fields.get(key.replace("{arch}", getattr(self, "architecture", "")))
    return default if field is None else field.contents()

  def __getitem__(self, key: str) -> Any:
    value = self.get(key)
    if value is None:
      raise ValueError(f"{self.path} has no {key}")
    return value

  def starting_with(self, prefix: str) -> dict[str, Any]:
    fields = self._reader.fields
    return {k: field.contents() for k, field in fields.items() if k.startswith(prefix)}

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns a tensor's shape with the outermost axis first; GGUF stores it reversed."""
    return tuple(int(size) for size in reversed(self.tensors[name].shape))

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor in float32."""
    import gguf

    tensor = self.tensors[name]
    return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))


class GgufCheckpoint(Checkpoint):
  """A .gguf file with a model and its tokenizer."""

  kind = "gguf"

  @property
  def _file(self) -> _File:
    return _File(self.path)

  @functools.cached_property
  def config(self) -> LlamaConfig:
    return _read_config(self._file)

  @property
  def max_positions(self) -> int:
    return self._file["{arch}.context_length"]

  def load_params(self, mesh: Mesh, config: LlamaConfig) -> Any:
    file, tensors = self._file, hf_tensors(config)
    _check_tensors(file, tensors)
    by_path = tensors_by_path(tensors)

    def load(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
      layers = by_path[tuple(entry.key for entry in path)]
      if layers[0].layer is None:
        whole = _read(file, layers[0], leaf.dtype)
      else:
        whole = np.empty(leaf.shape, leaf.dtype)
        for out, tensor in zip(whole, layers, strict=True):
          out[...] = _read(file, tensor, leaf.dtype)
      array = jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: whole[index], dtype=leaf.dtype
      )
      # Transfers are asynchronous: without this, the host would hold several parameters at a time.
      return jax.block_until_ready(array)

    return jax.tree.map_with_path(load, abstract_params(Llama(config), mesh))

  def _paths(self) -> Iterable[pathlib.Path]:
    return [self.path]

  def tokenizer_files(self) -> TokenizerFiles:
    return gguf_tokenizer.read_tokenizer(self._file.starting_with("tokenizer."), self.path)

  def copy_tokenizer(self, folder: str | os.PathLike) -> None:
    tokenizer_files.write_tokenizer(self.tokenizer_files(), folder)


def _read_config(file: _File) -> LlamaConfig:
  """Returns the model that a file's metadata describe."""
  for key in ("expert_count", "attention.sliding_window"):
    if file.get(f"{{arch}}.{key}"):
      raise ValueError(
        f"{file.path} has {file.architecture}.{key}={file[f'{{arch}}.{key}']}; our model has none"
      )
  scaling_type = file.get("{arch}.rope.scaling.type", "none")
  if scaling_type != "none":
    raise ValueError(
      f"{file.path} has {file.architecture}.rope.scaling.type={scaling_type!r}; supported is 'none'"
    )
  embed_dim, num_heads = file["{arch}.embedding_length"], file["{arch}.attention.head_count"]
  head_dim = file.get("{arch}.attention.key_length", embed_dim // num_heads)
  rotary_dim = file.get("{arch}.rope.dimension_count", head_dim)
  if rotary_dim != head_dim:
    raise ValueError(
      f"{file.path} has {file.architecture}.rope.dimension_count={rotary_dim}; supported is "
      f"{head_dim}, the whole head"
    )
  theta = _shortest(file.get("{arch}.rope.freq_base", 10_000.0))
  if "token_embd.weight" not in file.tensors:
    raise ValueError(f"{file.path} lacks token_embd.weight")
  return LlamaConfig(
    vocab_size=file.shape("token_embd.weight")[0],
    num_layers=file["{arch}.block_count"],
    embed_dim=embed_dim,
    mlp_dim=file["{arch}.feed_forward_length"],
    num_heads=num_heads,
    num_kv_heads=file["{arch}.attention.head_count_kv"],
    head_dim=head_dim,
    qk_norm=file.architecture == "qwen3",
    qkv_bias=file.architecture == "qwen2",
    tie_embeddings="output.weight" not in file.tensors,
    rope_theta=theta,
    rope_scaling=_rope_scaling(file, head_dim, theta),
    norm_eps=_shortest(file["{arch}.attention.layer_norm_rms_epsilon"]),
  )


def _shortest(value: float) -> float:
  """Returns 1e-05 for the float32 0.0000099999997: the decimal number that was meant."""
  return float(str(np.float32(value)))


def _rope_scaling(file: _File, head_dim: int, theta: float) -> RopeScaling:
  """Recognizes Llama 3.1's RoPE scaling, which GGUF stores as one factor per frequency.

  Only the parameters of Llama 3.1 and 3.2 are recognized: a pretraining context of 8192, and
  wavelengths bounded by 1 and 4.
  """
  if _ROPE_FACTORS not in file.tensors:
    return RopeScaling()
  factors_h = file.read(_ROPE_FACTORS)
  scaling = RopeScaling(  # the lowest frequencies are divided by the whole factor
    factor=_shortest(float(factors_h.max())),
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=8192,
  )
  unscaled_h = rope_frequencies(head_dim, theta, RopeScaling())
  scaled_h = rope_frequencies(head_dim, theta, scaling)
  if factors_h.shape != scaled_h.shape or not np.allclose(
    unscaled_h / scaled_h, factors_h, rtol=1e-4
  ):
    raise ValueError(f"{file.path} has a {_ROPE_FACTORS} that is not Llama 3.1's RoPE scaling")
  return scaling


def _read(file: _File, tensor: HfTensor, dtype: np.dtype) -> np.ndarray:
  """Reads one layer of our parameter."""
  array = file.read(_gguf_name(tensor.name))
  if file.architecture == "llama" and tensor.path[-1] in ("wq_DNH", "wk_DKH"):
    # llama.cpp rotates neighboring dimensions (0, 1), (2, 3), ... of llama's heads and permutes the
    # weights for it; our RoPE, like Hugging Face's, rotates dimension i with i + H / 2.
    heads, width = tensor.sizes[tensor.axes[0][0]], tensor.sizes["H"]
    pairs = array.reshape(heads, width // 2, 2, -1)
    array = pairs.swapaxes(1, 2).reshape(array.shape)
  whole = tuple(slice(0, tensor.sizes[letter]) for letter in tensor.ours)
  return tensor.read_ours(lambda slices: array[slices], whole).astype(dtype)


def _gguf_name(name: str) -> str:
  """Maps `model.layers.3.self_attn.q_proj.weight` to `blk.3.attn_q.weight`."""
  if name in _OTHER_NAMES:
    return _OTHER_NAMES[name]
  _, _, layer, inner = name.split(".", 3)
  inner, kind = inner.rsplit(".", 1)
  return f"blk.{layer}.{_LAYER_NAMES[inner]}.{kind}"


def _check_tensors(file: _File, tensors: list[HfTensor]) -> None:
  expected = {_gguf_name(tensor.name): tensor.shape for tensor in tensors}
  found = {name: file.shape(name) for name in file.tensors if name != _ROPE_FACTORS}
  check_shapes(file.path, found, expected)
  for name in expected:
    quantization = file.tensors[name].tensor_type.name
    if quantization not in _TYPES:
      raise ValueError(f"{file.path} has {name} in {quantization}; supported are {_TYPES}")
