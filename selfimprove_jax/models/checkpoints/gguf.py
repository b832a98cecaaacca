"""Loads models from GGUF files, llama.cpp's format; needs the extra `gguf`.

Supports the architectures llama, qwen2 and qwen3 with weights in F32, F16, BF16, Q8_0 and Q4_1,
which become plain floating-point parameters.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import selfimprove_jax.models.checkpoints.gguf_file as gguf_file
import selfimprove_jax.models.checkpoints.gguf_tokenizer as gguf_tokenizer
import selfimprove_jax.models.checkpoints.hf_config as hf_config
import selfimprove_jax.models.checkpoints.hf_names as hf_names
import selfimprove_jax.models.checkpoints.tokenizer_files as tokenizer_files
from selfimprove_jax.models.checkpoints.checkpoint import Checkpoint
from selfimprove_jax.models.checkpoints.hf_names import HfTensor
from selfimprove_jax.models.checkpoints.tokenizer_files import TokenizerFiles
from selfimprove_jax.models.llama import LlamaConfig, RopeScaling, rope_frequencies
from selfimprove_jax.runtime.progress import Progress

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_1")
# Hugging Face's names after `model.layers.N.` -> llama.cpp's after `blk.N.`.
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
# Our names -> the keys of a file, which follow the architecture's name.
_SIZES = {
  "num_layers": "block_count",
  "embed_dim": "embedding_length",
  "mlp_dim": "feed_forward_length",
  "num_heads": "attention.head_count",
}
_NAMES = {
  **_SIZES,
  "num_kv_heads": "attention.head_count_kv",
  "head_dim": "attention.key_length",
  "norm_eps": "attention.layer_norm_rms_epsilon",
  "rope_theta": "rope.freq_base",
}
# Keys that change nothing that we compute.
_HARMLESS = (
  *("context_length", "pooling_type", "tensor_data_layout", "vocab_size"),
  *("rope.scaling.finetuned", "rope.scaling.original_context_length"),
)
# Keys that change what a model computes, with the values that leave it as our model is. llama.cpp
# takes a factor without a type as linear scaling.
_OFF = (0.0, 1.0)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  "attention.causal": (True,),
  "expert_count": (0,),
  "expert_used_count": (0,),
  **dict.fromkeys(("attention.sliding_window", "attention.max_alibi_bias"), (0,)),
  **dict.fromkeys(("attention.clamp_kqv", "attention.scale"), (0.0,)),
  **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (0.0,)),
  **dict.fromkeys(("embedding_scale", "logit_scale", "residual_scale"), _OFF),
  **dict.fromkeys(("rope.scale_linear", "rope.scaling.factor", "rope.scaling.attn_factor"), _OFF),
  "rope.scaling.type": ("none", "linear"),  # a factor of 1
}


class _File:
  """The metadata and tensors of a GGUF file with a model that we may compute."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    file = gguf_file.open_file(path, path.stat().st_mtime_ns)
    self.fields, self.tensors, self.read = file.fields, file.tensors, file.read
    self.architecture = self.fields.get("general.architecture")
    if self.architecture not in _ARCHITECTURES:
      raise ValueError(
        f"{path} has architecture {self.architecture!r}; supported are {_ARCHITECTURES}"
      )

  def get(self, key: str, default: Any = None) -> Any:
    """Returns the value of a key of the architecture."""
    return self.fields.get(f"{self.architecture}.{key}", default)

  def __getitem__(self, key: str) -> Any:
    value = self.get(key)
    if value is None:
      raise ValueError(f"{self.path} has no {self.architecture}.{key}")
    return value


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
    return hf_config.check_size(self.path, "context_length", self._file["context_length"])

  def load_params(
    self, mesh: Mesh, config: LlamaConfig, *, progress: Progress = Progress.QUIET
  ) -> Any:
    file = self._file
    hf_names.check_layers(file.path, file.tensors, config)
    tensors = hf_names.hf_tensors(config)
    _check_tensors(file, tensors)

    def make_reader(layers: list[HfTensor], leaf: jax.ShapeDtypeStruct) -> hf_names.Reader:
      # Dequantized once, not once per block: quantized tensors cannot be read in slices.
      whole = np.empty(leaf.shape, leaf.dtype)
      parts = [whole] if layers[0].layer is None else whole
      for out, tensor in zip(parts, layers, strict=True):
        out[...] = _read(file, tensor)
      return whole.__getitem__

    return hf_names.place_params(config, mesh, tensors, make_reader, progress)

  def _paths(self) -> Iterable[pathlib.Path]:
    return [self.path]

  def tokenizer_files(self) -> TokenizerFiles:
    fields = self._file.fields.items()
    metadata = {name: value for name, value in fields if name.startswith("tokenizer.")}
    return gguf_tokenizer.read_tokenizer(metadata, self.path)

  def copy_tokenizer(self, folder: str | os.PathLike) -> None:
    tokenizer_files.write_tokenizer(self.tokenizer_files(), folder)


