"""BERT's encoder (Devlin et al. 2018), for sentence embeddings; reads Hugging Face folders.

  config = bert.read_config(folder)
  params = bert.load_params(folder, config)
  hidden_BTD = bert.Bert(config).apply({"params": params}, tokens_BT, is_token_BT)

Axis letters are those of `models.llama`, P positions, U types of segments. Computes in float32.
"""

import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import safetensors
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field

from selfimprove_jax.models import devices
from selfimprove_jax.models.checkpoints import hf, hf_config, hf_names
from selfimprove_jax.models.llama import Size, project
from selfimprove_jax.runtime.config import section

# Our path -> (our axes, Hugging Face's name, its axes), as in `hf_names`.
_EMBEDDINGS = {
  "embedding_VD": ("VD", "embeddings.word_embeddings.weight", ("V", "D")),
  "positions_PD": ("PD", "embeddings.position_embeddings.weight", ("P", "D")),
  "segment_types_UD": ("UD", "embeddings.token_type_embeddings.weight", ("U", "D")),
  "embedding_norm/scale": ("D", "embeddings.LayerNorm.weight", ("D",)),
  "embedding_norm/bias": ("D", "embeddings.LayerNorm.bias", ("D",)),
}
_LAYER = {
  "wq_DNH": ("DNH", "attention.self.query.weight", ("NH", "D")),
  "bq_NH": ("NH", "attention.self.query.bias", ("NH",)),
  "wk_DNH": ("DNH", "attention.self.key.weight", ("NH", "D")),
  "bk_NH": ("NH", "attention.self.key.bias", ("NH",)),
  "wv_DNH": ("DNH", "attention.self.value.weight", ("NH", "D")),
  "bv_NH": ("NH", "attention.self.value.bias", ("NH",)),
  "wo_NHD": ("NHD", "attention.output.dense.weight", ("D", "NH")),
  "bo_D": ("D", "attention.output.dense.bias", ("D",)),
  "attention_norm/scale": ("D", "attention.output.LayerNorm.weight", ("D",)),
  "attention_norm/bias": ("D", "attention.output.LayerNorm.bias", ("D",)),
  "w_up_DF": ("DF", "intermediate.dense.weight", ("F", "D")),
  "b_up_F": ("F", "intermediate.dense.bias", ("F",)),
  "w_down_FD": ("FD", "output.dense.weight", ("D", "F")),
  "b_down_D": ("D", "output.dense.bias", ("D",)),
  "mlp_norm/scale": ("D", "output.LayerNorm.weight", ("D",)),
  "mlp_norm/bias": ("D", "output.LayerNorm.bias", ("D",)),
}
# Our names -> Hugging Face's.
_NAMES = {
  "vocab_size": "vocab_size",
  "num_layers": "num_hidden_layers",
  "embed_dim": "hidden_size",
  "mlp_dim": "intermediate_size",
  "num_heads": "num_attention_heads",
  "max_positions": "max_position_embeddings",
  "num_segment_types": "type_vocab_size",
  "norm_eps": "layer_norm_eps",
}
_ABSENT = {"layer_norm_eps": 1e-12, "type_vocab_size": 2}  # transformers' defaults
# Fields that change what a model computes, with the values that leave it as our model is.
_NEUTRAL = {
  "model_type": ("bert",),
  "hidden_act": ("gelu",),
  "position_embedding_type": ("absolute",),
  "is_decoder": (False,),
  "add_cross_attention": (False,),
}


@section
class BertConfig:
  """The shape of an encoder.

  Attributes:
    num_segment_types: rows of the table of segment types; all tokens are of the first type.
  """

  vocab_size: Size
  num_layers: Size
  embed_dim: Size
  mlp_dim: Size
  num_heads: Size
  max_positions: Size
  num_segment_types: Size = 2
  norm_eps: Annotated[float, Field(ge=0)] = 1e-12

  def __post_init__(self) -> None:
    if self.embed_dim % self.num_heads:
      raise ValueError(
        f"embed_dim={self.embed_dim} must be a multiple of num_heads={self.num_heads}"
      )


class Bert(nn.Module):
  """Encodes tokens; each one attends to all tokens of its row."""

  c: BertConfig

  @nn.compact
  def __call__(
    self, tokens_BT: Int[Array, "B T"], is_token_BT: Bool[Array, "B T"]
  ) -> Float[Array, "B T D"]:
    """Returns the last hidden states.

    Args:
      is_token_BT: False at padding, which no token attends to, and whose states mean nothing.

    Raises:
      ValueError: a row is longer than `max_positions`.
    """
    c = self.c
    T = tokens_BT.shape[1]
    if c.max_positions < T:
      raise ValueError(f"rows have {T} tokens; the model has {c.max_positions} positions")
    embedding_VD = _weight(self, "embedding_VD", (c.vocab_size, c.embed_dim))
    positions_PD = _weight(self, "positions_PD", (c.max_positions, c.embed_dim))
    segment_types_UD = _weight(self, "segment_types_UD", (c.num_segment_types, c.embed_dim))
    x_BTD = embedding_VD[tokens_BT] + positions_PD[None, :T] + segment_types_UD[None, :1]
    x_BTD = _norm(c, "embedding_norm")(x_BTD)
    for index in range(c.num_layers):
      x_BTD = _Layer(c, name=f"layer_{index}")(x_BTD, is_token_BT)
    return x_BTD


