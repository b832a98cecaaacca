"""The parameters' form to sample with: a tree for each layer, projections of one input joined.

A scan copies each layer's weights out of the stack before it uses them, which at a token a step is
most of the work; and a few large products read memory faster than many small ones.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from selfimprove_jax.models.llama import Llama, LlamaConfig
from selfimprove_jax.models.params import abstract_params


def unroll_config(c: LlamaConfig) -> LlamaConfig:
  """The model that reads `unroll_params`' form: it computes the same, in `c.dtype` throughout."""
  return dataclasses.replace(c, unrolled=True, param_dtype=c.dtype, dropout_rate=0.0, remat="none")


def unroll_params(params: Any, c: LlamaConfig, mesh: Mesh) -> Any:
  """A copy of a model's parameters, for `Llama(unroll_config(c))`, sharded on the mesh.

  Args:
    params: of `Llama(c)`, without their boxes.
    c: the model they are of, not unrolled.
  """
  shardings = jax.tree.map(
    lambda leaf: leaf.sharding, abstract_params(Llama(unroll_config(c)), mesh)
  )
  with jax.set_mesh(mesh):
    return jax.jit(lambda p: _unroll(p, c), out_shardings=shardings)(nn.unbox(params))


def _unroll(params, c):
  params = jax.tree.map(lambda x: x.astype(c.dtype), params)
  layers = params["layers"]
  unrolled = {name: value for name, value in params.items() if name != "layers"}
  for i in range(c.num_layers):
    unrolled[f"layers_{i}"] = _join(jax.tree.map(lambda x, i=i: x[i], layers), c)
  return unrolled


def _join(layer, c):
  K, H = c.num_kv_heads, c.head_dim
  attention, mlp = dict(layer["attention"]), dict(layer["mlp"])
  qkv = [attention.pop(name) for name in ("wq_DNH", "wk_DKH", "wv_DKH")]
  attention["wqkv_DKJH"] = jnp.concatenate([w.reshape(c.embed_dim, K, -1, H) for w in qkv], axis=2)
  if c.qkv_bias:
    qkv = [attention.pop(name) for name in ("bq_NH", "bk_KH", "bv_KH")]
    attention["bqkv_KJH"] = jnp.concatenate([b.reshape(K, -1, H) for b in qkv], axis=1)
  mlp["w_gate_up_DJF"] = jnp.stack([mlp.pop("w_gate_DF"), mlp.pop("w_up_DF")], axis=1)
  return {**layer, "attention": attention, "mlp": mlp}