def _read_config(file: _File) -> LlamaConfig:
  _refuse_unsupported(file)
  if "token_embd.weight" not in file.tensors:
    raise ValueError(f"{file.path} lacks token_embd.weight")
  head_dim = _head_dim(file)
  theta = _shortest(file.get("rope.freq_base", 10_000.0))
  values = {ours: file[key] for ours, key in _SIZES.items()}
  values |= {
    "vocab_size": file.tensors["token_embd.weight"].shape[0],
    "num_kv_heads": file.get("attention.head_count_kv", values["num_heads"]),
    "head_dim": head_dim,
    "qk_norm": file.architecture == "qwen3",
    "qkv_bias": file.architecture == "qwen2",
    "tie_embeddings": "output.weight" not in file.tensors,
    "rope_theta": theta,
    "norm_eps": _shortest(file["attention.layer_norm_rms_epsilon"]),
  }
  config = hf_config.make_config(
    file.path, values, {k: f"{file.architecture}.{v}" for k, v in _NAMES.items()}
  )
  return dataclasses.replace(config, rope_scaling=_rope_scaling(file, config))


def _head_dim(file: _File) -> Any:
  width, heads = file["embedding_length"], file["attention.head_count"]
  return file.get("attention.key_length", hf_config.quotient(width, heads))


def _refuse_unsupported(file: _File) -> None:
  """Raises ValueError for a key that our model would not obey."""
  head_dim = _head_dim(file)
  neutral = _NEUTRAL | dict.fromkeys(
    ("attention.value_length", "rope.dimension_count"), (head_dim,)
  )
  prefix = f"{file.architecture}."
  found = {k.removeprefix(prefix): v for k, v in file.fields.items() if k.startswith(prefix)}
  for key, allowed in neutral.items():
    if key in found and found[key] not in allowed:
      supported = " or ".join(map(repr, allowed))
      raise ValueError(f"{file.path} has {prefix}{key}={found[key]!r}; supported is {supported}")
  if unknown := found.keys() - neutral.keys() - {*_NAMES.values(), *_HARMLESS}:
    raise ValueError(
      f"{file.path} has {', '.join(f'{prefix}{key}={found[key]!r}' for key in sorted(unknown))}, "
      f"which may change what the model computes; it is not supported"
    )
  if (parts := file.fields.get("split.count", 1)) not in (0, 1):
    raise ValueError(f"{file.path} is one of {parts} parts of a model; merge them into one file")


def _shortest(value: Any) -> Any:
  """Returns the shortest decimal that rounds to a float32: 1e-05 for 0.0000099999997."""
  return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(file: _File, config: LlamaConfig) -> RopeScaling:
  """Recognizes Llama 3.1's and 3.2's RoPE scaling, which GGUF stores as a factor per frequency."""
  if _ROPE_FACTORS not in file.tensors:
    return RopeScaling()
  tensor, theta = file.tensors[_ROPE_FACTORS], config.rope_theta
  if (tensor.shape, tensor.type.name) == ((config.head_dim // 2,), "F32"):
    factors_h = file.read(_ROPE_FACTORS)
    if np.isfinite(factors_h).all() and factors_h.max() > 0:
      scaling = RopeScaling(  # the lowest frequencies are divided by the whole factor
        factor=_shortest(float(factors_h.max())),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
      )
      unscaled_h = rope_frequencies(config.head_dim, theta, RopeScaling())
      scaled_h = rope_frequencies(config.head_dim, theta, scaling)
      if np.allclose(unscaled_h / scaled_h, factors_h, rtol=1e-4):
        return scaling
  raise ValueError(f"{file.path} has a {_ROPE_FACTORS} that is not Llama 3.1's RoPE scaling")


def _read(file: _File, tensor: HfTensor) -> np.ndarray:
  """Reads one layer of our parameter in float32."""
  array = file.read(_gguf_name(tensor.name))
  if file.architecture == "llama" and tensor.path[-1] in ("wq_DNH", "wk_DKH"):
    # llama.cpp's RoPE rotates neighboring dimensions (0, 1), (2, 3), ... of llama's heads, and its
    # weights are permuted to match; ours, like Hugging Face's, rotates dimension i with i + H / 2.
    heads, width = tensor.sizes[tensor.axes[0][0]], tensor.sizes["H"]
    pairs = array.reshape(heads, width // 2, 2, -1)
    array = pairs.swapaxes(1, 2).reshape(array.shape)
  everything = tuple(slice(0, tensor.sizes[letter]) for letter in tensor.ours)
  return tensor.read_ours(array.__getitem__, everything)


def _gguf_name(name: str) -> str:
  """Maps `model.layers.3.self_attn.q_proj.weight` to `blk.3.attn_q.weight`."""
  if name in _OTHER_NAMES:
    return _OTHER_NAMES[name]
  _, _, layer, inner = name.split(".", 3)
  inner, kind = inner.rsplit(".", 1)
  return f"blk.{layer}.{_LAYER_NAMES[inner]}.{kind}"


def _check_tensors(file: _File, tensors: list[HfTensor]) -> None:
  expected = {_gguf_name(tensor.name): tensor.shape for tensor in tensors}
  found = {name: t.shape for name, t in file.tensors.items() if name != _ROPE_FACTORS}
  hf_names.check_shapes(file.path, found, expected)
  for name in expected:
    quantization = file.tensors[name].type.name
    if quantization not in _TYPES:
      raise ValueError(f"{file.path} has {name} in {quantization}; supported are {_TYPES}")
