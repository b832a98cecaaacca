"""Models of GGUF files (llama.cpp's format), in; needs the extra `gguf`.

Supported are the architectures llama, qwen2 and qwen3, with weights in F32, F16, BF16, Q8_0 and
Q4_1, which become plain floating-point parameters.
"""

import functools
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from selfimprove_jax.models.hf_names import HfTensor, hf_tensors
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.models.rope import RopeScaling, rope_frequencies

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_1")
# Names after `blk.N.`, by those after Hugging Face's `model.layers.N.`.
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
_LOADING_NOTES = ("backend", "is_local", "local_files_only")


@functools.lru_cache(maxsize=1)  # its metadata alone take seconds
def _open(path: str, modified: int):
  del modified  # part of the key: a file that was replaced is read again
  try:
    import gguf
  except ImportError:
    raise ImportError(
      "reading a .gguf file needs the package gguf: pip install 'selfimprove_jax[gguf]'"
    ) from None
  try:
    return gguf.GGUFReader(path)
  except ValueError as error:
    raise ValueError(f"{path} is no whole GGUF file: {error}") from error


class _File:
  """A GGUF file's metadata and tensors."""

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self._reader = _open(str(self.path), self.path.stat().st_mtime_ns)
    self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

  def has(self, key: str) -> bool:
    return key in self._reader.fields

  def __getitem__(self, key: str) -> Any:
    if key not in self._reader.fields:
      raise ValueError(f"{self.path} has no {key}")
    return self._reader.fields[key].contents()

  def shape(self, name: str) -> tuple[int, ...]:
    """Outermost axis first, as everywhere but in GGUF."""
    return tuple(int(size) for size in reversed(self.tensors[name].shape))

  def read(self, name: str) -> np.ndarray:
    """A tensor in float32."""
    import gguf

    tensor = self.tensors[name]
    return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))


def _architecture(file):
  name = file["general.architecture"]
  if name not in _ARCHITECTURES:
    raise ValueError(f"{file.path} is of architecture {name!r}; supported are {_ARCHITECTURES}")
  return name


def read_config(path: str | os.PathLike) -> LlamaConfig:
  """The model that a GGUF file's metadata describe.

  Llama 3.1's RoPE scaling lies in GGUF as a factor for each frequency; it is recognised where it is
  that of Llama 3.1 and 3.2 (contexts pretrained with 8192, wavelengths bounded by 1 and 4).

  Raises:
    ValueError: a value that our model does not compute; it is named.
  """
  file = _File(path)
  arch = _architecture(file)
  for key in ("expert_count", "attention.sliding_window"):
    if file.has(f"{arch}.{key}") and file[f"{arch}.{key}"]:
      raise ValueError(f"{path} has {arch}.{key}={file[f'{arch}.{key}']}; supported is none")
  scaling_type = f"{arch}.rope.scaling.type"
  if file.has(scaling_type) and file[scaling_type] != "none":
    raise ValueError(f"{path} has {scaling_type}={file[scaling_type]!r}; supported is 'none'")
  embed_dim, num_heads = file[f"{arch}.embedding_length"], file[f"{arch}.attention.head_count"]
  head_dim = embed_dim // num_heads
  if file.has(f"{arch}.attention.key_length"):
    head_dim = file[f"{arch}.attention.key_length"]
  rotary_dim = f"{arch}.rope.dimension_count"
  if file.has(rotary_dim) and file[rotary_dim] != head_dim:
    raise ValueError(f"{path} has {rotary_dim}={file[rotary_dim]}; supported is {head_dim}, all")
  theta = 10_000.0
  if file.has(f"{arch}.rope.freq_base"):
    theta = _shortest(file[f"{arch}.rope.freq_base"])
  if "token_embd.weight" not in file.tensors:
    raise ValueError(f"{path} lacks token_embd.weight")
  return LlamaConfig(
    vocab_size=file.shape("token_embd.weight")[0],
    num_layers=file[f"{arch}.block_count"],
    embed_dim=embed_dim,
    mlp_dim=file[f"{arch}.feed_forward_length"],
    num_heads=num_heads,
    num_kv_heads=file[f"{arch}.attention.head_count_kv"],
    head_dim=head_dim,
    qk_norm=arch == "qwen3",
    qkv_bias=arch == "qwen2",
    tie_embeddings="output.weight" not in file.tensors,
    rope_theta=theta,
    rope_scaling=_rope_scaling(file, head_dim, theta),
    norm_eps=_shortest(file[f"{arch}.attention.layer_norm_rms_epsilon"]),
  )


def read_max_positions(path: str | os.PathLike) -> int:
  """The context length that a GGUF file names."""
  file = _File(path)
  return file[f"{_architecture(file)}.context_length"]


def _shortest(value):
  """1e-05 of the float32 0.0000099999997."""
  return float(str(np.float32(value)))


