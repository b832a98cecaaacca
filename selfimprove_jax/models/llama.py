"""One decoder family: our own model (Llama 3 with QK-norm), Llama 3.x, SmolLM2, Qwen2.5 and Qwen3.

Axis letters, for the whole package: B batch, T query position, S key position, D model,
F feed-forward, N query heads, K kv heads, G = N / K, H head width, h = H / 2, V vocabulary,
L layers, J projections joined in one.

Parameters and activations carry logical axis names; `runtime/partitioning.py` maps them to the axes
of a mesh. A weight's name ends in the letters of its axes.
"""

import functools
import math
from typing import Annotated, Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from pydantic import Field

from selfimprove_jax.models import cpu, devices
from selfimprove_jax.models.attention import Implementation, attend
from selfimprove_jax.models.packed_rows import PackedRows
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.runtime.config import section

Size = Annotated[int, Field(ge=1)]
Dtype = Literal["float32", "bfloat16", "float16"]
_POLICIES = jax.checkpoint_policies
REMAT_POLICIES = {
  "none": None,
  "full": _POLICIES.nothing_saveable,
  "dots": _POLICIES.dots_with_no_batch_dims_saveable,
  "qkv_context": _POLICIES.save_only_these_names("qkv", "context"),
}


@section
class RopeScaling:
  """Llama 3.1's stretched rotary frequencies, for contexts longer than the pretraining's.

  Attributes:
    factor: divides the slow frequencies; 1.0 leaves all as they are.
    low_freq_factor: wavelengths above `original_max_positions / low_freq_factor` are slow.
    high_freq_factor: wavelengths below `original_max_positions / high_freq_factor` stay; those
      between the two are interpolated.
    original_max_positions: context length of the pretraining.
  """

  factor: Annotated[float, Field(gt=0)] = 1.0
  low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
  high_freq_factor: float = 4.0
  original_max_positions: Size = 8192

  def __post_init__(self) -> None:
    if self.low_freq_factor >= self.high_freq_factor:
      raise ValueError(
        f"low_freq_factor={self.low_freq_factor} must be below "
        f"high_freq_factor={self.high_freq_factor}"
      )


@section
class LlamaConfig:
  """The shape and numerics of a model.

  Attributes:
    qk_norm: RMSNorm on each head's query and key before RoPE, as in Qwen3.
    qkv_bias: biases on the query, key and value projections, as in Qwen2.
    dropout_rate: on the embeddings and on both residual branches, in training only.
    dtype: dtype of activations.
    param_dtype: dtype of the parameters; float32 to train, bfloat16 is enough to sample.
    remat: what the backward pass recomputes; "none" keeps every activation.
    attention: see `attention.attend`. "cpu" also arranges the projections and norms for CPUs.
    scan_unroll: layers in one step of the scan; more is faster on CPU and slower to compile.
  """

  vocab_size: Size
  num_layers: Size
  embed_dim: Size
  mlp_dim: Size
  num_heads: Size
  num_kv_heads: Size
  head_dim: Size
  qk_norm: bool = True
  qkv_bias: bool = False
  tie_embeddings: bool = True
  rope_theta: Annotated[float, Field(ge=1, le=1e30)] = 500_000.0
  rope_scaling: RopeScaling = RopeScaling()
  norm_eps: Annotated[float, Field(ge=0)] = 1e-6
  dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
  dtype: Dtype = "bfloat16"
  param_dtype: Dtype = "float32"
  remat: Literal["none", "full", "dots", "qkv_context"] = "none"
  attention: Implementation = "auto"
  scan_unroll: Size = 1

  def __post_init__(self) -> None:
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")

  @property
  def num_parameters(self) -> int:
    attention = self.embed_dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
    if self.qkv_bias:
      attention += self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
    norms = 2 * self.embed_dim + (2 * self.head_dim if self.qk_norm else 0)
    layer = attention + 3 * self.embed_dim * self.mlp_dim + norms
    embeddings = self.vocab_size * self.embed_dim * (1 if self.tie_embeddings else 2)
    return self.num_layers * layer + embeddings + self.embed_dim

  def forward_flops_per_token(self, seq_len: int) -> int:
    """Counts a multiply-add as 2, causal attention half, and the embedding lookup as free."""
    lookup = 0 if self.tie_embeddings else self.vocab_size * self.embed_dim
    attention = 2 * self.num_layers * self.num_heads * self.head_dim * seq_len
    return 2 * (self.num_parameters - lookup) + attention

  def train_flops_per_token(self, seq_len: int) -> int:
    """Counts three forward passes; what remat recomputes does not count."""
    return 3 * self.forward_flops_per_token(seq_len)


# ---- Weights and projections


