"""One decoder family, as a pure `init` and `apply`.

`LlamaConfig` tells its members apart: ours (Llama 3 with per-head QK-norm), Llama 3.x, SmolLM2,
Qwen2.5 and Qwen3.

Axis letters, for the whole package: B batch, T query position, S key position, D model,
F feed-forward, N query heads, K kv heads, G = N / K, H head width, V vocabulary, L layers,
J projections joined in one.

The model knows nothing of training, meshes or files. Parameters and activations carry logical axis
names; `partitioning.py` says what they mean on a mesh.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from selfimprove_jax.models.attention import IMPLEMENTATIONS, attend
from selfimprove_jax.models.projections import make_bias, make_weight, project, project_each
from selfimprove_jax.models.rope import RopeScaling, rope

_POLICIES = jax.checkpoint_policies
REMAT_POLICIES = {
  "none": None,
  "full": _POLICIES.nothing_saveable,
  "dots": _POLICIES.dots_with_no_batch_dims_saveable,
  "qkv_context": _POLICIES.save_only_these_names("qkv", "context"),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """The shape and numerics of a model.

  Attributes:
    qk_norm: RMSNorm on each head's query and key before RoPE (Qwen3's form).
    qkv_bias: biases on the query, key and value projections (Qwen2's form).
    rope_scaling: Llama 3.1's; a dict of its fields will do.
    dropout_rate: on the embeddings and on both residual branches, in training only.
    dtype: of activations.
    param_dtype: of the parameters: float32 to train, bfloat16 will do to sample.
    remat: a name in `REMAT_POLICIES`: what the backward pass recomputes.
    attention: a name in `attention.IMPLEMENTATIONS`.
    scan_unroll: layers a step of the scan; more is a little faster on CPU and slower to compile.
    unrolled: the parameters' form to sample with (`models/unrolled.py` makes it): each layer's by
      themselves, with query, key and value joined, and gate and up. A cache needs it.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  mlp_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  qk_norm: bool = True
  qkv_bias: bool = False
  tie_embeddings: bool = True
  rope_theta: float = 500_000.0
  rope_scaling: RopeScaling | dict | None = None
  norm_eps: float = 1e-6
  dropout_rate: float = 0.0
  dtype: str = "bfloat16"
  param_dtype: str = "float32"
  remat: str = "none"
  attention: str = "xla"
  scan_unroll: int = 1
  unrolled: bool = False

  def __post_init__(self):
    if isinstance(self.rope_scaling, dict):  # as JSON and configs hold it
      object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} must be even: RoPE turns pairs")
    if self.remat not in REMAT_POLICIES:
      raise ValueError(f"remat={self.remat!r} is unknown; choose one of {list(REMAT_POLICIES)}")
    if self.attention not in IMPLEMENTATIONS:
      raise ValueError(f"attention={self.attention!r} is unknown; choose one of {IMPLEMENTATIONS}")

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
    """Multiply-adds counted twice; causal attention counted half; the embedding lookup is free."""
    lookup = 0 if self.tie_embeddings else self.vocab_size * self.embed_dim
    attention = 2 * self.num_layers * self.num_heads * self.head_dim * seq_len
    return 2 * (self.num_parameters - lookup) + attention

  def train_flops_per_token(self, seq_len: int) -> int:
    """Three forward passes; what remat computes again is not counted."""
    return 3 * self.forward_flops_per_token(seq_len)


@flax.struct.dataclass
class LayerCache:
  """Keys and values that a layer has seen, at their positions."""

  k_BKSH: Float[Array, "B K S H"]
  v_BKSH: Float[Array, "B K S H"]


Cache = tuple[LayerCache, ...]


def init_cache(c: LlamaConfig, batch: int, length: int) -> Cache:
  """An empty cache; an argument and a result of the unrolled model."""
  shape = (batch, c.num_kv_heads, length, c.head_dim)
  return tuple(
    LayerCache(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype)) for _ in range(c.num_layers)
  )


class RMSNorm(nn.Module):
  """In float32; the weight multiplies after the cast back, as in Hugging Face's Llama."""

  c: LlamaConfig

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    c = self.c
    init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
    scale_D = self.param("scale", init, (x.shape[-1],), jnp.dtype(c.param_dtype))

    def normalize(x, scale_D):
      x32 = x.astype(jnp.float32)
      x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + c.norm_eps)
      scale_D = scale_D.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
      return x32.astype(x.dtype) * scale_D

    return _cheap_to_repeat(normalize, c)(x, scale_D)


