"""Converts Hugging Face's config.json to `LlamaConfig` and back.

Rejects fields with which transformers would compute something that our model does not.
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from selfimprove_jax.models.llama import LlamaConfig, RopeScaling
from selfimprove_jax.runtime.config import parse

T = TypeVar("T")
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
# Our names -> Hugging Face's.
_SIZES = {
  "vocab_size": "vocab_size",
  "num_layers": "num_hidden_layers",
  "embed_dim": "hidden_size",
  "mlp_dim": "intermediate_size",
  "num_heads": "num_attention_heads",
}
_NAMES = {
  **_SIZES,
  "num_kv_heads": "num_key_value_heads",
  "norm_eps": "rms_norm_eps",
  "tie_embeddings": "tie_word_embeddings",
}
# Fields that change what a model computes, with the values that leave it as our model is. Those
# below the first are no fields of these architectures in transformers: a file that sets one was
# made for other code.
_OFF, _ONE = (False, 0), (1.0,)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  "hidden_act": ("silu",),
  **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), _OFF),
  "partial_rotary_factor": _ONE,
  **dict.fromkeys(("attention_multiplier", "attn_logit_softcapping"), ()),
  **dict.fromkeys(("clip_qkv", "final_logit_softcapping", "query_pre_attn_scalar"), ()),
  **dict.fromkeys(("embedding_multiplier", "logit_scale", "logits_scaling"), _ONE),
  **dict.fromkeys(("residual_multiplier", "scale_depth", "scale_emb"), _ONE),
  **dict.fromkeys(("alibi", "parallel_residual", "rope_interleaved", "use_mrope"), _OFF),
  **dict.fromkeys(("no_rope_layers", "num_experts", "num_local_experts", "n_routed_experts"), _OFF),
  **dict.fromkeys(("use_parallel_residual", "scale_attn_by_inverse_layer_idx"), _OFF),
}
_FULL = "full_attention"
_ROPE_SCALING = {
  "factor": "factor",
  "low_freq_factor": "low_freq_factor",
  "high_freq_factor": "high_freq_factor",
  "original_max_positions": "original_max_position_embeddings",
}


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object in a JSON file; raises ValueError if it is missing or holds no object."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise ValueError(f"{path.parent} has no {path.name}") from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  except OSError as error:  # a folder of this name
    raise ValueError(f"{path} can't be read: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} holds {str(value)[:40]!r} instead of an object in braces")
  return value


def read_config(folder: str | os.PathLike) -> LlamaConfig:
  """Returns the model that a Hugging Face folder's config.json describes.

  Supports Llama 3, 3.1, 3.2 and SmolLM2 (`LlamaForCausalLM`), Qwen2.5 (`Qwen2ForCausalLM`), Qwen3
  (`Qwen3ForCausalLM`) and its bare decoder (`Qwen3Model`, which has no head: its logits are
  meaningless). Fields that set how to compute (`dtype`, `remat`, ...) have their defaults.
  """
  path = pathlib.Path(folder) / CONFIG_FILE
  raw = read_json(path)
  architectures = raw.get("architectures") or []
  architecture = architectures[0] if isinstance(architectures, list) and architectures else ""
  if architectures != [architecture] or architecture not in _ABSENT:
    raise ValueError(f"{path} has architectures={architectures!r}; supported are {list(_ABSENT)}")
  raw = {**_ABSENT[architecture], **{k: v for k, v in raw.items() if v is not None}}
  missing = [theirs for theirs in _SIZES.values() if theirs not in raw]
  if missing:
    raise ValueError(f"{path} has no {', '.join(missing)}")
  family = re.match("[A-Z][a-z]+[0-9]?", architecture)[0].lower()
  _refuse_unsupported(path, raw, family)
  theta, scaling = _read_rope(path, raw)
  values = {ours: raw[theirs] for ours, theirs in _NAMES.items() if theirs in raw}
  values["num_kv_heads"] = values.get("num_kv_heads", values["num_heads"])
  values["head_dim"] = raw.get("head_dim", quotient(values["embed_dim"], values["num_heads"]))
  values["tie_embeddings"] = values["tie_embeddings"] or architecture == "Qwen3Model"
  values |= {"rope_theta": theta, "rope_scaling": scaling}
  values |= {"qk_norm": family == "qwen3", "qkv_bias": family == "qwen2"}
  return make_config(path, values, _NAMES)


def make_config(
  path: pathlib.Path,
  values: Mapping[str, Any],
  names: Mapping[str, str],
  section: type[T] = LlamaConfig,
) -> T:
  """Checks a file's values and returns them as a config.

  Args:
    names: the file's names of our fields, for its errors.
    section: the class of the config.

  Raises:
    ValueError: a value is not allowed.
  """
  try:
    return parse(section, values)
  except ValueError as error:
    message = re.sub(r"^\w+|\b\w+(?==)", lambda found: names.get(found[0], found[0]), str(error))
    raise ValueError(f"{path} describes no model: {message}") from error


def quotient(width: Any, heads: Any) -> Any:
  """Returns the width of a head; a wrong type or 0 is returned as it is, for `make_config`."""
  if type(width) is not int or type(heads) is not int or heads < 1:
    return heads
  return width // heads


def check_size(path: pathlib.Path, name: str, value: Any) -> int:
  """Returns a value that must be a positive integer, or raises ValueError."""
  if type(value) is not int or value < 1:
    raise ValueError(f"{path} has {name}={value!r}; it must be a positive integer")
  return value


def _refuse_unsupported(path: pathlib.Path, raw: dict[str, Any], family: str) -> None:
  neutral = _NEUTRAL | {"model_type": (family,)}  # transformers chooses its code by it
  for name, allowed in neutral.items():
    if name in raw and raw[name] not in allowed:
      supported = " or ".join(map(repr, allowed[:1])) or "a file without it"
      raise ValueError(f"{path} has {name}={raw[name]!r}; supported is {supported}")
  layer_types = raw.get("layer_types", [])
  if not isinstance(layer_types, list) or (others := {*map(str, layer_types)} - {_FULL}):
    others = sorted(others) if isinstance(layer_types, list) else layer_types
    raise ValueError(f"{path} has layer_types {others}; supported is {_FULL!r}")
  if code := [name for name in raw.get("auto_map") or () if name.startswith("AutoModel")]:
    raise ValueError(
      f"{path} names code of its own for {', '.join(code)} (auto_map), which is never run"
    )
  if "quantization_config" in raw:
    quantization = raw["quantization_config"]
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    raise ValueError(
      f"{path} has quantization_config of quant_method {method!r}; supported are weights in "
      f"float32, bfloat16 and float16"
    )


def _read_rope(path: pathlib.Path, raw: dict[str, Any]) -> tuple[Any, Any]:
  # transformers 5 writes theta and scaling into `rope_parameters`, transformers 4 separate fields.
  rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
  if not isinstance(rope, dict):
    raise ValueError(f"{path} has rope_scaling={rope!r}; it must be an object")
  rope = {name: value for name, value in rope.items() if value is not None}
  rope_type = rope.get("rope_type", rope.get("type", "default"))
  known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
  if rope_type == "llama3":
    known |= set(_ROPE_SCALING.values())
  elif rope_type != "default":
    raise ValueError(f"{path} has rope_type={rope_type!r}; supported are 'default' and 'llama3'")
  if unknown := sorted(rope.keys() - known):
    found = ", ".join(f"{name}={rope[name]!r}" for name in unknown)
    raise ValueError(
      f"{path} has {found} for RoPE of the type {rope_type!r}, which does not use it"
    )
  rotary_factor = rope.get("partial_rotary_factor", 1.0)
  if rotary_factor != 1.0:
    raise ValueError(f"{path} has partial_rotary_factor={rotary_factor!r}; supported is 1.0")
  theta = rope.get("rope_theta", raw["rope_theta"])
  if rope_type == "default":
    return theta, {}
  missing = [theirs for theirs in _ROPE_SCALING.values() if theirs not in rope]
  if missing:
    raise ValueError(f"{path} has rope_type='llama3' without {', '.join(missing)}")
  return theta, {ours: rope[theirs] for ours, theirs in _ROPE_SCALING.items()}


def config_json(c: LlamaConfig, *, dtype: str, max_positions: int) -> dict[str, Any]:
  """Returns the content of config.json, in a form that transformers 4 and 5 read.

  A model with QK-norm becomes a Qwen3, one with biases a Qwen2, any other a Llama.
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
  value["mlp_bias" if kind == "Llama" else "use_sliding_window"] = False
  if c.rope_scaling != RopeScaling():
    scaling = {theirs: getattr(c.rope_scaling, ours) for ours, theirs in _ROPE_SCALING.items()}
    value["rope_scaling"] = {"rope_type": "llama3", **scaling}
  return value
