"""The model in the form to sample with: layers unrolled, projections with the same input joined.

A scan copies each layer's weights out of the stack before it uses them, which is most of the work
of a decode step; and few large products read weights from memory faster than many small ones.
Axis letters are those of `llama.py`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from selfimprove_jax.models import llama
from selfimprove_jax.models.llama import (
  LlamaConfig,
  abstract_params,
  make_bias,
  make_weight,
  project,
)


class JoinedAttention(llama.Attention):
  """Attention with one weight for queries, keys and values."""

  def project_qkv(self, x_BTD) -> tuple[Array, Array, Array]:
    c = self.c
    # Grouped by kv head, so that a `tensor` axis over K leaves whole groups on a device. On J are
    # the group's queries, then its key and its value.
    K, H, J = c.num_kv_heads, c.head_dim, c.num_heads // c.num_kv_heads + 2
    qkv_BTKJH = project(x_BTD, make_weight(self, c, "wqkv_DKJH", (c.embed_dim, K, J, H)))
    if c.qkv_bias:
      qkv_BTKJH += make_bias(self, c, "bqkv_KJH", (K, J, H))
    q_BTNH = qkv_BTKJH[:, :, :, :-2].reshape(*x_BTD.shape[:2], c.num_heads, H)
    return q_BTNH, qkv_BTKJH[:, :, :, -2], qkv_BTKJH[:, :, :, -1]


class JoinedSwiGLU(llama.SwiGLU):
  """SwiGLU with one weight for gate and up."""

  def project_gate_up(self, x_BTD) -> tuple[Array, Array]:
    c = self.c
    # J is next to D, so that a `tensor` axis over F leaves both halves of a neuron on one device.
    w_gate_up_DJF = make_weight(self, c, "w_gate_up_DJF", (c.embed_dim, 2, c.mlp_dim))
    both_BTJF = project(x_BTD, w_gate_up_DJF)
    return both_BTJF[:, :, 0], both_BTJF[:, :, 1]


class DecodeLayer(llama.Layer):
  """A decoder layer with joined projections."""

  attention_class = JoinedAttention
  mlp_class = JoinedSwiGLU


class DecodeLlama(llama.Llama):
  """`Llama` on the parameters of `decode_params`; computes the same and takes a cache."""

  def run_layers(
    self, x_BTD, positions_BT, segments_BT, cache, rows, deterministic: bool
  ) -> tuple[Float[Array, "B T D"], llama.Cache | None]:
    caches = [None] * self.c.num_layers if cache is None else list(cache)
    for i in range(self.c.num_layers):
      layer = DecodeLayer(self.c, deterministic, name=f"layers_{i}")
      x_BTD, caches[i] = layer(x_BTD, positions_BT, segments_BT, caches[i], rows)
    return x_BTD, None if cache is None else tuple(caches)


def decode_config(c: LlamaConfig) -> LlamaConfig:
  """Returns the config of a model's `DecodeLlama`, without what is for training only."""
  return dataclasses.replace(c, param_dtype=c.dtype, dropout_rate=0.0, remat="none")


def decode_params(params: Any, c: LlamaConfig, mesh: Mesh) -> Any:
  """Copies parameters into the form of `DecodeLlama(decode_config(c))`, sharded on the mesh.

  Args:
    params: parameters of `Llama(c)`, boxed or not.
  """
  abstract = abstract_params(DecodeLlama(decode_config(c)), mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  with jax.set_mesh(mesh):
    return jax.jit(lambda p: _unroll(p, c), out_shardings=shardings)(nn.unbox(params))


def _unroll(params: Any, c: LlamaConfig) -> Any:
  """Splits the stacked layers and joins each one's projections."""
  # The cast comes first, so that slices and joins of bfloat16 copy half the bytes.
  params = jax.tree.map(lambda x: x.astype(c.dtype), params)
  layers = params["layers"]
  unrolled = {name: value for name, value in params.items() if name != "layers"}
  for i in range(c.num_layers):
    unrolled[f"layers_{i}"] = _join(jax.tree.map(lambda x, i=i: x[i], layers), c)
  return unrolled


def _join(layer: dict[str, Any], c: LlamaConfig) -> dict[str, Any]:
  K, H = c.num_kv_heads, c.head_dim
  attention, mlp = dict(layer["attention"]), dict(layer["mlp"])
  # Query head n belongs to kv head n // G: [N, H] is [K, G, H].
  qkv = [attention.pop(name) for name in ("wq_DNH", "wk_DKH", "wv_DKH")]
  attention["wqkv_DKJH"] = jnp.concatenate([w.reshape(c.embed_dim, K, -1, H) for w in qkv], axis=2)
  if c.qkv_bias:
    qkv = [attention.pop(name) for name in ("bq_NH", "bk_KH", "bv_KH")]
    attention["bqkv_KJH"] = jnp.concatenate([b.reshape(K, -1, H) for b in qkv], axis=1)
  mlp["w_gate_up_DJF"] = jnp.stack([mlp.pop("w_gate_DF"), mlp.pop("w_up_DF")], axis=1)
  return {**layer, "attention": attention, "mlp": mlp}