class Attention(nn.Module):
  """Grouped-query attention with QK-norm and RoPE; reads the cache with what it adds to it."""

  c: LlamaConfig

  @nn.compact
  def __call__(self, x_BTD, positions_BT, segments_BT, cache):
    c = self.c
    N, H = c.num_heads, c.head_dim
    q_BTNH, k_BTKH, v_BTKH = self._joined(x_BTD) if c.unrolled else self._apart(x_BTD)
    if c.qk_norm:
      q_BTNH = RMSNorm(c, name="q_norm")(q_BTNH)
      k_BTKH = RMSNorm(c, name="k_norm")(k_BTKH)
    q_BTNH = checkpoint_name(rope(q_BTNH, positions_BT, c.rope_theta, c.rope_scaling), "qkv")
    k_BTKH = checkpoint_name(rope(k_BTKH, positions_BT, c.rope_theta, c.rope_scaling), "qkv")
    v_BTKH = checkpoint_name(v_BTKH, "qkv")
    k_BKSH, v_BKSH, key_positions_BS = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), positions_BT
    if cache is not None and cache.k_BKSH.shape[2] > x_BTD.shape[1]:
      # By index of the head too: a slice of heads would have TPUs keep the cache in another layout
      # within the loop of decode steps, a second copy of it.
      rows_B11 = jnp.arange(x_BTD.shape[0])[:, None, None]
      heads_1K1 = jnp.arange(c.num_kv_heads)[None, :, None]
      at = (rows_B11, heads_1K1, positions_BT[:, None])
      k_BKSH = cache.k_BKSH.at[at].set(k_BKSH)
      v_BKSH = cache.v_BKSH.at[at].set(v_BKSH)
      B, _, S, _ = k_BKSH.shape
      key_positions_BS = jnp.broadcast_to(jnp.arange(S)[None], (B, S))
    if cache is not None:
      cache = LayerCache(k_BKSH, v_BKSH)
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
    context_BTNH = checkpoint_name(context_BTNH, "context")
    wo_NHD = make_weight(self, c, "wo_NHD", (N, H, c.embed_dim), 2 * c.num_layers * N * H)
    return project(context_BTNH, wo_NHD), cache

  def _apart(self, x_BTD):
    c = self.c
    D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
    weight = functools.partial(make_weight, self, c, fan_in=D)
    weights = weight("wq_DNH", (D, N, H)), weight("wk_DKH", (D, K, H)), weight("wv_DKH", (D, K, H))
    q_BTNH, k_BTKH, v_BTKH = project_each(x_BTD, *weights)
    if c.qkv_bias:
      q_BTNH += make_bias(self, c, "bq_NH", (N, H))[None, None]
      k_BTKH += make_bias(self, c, "bk_KH", (K, H))[None, None]
      v_BTKH += make_bias(self, c, "bv_KH", (K, H))[None, None]
    return q_BTNH, k_BTKH, v_BTKH

  def _joined(self, x_BTD):
    """By one product: a decode step is as fast as its weights are read."""
    c = self.c
    K, H, J = c.num_kv_heads, c.head_dim, c.num_heads // c.num_kv_heads + 2
    qkv_BTKJH = project(x_BTD, make_weight(self, c, "wqkv_DKJH", (c.embed_dim, K, J, H)))
    if c.qkv_bias:
      qkv_BTKJH += make_bias(self, c, "bqkv_KJH", (K, J, H))[None, None]
    q_BTNH = qkv_BTKJH[:, :, :, :-2].reshape(*x_BTD.shape[:2], c.num_heads, H)
    return q_BTNH, qkv_BTKJH[:, :, :, -2], qkv_BTKJH[:, :, :, -1]


class SwiGLU(nn.Module):
  c: LlamaConfig

  @nn.compact
  def __call__(self, x_BTD):
    c = self.c
    weight = functools.partial(make_weight, self, c)
    if c.unrolled:
      both_BTJF = project(x_BTD, weight("w_gate_up_DJF", (c.embed_dim, 2, c.mlp_dim)))
      gate_BTF, up_BTF = both_BTJF[:, :, 0], both_BTJF[:, :, 1]
    else:
      gate_BTF = project(x_BTD, weight("w_gate_DF", (c.embed_dim, c.mlp_dim)))
      up_BTF = project(x_BTD, weight("w_up_DF", (c.embed_dim, c.mlp_dim)))
    w_down_FD = weight("w_down_FD", (c.mlp_dim, c.embed_dim), 2 * c.num_layers * c.mlp_dim)

    def down(gate_BTF, up_BTF, w_down_FD):
      return project(jax.nn.silu(gate_BTF) * up_BTF, w_down_FD)

    return _cheap_to_repeat(down, c)(gate_BTF, up_BTF, w_down_FD)