def make_weight(module: nn.Module, c: LlamaConfig, name: str, shape, fan_in=None) -> Array:
  """Creates a weight whose logical axes are the letters of its name; returns it in `c.dtype`."""
  init = nn.initializers.normal((fan_in or shape[0]) ** -0.5)
  return _make_param(module, c, name, shape, init).astype(c.dtype)


def make_bias(module: nn.Module, c: LlamaConfig, name: str, shape) -> Array:
  """Creates a bias of zeros with two leading axes to broadcast over B and T."""
  return _make_param(module, c, name, shape, nn.initializers.zeros).astype(c.dtype)[None, None]


def _make_param(module: nn.Module, c: LlamaConfig, name: str, shape, init) -> Array:
  axes = {"D": "embed", "N": "heads", "K": "kv_heads", "F": "mlp", "V": "vocab"}
  logical = tuple(axes.get(letter) for letter in name.rsplit("_", 1)[1])
  init = nn.with_logical_partitioning(init, logical)
  return module.param(name, init, shape, jnp.dtype(c.param_dtype))


def project(x: Float[Array, "B T ..."], weight: Array, dtype: Any = None) -> Array:
  """Multiplies `x_BTi..` by `weight_i..o..`: the weight's leading axes are those of x after T.

  One matmul of two matrices: with B and T apart, XLA's CPU backend takes twice as long over the
  weight's gradient.
  """
  B, T, *contracted = x.shape
  out = weight.shape[len(contracted) :]
  i = math.prod(contracted)
  y = jnp.dot(
    x.reshape(B * T, i),
    weight.reshape(i, -1),
    precision=devices.precision(x, weight),
    preferred_element_type=dtype,
  )
  return y.reshape(B, T, *out)


# ---- Rotary position embedding (Su et al. 2021)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> Float[np.ndarray, " h"]:
  """Returns the radians per position of each pair of a head's coordinates."""
  frequencies_h = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
  if scaling.factor == 1.0:  # the formula below would round
    return frequencies_h.astype(np.float32)
  s = scaling
  turns_h = s.original_max_positions * frequencies_h / (2 * np.pi)  # within the old context
  keep_h = (turns_h - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
  keep_h = np.clip(keep_h, 0.0, 1.0)
  scaled_h = (1 - keep_h) * frequencies_h / s.factor + keep_h * frequencies_h
  return scaled_h.astype(np.float32)


def rope(
  x_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], c: LlamaConfig
) -> Float[Array, "B T N H"]:
  """Rotates each head in float32; pairs coordinate i with i + H / 2, as Hugging Face does."""
  frequencies_h = jnp.asarray(rope_frequencies(x_BTNH.shape[-1], c.rope_theta, c.rope_scaling))
  angles_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_h[None, None, None]
  sin, cos = jnp.sin(angles_BT1h), jnp.cos(angles_BT1h)
  x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x_BTNH.dtype)


# ---- The cache of keys and values


@flax.struct.dataclass
class LayerCache:
  """One layer's keys and values at their positions; heads come before positions (see `attend`)."""

  k_BKSH: Float[Array, "B K S H"]
  v_BKSH: Float[Array, "B K S H"]

  def write(
    self, k_BKTH: Array, v_BKTH: Array, positions_BT: Array
  ) -> tuple["LayerCache", Int[Array, "B S"]]:
    """Returns the cache with new keys and values, and the position of each of its keys.

    A cache no longer than the new keys is replaced by them; they must then begin at position 0.
    """
    B, K, S, _ = self.k_BKSH.shape
    if positions_BT.shape[1] >= S:
      return LayerCache(k_BKTH, v_BKTH), positions_BT
    # Heads are indexed too: with a slice over heads, XLA for TPUs would keep the cache in another
    # layout inside the loop of decode steps, which is a second copy of it.
    at = (jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None], positions_BT[:, None])
    cache = LayerCache(self.k_BKSH.at[at].set(k_BKTH), self.v_BKSH.at[at].set(v_BKTH))
    return cache, jnp.broadcast_to(jnp.arange(S)[None], (B, S))


Cache = tuple[LayerCache, ...]


def init_cache(c: LlamaConfig, batch: int, length: int) -> Cache:
  """Returns an empty cache, an argument and a result of `decode_layout.DecodeLlama`."""
  shape = (batch, c.num_kv_heads, length, c.head_dim)
  return tuple(
    LayerCache(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype)) for _ in range(c.num_layers)
  )


# ---- The model


class RMSNorm(nn.Module):
  """RMSNorm in float32; the weight multiplies after the cast back, as in Hugging Face's Llama."""

  c: LlamaConfig

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    c = self.c
    init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
    scale_D = self.param("scale", init, (x.shape[-1],), jnp.dtype(c.param_dtype))

    # Its own function, so that `cpu.recompute` can drop the float32 copies that it makes.
    def normalize(x: Array, scale_D: Array) -> Array:
      x32 = x.astype(jnp.float32)
      x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + c.norm_eps)
      scale_D = scale_D.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
      return x32.astype(x.dtype) * scale_D

    return cpu.recompute(normalize, c)(x, scale_D)


