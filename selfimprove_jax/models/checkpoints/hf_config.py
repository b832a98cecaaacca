"""Converts Hugging Face's config.json to `LlamaConfig` and back.

A field that makes transformers compute something that our model does not is refused by name.
"""

import json
import os
import pathlib
from typing import Any

from selfimprove_jax.models.llama import LlamaConfig, RopeScaling

CONFIG_FILE = "config.json"
# transformers' defaults for fields that config.json leaves out.
_LLAMA = {
  "attention_bias": False,
  "hidden_act": "silu",
  "mlp_bias": False,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10_000.0,
  "tie_word_embeddings": False,
}
_QWEN = {**_LLAMA, "use_sliding_window": False}
# `Qwen3Model` is the bare decoder, as in Qwen3-Embedding.
_ABSENT = {
  "LlamaForCausalLM": _LLAMA,
  "Qwen2ForCausalLM": _QWEN,
  "Qwen3ForCausalLM": {**_QWEN, "head_dim": 128},
  "Qwen3Model": {**_QWEN, "head_dim": 128},
}
_REQUIRED = (
  "hidden_size",
  "intermediate_size",
  "max_position_embeddings",
  "num_attention_heads",
  "num_hidden_layers",
  "vocab_size",
)
_ROPE_SCALING = {
  "factor": "factor",
  "low_freq_factor": "low_freq_factor",
  "high_freq_factor": "high_freq_factor",
  "original_max_positions": "original_max_position_embeddings",
}


def read_json(path: pathlib.Path) -> Any:
  """Returns the content of a JSON file.

  Raises:
    ValueError: the file is missing, or is not JSON.
  """
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise ValueError(f"{path.parent} has no {path.name}") from None
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error


def read_config(folder: str | os.PathLike) -> LlamaConfig:
  """Returns the model that a Hugging Face folder's config.json describes.

  Supports Llama 3, 3.1, 3.2 and SmolLM2 (`LlamaForCausalLM`), Qwen2.5 (`Qwen2ForCausalLM`), Qwen3
  (`Qwen3ForCausalLM`) and its bare decoder (`Qwen3Model`, which has no head: its logits are
  meaningless). Fields that say how to compute (`dtype`, `remat`, ...) have their defaults.

  Raises:
    ValueError: no config.json, or a value in it that our model does not compute.
  """
  path = pathlib.Path(folder) / CONFIG_FILE
  raw = read_json(path)
  architecture = ", ".join(raw.get("architectures") or [])
  if architecture not in _ABSENT:
    raise ValueError(f"{path} has architectures={architecture!r}; supported are {list(_ABSENT)}")
  raw = {**_ABSENT[architecture], **{k: v for k, v in raw.items() if v is not None}}
  missing = [name for name in _REQUIRED if name not in raw]
  if missing:
    raise ValueError(f"{path} has no {', '.join(missing)}")
  _refuse_unsupported(path, raw)
  theta, scaling = _read_rope(path, raw)
  num_heads = raw["num_attention_heads"]
  return LlamaConfig(
    vocab_size=raw["vocab_size"],
    num_layers=raw["num_hidden_layers"],
    embed_dim=raw["hidden_size"],
    mlp_dim=raw["intermediate_size"],
    num_heads=num_heads,
    num_kv_heads=raw.get("num_key_value_heads", num_heads),
    head_dim=raw.get("head_dim", raw["hidden_size"] // num_heads),
    qk_norm=architecture.startswith("Qwen3"),
    qkv_bias=architecture.startswith("Qwen2"),
    tie_embeddings=raw["tie_word_embeddings"] or architecture == "Qwen3Model",
    rope_theta=float(theta),
    rope_scaling=scaling,
    norm_eps=raw["rms_norm_eps"],
  )


def _refuse_unsupported(path: pathlib.Path, raw: dict[str, Any]) -> None:
  wanted = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
  }
  for name, value in wanted.items():
    if name in raw and raw[name] != value:
      raise ValueError(f"{path} has {name}={raw[name]!r}; supported is {value!r}")
  others = sorted(set(raw.get("layer_types", ())) - {"full_attention"})
  if others:
    raise ValueError(f"{path} has layer_types {others}; supported is 'full_attention'")
  if "quantization_config" in raw:
    method = raw["quantization_config"].get("quant_method")
    raise ValueError(
      f"{path} has quantization_config of quant_method {method!r}; supported are weights in "
      f"float32, bfloat16 and float16"
    )


def _read_rope(path: pathlib.Path, raw: dict[str, Any]) -> tuple[float, RopeScaling]:
  """Returns theta and the scaling."""
  # transformers 5 writes both into `rope_parameters`, transformers 4 separate fields.
  rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
  rope_type = rope.get("rope_type", rope.get("type", "default"))
  rotary_factor = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
  if rotary_factor != 1.0:
    raise ValueError(f"{path} has partial_rotary_factor={rotary_factor}; supported is 1.0")
  theta = rope.get("rope_theta", raw["rope_theta"])
  if rope_type == "default":
    return theta, RopeScaling()
  if rope_type != "llama3":
    raise ValueError(f"{path} has rope_type={rope_type!r}; supported are 'default' and 'llama3'")
  missing = [theirs for theirs in _ROPE_SCALING.values() if theirs not in rope]
  if missing:
    raise ValueError(f"{path} has rope_type='llama3' without {', '.join(missing)}")
  return theta, RopeScaling(**{ours: rope[theirs] for ours, theirs in _ROPE_SCALING.items()})


def config_json(c: LlamaConfig, *, dtype: str, max_positions: int) -> dict[str, Any]:
  """Returns the content of config.json, in a form that transformers 4 and 5 read.

  A model with QK-norm is a Qwen3, one with biases a Qwen2, any other a Llama.

  Raises:
    ValueError: transformers has no architecture for the model.
  """
  if c.qk_norm and c.qkv_bias:
    raise ValueError(
      "transformers has no architecture with qk_norm=True and qkv_bias=True: Qwen3 has the former, "
      "Qwen2 the latter"
    )
  kind = "Qwen3" if c.qk_norm else "Qwen2" if c.qkv_bias else "Llama"
  if kind == "Llama" and c.embed_dim % c.num_heads:
    raise ValueError(
      f"embed_dim={c.embed_dim} is not a multiple of num_heads={c.num_heads}, which transformers' "
      f"Llama requires"
    )
  value = {
    "architectures": [f"{kind}ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": c.head_dim,
    "hidden_act": "silu",
    "hidden_size": c.embed_dim,
    "intermediate_size": c.mlp_dim,
    "max_position_embeddings": max_positions,
    "model_type": kind.lower(),
    "num_attention_heads": c.num_heads,
    "num_hidden_layers": c.num_layers,
    "num_key_value_heads": c.num_kv_heads,
    "rms_norm_eps": c.norm_eps,
    "rope_theta": c.rope_theta,
    "tie_word_embeddings": c.tie_embeddings,
    "torch_dtype": dtype,
    "vocab_size": c.vocab_size,
  }
  if kind == "Llama":
    value["mlp_bias"] = False
  else:
    value["use_sliding_window"] = False
  if c.rope_scaling != RopeScaling():
    scaling = {theirs: getattr(c.rope_scaling, ours) for ours, theirs in _ROPE_SCALING.items()}
    value["rope_scaling"] = {"rope_type": "llama3", **scaling}
  return value