def _rope_scaling(file, head_dim, theta):
  if _ROPE_FACTORS not in file.tensors:
    return None
  factors_h = file.read(_ROPE_FACTORS)
  scaling = RopeScaling(_shortest(factors_h.max()), 1.0, 4.0, 8192)
  unscaled_h = rope_frequencies(head_dim, theta, None)
  scaled_h = rope_frequencies(head_dim, theta, scaling)
  if factors_h.shape != scaled_h.shape or not np.allclose(
    unscaled_h / scaled_h, factors_h, rtol=1e-4
  ):
    raise ValueError(f"{file.path} has a {_ROPE_FACTORS} that is not Llama 3.1's RoPE scaling")
  return scaling


def load_params(path: str | os.PathLike, *, config: LlamaConfig, abstract: Any) -> Any:
  """The parameters in a GGUF file, dequantised; one of ours is on the host at a time.

  llama.cpp keeps the q and k of architecture llama for a RoPE of neighbouring pairs; they are put
  back in the order of Hugging Face's.

  Args:
    config: of `read_config`.
    abstract: shapes, dtypes and shardings of the parameters of `config`.

  Raises:
    ValueError: a tensor is missing, is one too many, or has another shape or an unsupported type.
  """
  file = _File(path)
  tensors = hf_tensors(config)
  _check_tensors(file, tensors)
  interleaved = _architecture(file) == "llama"
  by_path: dict[tuple[str, ...], list[HfTensor]] = {}
  for tensor in tensors:
    by_path.setdefault(tensor.path, []).append(tensor)

  def read(tensor, dtype):
    array = file.read(gguf_name(tensor.name))
    if interleaved and tensor.path[-1] in ("wq_DNH", "wk_DKH"):
      heads, width = tensor.sizes[tensor.axes[0][0]], tensor.sizes["H"]
      pairs = array.reshape(heads, width // 2, 2, -1)
      array = pairs.swapaxes(1, 2).reshape(array.shape)
    whole = tuple(slice(0, tensor.sizes[letter]) for letter in tensor.ours)
    return tensor.read_ours(lambda slices: array[slices], whole).astype(dtype)

  def load(path_of_leaf, leaf):
    layers = by_path[tuple(entry.key for entry in path_of_leaf)]
    if layers[0].layer is None:
      whole = read(layers[0], leaf.dtype)
    else:
      whole = np.empty(leaf.shape, leaf.dtype)
      for out, tensor in zip(whole, layers, strict=True):
        out[...] = read(tensor, leaf.dtype)
    array = jax.make_array_from_callback(
      leaf.shape, leaf.sharding, lambda index: whole[index], dtype=leaf.dtype
    )
    return jax.block_until_ready(array)

  return jax.tree.map_with_path(load, abstract)


def gguf_name(name: str) -> str:
  """`blk.3.attn_q.weight` of `model.layers.3.self_attn.q_proj.weight`."""
  if name in _OTHER_NAMES:
    return _OTHER_NAMES[name]
  _, _, layer, inner = name.split(".", 3)
  inner, kind = inner.rsplit(".", 1)
  return f"blk.{layer}.{_LAYER_NAMES[inner]}.{kind}"


def _check_tensors(file, tensors):
  expected = {gguf_name(tensor.name): tensor.shape for tensor in tensors}
  missing = sorted(set(expected) - set(file.tensors))
  if missing:
    raise ValueError(f"{file.path} lacks {', '.join(missing[:8])}, {len(missing)} tensors in all")
  extra = sorted(set(file.tensors) - set(expected) - {_ROPE_FACTORS})
  if extra:
    raise ValueError(f"{file.path} has tensors that the model lacks: {', '.join(extra[:8])}")
  for name, shape in expected.items():
    if file.shape(name) != shape:
      raise ValueError(f"{file.path} has {name} {file.shape(name)} instead of {shape}")
    quantization = file.tensors[name].tensor_type.name
    if quantization not in _TYPES:
      raise ValueError(f"{file.path} has {name} in {quantization}; supported are {_TYPES}")


def save_tokenizer(path: str | os.PathLike, folder: str | os.PathLike) -> None:
  """Writes the tokenizer in a GGUF file, chat template included, as Hugging Face's files."""
  import transformers

  path, folder = pathlib.Path(path), pathlib.Path(folder)
  _File(path)  # says what is wrong with the file, or that the package is missing
  tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
  tokenizer.save_pretrained(folder)
  # transformers 5's own class and notes on how it was loaded: version 4 knows neither.
  config_file = folder / "tokenizer_config.json"
  config = json.loads(config_file.read_text(encoding="utf-8"))
  config = {name: config[name] for name in config if name not in _LOADING_NOTES}
  config["tokenizer_class"] = "PreTrainedTokenizerFast"
  config_file.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