class _Layer(nn.Module):
  """Attention, then a feed-forward network; a norm follows each residual sum."""

  c: BertConfig

  @nn.compact
  def __call__(self, x_BTD, is_token_BT) -> Float[Array, "B T D"]:
    c = self.c
    D, F, N = c.embed_dim, c.mlp_dim, c.num_heads
    H = D // N
    q_BTNH, k_BSNH, v_BSNH = (
      project(x_BTD, _weight(self, f"w{x}_DNH", (D, N, H))) + _bias(self, f"b{x}_NH", (N, H))
      for x in "qkv"
    )
    precision = devices.precision(q_BTNH, k_BSNH)
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, precision=precision) * H**-0.5
    lowest = jnp.finfo(scores_BNTS.dtype).min  # not -inf: a row of padding would become NaN
    scores_BNTS = jnp.where(is_token_BT[:, None, None, :], scores_BNTS, lowest)
    weights_BNTS = jax.nn.softmax(scores_BNTS)
    context_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH, precision=precision)
    attended_BTD = project(context_BTNH, _weight(self, "wo_NHD", (N, H, D)))
    attended_BTD += _bias(self, "bo_D", (D,))
    x_BTD = _norm(c, "attention_norm")(x_BTD + attended_BTD)
    up_BTF = project(x_BTD, _weight(self, "w_up_DF", (D, F))) + _bias(self, "b_up_F", (F,))
    down_BTD = project(nn.gelu(up_BTF, approximate=False), _weight(self, "w_down_FD", (F, D)))
    return _norm(c, "mlp_norm")(x_BTD + down_BTD + _bias(self, "b_down_D", (D,)))


def _weight(module: nn.Module, name: str, shape: tuple[int, ...]) -> Array:
  return module.param(name, nn.initializers.normal(0.02), shape, jnp.float32)


def _bias(module: nn.Module, name: str, shape: tuple[int, ...]) -> Array:
  return module.param(name, nn.initializers.zeros, shape, jnp.float32)[None, None]


def _norm(c: BertConfig, name: str) -> nn.LayerNorm:
  # The fast variance, E[x^2] - E[x]^2, would cancel digits.
  return nn.LayerNorm(c.norm_eps, use_fast_variance=False, name=name)


# ---- Hugging Face folders


def read_config(folder: str | os.PathLike) -> BertConfig:
  """Returns the encoder that a Hugging Face folder's config.json describes (`BertModel`).

  Raises:
    ValueError: it describes another model, or has a field that changes what the model computes.
  """
  path = pathlib.Path(folder) / hf_config.CONFIG_FILE
  raw = hf_config.read_json(path)
  if (architectures := raw.get("architectures")) != ["BertModel"]:
    raise ValueError(f"{path} has architectures={architectures!r}; supported is ['BertModel']")
  raw = {**_ABSENT, **{name: value for name, value in raw.items() if value is not None}}
  if missing := [theirs for theirs in _NAMES.values() if theirs not in raw]:
    raise ValueError(f"{path} has no {', '.join(missing)}")
  for name, allowed in _NEUTRAL.items():
    if name in raw and raw[name] not in allowed:
      raise ValueError(f"{path} has {name}={raw[name]!r}; supported is {allowed[0]!r}")
  values = {ours: raw[theirs] for ours, theirs in _NAMES.items()}
  return hf_config.make_config(path, values, _NAMES, BertConfig)


def load_params(folder: str | os.PathLike, config: BertConfig) -> dict[str, Any]:
  """Reads a Hugging Face folder's model.safetensors as parameters of `Bert`.

  Weights in bfloat16 and float16 become float32. The pooler, which `Bert` does not have, is not
  read.

  Raises:
    ValueError: the file is missing or damaged, or its tensors are not those of the config.
  """
  path = pathlib.Path(folder) / hf.WEIGHTS_FILE
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      names = list(itertools.filterfalse(_is_unused, file.keys()))
      if len(names) < config.num_layers:  # before a table of as many layers as a file may claim
        raise ValueError(f"{path} holds tensors of fewer than {config.num_layers} layers")
      tensors = _tensors(config)
      found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
      hf_names.check_shapes(path, found, {tensor.name: tensor.shape for tensor in tensors})
      dtypes = {name: file.get_slice(name).get_dtype() for name in names}
      if wrong := [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in hf.DTYPES]:
        raise ValueError(f"{path} has tensors in an unsupported dtype: {hf_names.some(wrong)}")
      return _read(file, tensors)
  except FileNotFoundError:
    raise ValueError(f"{folder} has no {hf.WEIGHTS_FILE}") from None
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{path} is damaged: {error}") from error


def _is_unused(name: str) -> bool:
  return name.startswith("pooler.") or name.endswith(".position_ids")


def _tensors(c: BertConfig) -> list[hf_names.HfTensor]:
  sizes = dict(V=c.vocab_size, P=c.max_positions, U=c.num_segment_types, D=c.embed_dim)
  sizes |= dict(F=c.mlp_dim, N=c.num_heads, H=c.embed_dim // c.num_heads)

  def make(table: Mapping[str, tuple], ours: tuple[str, ...], theirs: str) -> list:
    return [
      hf_names.HfTensor(theirs + name, (*ours, *path.split("/")), None, letters, axes, sizes)
      for path, (letters, name, axes) in table.items()
    ]

  tensors = make(_EMBEDDINGS, (), "")
  for index in range(c.num_layers):
    tensors += make(_LAYER, (f"layer_{index}",), f"encoder.layer.{index}.")
  return tensors


def _read(file: Any, tensors: Sequence[hf_names.HfTensor]) -> dict[str, Any]:
  params: dict[str, Any] = {}
  for tensor in tensors:
    block = file.get_slice(tensor.name)
    everything = tuple(slice(0, tensor.sizes[letter]) for letter in tensor.ours)
    array = tensor.read_ours(lambda slices, block=block: block[slices], everything)
    *above, last = tensor.path
    inner = params
    for key in above:
      inner = inner.setdefault(key, {})
    inner[last] = jnp.asarray(array, jnp.float32)
  return params