class Attention(nn.Module):
  """Grouped-query attention (Ainslie et al. 2023) with QK-norm and RoPE."""

  c: LlamaConfig

  @nn.compact
  def __call__(
    self, x_BTD, positions_BT, segments_BT, cache, rows=None
  ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
    c = self.c
    N, H = c.num_heads, c.head_dim
    q_BTNH, k_BTKH, v_BTKH = self.project_qkv(x_BTD)
    if c.qk_norm:
      q_BTNH = RMSNorm(c, name="q_norm")(q_BTNH)
      k_BTKH = RMSNorm(c, name="k_norm")(k_BTKH)
    # The names are what the remat policy `qkv_context` saves.
    q_BTNH = checkpoint_name(rope(q_BTNH, positions_BT, c), "qkv")
    k_BTKH = checkpoint_name(rope(k_BTKH, positions_BT, c), "qkv")
    v_BTKH = checkpoint_name(v_BTKH, "qkv")
    if rows is not None:
      q_BTNH, k_BTKH, v_BTKH = map(rows.lay_out, (q_BTNH, k_BTKH, v_BTKH))
      positions_BT = rows.positions_RC
    k_BKSH, v_BKSH, key_positions_BS = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), positions_BT
    if cache is not None:
      cache, key_positions_BS = cache.write(k_BKSH, v_BKSH, positions_BT)
      k_BKSH, v_BKSH = cache.k_BKSH, cache.v_BKSH
    context_BTNH = attend(
      q_BTNH,
      k_BKSH,
      v_BKSH,
      query_positions_BT=positions_BT,
      key_positions_BS=key_positions_BS,
      query_segments_BT=segments_BT,
      key_segments_BS=segments_BT,
      implementation=c.attention,
    )
    if rows is not None:
      context_BTNH = rows.pack(context_BTNH)
    context_BTNH = checkpoint_name(context_BTNH, "context")
    # Weights that write to the residual stream start smaller, by the number of such writes (GPT-2).
    wo_NHD = make_weight(self, c, "wo_NHD", (N, H, c.embed_dim), 2 * c.num_layers * N * H)
    return project(context_BTNH, wo_NHD), cache

  def project_qkv(self, x_BTD) -> tuple[Array, Array, Array]:
    c = self.c
    D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
    wq_DNH = make_weight(self, c, "wq_DNH", (D, N, H))
    wk_DKH = make_weight(self, c, "wk_DKH", (D, K, H))
    wv_DKH = make_weight(self, c, "wv_DKH", (D, K, H))
    if cpu.is_chosen(c.attention):
      q_BTNH, k_BTKH, v_BTKH = cpu.project_each(x_BTD, wq_DNH, wk_DKH, wv_DKH)
    else:
      q_BTNH, k_BTKH, v_BTKH = (project(x_BTD, w) for w in (wq_DNH, wk_DKH, wv_DKH))
    if c.qkv_bias:
      q_BTNH += make_bias(self, c, "bq_NH", (N, H))
      k_BTKH += make_bias(self, c, "bk_KH", (K, H))
      v_BTKH += make_bias(self, c, "bv_KH", (K, H))
    return q_BTNH, k_BTKH, v_BTKH


class SwiGLU(nn.Module):
  """The feed-forward network `down(silu(gate(x)) * up(x))` (Shazeer 2020)."""

  c: LlamaConfig

  @nn.compact
  def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    c = self.c
    gate_BTF, up_BTF = self.project_gate_up(x_BTD)
    fan_in = 2 * c.num_layers * c.mlp_dim
    w_down_FD = make_weight(self, c, "w_down_FD", (c.mlp_dim, c.embed_dim), fan_in)

    def down(gate_BTF: Array, up_BTF: Array, w_down_FD: Array) -> Array:
      return project(jax.nn.silu(gate_BTF) * up_BTF, w_down_FD)

    return cpu.recompute(down, c)(gate_BTF, up_BTF, w_down_FD)

  def project_gate_up(self, x_BTD) -> tuple[Array, Array]:
    c = self.c
    gate_BTF = project(x_BTD, make_weight(self, c, "w_gate_DF", (c.embed_dim, c.mlp_dim)))
    up_BTF = project(x_BTD, make_weight(self, c, "w_up_DF", (c.embed_dim, c.mlp_dim)))
    return gate_BTF, up_BTF