class Layer(nn.Module):
  """Pre-norm attention and feed-forward, each on a residual branch."""

  c: LlamaConfig
  deterministic: bool

  @nn.compact
  def __call__(self, x_BTD, positions_BT, segments_BT, cache=None):
    c = self.c
    dropout = functools.partial(nn.Dropout, c.dropout_rate, deterministic=self.deterministic)
    h_BTD = RMSNorm(c, name="attention_norm")(x_BTD)
    h_BTD, cache = Attention(c, name="attention")(h_BTD, positions_BT, segments_BT, cache)
    x_BTD += dropout(name="attention_dropout")(h_BTD)
    h_BTD = RMSNorm(c, name="mlp_norm")(x_BTD)
    x_BTD += dropout(name="mlp_dropout")(SwiGLU(c, name="mlp")(h_BTD))
    x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "act_embed"))
    return x_BTD, cache


class Llama(nn.Module):
  """Tokens in, hidden states or logits out.

  The layers are scanned, their weights stacked on L; unrolled, each has its own.
  """

  c: LlamaConfig

  @nn.compact
  def __call__(
    self,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    *,
    deterministic: bool = True,
    logits: bool = True,
  ) -> tuple[Float[Array, "B T V"] | Float[Array, "B T D"], Cache | None]:
    """Runs the decoder.

    Args:
      positions_BT: counted from the start of each document.
      segments_BT: document of each token, 0 for padding; None if a row is one document.
      cache: if given, keys and values are written at `positions_BT` and read from the cache; one no
        longer than the tokens is filled with theirs, which must begin at position 0.
      deterministic: False turns dropout on, with the rng named "dropout".
      logits: False gives the final hidden states (after the last norm) instead.

    Returns:
      float32 logits (or hidden states in `c.dtype`), and the new cache (None without one).
    """
    c = self.c
    if cache is not None and not c.unrolled:
      raise ValueError("a cache needs an unrolled model: see models/unrolled.py")
    if cache is not None and segments_BT is not None:
      raise ValueError("a cache holds one document a row: pass segments or a cache, not both")
    embedding_VD = self.param(
      "embedding_VD",
      nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed")),
      (c.vocab_size, c.embed_dim),
      jnp.dtype(c.param_dtype),
    )
    # Its width whole on every device, or the lookup gives rows in the table's layout, which XLA can
    # only turn into the batch's by copying all of them to all devices.
    table_VD = nn.with_logical_constraint(embedding_VD.astype(c.dtype), ("vocab", "act_embed"))
    x_BTD = jnp.take(table_VD, tokens_BT, axis=0)
    x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "act_embed"))
    x_BTD = nn.Dropout(c.dropout_rate, deterministic=deterministic)(x_BTD)
    if c.unrolled:
      caches = [None] * c.num_layers if cache is None else list(cache)
      for i in range(c.num_layers):
        layer = Layer(c, deterministic, name=f"layers_{i}")
        x_BTD, caches[i] = layer(x_BTD, positions_BT, segments_BT, caches[i])
      cache = None if cache is None else tuple(caches)
    else:
      x_BTD = self._scanned_layers(x_BTD, positions_BT, segments_BT, deterministic)
    x_BTD = RMSNorm(c, name="final_norm")(x_BTD)
    if c.tie_embeddings:
      head_DV = embedding_VD.T
    else:
      head_DV = make_weight(self, c, "head_DV", (c.embed_dim, c.vocab_size))
    if not logits:
      return x_BTD, cache
    logits_BTV = project(x_BTD, head_DV.astype(c.dtype), jnp.float32)
    return logits_BTV, cache

  def _scanned_layers(self, x_BTD, positions_BT, segments_BT, deterministic):
    c = self.c
    layer = Layer
    if c.remat != "none":
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
    x_BTD, _ = layers(x_BTD, positions_BT, segments_BT)
    return x_BTD


def output_head(params: Any) -> Float[Array, "V D"]:
  """The matrix that turns hidden states into logits: the embedding, if tied."""
  return params["head_DV"].T if "head_DV" in params else params["embedding_VD"]


def _cheap_to_repeat(function, c):
  """The function, of whose inner values the backward pass keeps none where a layer keeps all.

  They are quicker made again from the arguments than written and read: products are not repeated.
  """
  return jax.checkpoint(function) if c.remat == "none" else function