class Layer(nn.Module):
  """A decoder layer: pre-norm attention and feed-forward, each on a residual branch."""

  c: LlamaConfig
  deterministic: bool

  # `decode_layout.DecodeLayer` puts in modules that join projections.
  attention_class = Attention
  mlp_class = SwiGLU

  @nn.compact
  def __call__(
    self, x_BTD, positions_BT, segments_BT, cache=None, rows=None
  ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
    c = self.c
    dropout = functools.partial(nn.Dropout, c.dropout_rate, deterministic=self.deterministic)
    h_BTD = RMSNorm(c, name="attention_norm")(x_BTD)
    attention = self.attention_class(c, name="attention")
    h_BTD, cache = attention(h_BTD, positions_BT, segments_BT, cache, rows)
    x_BTD += dropout(name="attention_dropout")(h_BTD)
    h_BTD = RMSNorm(c, name="mlp_norm")(x_BTD)
    x_BTD += dropout(name="mlp_dropout")(self.mlp_class(c, name="mlp")(h_BTD))
    x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "act_embed"))
    return x_BTD, cache


class Llama(nn.Module):
  """Maps tokens to logits or hidden states; the layers are scanned, their weights stacked on L."""

  c: LlamaConfig

  @nn.compact
  def __call__(
    self,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    *,
    rows: PackedRows | None = None,
    deterministic: bool = True,
    logits: bool = True,
  ) -> tuple[Float[Array, "B T V"] | Float[Array, "B T D"], Cache | None]:
    """Runs the decoder.

    Args:
      positions_BT: counted from the start of each document.
      segments_BT: document of each token, 0 for padding; None if a row is one document.
      cache: keys and values are written to it at `positions_BT`, and attention reads all of it;
        only `decode_layout.DecodeLlama` takes one.
      rows: the rows that `tokens_BT` packs, one document each; the cache, if any, is of these rows.
        Only `decode_layout.DecodeLlama` takes them.
      deterministic: False turns dropout on, with the rng named "dropout".
      logits: False returns the final hidden states (after the last norm) instead.

    Returns:
      float32 logits (or hidden states in `c.dtype`), and the new cache (None without one).
    """
    c = self.c
    if cache is not None and segments_BT is not None:
      raise ValueError("a cache holds one document per row: pass segments or a cache, not both")
    if rows is not None and segments_BT is not None:
      raise ValueError("packed rows are one document each: pass segments or rows, not both")
    embedding_VD = _make_param(
      self, c, "embedding_VD", (c.vocab_size, c.embed_dim), nn.initializers.normal(0.02)
    )
    # Every device looks up whole rows of the table. If D were sharded, the result would have the
    # table's layout, which XLA can turn into the batch's only by an all-gather of all of it.
    table_VD = nn.with_logical_constraint(embedding_VD.astype(c.dtype), ("vocab", "act_embed"))
    x_BTD = jnp.take(table_VD, tokens_BT, axis=0)
    x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "act_embed"))
    x_BTD = nn.Dropout(c.dropout_rate, deterministic=deterministic)(x_BTD)
    x_BTD, cache = self.run_layers(x_BTD, positions_BT, segments_BT, cache, rows, deterministic)
    x_BTD = RMSNorm(c, name="final_norm")(x_BTD)
    if c.tie_embeddings:
      head_DV = embedding_VD.T
    else:
      head_DV = make_weight(self, c, "head_DV", (c.embed_dim, c.vocab_size))
    if not logits:
      return x_BTD, cache
    return project(x_BTD, head_DV.astype(c.dtype), jnp.float32), cache

  def run_layers(
    self, x_BTD, positions_BT, segments_BT, cache, rows, deterministic: bool
  ) -> tuple[Float[Array, "B T D"], Cache | None]:
    c = self.c
    if cache is not None or rows is not None:
      raise ValueError(
        "Llama takes no cache and no packed rows; decode_layout.DecodeLlama is the form to sample "
        "with"
      )
    layer = Layer
    if c.remat != "none":
      # The scan already keeps XLA from merging the recomputation with the forward pass.
      layer = nn.remat(Layer, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
    layers = nn.scan(
      layer,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(nn.broadcast, nn.broadcast),
      length=c.num_layers,
      unroll=c.scan_unroll,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(c, deterministic, name="layers")
    return layers(x_BTD, positions_BT, segments_BT)


# ---- Parameters


def output_head(params: Any) -> Float[Array, "V D"]:
  """Returns the matrix that turns hidden states into logits: the embedding, if tied."""
  return params["head_DV"].T if "head_DV" in params else params["embedding_VD"]


def init_params(model: Llama, key: jax.Array) -> Any:
  """Makes random parameters in Flax boxes that carry their logical axis names."""
  tokens_BT = jnp.zeros((1, 2), jnp.int32)
  return model.init(key, tokens_BT, tokens_BT)["params"]


def abstract_params(model: Llama, mesh: Mesh) -> Any:
  """Returns shapes, dtypes and shardings of the parameters; allocates nothing."""
  boxed = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    nn.unbox(boxed),
    partitioning.param_shardings(boxed, mesh),
  )
